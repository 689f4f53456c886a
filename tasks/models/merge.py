"""merge, for recipes of kind "models": make every arm of every set and seed.

The members are moved as align chose and merged by any method of `alloy.merge`; the repairs of
an arm run on calibration data. Each arm, in `models/<recipe>/arms/`, is a checkpoint that
`from_pretrained` loads, with a model card. Where only a part of the layers is shared (partial
zip, or heads of their own), it is one checkpoint a member.
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import alloy
from alloy.alignment.result import Alignment
from alloy.checkpoint.format import sentence_modules
from alloy.devices import device_pool
from alloy.errors import AlignmentError, MergeError
from alloy.merging import MERGE_METHODS, oriented
from alloy.refit import repair
from alloy.statistics.points import transposed_weights
from tasks.evaluation import accuracy
from tasks.evaluation.loading import load_any, load_config, use_device
from tasks.evaluation.outputs import answers
from tasks.models import stream
from tasks.models.shared.alignment import load_alignment
from tasks.models.shared.heads import headless, with_head
from tasks.models.shared.heads import heads as heads_of
from tasks.models.shared.jobs import Job, Progress, Report, jobs, load_weights, run_jobs
from tasks.models.shared.kept import kept as kept_of
from tasks.models.shared.searched import searched
from tasks.models.shared.statistics import load_statistics
from tasks.recipe.models import ModelsArm, ModelsRecipe
from tasks.reports import cards
from tasks.storage import read_json, write_folder, write_json

LEFT_BEHIND = ("config.json", "manifest.json", "alloy_merge.json", "README.md")  # of the reference
DOUBLED_RTOL, DOUBLED_ATOL = 1e-3, 1e-5  # logits of a doubled layer are doubled, up to rounding
COUNTER = "num_batches_tracked"  # of a batch norm: no weight, and nothing reads it afterwards

Weights = dict[str, Tensor]


def main(recipe: ModelsRecipe) -> None:
    recipe = searched(recipe)
    if recipe.is_trunk:
        # Imports our own models, and with them those of transformers: seconds.
        from tasks.models.shared.trunk import main as merge_parts

        merge_parts(recipe)
        return
    use_device("merge", float64=True)
    if not recipe.is_calibrated:
        stream.main(recipe)
        return
    planned = {job.name: job for job in jobs(recipe) if recipe.arms(job.set)}
    with write_folder(recipe.workspace.arms) as folder:
        num = {name: len(recipe.arms(job.set)) for name, job in planned.items()}
        arguments = {name: (job, job.within(folder)) for name, job in planned.items()}
        run_jobs("merge", merge_all, arguments, num, devices=device_pool())
    print(
        f"merge: wrote {recipe.workspace.arms}: {sum(num.values())} merged models "
        f"of {len(planned)} sets"
    )


def merge_all(job: Job, folder: Path, report: Report) -> None:
    """All arms of one set and seed."""
    weights = job.weights()
    for name, arm in job.recipe.arms(job.set).items():
        alignment = load_alignment(job, arm.aligned_by)
        progress = Progress(f"{job.name}: {name}", report)
        try:
            merged, repairs = merge_arm(job, arm, alignment, weights, partial(_fitted, progress))
        except ValueError as error:
            raise ValueError(f"set {job.set!r}: merge.arms.{name}: {error}") from error
        for member, tensors in merged.items():
            place = folder / name if len(merged) == 1 else folder / name / member
            save(job, tensors, member, place, record(job, name, arm, alignment, repairs))
        report("step")
        what = "one model" if len(merged) == 1 else f"{len(merged)} models that share layers"
        report("say", f"{job.name}: {name}: {what}")


def _fitted(progress: Progress, num: int, num_layers: int) -> None:
    if num < num_layers:
        progress(f"{num} of {num_layers} layers fitted")


def merge_arm(
    job: Job,
    arm: ModelsArm,
    alignment: Alignment,
    weights: Mapping[str, Weights],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Weights], dict[str, Any]]:
    """The merged model by the reference's name, or all members where they keep layers of their own.

    Also what its repairs measured. Raises ValueError for an arm that cannot be made.
    """
    aligned = {name: dict(tensors) for name, tensors in alignment.apply(weights).items()}
    for tensors in aligned.values():
        tensors.update(
            {n: t for n, t in aligned[alignment.reference].items() if n.endswith(COUNTER)}
        )
    own = aligned[alignment.reference]
    heads = heads_of(job, own)
    tails = {*own} - heads - (alignment.shared or {*own})  # of a partial zip
    stays = kept_of(job, own)
    if both := sorted(stays & heads):
        raise MergeError(f"heads and kept both name {both[0]!r}")
    kept = {n: t for n, t in own.items() if n in stays}
    names = [n for n in own if n not in stays | heads | tails]
    base = None
    if arm.base is not None:
        tensors = load_weights(job.workspace.checkpoints / arm.base)
        base = {name: tensors[name] for name in names}
    options = dict(arm.options)
    if "transposed" in MERGE_METHODS[arm.method].options:
        options = oriented(options, transposed_weights(job.skeleton) & set(names))
    merged = alloy.merge(
        arm.method,
        [{name: tensors[name] for name in names} for tensors in aligned.values()],
        base=base,
        coefficients=arm.coefficients,
        statistics=grams_of(job, arm, alignment, names),
        **options,
    )
    if tails:
        repairs = type(arm.repair)
        if arm.repair not in (repairs(), repairs(batch_norm=True)):
            raise ValueError(
                "repairs but batch_norm need one merged model; this alignment shares a part of "
                "the layers"
            )
        parts = {name: {**tensors, **merged} for name, tensors in aligned.items()}
        if arm.repair.batch_norm:
            seen = job.seen()
            parts = {n: repair.reestimate_norms(job.skeleton, w, seen) for n, w in parts.items()}
        return parts, {}
    first = {n: own[n] for n in heads}  # a layer behind the trunk says nothing about the trunk
    parents = {name: {**tensors, **first} for name, tensors in aligned.items()}
    whole, repairs = repaired(job, arm, alignment, {**merged, **kept, **first}, parents, progress)
    trunk = {**whole[alignment.reference], **kept}
    if not heads:
        return {alignment.reference: trunk}, repairs
    return {
        name: {**trunk, **{n: tensors[n] for n in heads}} for name, tensors in aligned.items()
    }, repairs


def grams_of(
    job: Job, arm: ModelsArm, alignment: Alignment, names: Sequence[str]
) -> list[dict[str, Any]] | None:
    """The Grams of each member's layers in the common units, for methods that need them."""
    if arm.method not in MERGE_METHODS or MERGE_METHODS[arm.method].statistics is None:
        return None
    if MERGE_METHODS[arm.method].statistics != "gram":
        raise MergeError(f"{arm.method} needs labels; use alloy.merge with your own statistics")
    statistics = load_statistics(job)
    if not statistics.grams:
        raise MergeError(
            f"{arm.method} needs Grams of the layers' inputs: set collect.grams to true"
        )
    try:
        moved = alignment.move(replace(statistics, places={})).grams
    except AlignmentError as error:
        raise MergeError(
            f"{arm.method} needs Grams in the common units, which alignment {arm.alignment!r} "
            f"does not give; choose one that permutes: {error}"
        ) from error
    return [
        {weight: gram for weight, gram in moved[name].items() if weight in names}
        for name in alignment.names
    ]


