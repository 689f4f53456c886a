"""The report of a recipe that merges experts: what was measured, as tables, charts and examples."""
