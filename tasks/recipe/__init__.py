"""Recipes: one YAML file in `params/`, typed, checked before the first stage runs."""