def repaired(
    job: Job,
    arm: ModelsArm,
    alignment: Alignment,
    merged: Weights,
    parents: Mapping[str, Weights],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Weights], dict[str, Any]]:
    """The merged model after the repairs that the arm switches on, and what they measured."""
    switches, measured = arm.repair, {}
    if switches == type(switches)():
        return {alignment.reference: merged}, measured
    if switches.repair and not alignment.exact:
        raise ValueError(
            f"repair looks at the aligned parents' activations, and alignment {arm.alignment!r} "
            f"({alignment.preset}) does not keep their functions"
        )
    model, seen = job.skeleton, job.seen()
    row = arm.one_row
    shares = None if row is None else dict(zip(parents, row, strict=True))
    if (fit := switches.permuted_least_squares) is not None:
        merged = repair.fit_layers(
            model,
            merged,
            parents if alignment.exact else unaligned(job, arm, alignment),
            seen,
            coefficients=shares,
            example_weights=None
            if fit.targets == "mean"
            else confidence(job, seen, blind=fit.targets == "blind_confidence"),
            inputs=fit.inputs,
            residual=fit.residual,
            ridge=fit.ridge,
            spec=alignment.spec,
            progress=progress,
        )
    if switches.repair:
        merged = repair.match_variance(
            model, merged, parents, seen, alignment.spec, coefficients=shares
        )
    if switches.batch_norm:
        merged = repair.reestimate_norms(model, merged, seen)
    if switches.temperature:
        factor = temperature(model, merged, job, seen)
        layer = output_layer(model, merged, seen[0])
        merged, measured["temperature"] = repair.scale_outputs(merged, layer, factor), factor
    return {alignment.reference: merged}, measured


