"""merge, for members that are parts of checkpoints: they become one trunk (`alloy.trunk`).

All arms are planned before the first is made. Each is a checkpoint of the first member's class in
which the parts share their weights, stored once; its config says so, and
`alloy.load_shared` loads it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from alloy.errors import MergeError
from alloy.modality.sharing import save_shared
from alloy.trunk import TrunkPlan, distil, merge_trunk, plan_trunk
from tasks.evaluation.loading import load_any, use_device
from tasks.models.shared.jobs import EXAMPLES, Job, batches, jobs
from tasks.models.shared.parts import members_of
from tasks.recipe.arm import ModelsArm
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.trunk import TrunkSettings
from tasks.reports import cards
from tasks.storage import write_folder, write_json

LEFT_BEHIND = ("config.json", "manifest.json", "alloy_merge.json", "README.md")  # of the source


def main(recipe: ModelsRecipe) -> None:
    use_device("merge", float64=True)
    (job,) = jobs(recipe)
    models = {name: load_any(folder) for name, folder in job.folders.items()}
    inputs = load_file(job.calibration) if recipe.prepare is not None else {}
    plans = {}
    for name, arm in recipe.merge.arms.items():
        try:
            plans[name] = plan(job, arm.trunk or TrunkSettings(), models, inputs)
        except MergeError as error:
            raise MergeError(f"{recipe.where}: merge.arms.{name}: {error}") from error
    print(f"merge: {next(iter(plans.values()))}")
    with write_folder(recipe.workspace.arms) as folder:
        for name, arm in recipe.merge.arms.items():
            try:
                made, found = merged(arm, plans[name], models, inputs)
            except MergeError as error:
                raise MergeError(f"{recipe.where}: merge.arms.{name}: {error}") from error
            save(job, name, arm, made, found, job.within(folder) / name)
            print(f"merge: {name}: {json.dumps(found)}", flush=True)
    print(f"merge: wrote {recipe.workspace.arms}: {len(plans)} models with one trunk")


def plan(job: Job, settings: TrunkSettings, models: dict[str, Any], inputs: Any) -> TrunkPlan:
    """The checked plan of one arm."""
    if not inputs:
        raise MergeError("a trunk is planned on examples of what its members read: give prepare")
    return plan_trunk(
        models,
        members_of(job.entry),
        {name: tensor[:EXAMPLES] for name, tensor in inputs.items()},
        kept=job.entry.kept,
        turn=settings.turns,
        norm_matrices=settings.norm_matrices,
    )


def merged(
    arm: ModelsArm, planned: TrunkPlan, models: dict[str, Any], inputs: Any
) -> tuple[Any, dict[str, Any]]:
    """The first member's model with the trunk, and what was found on the way."""
    settings = arm.trunk or TrunkSettings()
    data = list(batches(inputs, settings.batch_size))
    method: Any = arm.method
    trunk = merge_trunk(
        planned,
        data,
        method=method,
        gauge=settings.gauge,
        weigh=settings.weigh,
        ridge=settings.ridge,
        follow=settings.follow,
        take=settings.take,
    )
    result, (before, after) = trunk.model, planned.num_parameters
    found: dict[str, Any] = {"parameters": {"before": before, "after": after}}
    if trunk.gauge is not None:
        found["error"] = {"before": trunk.gauge.error_before, "after": trunk.gauge.error_after}
    if (training := settings.distil) is not None:
        parent = models[next(iter(planned.parts.values())).checkpoint]
        losses: list[float] = []
        result = distil(
            result,
            parent,
            data,
            steps=training.steps,
            learning_rate=training.learning_rate,
            progress=lambda _, loss: losses.append(loss),
        )
        found["distilled"] = {"first_loss": losses[0], "last_loss": losses[-1]}
    return result, found


def save(job: Job, name: str, arm: ModelsArm, model: Any, found: Any, folder: Path) -> None:
    """Write a checkpoint with its processors, card and record."""
    folder.mkdir(parents=True)
    save_shared(model, folder)
    source = job.folders[job.members[0]]
    for file in sorted(source.iterdir()):
        words = file.suffix in (".json", ".txt", ".model", ".jinja")
        if words and file.name not in LEFT_BEHIND and "safetensors" not in file.name:
            shutil.copy(file, folder / file.name)
    parts = {key: part.model_dump(exclude_defaults=True) for key, part in job.entry.parts.items()}
    record = {"arm": name, "members": parts, "merge": arm.model_dump(exclude_defaults=True)}
    write_json(folder / "alloy_merge.json", {**record, **found})
    rows = [[key, part.checkpoint, part.part] for key, part in job.entry.parts.items()]
    card = cards.Card(
        title=f"{job.recipe.name}: {name}",
        description=f"Parts of models merged into one trunk by `{arm.method}`. Their weights are "
        "stored once: load it with `alloy.load_shared`.",
        architecture=type(model).__name__,
        command=f"python -m tasks.merge {job.recipe.name}",
        sources=cards.Sources(["member", "checkpoint", "part"], rows),
        settings=record["merge"],
        notes="`alloy_merge.json` has every setting.",
        **cards.parents(job.folders),
    )
    (folder / "README.md").write_text(cards.render(card))
