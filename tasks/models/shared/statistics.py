"""The statistics that collect keeps of a set's members."""

from safetensors.torch import load_file

from alloy.statistics.sums import Statistics
from tasks.models.shared.jobs import Job


def load_statistics(job: Job) -> Statistics:
    """The statistics that `collect` kept of a job."""
    return Statistics.from_tensors(
        load_file(job.within(job.workspace.statistics) / "statistics.safetensors")
    )
