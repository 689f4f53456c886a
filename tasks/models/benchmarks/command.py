"""A command of the user's that measures a model: it prints JSON, a number for each metric."""

import hashlib
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.evaluation.score import Score
from tasks.models.benchmarks.harness import Answer, HarnessError
from tasks.recipe.section import ParamsError

ERROR = "_standard_error"


def refuse_missing(where: str, command: str) -> None:
    """Raise ParamsError where a command's program is not there, or its line cannot be read."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ParamsError(f"{where}.command: {command!r}: {error}") from error
    if shutil.which(words[0]) is None:
        raise ParamsError(f"{where}.command: there is no program {words[0]!r}")


def run_command(where: str, command: str, folder: Path) -> Answer:
    """The scores that a command prints for a model: the last line of its output.

    `{"accuracy": 71.5, "accuracy_standard_error": 0.4}`; a metric without an error has none.

    Raises:
        HarnessError: it fails, or prints something else.
    """
    words = [word.replace("{model}", str(folder)) for word in shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise HarnessError(f"{where}: {shlex.join(words)} ended with {done.returncode}: {last}")
    lines = done.stdout.strip().splitlines()
    try:
        printed = json.loads(lines[-1] if lines else "")
    except ValueError:
        printed = None
    if not isinstance(printed, dict):
        raise HarnessError(
            f"{where}: {shlex.join(words)}: its last line is an object of JSON, such as "
            f'{{"accuracy": 71.5}}, not {(lines or ["nothing"])[-1]!r:.80}'
        )
    return Answer(_scores(where, printed), _digest(command))


def _scores(where: str, printed: Mapping[str, Any]) -> dict[str, Score]:
    for name, value in printed.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise HarnessError(f"{where}: the command says {name} is {value!r:.40}: not a number")
    found = {
        name: Score(float(value), float(printed.get(f"{name}{ERROR}", math.nan)))
        for name, value in printed.items()
        if not name.endswith(ERROR)
    }
    if not found:
        raise HarnessError(f"{where}: the command says nothing: an empty object")
    return found


def _digest(command: str) -> str:
    """SHA-256 of the command, and of the files that it names."""
    digest = hashlib.sha256(command.encode())
    for word in shlex.split(command):
        if Path(word).is_file():
            digest.update(Path(word).read_bytes())
    return digest.hexdigest()
