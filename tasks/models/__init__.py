"""The stages for sets of checkpoints of any architecture."""
