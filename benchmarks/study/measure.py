"""Scores of all arms of one seed, before and after fine-tuning.

Rows are written as they come; those that are there, of the same models, are not made again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alloy.modality import ModalityModel, split_experts
from benchmarks.distance.permuted import mean_distances
from benchmarks.study import merges
from benchmarks.study.params import Mode, study
from benchmarks.study.train import WORK, parents_of
from tasks.experts.finetune import FACTS, Job, finetune
from tasks.experts.measures.benchmark import load_split
from tasks.experts.measures.benchmarks import BENCHMARKS, FINETUNED_ON_SCENES, FREE_ON_SCENES
from tasks.experts.shared.loading import load_model
from tasks.recipe.experts import FinetuneParams
from tasks.recipe.load import load_experts
from tasks.storage import read_json, write_file

RESULTS = Path("benchmarks/results/study")
SPLITS = ("validation", "test")
Row = dict[str, Any]


class Rows:
    """The rows of one stage, kept on the disk one by one."""

    def __init__(self, path: Path, planned: int) -> None:
        self.path, self.planned = path, planned
        self.old: dict[str, Row] = {}
        if path.is_file():
            self.old = {row["identity"]: row for row in read_json(path)["rows"]}
        self.rows: list[Row] = []

    def add(self, key: Mapping[str, Any], identity: str, make: Callable[[], Row]) -> None:
        """Add a row, from the disk or made now."""
        number = f"{len(self.rows) + 1} of {self.planned}"
        row = self.old.get(identity)
        if row is None:
            began = time.process_time()
            made = make()
            seconds = round(time.process_time() - began, 1)
            row = {**key, "identity": identity, "cpu_seconds": seconds, **made}
            print(f"study: {number}: {json.dumps(row)}", flush=True)
        self.rows.append(row)
        made = {row["identity"] for row in self.rows}
        self._write([*self.rows, *(row for name, row in self.old.items() if name not in made)])

    def close(self) -> None:
        """Leave out rows of models that the params no longer name."""
        self._write(self.rows)
        print(f"study: wrote {self.path}, {len(self.rows)} rows", flush=True)

    def _write(self, rows: Sequence[Row]) -> None:
        lines = ",\n".join(f" {json.dumps(row)}" for row in rows)
        with write_file(self.path) as partial:
            partial.write_text(f'{{"planned": {self.planned}, "rows": [\n{lines}\n]}}\n')


def measure(seed: int) -> None:
    """Score every arm on the benchmarks that need no training; distances of experts, too."""
    params = study()
    rows = Rows(RESULTS / f"merged_{seed}.json", len(params.arms))
    for name, arm in params.arms.items():
        identity = merges.identity(seed, arm)
        rows.add({"seed": seed, "arm": name}, identity, lambda name=name: _measured(seed, name))
    rows.close()


def _measured(seed: int, name: str) -> Row:
    arm = study().arms[name]
    model = load_model(merges.arm_folder(seed, name))
    row: Row = {split: scores(model, FREE_ON_SCENES, split) for split in SPLITS}
    parent = load_model(parents_of(seed) / arm.parent)
    if arm.method is not None and parent.config.sharing != "custom_norms":
        row["distances"] = mean_distances(split_experts(parent.state_dict(), parent.config))
    return row


def tune(seed: int) -> None:
    """Fine-tune the arms that the params say, as the recipe does, and score them."""
    params = study()
    tunings = params.tunings()
    recipe = load_experts(params.recipe)
    assert recipe.finetune is not None
    drawn = recipe.finetune.model_copy(update={"seed": recipe.finetune.seed + seed})
    digest = hashlib.sha256(drawn.model_dump_json().encode()).hexdigest()[:16]
    rows = Rows(RESULTS / f"finetuned_{seed}.json", len(tunings))
    for name, mode in tunings:
        key = {"seed": seed, "arm": name, "mode": mode}
        made = merges.identity(seed, params.arms[name])
        identity = f"{made}-{mode}-{digest}"
        rows.add(key, identity, lambda n=name, m=mode: _tuned(seed, n, m, drawn))
    rows.close()


def _tuned(seed: int, name: str, mode: Mode, params: FinetuneParams) -> Row:
    recipe, source = study().recipe, merges.arm_folder(seed, name)
    groups = (
        [FINETUNED_ON_SCENES]
        if mode == "joint"
        else [(benchmark,) for benchmark in FINETUNED_ON_SCENES]
    )
    result: Row = {"stopped_on": {}, "test": {}}
    for benchmarks in groups:
        work = WORK / str(seed) / "finetune" / name / "_".join((mode, *benchmarks))
        job = Job(recipe, source, None, tuple(benchmarks), params, work)
        finetune(job, lambda kind, *values: kind == "say" and print(*values, flush=True))
        tuned = load_model(work / "done")
        facts = read_json(work / "done" / FACTS)
        result["stopped_on"][" ".join(benchmarks)] = round(facts["validation_score"], 2)
        result["test"] |= scores(tuned, benchmarks, "test")
    return result


def scores(model: ModalityModel, benchmarks: Sequence[str], split: str) -> dict[str, float]:
    """Score a model, in per cent."""
    result = {}
    for name in benchmarks:
        benchmark, data = BENCHMARKS[name], load_split(study().recipe, name, split)
        score = benchmark.score(benchmark.outputs(model, data), data)[benchmark.metric]
        result[name] = round(score.value, 2)
    return result


def read(pattern: str) -> list[Row]:
    """Read the rows of all seeds that are there."""
    files = sorted(RESULTS.glob(f"{pattern}_*.json"))
    return [row for file in files for row in read_json(file)["rows"]]
