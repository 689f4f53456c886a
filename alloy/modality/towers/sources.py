"""Where towers come from: models and checkpoints of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from alloy.devices import on_cpu
from alloy.errors import CheckpointError, nearest

_TRAITS = {
    "rope_parameters": "its positions are rotary",
    "rope_theta": "its positions are rotary",
    "window_size": "it attends within windows",
    "window_sizes": "it attends within windows",
    "sliding_window": "it attends within windows",
    "relative_attention_num_buckets": "its positions are a bias by bucket (T5)",
    "num_register_tokens": "it has register tokens",
    "is_encoder_decoder": "it is an encoder and a decoder with cross-attention",
}
"""Settings by which an architecture shows what the modality transformer does not have."""


def read_source(source: PreTrainedModel | str | Path) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights of a model, or of a folder in the format of transformers.

    Raises:
        CheckpointError: a folder that is no checkpoint, weights missing from it or unknown in it.
    """
    if isinstance(source, PreTrainedModel):
        return source.config, on_cpu(source.state_dict())
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a tower comes from a folder that has one")
    model = _load(folder)
    return model.config, dict(model.state_dict())


def _load(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    (name,) = (config.architectures or ["AutoModel"])[:1]
    made = getattr(transformers, name, AutoModel)
    try:
        model, names = made.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if rest := sorted(names[kind]):
            raise CheckpointError(
                f"{folder}: {kind.removesuffix('_keys')} weights {rest[:3]} ({len(rest)} in all) "
                f"of a {type(model).__name__}"
            )
    return model


def refuse_unknown_type(config: Any, known: Mapping[str, object]) -> None:
    """Refuse a model that has no importer, with the reason if its config shows one."""
    if config.model_type in known:
        return
    reasons = [reason for trait, reason in _TRAITS.items() if getattr(config, trait, None)]
    why = f": {reasons[0]}" if reasons else ""
    raise CheckpointError(
        f"model type {config.model_type!r} has no tower for the modality transformer{why}; "
        f"{nearest(config.model_type, known)}"
    )
