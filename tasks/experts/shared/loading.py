"""Modality transformers, loaded whole or not at all."""

from pathlib import Path

from alloy.errors import CheckpointError
from alloy.modality import ModalityConfig, ModalityModel
from tasks.evaluation.loading import load_config, load_whole


def load_model(folder: Path) -> ModalityModel:
    """The checkpoint's modality transformer in evaluation mode, float32, on the chosen device.

    Raises:
        CheckpointError: no checkpoint there, one of another architecture, or weights that the model
            lacks or does not know.
    """
    config = load_config(folder)
    if not isinstance(config, ModalityConfig):
        raise CheckpointError(
            f"{folder} holds a model of type {config.model_type!r}; this recipe merges the experts "
            f"of a {ModalityConfig.model_type!r} model"
        )
    return load_whole(ModalityModel, folder)
