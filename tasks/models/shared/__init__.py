"""What several stages of recipes of kind models use."""
