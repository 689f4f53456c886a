"""Data sets that the shipped recipes compose of what packages carry."""
