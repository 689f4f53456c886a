"""Register the recipe's result in MLflow, with the lineage that says what it was made of.

One run a result: metrics, params, report and plots, and `lineage.json`: the hashes of the parents,
the digests of the data, the git revision and the DVC lock. Below it a run for each arm, and those
of fine-tuning. The model becomes a new version of the registered model, alias
`challenger`; `flows.promote` compares it with `champion`. A result that is registered already is
not registered again.

    python -m tasks.register RECIPE
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks import storage
from tasks.recipe.load import PARAMS, Recipe, load_file, read
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import PromoteParams, chosen_arm
from tasks.registry import tracking
from tasks.registry.held import KEY
from tasks.reports.mlflow_pages import forward, version_page
from tasks.usage import last_runs
from tasks.workspace import LOCK_FILE, Workspace, revision

CHALLENGER = "challenger"
CIRCUMSTANCES = ("git", "dvc_lock")  # of the lineage: equal results may differ in them
# What the served model imports, besides MLflow's own needs.
PACKAGES = (
    "mlflow", "numpy", "pandas", "pillow", "safetensors", "scipy", "tokenizers", "torch",
    "transformers",
)  # fmt: skip
MODALITY = "modality"
_LONGEST_PARAM = 6000  # MLflow's limits
_LONGEST_DESCRIPTION = 5000
SPLITS = ("validation", "test", "held_out", "calibration")
GATES = PARAMS / "promote.yaml"


def main(recipe: Recipe) -> None:
    section, workspace = recipe.registration, recipe.workspace
    folder = section.folder(workspace)
    refuse_many_models(recipe, folder)
    lineage = {
        **find_lineage(recipe),
        "model": section.model,
        "digest": storage.folder_digest(folder),
    }
    result = {name: value for name, value in lineage.items() if name not in CIRCUMSTANCES}
    key = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
    tracking.close_killed_runs(recipe.name)
    number = _registered(section.name, key) or _register(recipe, folder, lineage, key)
    storage.write_json(
        workspace.registered,
        {"name": section.name, "version": number, "result": key, "lineage": lineage},
    )
    with storage.write_file(workspace.registered_page) as path:
        path.write_text(forward(version_page(section.name, number), f"{section.name} {number}"))
    print(f"registered {section.name} version {number}; load it as models:/{section.name}/{number}")


def refuse_many_models(recipe: Recipe, folder: Path) -> None:
    """Raise ParamsError where the result is not one model."""
    if not (folder / "config.json").is_file():
        models = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise ParamsError(
            f"{recipe.where}: register.model: {folder} holds no model but {models or 'nothing'}; "
            "fine-tune one model on all benchmarks, or register the merged one (model: merged)"
        )


def find_lineage(recipe: Recipe) -> dict[str, Any]:
    """The origin of a result of the recipe, as far as it lies in the workspace.

    `parents`: source, revision and digest by checkpoint; `data`: SHA-256 by file; the params file,
    the git revision (with `+changes` for a dirty tree) and the SHA-256 of `dvc.lock`.
    """
    workspace = recipe.workspace
    return {
        "recipe": recipe.name,
        "parents": find_parents(workspace),
        "data": find_data(recipe),
        "metrics": storage.sha256(workspace.metrics),
        "params": storage.sha256(workspace.params),
        "git": revision(),
        "dvc_lock": storage.sha256(LOCK_FILE) if LOCK_FILE.is_file() else None,
    }


def find_data(recipe: Recipe) -> dict[str, str]:
    """SHA-256 by file; of kind "models" also the data of each set, as `SET/SPLIT.safetensors`.

    And of each benchmark of `evaluate`. Under that name gates look for the data of a score
    (`tasks.registry.promotion`).
    """
    manifest = recipe.workspace.data_manifest
    files = storage.read_json(manifest)["files"] if manifest.is_file() else {}
    if not isinstance(recipe, ModelsRecipe):
        return files
    of_benchmarks = storage.read_json(recipe.workspace.metrics).get("data", {})
    measured = {f"{place}.safetensors": digest for place, digest in of_benchmarks.items()}
    if not recipe.is_calibrated:
        return measured
    for name, entry in recipe.sets.items():
        splits = ("validation", "test") if entry.benchmark else ("calibration",)
        for split in splits:
            file = (
                f"benchmarks/{entry.benchmark}/{split}"
                if entry.benchmark
                else f"calibration/{entry.calibration}"
            )
            measured[f"{name}/{split}.safetensors"] = files[f"{file}.safetensors"]
    return {**files, **measured}


def find_parents(workspace: Workspace) -> dict[str, dict[str, str]]:
    """Source, revision and digest of each fetched checkpoint, by name."""
    return {
        path.parent.name: {
            name: value
            for name, value in storage.read_json(path).items()
            if name in ("source", "revision", "digest")
        }
        for path in sorted(workspace.checkpoints.glob("*/manifest.json"))
    }


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings, under names joined by `/`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _registered(name: str, key: str) -> str | None:
    """The version that this very result is already, after a run that died too early to say so."""
    numbers = [entry.number for entry in tracking.versions(name) if entry.tags.get(KEY) == key]
    if numbers and tracking.aliased(name, CHALLENGER) is None:
        tracking.move_alias(name, CHALLENGER, numbers[0])
    return numbers[0] if numbers else None


def _register(recipe: Recipe, folder: Path, lineage: Mapping[str, Any], key: str) -> str:
    section, workspace = recipe.registration, recipe.workspace
    scores = storage.read_json(workspace.metrics)
    models = {"merged", section.model, *_gated(recipe)}
    tags = {KEY: key, "stage": "register", "recipe": recipe.name, "digest": lineage["digest"]}
    with tracking.run(recipe.name, f"{recipe.name} {section.model}", tags) as log:
        log.params(_log_params(recipe))
        log.metrics(_numbers(_of_models(scores, models)))
        for usage in last_runs(recipe.name, failed=False).values():
            log.metrics(usage.metrics())
        packages = _packages(recipe)
        for path, digest in lineage["data"].items():
            file = workspace.data / path
            place = file if file.is_file() else workspace.params  # the recipe says where they lie
            source = {"uri": str(place), "packages": packages}
            log.dataset(f"{recipe.name}/{path}", digest, Path(path).stem, source)
        log.values(tracking.LINEAGE, lineage)
        for place in (
            workspace.metrics, workspace.examples, workspace.params, LOCK_FILE,
            workspace.page, workspace.table, workspace.plots, folder / "README.md",
        ):  # fmt: skip
            if place.exists():
                log.file(place)
        log_arms(recipe, scores, log.run_id)
        tracking.adopt(recipe.name, log.run_id, "finetune")
        log_pretraining(recipe, log.run_id)
        number = _log_model(
            log,
            section.name,
            folder,
            answers_of(workspace.data, folder),
            {KEY: key, "recipe": recipe.name},
        )
        log.tags({"version": f"models:/{section.name}/{number}"})
    tracking.describe(section.name, number, _description(recipe, log.run_id, lineage))
    return number


def log_pretraining(recipe: Recipe, parent: str) -> None:
    """A run below the result's for each parent whose pre-training this MLflow has: its curves."""
    made = tracking.makers("pretrain")
    for path in sorted(recipe.workspace.checkpoints.glob("*/manifest.json")) if made else ():
        files = storage.read_json(path).get("files", {})
        for source in {made[f["sha256"]] for f in files.values() if f["sha256"] in made}:
            tags = {"stage": "pretrain", "recipe": recipe.name, "source": source}
            name = f"pretrain {path.parent.name}"
            with tracking.run(recipe.name, name, tags, parent=parent) as log:
                log.curves_of(source)


