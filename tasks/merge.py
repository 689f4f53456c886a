"""merge: make one model of a recipe's checkpoints, `models/<recipe>/merged/`.

Recipes of kind "modality" merge the experts of one checkpoint (`tasks.merge_experts`); recipes of kind
"weights" merge whole checkpoints of any architecture as a stream (`alloy.merge_checkpoints`), those of kind
"models" align the units of sets of checkpoints first (`tasks.merge_models`).
"""

import shlex
import shutil
from pathlib import Path

from tqdm import tqdm

from alloy.checkpoint import MergeRequest, plan_merge, run_plan
from alloy.errors import nearest
from tasks import merge_experts, merge_models
from tasks.command import run_stage
from tasks.params import ParamsError, WeightsMergeParams, kind, load
from tasks.storage import write_folder, write_json


def merge_weights(recipe: str) -> None:
    """Merge the sources of a recipe of kind "weights"; an interrupted run goes on, by file."""
    params = load(recipe, "merge", WeightsMergeParams)
    models = Path("models") / recipe
    known = sorted(folder.name for folder in (models / "checkpoints").iterdir() if folder.is_dir())
    for name in [*params.sources, *([params.base] if params.base else [])]:
        if name not in known:
            raise ParamsError(f"params/{recipe}.yaml: merge: {name!r}: {nearest(name, known)}")
    # Streamed beside the old result, which stands until the new one is whole.
    fresh = models / "merged.new.incomplete"
    request = MergeRequest(
        params.method,
        {name: models / "checkpoints" / name for name in params.sources},
        fresh,
        base=None if params.base is None else models / "checkpoints" / params.base,
        coefficients=params.coefficients,
        statistics=params.statistics,
        dtype=params.dtype,
        tokenizer=params.tokenizer,
        options=params.options,
    )
    plan = plan_merge(request)
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="merge") as bar:
        report = run_plan(
            plan,
            hash_sources=True,
            title=f"{recipe}, merged",
            command=shlex.join(["python", "-m", "tasks.merge", recipe]),
            on_bytes=bar.update,
        )
    retired = models / "merged.old.incomplete"
    shutil.rmtree(retired, ignore_errors=True)
    if (models / "merged").exists():
        (models / "merged").rename(retired)
    fresh.rename(models / "merged")
    shutil.rmtree(retired, ignore_errors=True)
    with write_folder(models / "arms") as arms:
        write_json(arms / "manifest.json", {"files": {}, "note": "no arms but the merged model"})
    for note in report.notes:
        print(f"merge: note: {note}")
    print(f"merge: wrote {models / 'merged'}: {params.method} of {', '.join(params.sources)}")


MERGES = {"modality": merge_experts.main, "weights": merge_weights, "models": merge_models.main}


def main(recipe: str) -> None:
    MERGES[kind(recipe)](recipe)


if __name__ == "__main__":
    run_stage(main, __doc__)