def unaligned(job: Job, arm: ModelsArm, alignment: Alignment) -> dict[str, Weights | nn.Module]:
    """The parents as they are, for an alignment that does not keep their functions.

    The first is the reference, whose units the merged model has; the others run in their own
    modules.
    """
    if alignment.maps.get(alignment.reference):
        raise ValueError(
            "permuted_least_squares follows parents in the reference's units, and alignment "
            f"{arm.alignment!r} ({alignment.preset}) gives the merged model other ones"
        )
    parents: dict[str, Weights | nn.Module] = {}
    for name, folder in job.folders.items():
        if name == alignment.reference:
            parents[name] = load_weights(folder)
        elif job.entry.heads:
            parents[name] = headless(job, load_any(folder), alignment.specs[name])
        else:
            parents[name] = load_any(folder)
    return parents


def confidence(job: Job, seen: Sequence[Mapping[str, Tensor]], *, blind: bool) -> Tensor:
    """Each parent's confidence in its own answer to each calibration example [P, N]; no labels.

    Without a benchmark, whose classes say what each parent knows, or if `blind`, by its largest
    log-probability of any class.
    """
    outputs = [_logits(load_any(folder), seen) for folder in job.folders.values()]
    num = sum(len(next(iter(batch.values()))) for batch in seen)
    if any(len(logits) != num for logits in outputs):
        raise ValueError("targets 'confidence' needs models with one answer an example")
    benchmark = job.benchmark
    if benchmark is not None and not job.entry.heads:
        classes = load_file(benchmark / "classes.safetensors")
        outputs = [accuracy.logits(logits, classes) for logits in outputs]
        if not blind:
            return accuracy.confidence(outputs, classes)
    return accuracy.blind_confidence(outputs)


def temperature(
    model: nn.Module, merged: Weights, job: Job, seen: Sequence[Mapping[str, Tensor]]
) -> float:
    """The factor on the merged logits that brings them nearest to the parents' mean answer."""
    parents = [load_any(folder) for folder in job.folders.values()]
    mean = torch.stack([_logits(parent, seen).softmax(-1) for parent in parents]).mean(0)
    model.load_state_dict(merged)
    return repair.inverse_temperature(_logits(model, seen), mean)


