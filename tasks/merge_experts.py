"""Make one modality-agnostic model of a checkpoint's experts, in every way that the recipe names.

The merge stage of recipes of kind "modality". The arm that `merge.result` names becomes
`models/<recipe>/merged/`; all of them, for comparison, go to `models/<recipe>/arms/<arm>/`.
Embeddings and heads are the checkpoint's own.
"""

import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import alloy
from alloy.alignment.grams import transport_grams
from alloy.errors import MergeError, nearest
from alloy.merging import MERGE_METHODS, validate
from alloy.modality import ModalityModel, agnostic_config, shared_weights, split_experts
from alloy.modality.observe import REFERENCE, expert_spec
from alloy.modality.sensitivity import affine_grams, without_constant
from alloy.modality.sequential import merge_sequentially
from alloy.statistics.moments import Gram
from alloy.symmetry import transforms_from_tensors
from tasks.collect import load_spec, load_statistics
from tasks.gauge import answer_sensitivities, calibration, move
from tasks.models import load_model
from tasks.params import ArmParams, MergeParams, ParamsError, load
from tasks.storage import folder_digest, write_folder, write_json

Experts = Mapping[str, Mapping[str, Tensor]]
Grams = Mapping[str, Gram]
LOWER_EXPERTS = ("v", "l")  # the blocks below the joint ones have no others


def merge_experts(
    experts: Experts,
    arm: ArmParams,
    *,
    base: Mapping[str, Tensor] | None = None,
    grams: Mapping[str, Grams] | None = None,
) -> dict[str, Tensor]:
    """Merge the experts of every block: v and l in the lower ones, `arm.joint_experts` in the joint."""
    joint, every = experts["vl"], list(experts[REFERENCE])
    lower = [name for name in experts[REFERENCE] if name not in joint]
    merged: dict[str, Tensor] = {}
    for names, modalities in ((lower, LOWER_EXPERTS), (list(joint), arm.joint_experts)):
        if not names:
            continue
        statistics = (
            None
            if grams is None
            else [{n: grams[m][n] for n in names if n in grams[m]} for m in modalities]
        )
        merged |= alloy.merge(
            arm.method,
            [{name: experts[m][name] for name in names} for m in modalities],
            base=None if base is None else {name: base[name] for name in names},
            coefficients=_coefficients(arm, modalities, names, every),
            statistics=statistics,
            **{
                option: _by_name(value, names, every) if isinstance(value, Mapping) else value
                for option, value in arm.options.items()
            },
        )
    return merged


def _by_name(
    given: Mapping[str, Any], names: Sequence[str], every: Sequence[str]
) -> dict[str, Any]:
    """Values by glob pattern as values by name, of the blocks that are merged at once.

    A pattern may be about the lower or the joint blocks alone, so it is matched against every name.
    """
    decides = {name: next((p for p in given if fnmatchcase(name, p)), None) for name in every}
    if idle := [pattern for pattern in given if pattern not in decides.values()]:
        raise MergeError(f"patterns {idle} decide nothing: {nearest(idle[0], list(every))}")
    return {name: given[p] for name in names if (p := decides[name]) is not None}


def aligned(
    experts: Experts, checkpoint: str, models: Path, grams: Mapping[str, Grams] | None = None
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Grams]]:
    """The experts with the units of each moved as align found best, and their Grams with them."""
    spec = load_spec(models / "statistics" / checkpoint)
    transforms = models / "transforms" / checkpoint
    moved, moved_grams = dict(experts), dict(grams or {})
    for modality, weights in experts.items():
        if modality == REFERENCE or not weights:
            continue
        inner = expert_spec(spec, weights)
        found = transforms_from_tensors(load_file(transforms / f"{modality}.safetensors"), inner)
        moved[modality] = alloy.transport(weights, inner, found)
        if grams is not None:
            moved_grams[modality] = transport_grams(grams[modality], inner, found)
    return moved, moved_grams


def merge_arm(arm: ArmParams, models: Path, reports: dict[str, Any] | None = None) -> ModalityModel:
    """The agnostic model of one arm; what its gauge says of it goes into `reports`."""
    source = load_model(models / "checkpoints" / arm.checkpoint).cpu()
    data = calibration(models, arm.masked_share) if _reads_data(arm) else []
    if arm.gauge is not None:
        source, report = move(source, arm.gauge, data, arm.answers)
        if reports is not None:
            reports["gauge"] = report
    if arm.method == "sequential":
        return merge_sequentially(
            source,
            data,
            answer_sensitivities(source, data, arm.answers),
            joint_experts=arm.joint_experts,
            **_sequential_options(arm),
        )
    weights = source.state_dict()
    experts: Experts = split_experts(weights, source.config)
    grams: Mapping[str, Grams] | None = None
    if MERGE_METHODS[arm.method].statistics == "gram" and arm.gauge is not None:
        grams = without_constant(
            affine_grams(source, data, answer_sensitivities(source, data, arm.answers))
        )
    elif MERGE_METHODS[arm.method].statistics == "gram":
        grams = load_statistics(models / "statistics" / arm.checkpoint).grams
    if arm.align:
        experts, grams_moved = aligned(experts, arm.checkpoint, models, grams)
        grams = None if grams is None else grams_moved
    base = None
    if arm.base is not None:
        base = load_model(models / "checkpoints" / arm.base).cpu().state_dict()
    merged = merge_experts(experts, arm, base=base, grams=grams)
    model = ModalityModel(agnostic_config(source.config))
    model.load_state_dict({**shared_weights(weights, source.config), **merged}, strict=True)
    return model.eval()


