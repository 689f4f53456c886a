"""Load a checkpoint whole or not at all, on the device that was asked for."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from alloy.models import ModalityConfig, ModalityModel

disable_progress_bar()  # a bar for each model that a stage reads in milliseconds


class CheckpointError(ValueError):
    """A folder that is no complete checkpoint of the expected model; the message says what is wrong."""


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
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(config, ModalityConfig):
        raise CheckpointError(
            f"{folder} holds a model of type {config.model_type!r}; this recipe merges the experts of a "
            f"{ModalityConfig.model_type!r} model"
        )
    loaded: Any = ModalityModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, info = loaded  # a pair, because of output_loading_info
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"{folder} does not fit its own config.json: {wrong}")
    return model.eval().to(device())