def _logits(model: nn.Module, seen: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Logits of all examples [N, C]; where every token has some, tokens are the examples."""
    return torch.cat([answers(model, batch).rows for batch in seen])


@torch.no_grad()
def output_layer(model: nn.Module, weights: Weights, batch: Mapping[str, Tensor]) -> str:
    """The layer whose weight and bias scale the logits: doubling them doubles the logits.

    Raises ValueError where there is none, as for an output layer that is also the embedding.
    """
    model.load_state_dict(weights)
    before = answers(model, batch).rows
    candidates = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "dim", lambda: 0)() >= 2
        and before.shape[-1] in module.weight.shape
    ]
    for name in reversed(candidates):
        model.load_state_dict(repair.scale_outputs(weights, name, 2.0))
        doubled = answers(model, batch).rows
        if torch.allclose(doubled, 2 * before, rtol=DOUBLED_RTOL, atol=DOUBLED_ATOL):
            return name
    raise ValueError("temperature: no layer of its own writes the logits, so none can be scaled")


def save(job: Job, weights: Weights, member: str, folder: Path, account: Mapping[str, Any]) -> None:
    """Write a checkpoint of the reference's architecture, with its processors, card and record."""
    reference = job.folders[account["reference"]]
    own_head = bool(job.entry.heads)
    model = with_head(job, member, weights) if own_head else copy.deepcopy(job.skeleton)
    name = job.recipe.merge.dtype
    dtype = getattr(torch, name) if name else load_config(reference).dtype or torch.float32
    model.load_state_dict(weights)
    model.to("cpu", dtype).save_pretrained(folder)
    for file in sorted(reference.iterdir()):
        # Words and settings travel with the model; weights and words about them do not.
        words = file.suffix in (".json", ".txt", ".model", ".jinja")
        if words and file.name not in LEFT_BEHIND and "safetensors" not in file.name:
            shutil.copy(file, folder / file.name)
    for module in sentence_modules(reference):
        if any((reference / module).glob("*.safetensors")):
            raise ValueError(
                f"{reference / module} has weights of a sentence encoder's own, which alignment "
                "does not move: merge its members as they are, without prepare, collect and align"
            )
        shutil.copytree(reference / module, folder / module)
    write_json(folder / "alloy_merge.json", {**account, "member": member})
    (folder / "README.md").write_text(card(job, account, type(model).__name__))


def record(
    job: Job, name: str, arm: ModelsArm, alignment: Alignment, repairs: Mapping[str, Any]
) -> dict[str, Any]:
    """An arm's origin and settings, as data."""
    return {
        "arm": name,
        "set": job.set,
        "seed": job.seed,
        "reference": alignment.reference,
        "alignment": job.recipe.calibrated[2]
        .alignments[arm.aligned_by]
        .model_dump(include={"preset", "settings", "score"}),
        "merge": arm.model_dump(exclude={"alignment", "elsewhere"}),
        "repairs": dict(repairs),
        "calibration": job.entry.calibration,
        "members": {name: _origin(folder) for name, folder in job.folders.items()},
        "command": f"python -m tasks.merge {job.recipe.name}",
    }


def _origin(folder: Path) -> dict[str, str]:
    manifest = read_json(folder / "manifest.json")
    return {key: manifest[key] for key in ("source", "revision", "digest") if key in manifest}


def card(job: Job, account: Mapping[str, Any], architecture: str) -> str:
    """README.md of a merged model."""
    alignment, merge = account["alignment"], account["merge"]
    repairs = [key for key, value in merge["repair"].items() if value not in (None, False)]
    rows = [
        [name, str(origin.get("source")), str(origin.get("revision"))]
        for name, origin in account["members"].items()
    ]
    return cards.render(
        cards.Card(
            title=f"{job.recipe.name}: {account['arm']} of set {job.set}, seed {job.seed}",
            description=f"The members' units aligned by `{alignment['preset']}` to "
            f"{cards.code(account['reference'])} and merged by `{merge['method']}`; repaired by "
            f"{', '.join(repairs) or 'nothing'}.",
            architecture=architecture,
            command=account["command"],
            sources=cards.Sources(["member", "source", "revision"], rows),
            settings={
                "alignment settings": alignment["settings"] or "defaults",
                "merge options": merge["options"] or "defaults",
                "calibration data": account["calibration"],
            },
            notes="`alloy_merge.json` has every setting.",
            **cards.parents(job.folders),
        )
    )
