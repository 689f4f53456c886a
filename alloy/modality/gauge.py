"""The modality transformer in a gauge: its experts' streams, heads and neurons moved, its function kept.

The stream of each modality has a basis of its own. Where v and l enter the joint blocks, fixed
adapters change to the basis of vl. What writes the stream of v takes its rotation; the stream of l, into which the
text embeddings' norm writes, is the reference and never turns. Norms lose their gains and biases to
the layers that read them, and what writes a stream loses its mean, which no norm lets through.

The final norm is shared by streams of different bases, so it cannot keep a bias. But the output of a
LayerNorm sums to zero: it leaves the direction of ones free, and there a bias fits. The norm gets the
bias 1, and each reader's rows the sum that makes of it what the old bias was.

Shapes: D hidden, R rows of a reader.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alloy.alignment.search import align
from alloy.gauge import Gauge, search_gauge
from alloy.modality.configuration import ModalityConfig
from alloy.modality.experts import (
    MODALITIES,
    agnostic_config,
    expert_name,
    join,
    shared_weights,
    split_experts,
)
from alloy.modality.modeling import Block, ModalityModel
from alloy.modality.observe import REFERENCE as OBSERVED
from alloy.modality.observe import collect_experts, expert_spec
from alloy.refit.least_squares import Layer, Lesson, Sensitivity, Teacher, fit_layers
from alloy.refit.sensitivity import sensitivities
from alloy.statistics.moments import Gram
from alloy.symmetry import (
    SymmetrySpec,
    Transform,
    compose,
    find_symmetries,
    fold_norms,
    identity,
    invert,
    transport,
)
from alloy.symmetry.spec import leaves
from alloy.types import Weights

REFERENCE = "l"
"""The modality whose stream, heads and neurons stay where they are."""

_WRITERS = {"v": ("image_embeddings.cls_token", "image_embeddings.positions")}
_READERS = {
    "v": ("image_projection.weight", "segment_head.weight"),
    "l": ("text_projection.weight",),
    "vl": ("pooler.weight", "masked_word_head.transform.weight"),
}


class Tower(nn.Module):
    """One modality's way through its blocks, from what writes its stream to what reads it."""

    def __init__(self, config: ModalityConfig, first: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.writer = nn.Linear(D, D, bias=False)
        layers = range(first, config.num_hidden_layers)
        self.blocks = nn.ModuleDict({str(i): Block(config, i) for i in layers})
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.reader = nn.Linear(D, D, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.writer(x_BSD)
        for block in self.blocks.values():
            x_BSD = block(x_BSD, "", None)
        return self.reader(self.norm(x_BSD))


@dataclass(frozen=True)
class TowerWeights:
    """A modality's tower with its norms folded: ready to move by the transforms of `spec`.

    `writer.weight` and `reader.weight` are what becomes of the identity in front of the stream and
    behind the final norm.
    """

    weights: Weights
    spec: SymmetrySpec


def towers(model: ModalityModel) -> dict[str, TowerWeights]:
    """Each modality's experts as a tower whose stream may turn; the model's function, folded.

    Raises:
        ValueError: a model whose modalities share parts, so that they have no streams of their own.
    """
    config = model.config
    if config.sharing != "none":
        raise ValueError(
            f"a model of sharing {config.sharing!r} has parts in one basis for all modalities; only "
            f"sharing 'none' has streams that may turn apart"
        )
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    experts = split_experts(weights, config)
    gains = {name: tensor for name, tensor in weights.items() if ".scale" in name}
    eye_DD = torch.eye(config.hidden_size, dtype=torch.float64)
    found = {}
    for modality in MODALITIES:
        first = config.num_single_layers if modality == "vl" else 0
        spec = _trace(config, first)
        own = {
            **experts[modality],
            **{name: gain for name, gain in gains.items() if int(name.split(".")[1]) >= first},
            "norm.weight": weights["norm.weight"],
            "norm.bias": weights["norm.bias"],
            "writer.weight": eye_DD,
            "reader.weight": eye_DD,
        }
        folded, folded_spec = fold_norms(own, spec)
        found[modality] = TowerWeights(_without_norm_biases(folded, config, first), folded_spec)
    return found


def _trace(config: ModalityConfig, first: int) -> SymmetrySpec:
    return _traced(json.dumps(agnostic_config(config).to_dict(), sort_keys=True), first)


@cache
def _traced(config: str, first: int) -> SymmetrySpec:
    tower = Tower(ModalityConfig(**json.loads(config)), first).eval()
    return find_symmetries(tower, {"x_BSD": torch.randn(2, 3, tower.writer.in_features)})


def _without_norm_biases(weights: Weights, config: ModalityConfig, first: int) -> dict[str, Tensor]:
    result = dict(weights)
    for i in range(first, config.num_hidden_layers):
        for norm, reader in (("norm1", "attention.qkv"), ("norm2", "ffn.fc1")):
            bias = result[f"blocks.{i}.{norm}.bias"]
            read = f"blocks.{i}.{reader}"
            moved = result[f"{read}.weight"] @ bias
            result[f"{read}.bias"] = result[f"{read}.bias"] + moved
            result[f"blocks.{i}.{norm}.bias"] = torch.zeros_like(bias)
    return result


def in_gauge(
    model: ModalityModel, transforms: Mapping[str, Mapping[str, Transform]] | None = None
) -> ModalityModel:
    """The same function with every modality's tower moved by its transforms (without: folded only).

    The result has joint adapters where a stream has turned. It stays modality-specific.

    Raises:
        ValueError: a model whose modalities share parts; transforms that turn the stream of REFERENCE.
    """
    folded = towers(model)
    transforms = {} if transforms is None else transforms
    moved = {
        modality: transport(
            tower.weights, tower.spec, transforms.get(modality, identity(tower.spec))
        )
        for modality, tower in folded.items()
    }
    turned = {
        modality
        for modality, tower in folded.items()
        if _turns(transforms.get(modality, {}).get(_stream(tower.spec)))
    }
    if REFERENCE in turned:
        raise ValueError(
            f"the stream of {REFERENCE!r} cannot turn: the norm of the text embeddings writes into it"
        )
    config = copy.deepcopy(model.config)
    config.joint_adapters = config.joint_adapters or bool(turned)
    result = ModalityModel(config).to(model.dtype)
    result.load_state_dict(_assembled(model, moved, config.joint_adapters))
    result.config._attn_implementation = model.config._attn_implementation
    return result.to(model.device).eval()


def _turns(transform: Transform | None) -> bool:
    return transform is not None and not torch.equal(
        transform.as_matrix(), torch.eye(transform.size, dtype=torch.float64)
    )


def _stream(spec: SymmetrySpec) -> str:
    """The name of the space that the tower's writer writes."""
    (name,) = {str(leaf.space) for _, leaf in leaves(spec.layout["writer.weight"][0])}
    return name


def _assembled(
    model: ModalityModel, moved: Mapping[str, Weights], with_adapters: bool
) -> dict[str, Tensor]:
    """The model's weights, given its moved towers."""
    old = model.state_dict()
    experts = {
        modality: {
            name: tensor
            for name, tensor in tower.items()
            if name.startswith("blocks.") and ".scale" not in name
        }
        for modality, tower in moved.items()
    }
    weights = shared_weights(old, model.config)
    weights |= {name: torch.ones_like(t) for name, t in weights.items() if ".scale" in name}
    weights["norm.weight"] = torch.ones_like(old["norm.weight"])
    weights["norm.bias"] = torch.ones_like(old["norm.bias"])
    for modality, names in _READERS.items():
        for name in (name for name in names if name in weights):
            weights[name] = _read_after(moved[modality], weights[name])
    turn_DD = moved["v"]["writer.weight"]
    eye_DD = torch.eye(len(turn_DD), dtype=torch.float64)
    for name in _WRITERS["v"]:
        weights[name] = weights[name].double() @ turn_DD.T
    patches = weights["image_embeddings.patches.weight"].double()
    weights["image_embeddings.patches.weight"] = torch.einsum("de,e...->d...", turn_DD, patches)
    bias = weights["image_embeddings.patches.bias"].double()
    weights["image_embeddings.patches.bias"] = turn_DD @ bias
    types = weights["type_embeddings.weight"].double()
    weights["type_embeddings.weight"] = torch.stack([types[0], turn_DD @ types[1]])
    if with_adapters:
        entry_DD = moved["vl"]["writer.weight"]
        before = {
            side: old[name].double() if (name := f"{side}_adapter.weight") in old else eye_DD
            for side in ("image", "text")
        }
        weights["image_adapter.weight"] = entry_DD @ before["image"] @ turn_DD.T
        weights["text_adapter.weight"] = entry_DD @ before["text"]
    return join(experts, weights, model.config)


def _read_after(tower: Weights, reader_RD: Tensor) -> Tensor:
    """A layer behind the final norm, made to read the turned stream and a norm whose bias is 1."""
    read_RD = reader_RD.double() @ tower["reader.weight"]
    wanted_R1 = (read_RD @ tower["norm.bias"])[:, None]
    return read_RD - read_RD.mean(1, keepdim=True) + wanted_R1 / read_RD.shape[1]


# What the experts see.

Batch = Mapping[str, Tensor]

HIDDEN = "hidden_mask"
"""In a batch, which words [B, T] stand behind the mask token; without it every word counts as an answer."""


@dataclass(frozen=True)
class Run:
    """One modality's forward pass, and what it leads to."""

    forward: Callable[[ModalityModel, Batch], Tensor]
    """The states [B, S, D] in the modality's own stream."""
    mask: Callable[[ModalityModel, Batch], Tensor | None]
    """Which of them are no padding."""
    answers: Callable[[ModalityModel, Batch, Tensor], tuple[Tensor, ...]]
    """What the pre-trained heads make of these states."""
    heads: tuple[str, ...]
    """Their linear layers, which read this modality's stream alone."""


def _run_images(model: ModalityModel, batch: Batch) -> Tensor:
    return model.image_states(batch["pixel_values"])


def _run_texts(model: ModalityModel, batch: Batch) -> Tensor:
    return model.text_states(batch["input_ids"], batch["attention_mask"])


def _run_pairs(model: ModalityModel, batch: Batch) -> Tensor:
    return model.encode_joint(*(batch[n] for n in ("pixel_values", "input_ids", "attention_mask")))


def _mask_pairs(model: ModalityModel, batch: Batch) -> Tensor:
    mask_BT = batch["attention_mask"]
    return torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1 + model.config.num_patches)], 1)


