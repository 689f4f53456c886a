"""Images of another size: what a model knows by position is interpolated.

Shapes: P patches, D hidden, R rows of the table of relative positions, C its columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.modality.configuration import ModalityConfig
from alloy.types import Weights


def resize_images(weights: Weights, config: ModalityConfig, image_size: int) -> dict[str, Tensor]:
    """Interpolate positions, and rows of relative positions, for images of another size.

    Bicubic, as DINOv2, ViT and vl-merging do it; prefix tokens and texts stay as they are.

    Args:
        weights: of a modality transformer, or of its embeddings alone.
        config: of these weights.
        image_size: of the images to come, a multiple of the patch size.

    Raises:
        ValueError: an image size that is no multiple of the patch size.
    """
    if image_size % config.patch_size:
        raise ValueError(
            f"image_size {image_size} is no multiple of patch_size {config.patch_size}"
        )
    old, new = config.image_size // config.patch_size, image_size // config.patch_size
    result = dict(weights)
    if old == new:
        return result
    if (positions := weights.get("image_embeddings.positions")) is not None:
        prefix, patches_PD = positions[0].tensor_split([config.num_image_prefix_tokens])
        resized = torch.cat([prefix, _interpolated(patches_PD, old, new)])
        result["image_embeddings.positions"] = resized[None]
    if (table_RC := weights.get("position_bias.table")) is not None:
        offsets, rest = table_RC.tensor_split([(2 * old - 1) ** 2])
        resized = _interpolated(offsets, 2 * old - 1, 2 * new - 1)
        result["position_bias.table"] = torch.cat([resized, rest])
    return result


def _interpolated(grid_PD: Tensor, old: int, new: int) -> Tensor:
    """Resize a square grid of vectors, its rows one behind the other."""
    grid_1DHW = grid_PD.T.reshape(1, -1, old, old)
    resized = F.interpolate(grid_1DHW, size=(new, new), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.contiguous()
