"""Sets that share members are collected in one pass, texts without needless padding."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tasks.models import collect


def _job(name: str, members: str, calibration: str = "words") -> SimpleNamespace:
    folders = {member: Path(member) for member in members}
    return SimpleNamespace(
        name=name, members=list(members), folders=folders, calibration=Path(calibration)
    )


@pytest.fixture
def sizes(monkeypatch):
    """Of the checkpoints; capitals are of another architecture."""
    sizes = dict.fromkeys("abcdeAB", 10)
    monkeypatch.setattr(collect, "architecture", lambda _, member: member.isupper())
    monkeypatch.setattr(collect, "_num_bytes", lambda folder: sizes[str(folder)])
    return sizes


def _names(planned: list) -> list[str]:
    return ["".join(job.name for job in group) for group in collect.in_groups(planned)]


def test_sets_that_share_a_member_are_a_group(sizes):
    """A later set may join two groups; other data or another architecture stays apart."""
    planned = [_job("1", "ab"), _job("2", "cd"), _job("3", "ac"), _job("4", "e")]
    assert _names(planned) == ["123", "4"]
    assert _names([_job("1", "ab"), _job("2", "ac", "pictures")]) == ["1", "2"]
    assert _names([_job("1", "aA"), _job("2", "ab")]) == ["1", "2"]
    assert _names([_job("1", "AB"), _job("2", "ab")]) == ["1", "2"]


def test_a_group_fits_into_memory(sizes, monkeypatch):
    monkeypatch.setattr(collect, "MOST_BYTES", 30)
    assert _names([_job("1", "ab"), _job("2", "bc")]) == ["12"]
    sizes["c"] = 11
    assert _names([_job("1", "ab"), _job("2", "bc")]) == ["1", "2"]


def _batch(length: int, name: str = "attention_mask") -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, length)}


def test_texts_of_middling_length_come_first():
    """Batches by length begin in the middle; others stay in their order."""
    lengths = [3, 4, 6, 8, 9]
    turned = collect.middle_first([_batch(length) for length in lengths])
    assert [batch["attention_mask"].shape[1] for batch in turned] == [6, 8, 9, 3, 4]
    for kept in (
        [_batch(4), _batch(4), _batch(4)],
        [_batch(n, "pixel_values") for n in lengths],
        [_batch(3)],
    ):
        assert all(a is b for a, b in zip(collect.middle_first(kept), kept, strict=True))
