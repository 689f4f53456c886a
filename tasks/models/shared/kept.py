"""Tensors that stay the first member's, by pattern or as a group that its architecture has."""

from collections.abc import Collection
from fnmatch import fnmatchcase

from alloy.checkpoint import open_source
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.groups import GROUPS, kept_names
from alloy.checkpoint.config import model_names
from tasks.models.shared.jobs import Job


def kept(job: Job, names: Collection[str]) -> set[str]:
    """Those of these names, stored or the model's own, that stay the first member's.

    Raises:
        MergeError: a group that the first member lacks.
    """
    patterns = [pattern for pattern in job.entry.kept if pattern not in GROUPS]
    result = {n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)}
    if groups := [pattern for pattern in job.entry.kept if pattern in GROUPS]:
        findings, checkpoint = Findings(), open_source(job.folders[job.members[0]])
        stored = kept_names(findings, groups, checkpoint)
        findings.stop()
        result |= {*stored, *model_names(checkpoint.config, stored).values()} & {*names}
    return result
