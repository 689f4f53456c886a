"""How what models answer is measured, with labels and without."""
