"""Whole modality transformers as vl-merging and VLMo release them, and back.

Both are forks of ViLT: BEiT's blocks, BERT's text embeddings, one table of relative positions for
all. vl-merging (arXiv:2304.14933) has an expert as a `ModuleDict`, VLMo (arXiv:2111.02358) gives
the feed-forward network of each modality a name of its own.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from alloy.errors import CheckpointError
from alloy.modality.configuration import EXPERT_PARTS, LowerBlocksSee, ModalityConfig, Sharing
from alloy.modality.modeling import ModalityModel
from alloy.modality.towers.architecture import (
    Architecture,
    Joined,
    Layout,
    gather,
    layout_of,
    scatter,
)
from alloy.modality.towers.importing import build
from alloy.modality.towers.pickles import read_pickle
from alloy.types import Weights

_HEADS: Mapping[str, str] = {
    "pooler": "pooler.dense",
    "masked_word_head.transform": "mlm_score.transform.dense",
    "masked_word_head.norm": "mlm_score.transform.LayerNorm",
    "masked_word_head.decoder.weight": "mlm_score.decoder.weight",
    "masked_word_head.decoder.bias": "mlm_score.bias",
    "statement_head": "itm_score.fc",
    "answer_head.inner": "vqa_classifier.0",
    "answer_head.norm": "vqa_classifier.1",
    "answer_head.out": "vqa_classifier.3",
    "pair_head.inner": "nlvr2_classifier.0",
    "pair_head.norm": "nlvr2_classifier.1",
    "pair_head.out": "nlvr2_classifier.3",
    "logit_scale": "logit_scale",
}
_EMBEDDINGS = {
    "image_embeddings.cls_token": "transformer.cls_token",
    "image_embeddings.positions": "transformer.pos_embed",
    "image_embeddings.patches": "transformer.patch_embed.proj",
    "text_embeddings.words": "text_embeddings.word_embeddings",
    "text_embeddings.types": "text_embeddings.token_type_embeddings",
    "text_embeddings.positions": "text_embeddings.position_embeddings.weight",
    "text_embeddings.norm": "text_embeddings.LayerNorm",
    "type_embeddings.weight": "token_type_embeddings.weight",
    "position_bias.table": "relative_position_bias_table",
    "norm": "transformer.norm",
}
_OUTSIDE = re.compile(
    r"(text_imag_|text_|vl_text_imag_|video_|text_video_|vl_text_video_|temporal_)?"
    r"relative_position_index|mask_for_combining_temporal|temporal_relative_position_bias_table|"
    r"text_embeddings\.(position_ids|token_type_ids|position_embeddings\.weight)|"
    r"transformer\.mask_token|"
    r"(img_cls_classifier|mim_score|d_vae)\..*"
)
"""What the modality transformer does not have: indices that it computes, video, heads of other
tasks, and positions of words, which both models make but do not add where they have relative
ones."""

_SIZED = {
    "text_embeddings.position_embeddings.weight",
    "text_embeddings.token_type_embeddings.weight",
    "text_embeddings.word_embeddings.weight",
    "token_type_embeddings.weight",
    "transformer.patch_embed.proj.weight",
}
_PARTS = {"norm1": "norm1", "attention": "attn", "norm2": "norm2", "ffn": "mlp"}
_VLMO_NAMES = {"v": "imag", "l": "text", "vl": "vl"}


@dataclass(frozen=True, kw_only=True)
class Release:
    """A whole model of another repository under the modality transformer's names."""

    name: str
    config: ModalityConfig
    weights: Weights
    kept: Weights
    layout: Layout

    def model(self, *, seed: int = 0) -> ModalityModel:
        """Build the model; heads that the file lacks are fresh."""
        return build(self.config, self.weights, seed)

    def with_weights(self, weights: Weights) -> "Release":
        """Let another model of this config take the weights' place."""
        return replace(self, weights={name: weights[name] for name in self.weights})

    def export(self) -> dict[str, Tensor]:
        """Write the weights back under the other repository's names, beside all that was kept."""
        return {**self.kept, **scatter(self.layout, self.weights)}


