"""A model fitted to what a benchmark's data say of themselves: heads, size of images."""

import copy
from pathlib import Path
from typing import Any

from alloy.modality import ModalityModel, resize_images
from alloy.modality.towers.importing import build
from tasks.data.sets.description import DESCRIPTION, Description
from tasks.data.sets.splits import StoredSplit
from tasks.recipe.section import ParamsError


def description_of(folder: Path) -> Description | None:
    """The description of a prepared benchmark; None of one that was prepared without."""
    return Description.read(folder) if (folder / DESCRIPTION).is_file() else None


def ready(model: ModalityModel, examples: Any) -> ModalityModel:
    """The model as it reads these examples: of sets on disk, images of their size."""
    if not isinstance(examples, StoredSplit):
        return model
    return fitted(model, examples.description, seed=0).eval()


def with_drop_path(model: ModalityModel, probability: float, *, seed: int) -> ModalityModel:
    """The same weights in a model whose training leaves out updates with this probability.

    It is that of the last block; earlier ones have less, in proportion.
    """
    config = copy.deepcopy(model.config)
    config.drop_path = probability
    return build(config, model.state_dict(), seed).to(model.device)


def fitted(model: ModalityModel, about: Description, *, seed: int) -> ModalityModel:
    """The model with heads for these answers or classes, for images of this size.

    A model that fits is returned as it is. What is fresh depends on the seed alone; a second
    image's type starts as the first's; positions are interpolated.

    Raises:
        ParamsError: images that its patches cannot tile, texts longer than its positions.
    """
    old, config = model.config, copy.deepcopy(model.config)
    if about.image_size % config.patch_size:
        raise ParamsError(
            f"image_size {about.image_size} is no multiple of the model's patch_size "
            f"{config.patch_size}"
        )
    if config.text_positions != "none" and about.text_length > config.max_position_embeddings:
        raise ParamsError(
            f"text_length {about.text_length}: the model has positions for "
            f"{config.max_position_embeddings} tokens"
        )
    config.image_size = about.image_size
    if about.kind == "questions":
        config.num_answers = len(about.answers)
    if about.kind == "maps":
        config.num_segment_classes = len(about.classes)
        config.segment_cells = about.segment_cells
    if about.kind == "pairs":
        config.num_image_types = 2
    if config.to_dict() == old.to_dict():
        return model
    weights = resize_images(model.state_dict(), old, config.image_size)
    types = weights["type_embeddings.weight"]
    if config.num_image_types > old.num_image_types:
        weights["type_embeddings.weight"] = types[[0, 1, 1]]
    for head, sizes in (
        ("answer_head.", ("num_answers",)),
        ("segment_head.", ("num_segment_classes", "segment_cells")),
    ):
        if any(getattr(config, name) != getattr(old, name) for name in sizes):
            weights = {n: t for n, t in weights.items() if not n.startswith(head)}
    return build(config, weights, seed).to(model.device)
