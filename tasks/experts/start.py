"""Starts of pre-training and of recipes on real data: image towers and released checkpoints.

    python -m tasks.experts.start models/raw/vlm.ckpt models/raw/vlm --tokenizer models/raw/bert

writes a released file of vl-merging or VLMo as a checkpoint of a recipe, with a tokenizer.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alloy.modality import (
    FRESH_HEADS,
    ModalityConfig,
    ModalityModel,
    agnostic_config,
    import_release,
    import_tower,
)
from alloy.modality.configuration import Sharing
from tasks.evaluation.loading import load_tokenizer
from tasks.recipe.section import ParamsError
from tasks.storage import write_folder


def start_model(
    tower: Path | None, sharing: Sharing, settings: Mapping[str, Any], *, seed: int
) -> ModalityModel:
    """A model whose experts are copies of a tower of images, or random ones without a tower.

    What is random, and heads that only fine-tuning trains, depend on the seed alone, and are the
    same whatever is shared.
    """
    if tower is not None:
        return import_tower(tower).model(seed=seed, sharing=sharing, **settings)
    config = ModalityConfig(sharing=sharing, **settings)
    torch.manual_seed(seed)
    model = ModalityModel(config)
    torch.manual_seed(seed)
    heads = ModalityModel(agnostic_config(config)).state_dict()
    weights = model.state_dict()
    weights |= {name: t for name, t in heads.items() if name.startswith(FRESH_HEADS)}
    model.load_state_dict(weights)
    return model


def tokenizer_of(folder: Path) -> Any:
    """A folder's tokenizer.

    Raises:
        ParamsError: there is none.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ParamsError(f"{folder} has no tokenizer (tokenizer_config.json)")
    return tokenizer


def copy_processor(source: Path | None, target: Path) -> None:
    """Copy an image processor's settings, if there are any."""
    path = None if source is None else source / "preprocessor_config.json"
    if path is not None and path.is_file():
        shutil.copy(path, target)


def write_release(file: Path, target: Path, tokenizer: Path) -> None:
    """Write a released `.ckpt` as a checkpoint, nothing in it executed."""
    release = import_release(file)
    words = tokenizer_of(tokenizer)
    if len(words) != release.config.vocab_size:
        raise ParamsError(
            f"{tokenizer} has {len(words)} tokens; {file} has embeddings of "
            f"{release.config.vocab_size}: give the tokenizer that it was trained with"
        )
    with write_folder(target) as partial:
        release.model().save_pretrained(partial)
        words.save_pretrained(partial)
    print(f"wrote {target}: {release.name}, sharing {release.config.sharing}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tasks.experts.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a .ckpt file of vl-merging or VLMo")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder that has one")
    given = parser.parse_args()
    try:
        write_release(given.file, given.target, given.tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.experts.start: {error}")
