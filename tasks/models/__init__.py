"""What the stages do for sets of checkpoints of any architecture."""