def _answer_images(model: ModalityModel, batch: Batch, states_BID: Tensor) -> tuple[Tensor]:
    del batch
    return (model.embed_image(states_BID),)


def _answer_texts(model: ModalityModel, batch: Batch, states_BTD: Tensor) -> tuple[Tensor]:
    del batch
    return (model.embed_text(states_BTD),)


def _answer_pairs(model: ModalityModel, batch: Batch, states_BSD: Tensor) -> tuple[Tensor, Tensor]:
    mask_BT = batch["attention_mask"].bool()
    words_NV = model.masked_word_logits(states_BSD[:, : mask_BT.shape[1]][mask_BT])
    if HIDDEN in batch:
        words_NV = words_NV[batch[HIDDEN][mask_BT]]
    return _centred(words_NV), _centred(model.statement_logits(states_BSD))


def _centred(logits: Tensor) -> Tensor:
    """Without what softmax does not see."""
    return logits - logits.mean(-1, keepdim=True)


RUNS: Mapping[str, Run] = {
    "v": Run(_run_images, lambda _, batch: None, _answer_images, ("image_projection",)),
    "l": Run(
        _run_texts, lambda _, batch: batch["attention_mask"], _answer_texts, ("text_projection",)
    ),
    "vl": Run(
        _run_pairs,
        _mask_pairs,
        _answer_pairs,
        (
            "masked_word_head.transform",
            "masked_word_head.decoder",
            "pooler",
            "statement_head",
        ),
    ),
}

