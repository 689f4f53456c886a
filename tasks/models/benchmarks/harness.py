"""Evaluation harnesses, each in a process of its own: its memory and its settings end with it.

The process is `python -m tasks.models.benchmarks.KIND REQUEST ANSWER`, both files of JSON.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from alloy.devices import chosen_device
from alloy.errors import nearest
from tasks.evaluation.score import Score
from tasks.recipe.benchmarks import LmEval, Mteb
from tasks.recipe.section import ParamsError
from tasks.registry.secrets import without_secrets
from tasks.storage import read_json, write_json

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
LINES = 8  # of a failed process's output


class HarnessError(ValueError):
    """A harness, or a command of the user's, that failed; the message has its last words."""


class Answer(NamedTuple):
    """Scores by metric, and the SHA-256 of what was measured."""

    scores: dict[str, Score]
    digest: str


def refuse_missing(where: str, kind: str, section: LmEval | Mteb) -> None:
    """Raise ParamsError where a harness is not installed, or has no such task."""
    if find_spec(kind) is None:
        raise ParamsError(
            f"{where}: {kind} is not installed: pip install 'alloy-merge[harness]', or leave it out"
        )
    path = section.include_path
    if path is not None and not Path(path).exists():
        raise ParamsError(f"{where}.include_path: {path} is not there")
    known = _known(kind, path)
    for task in section.tasks:
        if task not in known:
            raise ParamsError(f"{where}.tasks: {task!r}: {nearest(task, known)}")


def _known(kind: str, path: str | None) -> list[str]:
    """The names of the tasks that a harness has, with those of one's own."""
    request = {"list": True, "include_path": path}
    return _ask(kind, request, offline=True)["tasks"]


def run_harness(
    kind: str, section: LmEval | Mteb, folder: Path, batch_size: int
) -> dict[str, Answer]:
    """The answers of a harness by task.

    Raises:
        HarnessError: it failed, with its last words.
    """
    request = {
        **section.model_dump(exclude={"split"}),
        "model": str(folder),
        "batch_size": batch_size,
        "device": str(chosen_device()),
    }
    answered = _ask(kind, request, offline=section.offline)
    return {
        task: Answer(
            {
                name: Score(value, math.nan if error is None else error)
                for name, (value, error) in answer["scores"].items()
            },
            answer["digest"],
        )
        for task, answer in answered.items()
    }


def _ask(kind: str, request: dict, *, offline: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(asked, request)
        command = [sys.executable, "-m", f"tasks.models.benchmarks.{kind}_process"]
        environment = {**os.environ, **(OFFLINE if offline else {})}
        done = subprocess.run(
            [*command, str(asked), str(answer)], env=environment, capture_output=True, text=True
        )
        if done.returncode or not answer.is_file():
            last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-LINES:])
            hint = ""
            if offline and "ffline" in last:
                hint = "\nthe data are not on this machine: `offline: false` lets it fetch them"
            raise HarnessError(f"{kind} failed: {without_secrets(last)}{hint}")
        return json.loads(json.dumps(read_json(answer)))
