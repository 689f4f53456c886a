"""Units of all models merged many to many: which can be, how they cluster, and the search."""
