"""Recalls of retrieval where an image has several captions, as the field computes them.

Shapes: I images, T captions.
"""

import torch
from torch import Tensor

_ROWS = 256
FOLD = 1000
"""Images of a fold of the small test, whose scores are means over the folds of COCO's 5,000."""


def ranks(similar_IT: Tensor, image_of_T: Tensor) -> tuple[Tensor, Tensor]:
    """Count the wrong candidates ahead of the best right one.

    Those that tie are ahead, so that equal embeddings find nothing.

    Args:
        similar_IT: similarities of images and captions.
        image_of_T: each caption's image.

    Returns:
        For each image among captions [I], and for each caption among images [T].
    """
    num_images, num_texts = similar_IT.shape
    right_T = similar_IT[image_of_T, torch.arange(num_texts)]
    of_text = torch.zeros(num_texts, dtype=torch.long)
    of_image = torch.empty(num_images, dtype=torch.long)
    for start in range(0, num_images, _ROWS):
        rows = similar_IT[start : start + _ROWS]
        own = image_of_T[None] == torch.arange(start, start + len(rows))[:, None]
        of_text += ((rows >= right_T) & ~own).sum(0)
        best = rows.masked_fill(~own, float("-inf")).amax(1, keepdim=True)
        of_image[start : start + len(rows)] = ((rows >= best) & ~own).sum(1)
    return of_image, of_text


def folds(num_images: int) -> list[slice]:
    """The folds of 1,000 images of a test set of whole thousands, at least two; else none."""
    if num_images < 2 * FOLD:
        return []
    return [slice(start, start + FOLD) for start in range(0, num_images - FOLD + 1, FOLD)]


def hits(rank_N: Tensor, k: int) -> Tensor:
    """Return 1 where the right one is among the first k and 0 elsewhere, [N]."""
    return (rank_N < k).double()


def by_image(values_T: Tensor, image_of_T: Tensor, num_images: int) -> Tensor:
    """The mean of each image's captions, [I]."""
    sums = torch.zeros(num_images, dtype=values_T.dtype).index_add_(0, image_of_T, values_T)
    return sums / image_of_T.bincount(minlength=num_images).clamp(min=1)
