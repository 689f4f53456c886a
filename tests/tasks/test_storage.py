"""Files are whole or absent, whoever dies when and whoever else writes."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from tasks import storage


def write(path: Path, content: str) -> None:
    with storage.write_folder(path) as folder:
        for name in ("first", "second"):
            (folder / name).write_text(content)


def read(path: Path) -> set[str]:
    return {file.read_text() for file in path.iterdir()}


def others(path: Path) -> list[str]:
    """What lies beside a path."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that has been written before."""
    write(tmp_path / "output", "old")
    return tmp_path / "output"


def test_the_old_folder_stands_until_the_new_one_is_complete(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While files are written and flushed, the old folder is read; after the renames, the new."""
    flushed = []

    def flush(path: Path) -> None:
        flushed.append(path.name)
        if path.parent != place.parent.parent:  # the last: the folder that holds both
            assert read(place) == {"old"}

    monkeypatch.setattr(storage, "_flush", flush)
    with storage.write_folder(place) as folder:
        for name in ("first", "second"):
            (folder / name).write_text("new")
            assert read(place) == {"old"}
    assert read(place) == {"new"}
    assert flushed == ["first", "second", "new", place.parent.name]
    assert others(place) == []


def test_a_block_that_raises_leaves_the_old_state(place: Path) -> None:
    """Of a file and a folder alike, and nothing lies beside them."""
    (file := place.parent / "file.json").write_text("old")

    def fail(writer, path: Path) -> None:
        with writer(path) as partial:
            (partial if path == file else partial / "first").write_text("half")
            raise ValueError("broke")

    for writer, path in ((storage.write_folder, place), (storage.write_file, file)):
        with pytest.raises(ValueError, match="broke"):
            fail(writer, path)
    assert read(place) == {"old"}
    assert file.read_text() == "old"
    assert others(place) == ["file.json"]


def test_a_rename_that_fails_leaves_the_old_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder is back where the new one cannot take its place."""
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        write(place, "new")
    assert read(place) == {"old"}
    assert others(place) == []


def test_two_writers_do_not_meet(place: Path) -> None:
    """Both are whole; the one that ends last is what is read."""
    first, second = threading.Event(), threading.Event()

    def slow() -> None:
        with storage.write_folder(place) as folder:
            (folder / "first").write_text("slow")
            first.set()
            second.wait(10)
            (folder / "second").write_text("slow")

    writer = threading.Thread(target=slow)
    writer.start()
    first.wait(10)
    write(place, "quick")
    assert read(place) == {"quick"}
    second.set()
    writer.join(600)
    assert read(place) == {"slow"}
    assert others(place) == []


def _die(path: Path, at: str) -> None:
    """Write a folder and be killed: while it is written, or between the two renames."""
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if self.name == "new":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    with storage.write_folder(path) as folder:
        (folder / "first").write_text("new")
        if at == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = dying  # ty: ignore


@pytest.mark.parametrize(("at", "found"), [("writing", {"old"}), ("renaming", {"new"})])
def test_what_a_killed_writer_leaves_is_settled(place: Path, at: str, found: set[str]) -> None:
    """The next writer removes it; a new folder that was complete takes its place even so."""
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(place, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(others(place)) == 1
    storage.remove_leftovers(place)
    assert read(place) == found
    assert others(place) == []


def test_nothing_of_others_is_removed(place: Path, tmp_path: Path) -> None:
    """Names that are not quite ours, links, and the folders of other paths stay."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    theirs = [
        "output.incomplete",
        "output.old.incomplete",
        "output.alloy-work.incomplete",
        "output.alloy-0123456789ab",
        "output.alloy-0123456789abc.incomplete",
        "output.alloy-0123456789AB.incomplete",
        "output.json.alloy-0123456789ab.incomplete",
    ]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    (tmp_path / "output.alloy-00000000000a.incomplete").symlink_to(elsewhere)
    before = others(place)
    write(place, "new")
    assert others(place) == before
    assert all((tmp_path / name / "precious").exists() for name in theirs)


def test_a_name_of_special_characters_is_no_pattern(tmp_path: Path) -> None:
    """`[a]*` matches itself alone."""
    for name in ("[a]*", "a"):
        (tmp_path / f"{name}.alloy-0123456789ab.incomplete").mkdir()
    write(tmp_path / "[a]*", "new")
    assert others(tmp_path / "[a]*") == ["a.alloy-0123456789ab.incomplete"]


def test_long_work_goes_on_where_it_stopped(place: Path) -> None:
    """A resumable folder survives a failure, refuses a second process, and goes at the end."""

    def work(end: str | None) -> list[str]:
        with storage.resumable_folder(place) as folder:
            there = sorted(path.name for path in folder.iterdir())
            (folder / "part").touch()
            if end == "beside":
                work(None)
            if end == "fail":
                raise ValueError("broke")
            return there

    with pytest.raises(ValueError, match="broke"):
        work("fail")
    with pytest.raises(BlockingIOError, match=r"another process is writing .*output: wait until"):
        work("beside")
    assert work(None) == ["part"]
    assert others(place) == []
    assert work(None) == []


def test_a_digest_knows_names_and_contents(tmp_path: Path) -> None:
    """A folder's digest changes with a name as with a byte, and not with the folder's own name."""
    digests = []
    for folder, file, content in (
        ("a", "x", "1"),
        ("b", "x", "1"),
        ("c", "y", "1"),
        ("d", "x", "2"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(content)
        digests.append(storage.folder_digest(tmp_path / folder))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
