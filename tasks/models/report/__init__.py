"""The report of sets of checkpoints that were merged: scores, barriers, alignments, distances."""
