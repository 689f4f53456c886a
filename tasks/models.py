"""Load a checkpoint whole or not at all, on the device that was asked for."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import alloy.modality
from alloy.errors import CheckpointError
from alloy.modality import ModalityConfig, ModalityModel

disable_progress_bar()  # a bar for each model that a stage reads in milliseconds


def device() -> torch.device:
    """ALLOY_DEVICE (`make merge DEVICE=cuda`), else a GPU if there is one, else the CPU."""
    asked = os.environ.get("ALLOY_DEVICE", "")
    if not asked:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(asked)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"DEVICE={asked!r} cannot be used here ({error}); try cpu") from error
    return chosen


def load_model(folder: Path) -> ModalityModel:
    """The checkpoint's modality transformer in evaluation mode, float32, on `device()`.

    Raises:
        CheckpointError: no checkpoint there, one of another architecture, or weights that the model
            lacks or does not know.
    """
    config = load_config(folder)
    if not isinstance(config, ModalityConfig):
        raise CheckpointError(
            f"{folder} holds a model of type {config.model_type!r}; this recipe merges the experts of a "
            f"{ModalityConfig.model_type!r} model"
        )
    return _load(ModalityModel, folder)


def load_any(folder: Path) -> PreTrainedModel:
    """The checkpoint's model, whatever its architecture, in evaluation mode, float32, on `device()`.

    Raises CheckpointError as `load_model` does.
    """
    return _load(model_class(folder), folder)


def load_config(folder: Path) -> PreTrainedConfig:
    """A checkpoint's config; CheckpointError where there is none."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint")
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def model_class(folder: Path) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved from; its config names it."""
    names = load_config(folder).architectures or []
    for name in names:
        for module in (transformers, alloy.modality):
            if isinstance(found := getattr(module, name, None), type):
                return found
    raise CheckpointError(
        f"{folder}/config.json: architectures is {names}; it must name a class of transformers"
    )


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, None where it has none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _load(architecture: Any, folder: Path) -> Any:
    model, info = architecture.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"{folder} does not fit its own config.json: {wrong}")
    return model.eval().to(device())
