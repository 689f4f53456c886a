"""Small data sets in the formats of the real ones, written once for the session."""

import shutil
from pathlib import Path

import pytest

from tasks.data.drawn import write_sets


@pytest.fixture(scope="session")
def drawn_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_sets(folder / "sets", num=6)
    return folder / "sets"


@pytest.fixture
def raw(drawn_sets: Path, tmp_path: Path) -> Path:
    """A copy of the sets that a test may damage."""
    return Path(shutil.copytree(drawn_sets, tmp_path / "raw"))
