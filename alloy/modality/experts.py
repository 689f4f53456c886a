"""Experts as ordinary weights: taken out of a checkpoint, put back, copied from a seed.

An expert is one modality's copy of a part of a block. In a checkpoint it is called
`blocks.0.attention.v.qkv.weight`; taken out it has the name that the modality-agnostic model gives
it, `blocks.0.attention.qkv.weight`, so that merging experts is merging ordinary weights.
"""

import copy
import re
from collections.abc import Mapping

from torch import Tensor

from alloy.modality.configuration import EXPERT_PARTS, ModalityConfig
from alloy.types import Weights

MODALITIES = ("v", "l", "vl")
"""Vision, language, and both together."""
_EXPERT = re.compile(r"(blocks\.(\d+)\.(norm1|attention|norm2|ffn))\.(vl|v|l)\.(.+)")
_PART = re.compile(r"blocks\.(\d+)\.(norm1|attention|norm2|ffn)\.(.+)")


def agnostic_config(config: ModalityConfig) -> ModalityConfig:
    """Configure the same model with every part shared, as a merged model is."""
    agnostic = copy.deepcopy(config)
    agnostic.sharing = "all"
    return agnostic


def split_experts(weights: Weights, config: ModalityConfig) -> dict[str, dict[str, Tensor]]:
    """Take out each modality's experts, under the agnostic model's names.

    The vl experts are those of the joint blocks only.

    Raises:
        ValueError: the weights are not those of `config`.
    """
    experts: dict[str, dict[str, Tensor]] = {modality: {} for modality in MODALITIES}
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            part, _, _, modality, rest = match.groups()
            experts[modality][f"{part}.{rest}"] = tensor
    _refuse_other_experts(experts, weights, config)
    return experts


def shared_weights(weights: Weights, config: ModalityConfig) -> dict[str, Tensor]:
    """Take out what no modality owns: embeddings, heads, norms and parts that `config` shares."""
    split_experts(weights, config)
    return {name: tensor for name, tensor in weights.items() if not _EXPERT.fullmatch(name)}


def join(
    experts: Mapping[str, Weights], shared: Weights, config: ModalityConfig
) -> dict[str, Tensor]:
    """Put experts and shared weights back into one checkpoint: undoes the two functions above."""
    joined = dict(shared)
    for modality, weights in experts.items():
        for name, tensor in weights.items():
            joined[expert_name(name, modality)] = tensor
    split_experts(joined, config)
    return joined


def expert_name(name: str, modality: str) -> str:
    """Name of a weight or module of the agnostic model as one modality's expert."""
    match = _PART.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} of modality {modality!r} is no part of a block")
    layer, part, rest = match.groups()
    return f"blocks.{layer}.{part}.{modality}.{rest}"


def copy_to_experts(seed: Weights, config: ModalityConfig) -> dict[str, Tensor]:
    """Copy a seed's (agnostic) parts into every modality's experts."""
    weights: dict[str, Tensor] = {}
    for name, tensor in seed.items():
        match = _PART.fullmatch(name)
        if match is None or match[2] not in EXPERT_PARTS[config.sharing]:
            weights[name] = tensor
            continue
        layer, part, rest = match.groups()
        for modality in config.modalities(int(layer)):
            weights[f"blocks.{layer}.{part}.{modality}.{rest}"] = tensor.clone()
    return weights


def _refuse_other_experts(
    experts: Mapping[str, Weights], weights: Weights, config: ModalityConfig
) -> None:
    """Refuse weights whose blocks lack or add experts, by the parts of `config.sharing`."""
    actual = set()
    for modality, parts in experts.items():
        for name in parts:
            _, layer, part, _ = name.split(".", 3)
            actual.add((int(layer), part, modality))
    expected = {
        (layer, part, modality)
        for layer in range(config.num_hidden_layers)
        for part in EXPERT_PARTS[config.sharing]
        for modality in config.modalities(layer)
    }
    if actual != expected:
        missing, surplus = sorted(expected - actual), sorted(actual - expected)
        raise ValueError(
            f"the weights are not those of sharing {config.sharing!r} with "
            f"{config.num_hidden_layers} blocks, {config.num_joint_layers} of them joint: "
            f"missing experts {missing[:3]}, unexpected experts {surplus[:3]} "
            f"(block, part, modality; {len(missing)} and {len(surplus)} in all)"
        )
