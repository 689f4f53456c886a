"""What a stage has written stands until its next run has ended well."""

from pathlib import Path

import pytest

from flows.kept import JOURNALS, kept, recover
from tests.flows.conftest import snapshot

OUTPUTS = (Path("out/merged"), Path("out/arms.json"))


class Killed(BaseException):
    """The end of a process, as far as the files can tell."""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files that a stage has written before."""
    monkeypatch.chdir(tmp_path)
    OUTPUTS[0].mkdir(parents=True)
    (OUTPUTS[0] / "weights").write_text("old")
    OUTPUTS[1].write_text("old")
    return snapshot(tmp_path / "out")


def never(address: str) -> bool:
    return False


def run_that_dies() -> None:
    """A run of the stage that ends when one of its outputs is half written."""
    with kept("merge@toy", OUTPUTS, never):
        assert not any(output.exists() for output in OUTPUTS)
        OUTPUTS[1].write_text("half of the new")
        raise Killed


def test_a_failure_brings_the_old_outputs_back(written: dict[str, bytes], tmp_path: Path) -> None:
    """During the run the places are empty; after a failure they hold what they held before."""
    with pytest.raises(Killed):
        run_that_dies()
    assert snapshot(tmp_path / "out") == written
    assert not list(JOURNALS.iterdir())


def test_what_dvc_has_recorded_replaces_it(written: dict[str, bytes], tmp_path: Path) -> None:
    """After a run that ended well, or died when all was recorded, the new outputs stand alone."""
    with kept("merge@toy", OUTPUTS, lambda address: address == "merge@toy"):
        OUTPUTS[1].write_text("new")
    assert snapshot(tmp_path / "out") == {"arms.json": b"new"}


@pytest.mark.parametrize("survived", range(6))
def test_the_next_run_settles_what_a_killed_one_left(
    written: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """Killed at any rename or removal, on the way out or on the way back: nothing is lost."""
    calls = []

    def dying(name: str):
        function = getattr(Path, name)

        def call(self: Path, *arguments, **options):
            calls.append(name)
            if len(calls) > survived:
                raise Killed
            return function(self, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink"):
            patch.setattr(Path, name, dying(name))
        with pytest.raises(Killed):
            run_that_dies()
    recover(never)
    assert snapshot(tmp_path / "out") == written
    assert not list(JOURNALS.iterdir())


def test_files_of_others_are_never_touched(written: dict[str, bytes], tmp_path: Path) -> None:
    """A file that looks like one set aside, but is in no journal, stays."""
    theirs = tmp_path / "out" / "merged.kept-00000000.incomplete"
    theirs.write_text("mine")
    recover(never)
    with pytest.raises(Killed):
        run_that_dies()
    assert theirs.read_text() == "mine"
    assert snapshot(tmp_path / "out") == written | {theirs.name: b"mine"}


def test_an_output_that_cannot_be_moved_stops_the_run_before_it_begins(
    written: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second rename is refused, the first output is back in its place."""
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self == OUTPUTS[1]:
            raise PermissionError(1, "Operation not permitted", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(PermissionError), kept("merge@toy", OUTPUTS, never):
        pytest.fail("the stage must not run")
    assert snapshot(tmp_path / "out") == written
