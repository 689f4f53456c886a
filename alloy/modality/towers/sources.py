"""Sources of towers: models and checkpoints of transformers."""

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from safetensors import SafetensorError, safe_open
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


class Source(NamedTuple):
    """A model of transformers, or what its file holds of it."""

    config: Any
    weights: dict[str, Tensor]
    missing: frozenset[str] = frozenset()
    """Weights of the model that its file lacks."""


def read_source(source: PreTrainedModel | str | Path) -> Source:
    """Read config and weights of a model, or of a folder in the format of transformers.

    Weights of the folder that its model does not have are read, too.

    Raises:
        CheckpointError: a folder that is no checkpoint of safetensors.
    """
    if isinstance(source, PreTrainedModel):
        return Source(source.config, on_cpu(source.state_dict()))
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a tower comes from a folder that has one")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, names = _class_of(config).from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    weights = {n: t for n, t in model.state_dict().items() if n not in names["missing_keys"]}
    surplus = _surplus(folder, model, set(names["unexpected_keys"]))
    return Source(model.config, weights | surplus, frozenset(names["missing_keys"]))


def _class_of(config: Any) -> Any:
    """Class of transformers that a checkpoint names as its own; without one, the bare model."""
    (name,) = (config.architectures or [""])[:1]
    made = getattr(transformers, name, None)
    is_model = isinstance(made, type) and issubclass(made, PreTrainedModel)
    return made if is_model else AutoModel


def _surplus(folder: Path, model: PreTrainedModel, unexpected: Set[str]) -> dict[str, Tensor]:
    """Read what the files hold beyond the model: other heads, and indices that it computes."""
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no dict)
                if name in unexpected or name in computed or ignored.search(name):
                    tensors[name] = file.get_tensor(name)
    if lost := sorted(unexpected - tensors.keys()):
        raise CheckpointError(f"{folder}: weights {lost[:3]} are not in its files by these names")
    return tensors


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
