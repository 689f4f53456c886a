"""Other people's `.ckpt` files: read as records of tensors, never executed.

A trainer's file holds more than weights: settings, states of optimisers and of callbacks, some of
them objects of its own classes. torch's weights_only loader builds tensors and plain containers
alone. The classes of known trainers are read as empty records in their place; any other name in the
file is refused.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alloy.errors import CheckpointError

_TRAINERS = ("vilt", "vlmo", "pytorch_lightning", "lightning", "lightning_fabric", "sacred")
_WEIGHTS = ("state_dict", "module", "model")


class Record:
    """In the place of a trainer's object: what it was made of, and nothing that it could do."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Record":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def read_pickle(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and settings of a trainer's checkpoint.

    Returns:
        The tensors by name, and the settings that the file records ({} if none).

    Raises:
        CheckpointError: no file of torch's, names of code that is no known trainer's, no weights.
    """
    path = Path(path)
    records = _records_of(path)
    try:
        with torch.serialization.safe_globals(records):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: torch's weights_only loader refuses it: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    nested = (content.get(key) for key in _WEIGHTS)
    weights = next((each for each in nested if isinstance(each, dict)), content)
    tensors = {str(name): t for name, t in weights.items() if isinstance(t, Tensor)}
    if other := sorted(str(name) for name, t in weights.items() if not isinstance(t, Tensor)):
        raise CheckpointError(f"{path}: {other[:3]} are no tensors ({len(other)} in all)")
    return tensors, _settings(content.get("hyper_parameters"))


def _records_of(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The stand-in for each class of a trainer in the file."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no checkpoint of torch.save: {error}") from error
    if strange := sorted(n for n in names if n.partition(".")[0] not in _TRAINERS):
        raise CheckpointError(
            f"{path}: the file names {strange[:3]} ({len(strange)} in all), which reading it would "
            f"have to execute; a file of tensors alone is read"
        )
    return [(OrderedDict if name.endswith("Dict") else Record, name) for name in names]


def _settings(hyper_parameters: Any) -> dict[str, Any]:
    if not isinstance(hyper_parameters, dict):
        return {}
    config = hyper_parameters.get("config", hyper_parameters)
    return dict(config) if isinstance(config, dict) else {}
