"""MTEB in a process of its own (`tasks.models.benchmarks.harness`)."""

import hashlib
import importlib.util
import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

from tasks.storage import read_json, sha256, write_json


def main(asked: Path, answer: Path) -> None:
    import mteb

    request = read_json(asked)
    own = own_tasks(request["include_path"])
    if request.get("list"):
        known = [] if own else [task.metadata.name for task in mteb.get_tasks()]
        write_json(answer, {"tasks": [*own, *known]})
        return
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(request["model"], device=request["device"], local_files_only=True)
    tasks = [own[name]() if name in own else mteb.get_task(name) for name in request["tasks"]]
    results: Any = mteb.evaluate(
        model,
        tasks,
        cache=None,
        encode_kwargs={"batch_size": request["batch_size"]},
        show_progress_bar=False,
    )
    write_json(
        answer,
        {
            result.task_name: {
                "scores": scores(result.scores),
                "digest": digest(result, request["include_path"]),
            }
            for result in results.task_results
        },
    )


def own_tasks(path: str | None) -> dict[str, Any]:
    """The tasks that a Python file of the user's defines, by name."""
    from mteb.abstasks.abstask import AbsTask

    if path is None:
        return {}
    spec = importlib.util.spec_from_file_location("own_tasks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        thing.metadata.name: thing
        for _, thing in inspect.getmembers(module, inspect.isclass)
        if issubclass(thing, AbsTask) and thing.__module__ == "own_tasks"
    }


def scores(by_split: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[float, None]]:
    """The mean of each metric over splits and subsets; MTEB gives no standard errors."""
    rows = [row for rows in by_split.values() for row in rows]
    found = {}
    for metric in rows[0]:
        values = [row.get(metric) for row in rows]
        if all(isinstance(v, float) and math.isfinite(v) for v in values):
            found[metric] = (sum(v for v in values if v is not None) / len(values), None)
    return found


def digest(result: Any, path: str | None) -> str:
    """SHA-256 of what names a task's data: its revision, or the file that defines it."""
    named = [result.task_name, result.dataset_revision, path and sha256(Path(path))]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