def log_arms(recipe: Recipe, scores: Mapping[str, Any], parent: str) -> None:
    """A run for each model that was measured, below the result's: comparable in MLflow's page.

    Metrics have the same names in all of them, `SPLIT/BENCHMARK/METRIC`; an arm's params are its
    own section of the recipe.
    """
    arms: Mapping[str, Any] = read(recipe.name)["merge"]["arms"]
    measured = {model for split, of in scores.items() if _is_split(split, of) for model in of}
    for model in sorted({*measured, *arms}):
        tags, place = {"stage": "arm", "recipe": recipe.name}, recipe.folder(model)
        if (place / "config.json").is_file():
            tags["digest"] = storage.folder_digest(place)
        with tracking.run(recipe.name, model, tags, parent=parent) as log:
            given = arms.get(model, {})
            log.params({name.replace("/", "."): value for name, value in flatten(given)})
            own = {
                split: of[model]
                for split, of in scores.items()
                if _is_split(split, of) and model in of
            }
            log.metrics(_numbers(own))


def _is_split(name: str, content: object) -> bool:
    return name in SPLITS and isinstance(content, Mapping)


def _of_models(scores: Mapping[str, Any], models: Collection[str]) -> dict[str, Any]:
    """The scores of some models; distances and whatever else is no split stand as they are."""
    return {
        split: {model: of[model] for model in of if model in models} if _is_split(split, of) else of
        for split, of in scores.items()
    }


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flatten(scores) if isinstance(value, int | float)}


