"""Load a checkpoint whole or not at all, on the device that the environment names.

transformers is loaded at first use: the package takes a CPU second, its models two more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from alloy.devices import chosen_device
from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OURS = {"modality": "alloy.modality"}  # model_type: the package that teaches transformers of it


def _transformers() -> Any:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each model that a stage reads in milliseconds
    return transformers


def use_device(stage: str, *, float64: bool = False) -> None:
    """Name the device of a stage (`make merge DEVICE=cuda`), before anything else is done.

    A stage that computes in float64 runs on the CPU where the device has none (Apple's mps).

    Raises:
        DeviceError: a device that is not there.
    """
    chosen = chosen_device()
    if float64 and chosen.type == "mps":
        os.environ["ALLOY_DEVICE"] = "cpu"
        print(f"{stage}: on cpu: mps has no float64")
        return
    print(f"{stage}: on {chosen}")


def load_any(folder: Path, on: torch.device | None = None) -> PreTrainedModel:
    """Load a model of any architecture in evaluation mode, float32.

    Args:
        on: a device, by default the chosen one.

    Raises:
        CheckpointError: no checkpoint there, or weights that the model lacks or does not know.
    """
    _transformers()
    if "alloy_trunk" in _read_config(folder):
        shared = import_module("alloy.modality.sharing").load_shared(folder, dtype=torch.float32)
        return shared.to(chosen_device() if on is None else on)
    return load_whole(model_class(folder), folder, on)


def load_config(folder: Path) -> PreTrainedConfig:
    """A checkpoint's config; CheckpointError where there is none."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint")
    package_of(folder)
    return _transformers().AutoConfig.from_pretrained(folder, local_files_only=True)


def package_of(folder: Path) -> ModuleType:
    """The package of the checkpoint's classes: transformers, or ours that registers them."""
    name = package_name(folder)
    return _transformers() if name == "transformers" else import_module(name)


def package_name(folder: Path) -> str:
    """The name of the package of the checkpoint's classes.

    Raises:
        CheckpointError: no config.json, or one that is not JSON.
    """
    return OURS.get(_read_config(folder).get("model_type", ""), "transformers")


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def model_class(folder: Path) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved from; its config names it."""
    for name in (names := load_config(folder).architectures or []):
        if isinstance(architecture := getattr(package_of(folder), name, None), type):
            return architecture
    raise _without_class(folder, names)


def class_name(folder: Path) -> str:
    """The name of that class; the models of transformers, which take seconds, are not imported.

    Raises:
        CheckpointError: as `model_class`.
    """
    names, known = load_config(folder).architectures or [], {*dir(package_of(folder))}
    for name in names:
        # A class has a capital; transformers lists functions and modules among its names, too.
        if name in known and name[:1].isupper():
            return name
    raise _without_class(folder, names)


def _without_class(folder: Path, names: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}/config.json: architectures is {names}; it must name a class of transformers"
    )


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, None where it has none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def image_processor(checkpoint: Path) -> Any:
    """The checkpoint's image processor, None where it has none."""
    if not any((checkpoint / f"{n}_config.json").is_file() for n in ("preprocessor", "processor")):
        return None
    try:
        return _transformers().AutoImageProcessor.from_pretrained(checkpoint, local_files_only=True)
    except (ImportError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint}: its image processor cannot be used: {error}"
        ) from error


def joint_processor(checkpoint: Path) -> Any:
    """What a model of several modalities reads them by together.

    Raises:
        CheckpointError: there is none, or one that needs packages which are not there.
    """
    try:
        found = _transformers().AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
    except (ImportError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint}: its processor cannot be used: {said}") from error
    if not isinstance(found, _transformers().ProcessorMixin):
        raise CheckpointError(f"{checkpoint}: no processor of images and texts together")
    return found


def load_whole(architecture: Any, folder: Path, on: torch.device | None = None) -> Any:
    """Load a checkpoint's model in evaluation mode, float32, by default on the chosen device.

    Raises:
        CheckpointError: the model lacks weights of the checkpoint, or the other way round.
    """
    _transformers()
    model, info = architecture.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"{folder} does not fit its own config.json: {wrong}")
    return model.eval().to(chosen_device() if on is None else on)
