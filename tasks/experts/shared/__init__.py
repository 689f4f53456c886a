"""What several stages of recipes of kind experts use."""