Answers = Literal["heads", "states"]
"""What merging shall keep: what the pre-trained heads answer, or also all states behind the last block, which heads
that are still to be trained may read."""

Felt = Mapping[str, Mapping[str, Sensitivity]]
"""By modality and by layer of the agnostic model, how much the answers depend on it."""


def sensitivities_of(
    model: ModalityModel,
    batches: Iterable[Batch],
    answers: Answers = "heads",
    *,
    generator: torch.Generator | None = None,
) -> dict[str, dict[str, Sensitivity]]:
    """How much each modality's answers depend on its experts' layers and on its heads (`alloy.refit.sensitivity`).

    They are of the model as it stands: in another gauge they are others.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    found = {}
    for modality, run in RUNS.items():
        if layers := _layers_of(model, modality):
            own = layers | {name: name for name in run.heads}
            found[modality] = sensitivities(
                model,
                {name: Layer(model.get_submodule(there)) for name, there in own.items()},
                batches,
                partial(_answers, run=run, kind=answers),
                generator=generator,
            )
    return found


def _answers(
    model: ModalityModel, batch: Batch, *, run: Run, kind: Answers = "heads"
) -> tuple[Tensor, ...]:
    states_BSD = run.forward(model, batch)
    found = run.answers(model, batch, states_BSD)
    if kind == "heads":
        return found
    mask_BS = run.mask(model, batch)
    if run is not RUNS["vl"]:  # where the norm is part of the pass
        states_BSD = model.norm(states_BSD)
    return *found, states_BSD if mask_BS is None else states_BSD[mask_BS.bool()]


def _layers_of(model: ModalityModel, modality: str) -> dict[str, str]:
    """The linear layers of a modality's experts: their names in the agnostic model and here."""
    found = {}
    for name in split_experts(model.state_dict(), model.config)[modality]:
        layer, _, kind = expert_name(name, modality).rpartition(".")
        if kind == "weight" and isinstance(model.get_submodule(layer), nn.Linear):
            found[name.removesuffix(".weight")] = layer
    return found