def import_release(
    path: str | Path,
    *,
    num_joint_layers: int | None = None,
    num_attention_heads: int | None = None,
) -> Release:
    """Import a `.ckpt` file of vl-merging or VLMo; nothing in it is executed.

    Args:
        path: the file.
        num_joint_layers: of a file that neither has vl experts nor records its settings.
        num_attention_heads: of a file that has no relative positions to count them by.

    Raises:
        CheckpointError: a file that is neither's, that cannot be read as tensors alone, or whose
            weights are missing, unknown or do not tell what the arguments would.
    """
    weights, recorded = read_pickle(path)
    if not any(name.startswith("transformer.blocks.0.") for name in weights):
        raise CheckpointError(
            f"{path}: no weights of vl-merging or VLMo (transformer.blocks.*), but "
            f"{sorted(weights)[:3]}"
        )
    if missing := sorted(_SIZED - weights.keys()):
        raise CheckpointError(f"{path}: weights are missing: {missing} (sizes are read off them)")
    is_vlmo = any(".mlp_imag." in name for name in weights)
    config = _config(weights, recorded, is_vlmo, num_joint_layers, num_attention_heads)
    names = _names(config, is_vlmo)
    with torch.device("meta"):
        sizes = ModalityModel(config).state_dict()
    absent = {ours for ours, theirs in names.items() if _is_absent(ours, theirs, weights)}
    sizes = {n: t for n, t in sizes.items() if not {n, n.rpartition(".")[0]} & absent}
    architecture = Architecture(inputs="states", names=names, settings={})
    layout = layout_of(architecture, sizes, weights)
    placed = {part.name for place in layout.values() for part in place.parts}
    rest = weights.keys() - placed
    if other := sorted(name for name in rest if not _OUTSIDE.fullmatch(name)):
        raise CheckpointError(
            f"{path}: weights that no layer of the modality transformer takes: {other[:3]} "
            f"({len(other)} in all)"
        )
    return Release(
        name="VLMo" if is_vlmo else "vl-merging",
        config=config,
        weights=gather(layout, sizes, weights),
        kept={name: weights[name] for name in rest},
        layout=layout,
    )


def _is_absent(ours: str, theirs: str | Joined, weights: Weights) -> bool:
    """True if a head that not every file has is missing from this one."""
    return (
        isinstance(theirs, str)
        and (ours in _HEADS or ours in ("image_projection", "text_projection"))
        and not any(name in weights for name in (theirs, f"{theirs}.weight"))
    )


def _names(config: ModalityConfig, is_vlmo: bool) -> dict[str, str | Joined]:
    """Name there of every layer here."""
    projection = "itc" if is_vlmo else "ifm"
    names: dict[str, str | Joined] = {
        **_HEADS,
        **_EMBEDDINGS,
        "image_projection": f"{projection}_image_proj.fc",
        "text_projection": f"{projection}_text_proj.fc",
        "joint_image_projection": f"{projection}_vl_image_proj.fc",
        "joint_text_projection": f"{projection}_vl_text_proj.fc",
        "joint_logit_scale": "logit_vl_scale",
        "blocks.{i}.scale1.gain": "transformer.blocks.{i}.gamma_1",
        "blocks.{i}.scale2.gain": "transformer.blocks.{i}.gamma_2",
    }
    for part, there in _PARTS.items():
        own = part in EXPERT_PARTS[config.sharing]
        for modality in ("v", "l", "vl") if own else (None,):
            here = f"blocks.{{i}}.{part}" + (f".{modality}" if modality else "")
            name = there
            if modality is not None:
                name += f"_{_VLMO_NAMES[modality]}" if is_vlmo else f".{modality}"
            names |= _layers(part, here, f"transformer.blocks.{{i}}.{name}")
    return names


def _layers(part: str, here: str, there: str) -> dict[str, str | Joined]:
    if part == "attention":
        biases = Joined((f"{there}.q_bias", f"{there}.k_bias", f"{there}.v_bias"))
        return {
            f"{here}.qkv.weight": f"{there}.qkv.weight",
            f"{here}.qkv.bias": biases,
            f"{here}.proj": f"{there}.proj",
        }
    if part == "ffn":
        return {f"{here}.{layer}": f"{there}.{layer}" for layer in ("fc1", "fc2")}
    return {here: there}