def _gated(recipe: Recipe) -> list[str]:
    gates = load_file("promote", PromoteParams).gates if GATES.is_file() else {}
    return [gates[recipe.name].model] if recipe.name in gates else []


def _packages(recipe: Recipe) -> dict[str, str]:
    manifest = recipe.workspace.data_manifest
    return storage.read_json(manifest).get("packages", {}) if manifest.is_file() else {}


def _description(recipe: Recipe, run_id: str, lineage: Mapping[str, Any]) -> str:
    """The version's page: what it is, where it comes from and how good it is."""
    workspace = recipe.workspace
    parents = ", ".join(
        f"{name} ({entry.get('source', '?')})" for name, entry in lineage["parents"].items()
    )
    arm = chosen_arm(recipe.named_arm, workspace)
    lines = [
        f"Recipe `{recipe.name}`, arm `{arm}`, commit `{lineage['git']}`.",
        f"Made of {parents}.",
        f"Run `{run_id}` has the report, the plots, the lineage and a run for each arm.",
    ]
    table = workspace.table.read_text() if workspace.table.is_file() else ""
    return "\n\n".join([*lines, table])[:_LONGEST_DESCRIPTION]


def _log_params(recipe: Recipe) -> dict[str, str]:
    flat = {name.replace("/", "."): str(v) for name, v in flatten(read(recipe.name))}
    for name, value in flat.items():
        if len(value) > _LONGEST_PARAM:
            raise ParamsError(f"{recipe.where}: {name} is too long for MLflow ({len(value)})")
    return flat


def answers_of(data: Path, checkpoint: Path) -> Sequence[str]:
    """The answers of a model's head, as the data that it was made for describe them."""
    num = storage.read_json(checkpoint / "config.json").get("num_answers")
    for path in sorted(data.glob("*/description.json")):
        answers = storage.read_json(path)["answers"]
        if answers and len(answers) == num:
            return answers
    return ()


def _log_model(
    log: tracking.Log, name: str, folder: Path, answers: Sequence[str], tags: Mapping[str, str]
) -> str:
    import alloy
    from tasks.registry import serving

    is_modality = storage.read_json(folder / "config.json").get("model_type") == MODALITY
    interface = _as_modality(folder, answers) if is_modality else _as_transformer(folder)
    return tracking.register(
        log,
        name,
        code=Path(serving.__file__),
        artifacts={"checkpoint": folder},
        packages=[Path(alloy.__file__).parent],
        requirements=[requirement(p) for p in (*PACKAGES, *interface.pop("packages", ()))],
        tags=tags,
        alias=CHALLENGER,
        **interface,
    )


def _as_modality(folder: Path, answers: Sequence[str]) -> dict[str, Any]:
    """The interface of a modality transformer, which transformers has no task for."""
    from tasks.registry import serving
    from tasks.registry.families import grey

    config = storage.read_json(folder / "config.json")
    example = {"text": "where is cat"}
    if "image_size" in config:
        example = {"image": grey(config["image_size"]), **example}
    return {
        "settings": {"answers": list(answers)},
        "inputs": serving.INPUTS,
        "outputs": serving.OUTPUTS,
        "options": serving.OPTIONS,
        "example": example,
        "flavour": None,
        "components": {},
    }


def _as_transformer(folder: Path) -> dict[str, Any]:
    """The interface of a model's family, and its entry in MLflow's transformers flavour."""
    import transformers

    from tasks.evaluation.loading import class_name
    from tasks.registry.families import Family, example_of, family_of

    family = family_of(folder) or Family(None, "", "")
    entry = {
        "task": family.task,
        "instance_type": family.pipeline,
        "pipeline_model_type": class_name(folder),
        "source_model_name": folder.name,
        "model_binary": f"artifacts/{folder.name}",
        "torch_dtype": None,
        "components": [kind for kind in family.components if kind != "processor"],
        **{f"{kind}_type": name for kind, name in family.components.items()},
        "transformers_version": transformers.__version__,
        "code": "code",
    }
    return {
        "settings": {"family": family.name},
        "inputs": family.inputs,
        "outputs": family.outputs,
        "options": family.options,
        "example": example_of(family, folder),
        "flavour": entry if family.task else None,
        "components": dict.fromkeys(family.components, folder),
        "packages": family.packages,
    }


def requirement(package: str) -> str:
    """The installed version, without what names a build or a place (`2.13.0+cpu`)."""
    return f"{package}=={re.sub(r'[+].*', '', version(package))}"