@contextmanager
def _inputs_of(model: ModalityModel, layers: Mapping[str, str]) -> Generator[dict[str, Tensor]]:
    """Fills a mapping with the inputs of the layers while the model runs."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(there).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
        for name, there in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def affine_grams(
    model: ModalityModel, batches: Iterable[Batch], felt: Felt | None = None
) -> dict[str, dict[str, Gram]]:
    """Grams of the inputs of the experts' linear layers with a constant 1 behind them, in one pass.

    By modality and by the weight's name in the agnostic model; padding does not count. With `felt`, of the same
    batches, each token counts as much as the answers depend on it, and the mean is over examples: J is then the
    share of the answers' variance that merging is expected to cost.
    """
    grams: dict[str, dict[str, Gram]] = {}
    layers = {modality: found for modality in RUNS if (found := _layers_of(model, modality))}
    for number, batch in enumerate(batches):
        for modality, own in layers.items():
            run, mine = RUNS[modality], grams.setdefault(modality, {})
            mask_BS = run.mask(model, batch)
            with _inputs_of(model, own) as seen:
                run.forward(model, batch)
            for layer, x_BSD in seen.items():
                kept_BS = x_BSD.new_ones(x_BSD.shape[:2]) if mask_BS is None else mask_BS
                x_ND = x_BSD[kept_BS.bool()].double()
                x_ND = torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], dim=1)
                count = len(x_ND)
                if felt is not None:
                    (weight_BS,) = felt[modality][layer].samples[number]
                    x_ND = weight_BS[kept_BS.bool()].double().sqrt()[:, None] * x_ND
                    count = len(x_BSD)
                name = f"{layer}.weight"
                before = mine.get(name, Gram.zero(x_ND.shape[1]))
                mine[name] = replace(before.update(x_ND), count=before.count + count)
    return grams


def without_constant(
    grams: Mapping[str, Mapping[str, Gram]],
) -> dict[str, dict[str, Gram]]:
    """`affine_grams` as Grams of the layers' inputs alone."""
    return {
        modality: {name: replace(g, sum_DD=g.sum_DD[:-1, :-1]) for name, g in own.items()}
        for modality, own in grams.items()
    }


def inner_alignment(
    model: ModalityModel, batches: Iterable[Batch], *, weight_share: float = 0.5
) -> dict[str, dict[str, Transform]]:
    """Heads, neurons and the units within heads of v and vl, made similar to those of l: a start.

    Args:
        model: folded, as `in_gauge(model)` gives it.
        batches: image i and text i belong together.
        weight_share: a of the dual space of `alloy.align`.
    """
    found: dict[str, dict[str, Transform]] = {}
    folded = towers(model)
    experts = split_experts(model.state_dict(), model.config)
    spec = folded[OBSERVED].spec
    moments = collect_experts(model, batches, spec).moments
    for modality, weights in experts.items():
        if modality != OBSERVED and weights:
            found[modality] = align(
                {name: experts[OBSERVED][name] for name in weights},
                weights,
                expert_spec(spec, weights),
                moments[modality],
                weight_share=weight_share,
                method="orthogonal",
            )
    # Statistics are of pairs with v; what brings l to v, undone, brings v and all that follows it to l.
    back = invert(found[REFERENCE])
    others = {m: compose(t, _within(back, t)) for m, t in found.items() if m != REFERENCE}
    return {OBSERVED: back, **others}


