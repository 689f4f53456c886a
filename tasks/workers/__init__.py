"""Processes of a stage: many jobs side by side, or one job that several processes share."""

from tasks.workers.side_by_side import Report, num_cores, side_by_side

__all__ = ["Report", "num_cores", "side_by_side"]
