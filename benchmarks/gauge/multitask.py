"""The gauge between classifiers of one modality: ViTs and BERTs of the multitask recipe.

The embeddings are merged here, too. In them both models see the same inputs, which no gauge can lay
side by side; tasks read different directions only in the layers behind. A parent counts in each
example as much as it is sure of it (`tasks.evaluation.accuracy.confidence`), in Grams and in least
squares alike, so no labels are needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import alloy
from alloy.errors import SymmetryError
from alloy.gauge import Gauge, merge_layers, search_gauge
from alloy.refit import LinearLayer, repair
from alloy.statistics.moments import Gram, kept_tokens
from alloy.symmetry import SymmetrySpec, fold_norms, identity, transport
from tasks.evaluation import accuracy
from tasks.evaluation.loading import load_any
from tasks.evaluation.outputs import answers
from tasks.models.measures.yardsticks import Labelled, as_candidate
from tasks.recipe.load import load_models
from tasks.recipe.models import ModelsRecipe

RECIPE = "multitask"
RELEASED, DATA = Path("released") / RECIPE, Path("data") / RECIPE
TABLES = ("cls_token", "position_embeddings")
"""Parameters of a ViT that are added as they are."""
RIDGE = 1e-2
"""Ridge of the recipe's arm `ours`."""
STEPS = 40
"""Steps of the search, fewer than for the modality transformer."""

Weights = dict[str, Tensor]
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Pair:
    """Two parents, folded where their norms allow it, and their shares in the calibration data."""

    model: nn.Module
    raw: dict[str, Weights]
    weights: dict[str, Weights]
    spec: SymmetrySpec
    folded: SymmetrySpec
    kept: str
    """The reason norms were not folded; empty where they were."""
    batches: Batches
    shares_PN: Tensor


