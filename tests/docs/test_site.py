"""The site: `make docs` builds, and refuses what it should."""

import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


def load_hooks(monkeypatch):
    """The module that mkdocs loads beside the pages."""
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("hooks")


@pytest.mark.slow
def test_the_site_builds_in_a_minute(tmp_path) -> None:
    """No broken link, no public name without a docstring or off the reference's pages."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, text=True, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < 60, "CPU seconds"  # 17 on a quiet machine
    reference = (tmp_path / "reference/merging/index.html").read_text()
    assert 'id="alloy.merging.merge"' in reference
    assert (tmp_path / "benchmarks/results/gauge/index.html").is_file()  # a link out of docs/


def test_what_the_reference_would_not_explain_is_found(tmp_path, monkeypatch) -> None:
    """Functions and methods without a docstring, arguments that are none, names on no page."""
    hooks = load_hooks(monkeypatch)
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    monkeypatch.setattr(hooks, "_library", None)
    for name in ("alloy/inner", "docs/reference"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "alloy/__init__.py").write_text("")
    (tmp_path / "docs/reference/page.md").write_text("::: alloy.inner\n")
    (tmp_path / "alloy/inner/__init__.py").write_text(INNER)
    assert hooks.unexplained() == [
        "alloy.inner.Model.run has no docstring",
        "alloy.inner.merge has no docstring",
        "alloy.inner.said(c, d) is no argument",
    ]
    (tmp_path / "docs/reference/page.md").unlink()
    assert "alloy.inner.said is on no page of docs/reference/" in hooks.unexplained()


INNER = '''
__all__ = ["Model", "merge", "said"]

def merge(): ...

def said(a, b, c, d):
    """Documented.

    Args:
        a: one thing, on
            two lines.
        *b: another.
        c, d: two at once, which no tool can read.
    """

class Model:
    """Documented."""

    def run(self): ...

    def _own(self): ...
'''
