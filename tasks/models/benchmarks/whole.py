"""A checkpoint that others can load from its folder: an adapter is folded into its base."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from alloy.checkpoint import load_weights


def whole(folder: Path, place: Path) -> Path:
    """The folder itself, or of `base+adapter` a folder at `place` with the folded weights."""
    if folder.is_dir():
        return folder
    base = Path(str(folder).partition("+")[0])
    place.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, place)
    weights = {name: tensor.contiguous() for name, tensor in load_weights(folder).items()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place
