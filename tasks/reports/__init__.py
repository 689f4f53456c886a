"""Pages, tables, charts and model cards: one way to write each, for every recipe.

A family of recipes builds a `Report` (`tasks.experts.report`, `tasks.models.report`); what is here
writes it.
"""
