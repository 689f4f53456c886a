"""Load the alignments of a set's members."""

from safetensors.torch import load_file

from alloy.alignment.result import Alignment
from tasks.models.shared.jobs import Job


def load_alignment(job: Job, name: str) -> Alignment:
    """Load an alignment that `align` wrote for a job."""
    return Alignment.from_tensors(
        load_file(job.within(job.workspace.transforms) / f"{name}.safetensors")
    )
