"""lm-evaluation-harness in a process of its own (`tasks.models.benchmarks.harness`)."""

import hashlib
import math
import sys
from pathlib import Path
from typing import Any

from tasks.storage import read_json, write_json

ERROR = "_stderr"


def main(asked: Path, answer: Path) -> None:
    from lm_eval.tasks import TaskManager

    request = read_json(asked)
    path = request["include_path"]
    if request.get("list"):
        manager = TaskManager(include_path=path)
        write_json(answer, {"tasks": [*manager.all_tasks]})
        return
    from lm_eval import simple_evaluate
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(request["model"])
    if tokenizer.eos_token is None:
        sys.exit(f"the tokenizer of {request['model']} has no eos_token, which lm_eval begins with")
    manager = TaskManager(include_path=path)
    results: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": request["model"], "dtype": "float32"},
        tasks=request["tasks"],
        num_fewshot=request["num_fewshot"],
        limit=request["limit"],
        batch_size=request["batch_size"],
        device=request["device"],
        task_manager=manager,
        bootstrap_iters=1000,
    )
    rows = {**results["results"], **results.get("groups", {})}
    write_json(
        answer,
        {
            task: {"scores": scores(rows[task]), "digest": digest(task, results)}
            for task in request["tasks"]
        },
    )


def scores(row: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Each metric with its standard error; one of a filter has the filter's name behind it."""
    found = {}
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if not isinstance(value, int | float) or not filtered or metric.endswith(ERROR):
            continue
        error = row.get(f"{metric}{ERROR},{filtered}")
        known = isinstance(error, int | float) and math.isfinite(error)
        name = metric if filtered == "none" else f"{metric}_{filtered}"
        found[name] = (float(value), float(error) if known else None)
    return found


def digest(task: str, results: dict[str, Any]) -> str:
    """SHA-256 of the documents, prompts and answers of a task."""
    whole = hashlib.sha256(str(results["versions"].get(task)).encode())
    names = [task] if task in results["samples"] else results["group_subtasks"].get(task, ())
    for name in names:
        for sample in results["samples"].get(name, ()):
            for key in ("doc_hash", "prompt_hash", "target_hash"):
                whole.update(str(sample[key]).encode())
    return whole.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