def measure(sets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure every arm's joint accuracy on validation data, for every seed of the sets."""
    recipe = load_models(RECIPE)
    for name in sets:
        for seed, members in recipe.sets[name].members.items():
            pair = load_pair(recipe, name, members)
            yardstick = _yardstick(recipe, name)
            for arm, weights, facts in merges(pair):
                score = _score(pair.model, weights, yardstick)
                yield {"set": name, "seed": seed, "arm": arm, "joint": score, **facts}
            parents = [as_candidate(load_any(RELEASED / member)) for member in members]
            joint = yardstick.score(parents)["joint_accuracy"].value
            yield {"set": name, "seed": seed, "arm": "ensemble of the parents", "joint": joint}


def _yardstick(recipe: ModelsRecipe, name: str) -> Labelled:
    benchmark = recipe.sets[name].benchmark
    assert benchmark is not None
    folder = DATA / "benchmarks" / benchmark
    classes = load_file(folder / "classes.safetensors")
    examples = load_file(folder / "validation.safetensors")
    return Labelled(examples, classes, recipe.evaluate.batch_size)


def _score(model: nn.Module, weights: Weights, yardstick: Labelled) -> float:
    model.load_state_dict(weights)
    return round(yardstick.score([as_candidate(model)])["joint_accuracy"].value, 2)


def load_pair(recipe: ModelsRecipe, name: str, members: Sequence[str]) -> Pair:
    chosen = recipe.sets[name]
    inputs = load_file(DATA / "calibration" / f"{chosen.calibration}.safetensors")
    size = recipe.calibrated[1].batch_size
    num = len(next(iter(inputs.values())))
    batches = [{k: v[i : i + size] for k, v in inputs.items()} for i in range(0, num, size)]
    classes = load_file(DATA / "benchmarks" / str(chosen.benchmark) / "classes.safetensors")
    return make_pair({member: load_any(RELEASED / member) for member in members}, batches, classes)


def make_pair(models: Mapping[str, Any], batches: Batches, classes: Mapping[str, Tensor]) -> Pair:
    """Parents by name, what they see of the calibration data, and the classes they know."""
    members = list(models)
    model = models[members[0]]
    spec = alloy.find_symmetries(model, {k: v[:4] for k, v in batches[0].items()})
    raw = {
        member: {name: tensor.clone() for name, tensor in parent.state_dict().items()}
        for member, parent in models.items()
    }
    weights, folded, kept = raw, spec, ""
    try:
        folds = {member: fold_norms(own, spec, biases=True) for member, own in raw.items()}
        weights = {member: own for member, (own, _) in folds.items()}
        folded = folds[members[0]][1]
    except SymmetryError as error:
        kept = str(error)
    logits = [
        accuracy.logits(torch.cat([answers(m, batch).rows for batch in batches]), classes)
        for m in models.values()
    ]
    shares_PN = accuracy.confidence(logits, classes)
    return Pair(model, raw, weights, spec, folded, kept, batches, shares_PN)


def merges(pair: Pair) -> Iterator[tuple[str, Weights, dict[str, Any]]]:
    """Every arm's name, weights and facts."""
    names = list(pair.raw)
    aligned = aligned_by(pair, "mudsc", weight_share=0.5)
    similar = aligned.apply(pair.raw)
    yield "average", _mean(pair.raw), {}
    yield "mudsc", _mean(similar), {}
    yield "least squares", fitted(pair, _mean(pair.raw), pair.raw), {}
    yield "mudsc + least squares", fitted(pair, _mean(similar), similar), {}
    grams = [observed(pair, member, own) for member, own in enumerate(pair.weights.values())]
    still = [identity(pair.folded) for _ in names]
    yield "closed form", _closed_form(pair, pair.weights, grams, still), {}
    gauge = _search(pair, grams, aligned)
    moved = {
        name: transport(pair.weights[name], pair.folded, transforms)
        for name, transforms in zip(names, gauge.transforms, strict=True)
    }
    facts = {
        "error": [round(gauge.error_before, 3), round(gauge.error_after, 3)],
        "start": gauge.start,
        "streams": [use._asdict() for use in gauge.streams],
        "kept": pair.kept,
    }
    merged = _closed_form(pair, moved, grams, gauge.transforms)
    yield "gauge + closed form", merged, facts
    yield "gauge + least squares", fitted(pair, merged, moved), facts


def aligned_by(pair: Pair, preset: str, **settings: Any):
    """Align the pair by a preset of `alloy.align_models`."""
    models = {}
    for name, weights in pair.raw.items():
        models[name] = type(pair.model)(pair.model.config).eval()
        models[name].load_state_dict(weights)
    specs = dict.fromkeys(pair.raw, pair.spec)
    statistics = alloy.collect(models, pair.batches, specs)
    return alloy.align_models(pair.raw, specs, statistics, preset=preset, **settings)


def _search(pair: Pair, grams: Sequence[Mapping[str, Gram]], aligned) -> Gauge:
    other = list(pair.raw)[1]
    initial = {"mudsc": [identity(pair.folded), aligned.transforms[other]]}
    if not pair.kept:
        turned = aligned_by(pair, "orthogonal").transforms[other]
        initial["orthogonal"] = [identity(pair.folded), turned]
    models = list(pair.weights.values())
    return search_gauge(models, pair.folded, grams, initial=initial, steps=STEPS, max_rounds=1)


def _closed_form(
    pair: Pair,
    moved: Mapping[str, Weights],
    grams: Sequence[Mapping[str, Gram]],
    transforms: Sequence,
) -> Weights:
    """Merge into W* of all layers and the mean of the norms.

    `moved` are the models under the transforms.
    """
    models = list(pair.weights.values())
    layers = merge_layers(models, pair.folded, grams, transforms)
    mean = _mean(moved)
    return {**mean, **{name: tensor.to(mean[name]) for name, tensor in layers.items()}}


def _mean(models: Mapping[str, Weights]) -> Weights:
    first, *others = models.values()
    return {
        name: torch.stack([t, *(other[name] for other in others)]).mean(0)
        if t.is_floating_point()
        else t
        for name, t in first.items()
    }


def fitted(pair: Pair, merged: Weights, parents: Mapping[str, Weights]) -> Weights:
    """Refit every layer of a merge by least squares, each example as its surer parent has it."""
    return repair.fit_layers(
        pair.model, merged, parents, pair.batches, example_weights=pair.shares_PN, ridge=RIDGE
    )


@torch.no_grad()
def observed(pair: Pair, member: int, weights: Weights) -> dict[str, Gram]:
    """Sum Grams of a parent's layers and tables, weighted by its share in each example."""
    pair.model.load_state_dict(weights)
    grams: dict[str, Gram] = {}
    shares_N = pair.shares_PN[member]
    for batch in pair.batches:
        size = len(next(iter(batch.values())))
        share_B, shares_N = shares_N[:size], shares_N[size:]
        with _Observer(pair.model, grams, batch.get("attention_mask"), share_B):
            pair.model(**batch)
    for name, tensor in weights.items():
        if name.endswith(TABLES):
            num, mean = tensor.shape[1], pair.shares_PN[member].mean()
            grams[name] = Gram(mean * torch.eye(num, dtype=torch.float64), num, dim=0)
    return grams


class _Observer:
    """Adds to the Grams what the layers read while the model runs."""

    def __init__(self, model, grams, mask, share_B) -> None:
        self.grams, self.mask, self.root_B = grams, mask, share_B.double().sqrt()
        self.handles = [
            module.register_forward_pre_hook(
                lambda module, args, name=name: self._see(f"{name}.weight", module, args[0])
            )
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        constant = True
        if isinstance(module, nn.Embedding):
            x, constant = F.one_hot(x, module.num_embeddings), False
        elif isinstance(module, nn.Conv2d):
            x = LinearLayer(module).samples(x)
        batch = len(self.root_B)
        if len(x) != batch:  # a table of positions, read once for all
            x = x.expand(batch, *x.shape[1:])
        x = x.double()
        if constant:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
        x = x * self.root_B.view(-1, *[1] * (x.ndim - 1))
        fits = self.mask is not None and self.mask.shape == x.shape[:-1]
        x_ND = kept_tokens(x, self.mask if fits else None)
        zero = Gram.zero(x_ND.shape[1], dim=int(constant))
        self.grams[name] = self.grams.get(name, zero).update(x_ND)
