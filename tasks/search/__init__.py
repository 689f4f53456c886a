"""Search of a recipe's settings by validation scores."""
