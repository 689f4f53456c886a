"""`adapter_config.json`: the keys that change what an adapter computes, or a refusal by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alloy.checkpoint.format import ADAPTER
from alloy.checkpoint.reading import read_json, shown, source_file, typed
from alloy.errors import CheckpointError, nearest

MERGE_AND_UNLOAD = (
    "load it on its base with peft, call merge_and_unload, save the result and merge that"
)
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_bias", "bias", "fan_in_fan_out", "init_lora_weights", "base_model_name_or_path",
}  # fmt: skip
_NO_MATTER = {
    "auto_mapping", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
"""They say how it was trained, or where: the tensors of the file say that too."""
_INITIALISATIONS = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
"""Settings of how training started, as `init_lora_weights` says."""
_NOT_FOLDED = {
    "alora_invocation_tokens": "aLoRA works from some token on, which no weight can express",
    "arrow_config": "Arrow routes between adapters while the model runs",
    "kasa_config": "KaSA changes the base as well",
    "layer_replication": "the model has layers that the base lacks",
    "megatron_config": "its layers are split as in Megatron",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "LoRA on parameters (experts of a mixture)",
    "trainable_token_indices": "rows of single tokens were trained",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "QALoRA pools the inputs",
    "velora_config": "VeLoRA is not known to fold",
}
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base as it was; PiSSA, OLoRA, CorDA, LoftQ and others move it."""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA that its tensors do not tell."""

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    base: str | None
    """`base_model_name_or_path`: a name of the hub or a path where it was trained."""

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)

    def scaling(self, module: str) -> float:
        """The factor on B @ A (arXiv:2106.09685; by the root of the rank: arXiv:2312.03732)."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(folder: Path) -> AdapterConfig:
    """The config of an adapter that can be folded exactly.

    Raises:
        CheckpointError: no adapter, another kind than LoRA, a setting that no weight of the base's
            form can express, or an unknown one.
    """
    path = source_file(folder, ADAPTER)
    if path is None:
        raise CheckpointError(
            f"{folder}: no {ADAPTER}; give the folder of an adapter as PEFT saves"
        )
    data = read_json(path)
    kind = typed(data, "peft_type", "text", path)
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {shown(kind)}; LORA alone can be folded. For a kind that peft "
            f"can merge, {MERGE_AND_UNLOAD}"
        )
    _refuse_settings(data, path)
    return AdapterConfig(
        path=path,
        rank=_rank(data.get("r", 8), "r", path),
        alpha=_number(data.get("lora_alpha", 8), "lora_alpha", path),
        rank_pattern={
            key: _rank(value, f"rank_pattern[{key!r}]", path)
            for key, value in _patterns(data, "rank_pattern", path).items()
        },
        alpha_pattern={
            key: _number(value, f"alpha_pattern[{key!r}]", path)
            for key, value in _patterns(data, "alpha_pattern", path).items()
        },
        use_rslora=bool(typed(data, "use_rslora", "true or false", path)),
        use_dora=bool(typed(data, "use_dora", "true or false", path)),
        fan_in_fan_out=bool(typed(data, "fan_in_fan_out", "true or false", path)),
        base=typed(data, "base_model_name_or_path", "text", path),
    )


def _refuse_settings(data: Mapping[str, Any], path: Path) -> None:
    """Every key is known, and says nothing that a fold cannot do."""
    for key, value in data.items():
        if key in _READ | _NO_MATTER | _INITIALISATIONS or not value:
            continue
        if key in _NOT_FOLDED:
            raise CheckpointError(
                f"{path}: {key} is {shown(value)}: {_NOT_FOLDED[key]}, so it cannot be folded into "
                f"the base's weights here; {MERGE_AND_UNLOAD} if peft can"
            )
        raise CheckpointError(
            f"{path}: {key} is {shown(value)}, a setting that is not known here and may change "
            f"the function; {nearest(key, [*_READ, *_NO_MATTER])}, or {MERGE_AND_UNLOAD}"
        )
    start = data.get("init_lora_weights", True)
    if start is not None and start not in _KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights is {shown(start)}, which moves the base's weights before "
            "training: the adapter belongs to the moved base; save it with "
            "path_initial_model_for_weight_conversion, or " + MERGE_AND_UNLOAD
        )
    if data.get("bias") not in (None, "none", "all", "lora_only"):
        raise CheckpointError(
            f"{path}: bias is {shown(data['bias'])}; it must be none, all or lora_only"
        )


def _patterns(data: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    """Values by a regular expression that ends a module's name."""
    patterns = typed(data, key, "an object", path) or {}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{path}: {key} holds {pattern!r}, no regular expression ({error})"
            ) from error
    return patterns


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that the end of a module's name matches, as PEFT looks it up."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), module)


def _rank(value: object, key: str, path: Path) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path}: {key} is {shown(value)}; a rank is a whole number from 1")
    return value


def _number(value: object, key: str, path: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; it must be a finite number")
    return float(value)