def _within(transforms: Mapping[str, Transform], others: Mapping[str, Transform]):
    return {name: transform for name, transform in transforms.items() if name in others}


def find_gauge(
    model: ModalityModel,
    grams: Mapping[str, Mapping[str, Gram]],
    *,
    turn_streams: bool = True,
    fixed_spaces: Sequence[str] = (),
    still: Sequence[str] = (),
    initial: Mapping[str, Mapping[str, Mapping[str, Transform]]] | None = None,
    **settings: Any,
) -> tuple[dict[str, dict[str, Transform]], Gauge]:
    """Each modality's transforms at which merging its experts costs least, and the search's report.

    Args:
        model: folded, as `in_gauge(model)` gives it.
        grams: `affine_grams` of it. Experts whose modality has none are not moved.
        turn_streams: whether v and vl may have bases of their own, at the price of two adapters.
        fixed_spaces: spaces of the towers' spec that stay as they are in every expert.
        still: modalities whose stream does not turn, beside l.
        initial: further starts by name: each modality's transforms, such as `inner_alignment`.
        settings: of `alloy.gauge.search_gauge`.
    """
    folded = towers(model)
    spec = folded[REFERENCE].spec
    names = [m for m in MODALITIES if grams.get(m)]
    gauge = search_gauge(
        [folded[m].weights for m in names],
        spec,
        [grams[m] for m in names],
        reference=names.index(REFERENCE),
        fixed=[*fixed_spaces, *([] if turn_streams else [_stream(spec)])],
        held=[(names.index(modality), _stream(spec)) for modality in still],
        initial={
            start: [found.get(modality, {}) for modality in names]
            for start, found in (initial or {}).items()
        },
        **settings,
    )
    transforms = {}
    for modality, found in zip(names, gauge.transforms, strict=True):
        spaces = folded[modality].spec.spaces
        transforms[modality] = {name: t for name, t in found.items() if name in spaces}
    return transforms, gauge


@torch.no_grad()
def merge_sequentially(
    model: ModalityModel,
    batches: Sequence[Batch],
    felt: Felt | None = None,
    *,
    joint_experts: Sequence[str] = MODALITIES,
    ridge: float = 3e-2,
    residual: bool = True,
    heads: bool = True,
) -> ModalityModel:
    """The modality-agnostic model of a model's experts by sequential least squares.

    Args:
        model: in any gauge; its adapters and embeddings become the merged model's.
        batches: calibration data, read once per layer. What they do not have the merged model does not
            learn to cope with: without hidden words among the texts its masked-word head forgets them.
        felt: `sensitivities_of` this model and these batches, so that the answers' errors are made small;
            without it every unit of every token counts alike.
        joint_experts: the modalities that are merged in the joint blocks.
        heads: whether the pre-trained heads follow, too, each fitted to what it computed in `model`, from
            the streams as merging has left them; otherwise they stay.
    """
    student = average_of_experts(model, joint_experts)
    lessons = []
    for modality, run in RUNS.items():
        layers = {
            layer: there
            for layer, there in _layers_of(model, modality).items()
            if modality in joint_experts
            or int(layer.split(".")[1]) < model.config.num_single_layers
        }
        if layers and heads:
            layers |= {name: name for name in run.heads}
        if layers:
            lessons.append(
                Lesson(
                    [Teacher(model, layers)],
                    batches,
                    forward=partial(_answers, run=run),
                    masks=partial(_masks, run=run),
                    sensitivities=None if felt is None else felt[modality],
                )
            )
    fit_layers(student, lessons, ridge=ridge, residual=residual)
    return student


def _masks(model: ModalityModel, batch: Batch, run: Run) -> dict[str, Tensor]:
    mask = run.mask(model, batch)
    return {} if mask is None else {"attention_mask": mask}


def average_of_experts(
    model: ModalityModel, joint_experts: Sequence[str] = MODALITIES
) -> ModalityModel:
    """The modality-agnostic model whose parts are the means of the model's experts."""
    experts = split_experts(model.state_dict(), model.config)
    merged = {}
    for name in experts["v"]:
        joint = int(name.split(".")[1]) >= model.config.num_single_layers
        members = joint_experts if joint else ("v", "l")
        merged[name] = torch.stack([experts[m][name] for m in members]).mean(0)
    result = ModalityModel(agnostic_config(model.config)).to(model.dtype)
    result.load_state_dict({**shared_weights(model.state_dict(), model.config), **merged})
    return result.to(model.device).eval()
