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

from torch import Tensor

import alloy
from alloy.errors import MergeError, nearest_tensors
from alloy.merging import MERGE_METHODS
from alloy.modality import ModalityModel, agnostic_config, shared_weights, split_experts
from alloy.modality.observe import REFERENCE
from alloy.modality.sensitivity import affine_grams, without_constant
from alloy.modality.sequential import merge_sequentially
from alloy.statistics.moments import Gram
from tasks.evaluation.loading import use_device
from tasks.experts.shared.alignment import aligned
from tasks.experts.shared.loading import load_model
from tasks.experts.shared.statistics import load_statistics
from tasks.experts.shared.streams import answer_sensitivities, calibration, move
from tasks.recipe.experts import LOWER_EXPERTS, ArmParams, ExpertsRecipe
from tasks.reports import cards
from tasks.storage import folder_digest, write_folder, write_json

Experts = Mapping[str, Mapping[str, Tensor]]
Grams = Mapping[str, Gram]


def merge_experts(
    experts: Experts,
    arm: ArmParams,
    *,
    base: Mapping[str, Tensor] | None = None,
    grams: Mapping[str, Grams] | None = None,
) -> dict[str, Tensor]:
    """Merge the experts of every block: v and l, in the joint ones `arm.joint_experts`."""
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
        raise MergeError(f"patterns {idle} decide nothing: {nearest_tensors(idle[0], every)}")
    return {name: given[p] for name in names if (p := decides[name]) is not None}


def merge_arm(
    arm: ArmParams, recipe: ExpertsRecipe, reports: dict[str, Any] | None = None
) -> ModalityModel:
    """The agnostic model of one arm; what its gauge says of it goes into `reports`."""
    workspace = recipe.workspace
    source = load_model(workspace.checkpoints / arm.checkpoint)
    data = calibration(recipe, arm) if arm.reads_data else []
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
        grams = load_statistics(workspace.statistics / arm.checkpoint).grams
    if arm.align:
        experts, grams_moved = aligned(experts, arm.checkpoint, workspace, grams)
        grams = None if grams is None else grams_moved
    base = None
    if arm.base is not None:
        base = load_model(workspace.checkpoints / arm.base).state_dict()
    merged = merge_experts(experts, arm, base=base, grams=grams)
    model = ModalityModel(agnostic_config(source.config))
    model.load_state_dict({**shared_weights(weights, source.config), **merged}, strict=True)
    return model.eval()


def _sequential_options(arm: ArmParams) -> dict[str, Any]:
    """The method's options with its defaults."""
    known = MERGE_METHODS["sequential"].options
    return {name: arm.options.get(name, option.default) for name, option in known.items()}


def write_checkpoint(model: ModalityModel, source: Path, card: str, folder: Path) -> None:
    """A folder that `from_pretrained` loads: weights, config, the source's tokenizer, a card."""
    model.cpu().save_pretrained(folder)
    for file in sorted(source.glob("token*.json")) + sorted(source.glob("special_tokens*.json")):
        shutil.copy(file, folder)
    (folder / "README.md").write_text(card)


def card(recipe: str, name: str, arm: ArmParams, checkpoints: Path) -> str:
    """README.md of an arm: what was merged, how, and from which bytes."""
    sources = sorted({arm.checkpoint, *([arm.base] if arm.base else [])})
    rows = [[source, folder_digest(checkpoints / source)] for source in sources]
    return cards.render(
        cards.Card(
            title=f"{name}: a merged modality-agnostic transformer",
            description="The vision, language and cross-modal experts of one checkpoint merged "
            "into one model that serves images, texts and pairs (arXiv:2304.14933).",
            architecture=cards.MODALITY,
            command=f"python -m tasks.merge {recipe}",
            sources=cards.Sources(["source", "SHA-256 of its files"], rows),
            settings=arm.model_dump(exclude_none=True),
            **cards.parents({source: checkpoints / source for source in sources}),
        )
    )


def _coefficients(
    arm: ArmParams, modalities: Sequence[str], names: Sequence[str], every: Sequence[str]
) -> list[float] | dict[str, list[float]] | None:
    """The arm's coefficients of these modalities, in their order; by pattern as by name."""
    given = arm.coefficients_of(modalities)
    return _by_name(given, names, every) if isinstance(given, Mapping) else given


def main(recipe: ExpertsRecipe) -> None:
    workspace = recipe.workspace
    use_device("merge", float64=True)
    with write_folder(workspace.arms) as arms:
        for name, arm in recipe.merge.arms.items():
            how = ", aligned" * arm.align + ", in the best gauge" * (arm.gauge is not None)
            print(f"merge: {name}: {arm.method} of {arm.checkpoint}{how}")
            (arms / name).mkdir()
            reports: dict[str, Any] = {}
            write_checkpoint(
                merge_arm(arm, recipe, reports),
                workspace.checkpoints / arm.checkpoint,
                card(recipe.name, name, arm, workspace.checkpoints),
                arms / name,
            )
            for kind, report in reports.items():
                write_json(arms / name / f"{kind}.json", report)
    print(f"merge: wrote {workspace.arms}: {len(recipe.merge.arms)} arms")
