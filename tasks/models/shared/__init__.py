"""Code that several stages of recipes of kind "models" share."""
