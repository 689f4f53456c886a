"""The site: every page is in its navigation, every public name is explained, `make docs` builds."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


def pages(nav: object) -> list[str]:
    """The pages of a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for part in inner for page in pages(part)]


def test_every_page_is_in_the_navigation() -> None:
    """A new page in docs/ stands in mkdocs.yml, too."""
    listed = pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    written = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(written)


@pytest.mark.slow
def test_the_site_builds_in_a_minute(tmp_path) -> None:
    """No broken link, no public name without a docstring or off the reference's pages."""
    began = time.monotonic()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 240  # 60 on a quiet machine
    reference = (tmp_path / "reference/merging/index.html").read_text()
    assert 'id="alloy.merging.merge"' in reference
    assert (tmp_path / "benchmarks/results/gauge/index.html").is_file()  # a link out of docs/


def test_an_undocumented_name_is_found(tmp_path, monkeypatch) -> None:
    """A public function, or a public method of a public class, without a docstring."""
    monkeypatch.syspath_prepend(DOCS)
    hooks = importlib.import_module("hooks")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    monkeypatch.setattr(hooks, "_library", None)
    (tmp_path / "alloy").mkdir()
    (tmp_path / "alloy/__init__.py").write_text(
        "__all__ = ['Model', 'merge', 'said']\n"
        "def merge(): ...\n"
        'def said():\n    """Documented."""\n'
        'class Model:\n    """Documented."""\n    def run(self): ...\n'
        "    def _own(self): ...\n"
    )
    assert hooks.undocumented() == ["alloy.Model.run", "alloy.merge"]