def _reads_data(arm: ArmParams) -> bool:
    """Whether an arm sees the calibration data itself, not only the statistics that collect took of it."""
    return arm.gauge is not None or arm.method == "sequential"


def _sequential_options(arm: ArmParams) -> dict[str, Any]:
    """The method's options with its defaults."""
    known = MERGE_METHODS["sequential"].options
    return {name: arm.options.get(name, option.default) for name, option in known.items()}


def write_checkpoint(model: ModalityModel, source: Path, card: str, folder: Path) -> None:
    """A folder that `from_pretrained` loads: weights, config, the source's tokenizer, a card."""
    model.save_pretrained(folder)
    for file in sorted(source.glob("token*.json")) + sorted(source.glob("special_tokens*.json")):
        shutil.copy(file, folder)
    (folder / "README.md").write_text(card)


def card(recipe: str, name: str, arm: ArmParams, models: Path) -> str:
    """What was merged, how, and from which bytes."""
    sources = {arm.checkpoint, *([arm.base] if arm.base else [])}
    digests = "\n".join(
        f"| `{source}` | `{folder_digest(models / 'checkpoints' / source)}` |"
        for source in sorted(sources)
    )
    settings = "\n".join(f"- {key}: `{value}`" for key, value in arm.model_dump().items())
    return f"""---
library_name: transformers
tags: [merge, alloy]
license: apache-2.0
---
# {name}: a merged modality-agnostic transformer

The vision, language and cross-modal experts of one checkpoint merged into one model that serves images, texts
and pairs (arXiv:2304.14933). Made by `python -m tasks.merge {recipe}`; load it with
`import alloy.modality; AutoModel.from_pretrained(folder)`.

| source | SHA-256 of its files |
|---|---|
{digests}

{settings}
"""


def _refuse_impossible(params: MergeParams, recipe: str, models: Path) -> None:
    """Everything that can be wrong with an arm, before the first is merged."""
    known = sorted(folder.name for folder in (models / "checkpoints").iterdir() if folder.is_dir())
    for name, arm in params.arms.items():
        where = f"params/{recipe}.yaml: merge.arms.{name}"
        for key, asked, right in (
            ("method", arm.method, list(MERGE_METHODS)),
            ("checkpoint", arm.checkpoint, known),
            ("base", arm.base, known),
        ):
            if asked is not None and asked not in right:
                raise ParamsError(f"{where}.{key}: {asked!r}: {nearest(asked, right)}")
        if arm.gauge is not None and arm.align:
            raise ParamsError(
                f"{where}: align moves units before the search of the gauge undoes it; leave out one"
            )
        for key, given in (("answers", arm.answers), ("masked_share", arm.masked_share)):
            if given and not _reads_data(arm):
                raise ParamsError(
                    f"{where}.{key} is of method sequential and of a gauge's search; leave it out"
                )
        if arm.method == "sequential" and arm.coefficients is not None:
            raise ParamsError(
                f"{where}: sequential weighs all experts alike; leave out coefficients"
            )
        for modalities in (LOWER_EXPERTS, arm.joint_experts):
            check_arm(where, arm, modalities)


def check_arm(where: str, arm: ArmParams, modalities: Sequence[str]) -> None:
    """ParamsError unless the method can merge these modalities so."""
    try:
        validate(
            arm.method,
            [],
            num_models=len(modalities),
            base=arm.base is not None,
            statistics=MERGE_METHODS[arm.method].statistics == "gram",
            coefficients=_coefficients(arm, modalities),
            options=arm.options,
            inputs=MERGE_METHODS[arm.method].inputs if arm.method == "sequential" else (),
        )
    except MergeError as error:
        raise ParamsError(f"{where}: {error}") from error


def _coefficients(
    arm: ArmParams, modalities: Sequence[str], names: Sequence[str] = (), every: Sequence[str] = ()
) -> list[float] | dict[str, list[float]] | None:
    """The arm's coefficients of these modalities, in their order; by pattern as by name."""
    if arm.coefficients is None:
        return None
    given: Any = arm.coefficients
    if all(isinstance(row, Mapping) for row in given.values()):
        rows = {pattern: _in_order(row, modalities) for pattern, row in given.items()}
        return _by_name(rows, names, every) if every else rows
    return _in_order(given, modalities)


def _in_order(given: Mapping[str, Any], modalities: Sequence[str]) -> list[float]:
    if missing := [m for m in modalities if m not in given]:
        raise MergeError(f"coefficients {dict(given)} lack {missing}")
    return [given[m] for m in modalities]


def main(recipe: str) -> None:
    params = load(recipe, "merge", MergeParams)
    models = Path("models") / recipe
    _refuse_impossible(params, recipe, models)
    with write_folder(models / "arms") as arms:
        for name, arm in params.arms.items():
            how = ", aligned" * arm.align + ", in the best gauge" * (arm.gauge is not None)
            print(f"merge: {name}: {arm.method} of {arm.checkpoint}{how}")
            (arms / name).mkdir()
            reports: dict[str, Any] = {}
            write_checkpoint(
                merge_arm(arm, models, reports),
                models / "checkpoints" / arm.checkpoint,
                card(recipe, name, arm, models),
                arms / name,
            )
            for kind, report in reports.items():
                write_json(arms / name / f"{kind}.json", report)
    with write_folder(models / "merged") as merged:
        shutil.copytree(models / "arms" / params.result, merged, dirs_exist_ok=True)
    print(f"merge: wrote {models / 'arms'}; {models / 'merged'} is the arm {params.result!r}")
