"""From an image to what a model reads: resized, cropped, augmented; a function of one seed.

As in vl-merging: the whole image becomes a square, bicubic; in training a crop of it may, and
RandAugment (arXiv:1909.13719, by kornia) changes it. Where a map of labels goes with the image,
both are cropped and mirrored alike and nothing else changes.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tasks.data.sets.description import Look

_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """Changes of training images."""

    num_operations: int = 2  # of RandAugment on each image; 0: none
    magnitude: int = 7  # of its 30
    smallest_crop: float = 1.0  # share of the image; 1: no crop
    mirror: bool = False  # half of the images; never where texts say left or right


def to_pixels(
    image: Image.Image,
    size: int,
    look: Look,
    augmentation: Augmentation | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pixels of one image: uint8 [3, S, S] where -1 to 1 is meant, else normalised float32."""
    if augmentation is not None and generator is not None:
        image = _framed(image, None, augmentation, generator)[0]
    square = image.resize((size, size), Image.Resampling(look.resample))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
    if augmentation is not None and generator is not None and augmentation.num_operations:
        pixels = _rand_augmented(pixels, augmentation, generator)
    return _normalised(pixels, look)


def to_pixels_and_labels(
    image: Image.Image,
    labels: np.ndarray,
    size: int,
    look: Look,
    augmentation: Augmentation | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """An image and its map, framed alike: pixels [3, S, S] and labels int64 [S, S]."""
    mask: Image.Image | None = Image.fromarray(labels.astype(np.int32), mode="I")
    if augmentation is not None and generator is not None:
        image, mask = _framed(image, mask, augmentation, generator)
    assert mask is not None
    pixels = to_pixels(image, size, look)
    mask = mask.resize((size, size), Image.Resampling.NEAREST)
    return pixels, torch.from_numpy(np.array(mask)).long()


def _normalised(pixels: Tensor, look: Look) -> Tensor:
    if look.is_plain:
        return pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (look.mean, look.std))
    return (pixels / 255 - mean) / std


def _framed(
    image: Image.Image,
    mask: Image.Image | None,
    augmentation: Augmentation,
    generator: torch.Generator,
) -> tuple[Image.Image, Image.Image | None]:
    """Crop and mirror an image, and its map with it."""
    if augmentation.smallest_crop < 1:
        box = _crop(image.size, augmentation.smallest_crop, generator)
        image, mask = image.crop(box), None if mask is None else mask.crop(box)
    if augmentation.mirror and torch.rand((), generator=generator) < 0.5:
        turn = Image.Transpose.FLIP_LEFT_RIGHT
        image, mask = image.transpose(turn), None if mask is None else mask.transpose(turn)
    return image, mask


def _crop(
    size: tuple[int, int], smallest: float, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """A box of at least that share of the image, of an aspect between 3:4 and 4:3."""
    width, height = size
    for _ in range(_TRIES):
        draws = torch.rand(4, generator=generator).tolist()
        area = width * height * (smallest + (1 - smallest) * draws[0])
        low, high = (math.log(ratio) for ratio in _RATIOS)
        ratio = math.exp(low + (high - low) * draws[1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws[2] * (width - w + 1)), int(draws[3] * (height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def _rand_augmented(
    pixels: Tensor, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """RandAugment by numbers of this generator's; torch's own source of numbers stays as it is."""
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # torch.manual_seed would also note a call, with its traceback, for each kind of device
        torch.default_generator.manual_seed(seed)
        changed = _policy(augmentation)(pixels[None].float() / 255)[0]
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)


@cache
def _policy(augmentation: Augmentation) -> Any:
    from kornia.augmentation.auto import RandAugment  # slow to import; training alone needs it

    return RandAugment(n=augmentation.num_operations, m=augmentation.magnitude)
