"""Two towers as the experts of one modality transformer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alloy.errors import CheckpointError
from alloy.modality.configuration import ModalityConfig
from alloy.modality.experts import expert_name
from alloy.modality.modeling import ModalityModel
from alloy.modality.towers.importing import Tower, build, changed
from alloy.types import Weights

_BLOCKS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "activation",
    "norm_position",
    "final_norm",
)
"""Settings that all experts of a model share."""

_IMAGES = (
    "image_size",
    "patch_size",
    "num_channels",
    "num_image_prefix_tokens",
    "image_positions",
    "image_norm",
    "patch_bias",
    "image_pooling",
    "relative_position_bias",
)
_TEXTS = (
    "vocab_size",
    "max_position_embeddings",
    "pad_token_id",
    "text_positions",
    "text_norm",
    "num_text_types",
    "causal",
)
_ROLES = {"v": ("images", "states"), "l": ("texts", "states")}


def join_towers(
    v: Tower,
    l: Tower,  # noqa: E741 (the modality's name)
    *,
    num_joint_layers: int = 0,
    joint: str = "v",
    seed: int = 0,
    **changes: Any,
) -> ModalityModel:
    """Build a modality transformer whose experts v and l are two towers, with their embeddings.

    Each tower computes what it computed. Gains of LayerScale that only one of them has, or that
    differ, become part of the layers before them.

    Args:
        v: a tower of images or of states.
        l: a tower of texts or of states.
        num_joint_layers: of the last blocks, which see both.
        joint: the tower from which the vl experts of the joint blocks, and their norm, are copied.
        seed: of what is fresh: embeddings that a tower of states lacks, and heads.
        changes: other settings. `layer_norm_eps` must be one of them where the towers' differ.

    Raises:
        CheckpointError: towers that do not fit one another, with the first difference.
    """
    towers = {"v": v, "l": l}
    if joint not in towers:
        raise CheckpointError(f"joint {joint!r} is no tower of this model; choose 'v' or 'l'")
    _refuse_other_towers(towers, changes)
    weights = {modality: dict(tower.weights) for modality, tower in towers.items()}
    if keeps_scale := _same_scale(weights["v"], weights["l"]):
        shared = {n: t for n, t in weights["v"].items() if ".scale" in n}
    else:
        shared = {}
    weights = {m: _without_scale(own, folded=not keeps_scale) for m, own in weights.items()}
    config = changed(
        v.config,
        **_settings(towers, keeps_scale),
        **{"num_joint_layers": num_joint_layers, **changes},
    )
    joined = dict(shared)
    for modality, own in weights.items():
        joined |= _named(own, modality, 0)
    joined |= _named(weights[joint], "vl", config.num_single_layers)
    joined["type_embeddings.weight"] = torch.zeros(2, config.hidden_size)
    return build(config, joined, seed)


def _refuse_other_towers(towers: Mapping[str, Tower], changes: Mapping[str, Any]) -> None:
    for modality, tower in towers.items():
        if tower.inputs not in _ROLES[modality]:
            raise CheckpointError(
                f"{modality} is a tower of {' or '.join(_ROLES[modality])}; {tower.name} is one of "
                f"{tower.inputs}"
            )
    first, second = towers["v"], towers["l"]
    settings = _BLOCKS if "layer_norm_eps" in changes else (*_BLOCKS, "layer_norm_eps")
    for setting in settings:
        here, there = getattr(first.config, setting), getattr(second.config, setting)
        if here != there:
            end = "; say which one" if setting == "layer_norm_eps" else ""
            raise CheckpointError(
                f"experts of one model share {setting}: it is {here!r} in {first.name} and "
                f"{there!r} in {second.name}{end}"
            )


def _settings(towers: Mapping[str, Tower], keeps_scale: bool) -> dict[str, Any]:
    config, text = towers["v"].config, towers["l"].config
    eps = text.layer_norm_eps if text.text_norm_eps is None else text.text_norm_eps
    settings = {"sharing": "none", "final_norm": _final_norm(config), "text_norm_eps": eps}
    settings |= {name: getattr(config, name) for name in _IMAGES}
    settings |= {name: getattr(text, name) for name in _TEXTS}
    return settings | ({} if keeps_scale else {"layer_scale": None})


def _final_norm(config: ModalityConfig) -> str:
    return "none" if config.final_norm == "none" else "own"


def _named(weights: Weights, modality: str, first_layer: int) -> dict[str, Tensor]:
    """Give a tower's weights the names of one modality's experts, from a block on."""
    named = {}
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            if int(name.split(".")[1]) >= first_layer:
                named[expert_name(name, modality)] = tensor
        elif name.startswith("norm."):
            named[name.replace("norm.", f"norm.{modality}.")] = tensor
        elif modality != "vl":
            named[name] = tensor
    return named


def _same_scale(first: Weights, second: Weights) -> bool:
    scales = [{n: t for n, t in own.items() if ".scale" in n} for own in (first, second)]
    return scales[0].keys() == scales[1].keys() and all(
        torch.equal(tensor, scales[1][name]) for name, tensor in scales[0].items()
    )


def _without_scale(weights: Weights, *, folded: bool) -> dict[str, Tensor]:
    """Drop the gains of LayerScale, after the layers before them have taken them up."""
    result = {name: tensor for name, tensor in weights.items() if ".scale" not in name}
    for name in (n for n in weights if ".scale" in n and folded):
        block = name.split(".scale")[0]
        layer = f"{block}.attention.proj" if ".scale1." in name else f"{block}.ffn.fc2"
        result[f"{layer}.weight"] = weights[name][:, None] * result[f"{layer}.weight"]
        result[f"{layer}.bias"] = weights[name] * result[f"{layer}.bias"]
    return result
