"""Checkpoints on disk: read lazily, merged in a stream, written whole or not at all.

torch is imported only by methods that need it.
"""

from alloy.checkpoint._format import Checkpoint, CheckpointError, Entry, open_checkpoint
from alloy.checkpoint._merge import MergeReport, merge_checkpoints, run_plan
from alloy.checkpoint._plan import MergePlan, plan_merge
from alloy.checkpoint._statistics import save_statistics

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Entry",
    "MergePlan",
    "MergeReport",
    "merge_checkpoints",
    "open_checkpoint",
    "plan_merge",
    "run_plan",
    "save_statistics",
]
