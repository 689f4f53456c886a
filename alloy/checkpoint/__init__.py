"""Checkpoints on disk: read lazily, merged in a stream, written whole or not at all.

Names are loaded when they are first used: reading the format needs no merge engine and no torch.
"""

from typing import TYPE_CHECKING

from alloy.lazy import lazily

if TYPE_CHECKING:
    from alloy.checkpoint.adapter.source import open_source
    from alloy.checkpoint.checks.names import open_members
    from alloy.checkpoint.format import Checkpoint, Entry, open_checkpoint
    from alloy.checkpoint.plan import MergePlan, plan_merge
    from alloy.checkpoint.request import MergeRequest
    from alloy.checkpoint.run import MergeReport, merge_checkpoints, run_plan
    from alloy.checkpoint.statistics import save_statistics
    from alloy.checkpoint.tensors import load_weights
    from alloy.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Entry",
    "MergePlan",
    "MergeReport",
    "MergeRequest",
    "load_weights",
    "merge_checkpoints",
    "open_checkpoint",
    "open_members",
    "open_source",
    "plan_merge",
    "run_plan",
    "save_statistics",
]

_HOMES = {
    "Checkpoint": "alloy.checkpoint.format",
    "Entry": "alloy.checkpoint.format",
    "open_checkpoint": "alloy.checkpoint.format",
    "open_members": "alloy.checkpoint.checks.names",
    "open_source": "alloy.checkpoint.adapter.source",
    "MergePlan": "alloy.checkpoint.plan",
    "plan_merge": "alloy.checkpoint.plan",
    "MergeRequest": "alloy.checkpoint.request",
    "MergeReport": "alloy.checkpoint.run",
    "merge_checkpoints": "alloy.checkpoint.run",
    "run_plan": "alloy.checkpoint.run",
    "save_statistics": "alloy.checkpoint.statistics",
    "load_weights": "alloy.checkpoint.tensors",
    "CheckpointError": "alloy.errors",
}

__getattr__, __dir__ = lazily(__name__, _HOMES)
