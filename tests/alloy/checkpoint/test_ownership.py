"""The engine removes and overwrites what it made itself, and nothing else."""

import json
from pathlib import Path

import pytest

import alloy
from alloy.errors import CheckpointError, MergeError

FOREIGN = {
    "a file": lambda folder: (folder / "thesis.txt").write_text("mine"),
    "a checkpoint": lambda folder: (folder / "model.safetensors").write_bytes(b"mine"),
    "a folder": lambda folder: (folder / "sub").mkdir(),
    "a lock of somebody else": lambda folder: (folder / "lock").write_text("pid 4711"),
    "a link called lock": lambda folder: (folder / "lock").symlink_to(folder.parent / "a"),
    "a hidden file": lambda folder: (folder / ".env").write_text("mine"),
    "another program's journal": lambda folder: (folder / "journal.jsonl").write_text(
        '{"entry": 1}\n'
    ),
    "a journal that is no JSON": lambda folder: (folder / "journal.jsonl").write_bytes(
        b"\xff\xfe\n"
    ),
    "a journal that is a list": lambda folder: (folder / "journal.jsonl").write_text("[1]\n"),
    "a journal that points outside": lambda folder: (folder / "journal.jsonl").write_text(
        json.dumps({"plan": "x", "files": ["../a/config.json"]}) + "\n"
    ),
    "a journal that is a link": lambda folder: (folder / "journal.jsonl").symlink_to(
        folder.parent / "a" / "config.json"
    ),
    "our journal, and a file beside": lambda folder: (
        (folder / "journal.jsonl").write_text(json.dumps({"plan": "x", "files": []}) + "\n"),
        (folder / "notes.md").write_text("mine"),
    ),
}


def _state(folder: Path) -> dict[str, bytes | str | None]:
    return {
        str(p.relative_to(folder)): str(p.readlink())
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def sources(write, weights) -> list[Path]:
    return [write("a", weights(1)), write("b", weights(2))]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_is_not_ours_stays(sources, tmp_path, name):
    """Whatever stands where a merge keeps its work, the merge is refused and every byte stays."""
    unfinished = tmp_path / "out.incomplete"
    unfinished.mkdir()
    FOREIGN[name](unfinished)
    before = _state(tmp_path)
    with pytest.raises(CheckpointError, match="move or remove it"):
        alloy.merge_checkpoints("linear", sources, tmp_path / "out")
    assert _state(tmp_path) == before


def _is_unfinished(root: Path, source: Path) -> Path:
    return source.rename(root / "out.incomplete")


def _is_unfinished_by_a_link(root: Path, source: Path) -> Path:
    (root / "out.incomplete").symlink_to(source)
    return source


def _inside_unfinished(root: Path, source: Path) -> Path:
    (root / "out.incomplete").mkdir()
    return source.rename(root / "out.incomplete" / "b")


def _is_output_by_a_link(root: Path, source: Path) -> Path:
    (root / "out").symlink_to(source)
    return source


def _inside_output(root: Path, source: Path) -> Path:
    (root / "out").mkdir()
    return source.rename(root / "out" / "b")


PLACES = (
    _is_unfinished,
    _is_unfinished_by_a_link,
    _inside_unfinished,
    _is_output_by_a_link,
    _inside_output,
)


@pytest.mark.parametrize("place", PLACES)
def test_sources_and_output_are_apart(sources, tmp_path, place):
    """A source equal to, or inside, what the merge writes is refused, and every byte stays."""
    moved = place(tmp_path, sources[1])
    before = _state(tmp_path)
    with pytest.raises((CheckpointError, MergeError)):
        alloy.merge_checkpoints("linear", [sources[0], moved], tmp_path / "out")
    assert _state(tmp_path) == before


def test_an_output_inside_a_source_by_a_link_is_refused(sources, tmp_path):
    """Links are resolved: what is written must not land in a source."""
    (tmp_path / "elsewhere").symlink_to(sources[0])
    before = _state(tmp_path)
    with pytest.raises((CheckpointError, MergeError), match="lies inside the source"):
        alloy.merge_checkpoints("linear", sources, tmp_path / "elsewhere" / "out")
    assert _state(tmp_path) == before


def test_an_empty_folder_is_taken_over(sources, tmp_path):
    """An empty unfinished folder, which a killed run may leave, is no obstacle."""
    (tmp_path / "out.incomplete").mkdir()
    alloy.merge_checkpoints("linear", sources, tmp_path / "out")
    assert not (tmp_path / "out.incomplete").exists()


def test_of_another_plan_only_what_it_wrote_is_removed(killed, tmp_path):
    """A file that somebody put beside an interrupted merge outlives the next plan's start."""
    sources, output, unfinished = killed
    (unfinished / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'notes.md'"):
        alloy.merge_checkpoints("linear", sources, output, coefficients=[1, 2])
    assert (unfinished / "notes.md").read_text() == "mine"
