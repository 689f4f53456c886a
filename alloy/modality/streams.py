"""Streams of the modality transformer, each in a basis of its own, at an unchanged function.

Every modality's experts form a tower: what writes its residual stream, its blocks, what reads it.
A tower's streams, heads and neurons may be moved by any element of its symmetry group. What writes
the stream of v takes its rotation. The stream of l, into which the norm of the text embeddings
writes, is the anchor and never turns. Where v and l enter the joint blocks, fixed adapters change
to the basis of vl. Norms lose their gains and biases to the layers that read them, and whatever
writes a stream loses its mean, which no norm lets through.

The final norm is shared by streams of different bases, so it cannot keep a bias. But the output of
a LayerNorm sums to zero: the direction of ones is free, and a bias fits there. The norm gets the
bias 1, and the rows of each reader get the sum that turns it into the old bias.

Shapes: D hidden, R rows of a reader.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from alloy.devices import on_cpu
from alloy.modality.configuration import ModalityConfig
from alloy.modality.experts import (
    MODALITIES,
    agnostic_config,
    join,
    shared_weights,
    split_experts,
)
from alloy.modality.layers import Block
from alloy.modality.modeling import ModalityModel
from alloy.symmetry import (
    SymmetrySpec,
    Transform,
    find_symmetries,
    fold_norms,
    identity,
    transport,
)
from alloy.symmetry.spec import leaves
from alloy.types import Weights

ANCHOR = "l"
"""The modality whose stream, heads and neurons stay where they are."""

_WRITERS = tuple(f"image_embeddings.{name}" for name in ("cls_token", "positions", "mask_token"))
_READERS = {
    "v": ("image_projection.weight", "segment_head.weight", "patch_head.weight"),
    "l": ("text_projection.weight",),
    "vl": ("pooler.weight", "masked_word_head.transform.weight"),
}
_NORM = ("weight", "bias")


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
    """Towers of a model by modality, folded: their streams may turn, the function stays.

    Raises:
        ValueError: the modalities share parts, so that they have no streams of their own.
    """
    config = model.config
    if config.sharing != "none":
        raise ValueError(
            f"a model of sharing {config.sharing!r} has parts in one basis for all modalities; "
            f"only sharing 'none' has streams that may turn apart"
        )
    _refuse_other_architectures(config)
    weights = {name: t.double() for name, t in on_cpu(model.state_dict()).items()}
    experts = split_experts(weights, config)
    gains = {name: tensor for name, tensor in weights.items() if ".scale" in name}
    eye_DD = torch.eye(config.hidden_size, dtype=torch.float64)
    result = {}
    for modality in MODALITIES:
        first = config.num_single_layers if modality == "vl" else 0
        spec = _trace(config, first)
        own = {
            **experts[modality],
            **{name: gain for name, gain in gains.items() if int(name.split(".")[1]) >= first},
            **{f"norm.{kind}": weights[_norm(config, modality, kind)] for kind in _NORM},
            "writer.weight": eye_DD,
            "reader.weight": eye_DD,
        }
        folded, folded_spec = fold_norms(own, spec)
        result[modality] = TowerWeights(_without_norm_biases(folded, config, first), folded_spec)
    return result


def _refuse_other_architectures(config: ModalityConfig) -> None:
    """Refuse what would not stay the same function in another gauge."""
    turning = {
        "norm_position": ("pre",),
        "final_norm": ("shared", "own"),
        "relative_position_bias": (None,),
        "image_norm": (False,),
        "joint_contrast": (False,),
    }
    for setting, values in turning.items():
        if (actual := getattr(config, setting)) not in values:
            right = " or ".join(map(repr, values))
            raise ValueError(
                f"streams turn in models of {setting} {right} alone; this one has {actual!r}"
            )


def _norm(config: ModalityConfig, modality: str, kind: str) -> str:
    """The name of a weight of the norm behind a modality's last block."""
    return f"norm.{modality}.{kind}" if config.final_norm == "own" else f"norm.{kind}"


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
    """Fold a model's towers and move each by its modality's transforms; the function stays.

    The result has joint adapters where a stream has turned. It stays modality-specific.

    Args:
        model: with sharing "none".
        transforms: by modality and by space of the tower; what is absent stays. None only folds.

    Raises:
        ValueError: the modalities share parts; the transforms turn the stream of ANCHOR.
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
        if _turns(transforms.get(modality, {}).get(stream_of(tower.spec)))
    }
    if ANCHOR in turned:
        raise ValueError(
            f"the stream of {ANCHOR!r} cannot turn: the norm of the text embeddings writes into it"
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


def stream_of(spec: SymmetrySpec) -> str:
    """Name of a tower's stream: the space that its writer writes."""
    (name,) = {str(leaf.space) for _, leaf in leaves(spec.layout["writer.weight"][0])}
    return name


def _assembled(
    model: ModalityModel, moved: Mapping[str, Weights], with_adapters: bool
) -> dict[str, Tensor]:
    """The model's weights, given its moved towers."""
    old = on_cpu(model.state_dict())
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
    for modality in MODALITIES:
        for kind in _NORM:
            name = _norm(model.config, modality, kind)
            weights[name] = torch.ones_like(old[name])
    for modality, names in _READERS.items():
        for name in (name for name in names if name in weights):
            weights[name] = _read_after(moved[modality], weights[name])
    turn_DD = moved["v"]["writer.weight"]
    eye_DD = torch.eye(len(turn_DD), dtype=torch.float64)
    for name in (name for name in _WRITERS if name in weights):
        weights[name] = weights[name].double() @ turn_DD.T
    patches = weights["image_embeddings.patches.weight"].double()
    weights["image_embeddings.patches.weight"] = torch.einsum("de,e...->d...", turn_DD, patches)
    if (name := "image_embeddings.patches.bias") in weights:
        weights[name] = turn_DD @ weights[name].double()
    types = weights["type_embeddings.weight"].double()  # of texts, then of images
    weights["type_embeddings.weight"] = torch.stack(
        [types[0], *(turn_DD @ of_images for of_images in types[1:])]
    )
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
