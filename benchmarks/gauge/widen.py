"""The same function in a wider stream: parents that differ in the slack of their streams alone.

A folded model's stream sums to zero. Zeros behind it therefore change a LayerNorm by one factor,
which the layers that read it take back. The feed-forward networks keep their neurons; attention, as
wide as the stream, gets heads that do nothing.

Two parts are only nearly equal, so the widened parent is measured itself: the norm of the text
embeddings leaves a mean, and that of the masked-word head counts some units twice unless the width
is a multiple of the old one.

Shapes: D old width, W new width, R rows of a reader.
"""

import copy

import torch
from torch import Tensor

from alloy.modality import ModalityModel
from alloy.modality.streams import in_gauge

READERS = ("image_projection.weight", "text_projection.weight", "pooler.weight")
HEAD = "masked_word_head"


def widen(source: ModalityModel, width: int) -> ModalityModel:
    """Widen a folded model's streams, without the heads that pre-training does not train.

    Raises:
        ValueError: the width is smaller than the model's, or no multiple of its units per head.
    """
    folded = in_gauge(source)
    config = copy.deepcopy(folded.config)
    D, per_head = config.hidden_size, config.hidden_size // config.num_attention_heads
    if width < D or width % per_head:
        raise ValueError(f"width {width}: take a multiple of {per_head} of at least {D}")
    config.hidden_size, config.num_attention_heads = width, width // per_head
    config.num_answers = config.num_segment_classes = 0
    wide = ModalityModel(config).eval()
    old, new = folded.state_dict(), dict(wide.state_dict())
    for name, tensor in old.items():
        if name in new and not name.startswith("pair_head"):
            new[name] = _widened(name, tensor.double(), D, width).to(tensor.dtype)
    wide.load_state_dict(new)
    wide.config._attn_implementation = folded.config._attn_implementation
    return wide


def _widened(name: str, tensor: Tensor, D: int, width: int) -> Tensor:
    shrink = (D / width) ** 0.5
    part = name.rpartition(".")[0].rpartition(".")[2]
    kind = name.rpartition(".")[2]
    if name.startswith("blocks.") and ".norm" in name:
        return _padded(tensor, 0, width, fill=1.0 if kind == "weight" else 0.0)
    if name in ("norm.weight", "norm.bias"):
        return _padded(tensor, 0, width, fill=1.0)
    if part in ("qkv", "fc1") and kind == "weight":
        tensor = _padded(shrink * _centred(tensor, 1), 1, width)
    if part == "qkv":
        thirds = [_padded(third, 0, width) for third in tensor.split(D)]
        return torch.cat(thirds)
    if part == "proj" and kind == "weight":
        return _padded(_padded(tensor, 0, width), 1, width)
    if part in ("proj", "fc2"):
        return _padded(tensor, 0, width)
    if name in READERS or name == f"{HEAD}.transform.weight":
        tensor = _read(tensor, shrink, width)
    if name.startswith(HEAD):
        return _of_words(name, tensor, D, width)
    if name.startswith("pooler"):
        return _padded(tensor, 0, width)
    if name == "statement_head.weight":
        return _padded(tensor, 1, width)
    if name.startswith("text_embeddings.norm"):
        return _padded(shrink * tensor if kind == "weight" else _centred(tensor, 0), 0, width)
    if name.startswith("text_embeddings") or name == "type_embeddings.weight":
        return _padded(_centred(tensor, -1), -1, width)
    if name.startswith("image_embeddings.patches"):
        return _padded(tensor, 0, width)
    if name.startswith("image_embeddings"):
        return _padded(tensor, -1, width)
    return tensor


def _padded(tensor: Tensor, dim: int, size: int, fill: float = 0.0) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim)


def _centred(tensor: Tensor, dim: int) -> Tensor:
    return tensor - tensor.mean(dim, keepdim=True)


def _read(reader_RD: Tensor, shrink: float, width: int) -> Tensor:
    """Widen a reader of the final norm, whose bias is 1: its rows keep their sums."""
    total_R1 = reader_RD.sum(1, keepdim=True)
    return _padded(shrink * _centred(reader_RD, 1), 1, width) + total_R1 / width


def _of_words(name: str, tensor: Tensor, D: int, width: int) -> Tensor:
    """Repeat units of the masked-word head, because a norm stands behind its activation."""
    repeated = torch.arange(width) % D
    if name == f"{HEAD}.decoder.weight":
        return tensor[:, repeated] / repeated.bincount()[repeated]
    return tensor if name == f"{HEAD}.decoder.bias" else tensor[repeated]
