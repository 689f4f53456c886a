"""Measures of what models answer, with labels and without."""