def _config(
    weights: Weights,
    recorded: Mapping[str, Any],
    is_vlmo: bool,
    num_joint_layers: int | None,
    num_attention_heads: int | None,
) -> ModalityConfig:
    """Read the settings off the weights, and off the file's records where weights do not tell."""
    num_layers = 1 + max(_numbers(weights, r"transformer\.blocks\.(\d+)\..*"))
    sharing: Sharing = "custom_ffn" if is_vlmo else _sharing(weights)
    words = weights["text_embeddings.word_embeddings.weight"]
    patches = weights["transformer.patch_embed.proj.weight"]
    fc1 = next((t for n, t in weights.items() if re.search(r"mlp[._\w]*\.fc1\.weight$", n)), None)
    types = weights["token_type_embeddings.weight"]
    if len(types) not in (2, 3):
        raise CheckpointError(
            f"token_type_embeddings.weight has {len(types)} rows: texts, images and a second image "
            f"are 2 or 3"
        )
    table = weights.get("relative_position_bias_table")
    side = _side(weights, table)
    answers = weights.get("vqa_classifier.3.bias")
    return ModalityConfig(
        sharing=sharing,
        hidden_size=words.shape[1],
        num_hidden_layers=num_layers,
        num_joint_layers=_num_joint(weights, recorded, num_layers, num_joint_layers),
        num_attention_heads=_num_heads(recorded, table, num_layers, num_attention_heads),
        intermediate_size=4 * words.shape[1] if fc1 is None else fc1.shape[0],
        layer_norm_eps=1e-6,
        layer_scale=0.1 if "transformer.blocks.0.gamma_1" in weights else None,
        image_size=side * patches.shape[-1],
        patch_size=patches.shape[-1],
        num_channels=patches.shape[1],
        vocab_size=words.shape[0],
        max_position_embeddings=len(weights["text_embeddings.position_embeddings.weight"]),
        embedding_size=words.shape[1],
        num_answers=0 if answers is None else len(answers),
        num_segment_classes=0,
        relative_position_bias=None if table is None else "layer",
        relative_text_distance=0 if table is None else (len(table) - (2 * side - 1) ** 2 - 5) // 2,
        image_positions=table is None,
        text_positions="learned" if table is None else "none",
        text_norm_eps=1e-12,
        num_text_types=len(weights["text_embeddings.token_type_embeddings.weight"]),
        lower_blocks_see="both" if is_vlmo else _lower_blocks_see(recorded, sharing),
        head_norm_eps=1e-5,
        num_image_types=len(types) - 1,
        joint_contrast="logit_vl_scale" in weights,
    )


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]


def _sharing(weights: Weights) -> Sharing:
    """Find which parts of vl-merging's blocks have experts."""
    own = {
        part
        for part, there in _PARTS.items()
        if any(name.startswith(f"transformer.blocks.0.{there}.v.") for name in weights)
    }
    for sharing in get_args(Sharing):
        if own == set(EXPERT_PARTS[sharing]):
            return sharing
    raise CheckpointError(
        f"experts of {sorted(own)}: a sharing that the modality transformer does not have; it has "
        f"{ {name: list(parts) for name, parts in EXPERT_PARTS.items()} }"
    )


def _lower_blocks_see(recorded: Mapping[str, Any], sharing: Sharing) -> LowerBlocksSee:
    """Find whether the lower blocks of vl-merging's joint pass attend to one modality or both.

    The paper's attend to one; where the file does not record its settings, so do these.
    """
    own = EXPERT_PARTS[sharing]
    setting = "self_attn_for_single_mode" if "attention" in own else "separate_inference"
    if recorded.get(setting) is not False:
        return "one"
    if "attention" in own or "norm1" in own:
        raise CheckpointError(
            f"the file records {setting}=False: experts of attention or of its norm that read both "
            f"modalities in the lower blocks are not carried"
        )
    return "both"


def _side(weights: Weights, table: Tensor | None) -> int:
    """Number of patches along one side of an image."""
    if table is None:
        return math.isqrt(weights["transformer.pos_embed"].shape[1] - 1)
    if (index := weights.get("relative_position_index")) is not None:
        return math.isqrt(len(index) - 1)
    return (math.isqrt(len(table) - 5 - 2 * 196) + 1) // 2  # both count 196 words


def _num_joint(
    weights: Weights, recorded: Mapping[str, Any], num_layers: int, asked: int | None
) -> int:
    pattern = r"transformer\.blocks\.(\d+)\.(?:\w+\.vl|\w+_vl)\..*"
    if joint := _numbers(weights, pattern):
        return num_layers - min(joint)
    if asked is not None:
        return asked
    start = recorded.get("vlffn_start_layer_index")
    if not isinstance(start, int) or start < 0:
        raise CheckpointError(
            "neither vl experts nor the file's settings tell how many of the last blocks see image "
            "and text together; say num_joint_layers"
        )
    return num_layers - start


def _num_heads(
    recorded: Mapping[str, Any], table: Tensor | None, num_layers: int, asked: int | None
) -> int:
    if table is not None:
        return table.shape[1] // num_layers
    heads = recorded.get("num_heads") if asked is None else asked
    if not isinstance(heads, int):
        raise CheckpointError(
            "without relative positions neither the weights nor the file's settings tell the "
            "number of heads; say num_attention_heads"
        )
    return heads
