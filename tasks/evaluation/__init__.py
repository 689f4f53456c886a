"""Models in use: loaded from disk, what they answer, how accurate they are."""
