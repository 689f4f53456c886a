"""Processes of a stage: many jobs side by side, or one job that several processes share."""

from tasks.workers.cores import in_order, job_cores, num_cores, share_cores
from tasks.workers.side_by_side import Report, side_by_side, start_importing

__all__ = [
    "Report",
    "in_order",
    "job_cores",
    "num_cores",
    "share_cores",
    "side_by_side",
    "start_importing",
]
