"""Layers of the modality transformer; `ModalityConfig` says how each of them is built.

Shapes: B batch, T text tokens, P patches, N prefix tokens of an image, I = N + P image tokens,
S any sequence, D hidden, H heads, K channels of a head, R rows of a table.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from alloy.modality.configuration import EXPERT_PARTS, Activation, ModalityConfig


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU as CLIP does."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


class Writer(nn.Linear):
    """Linear layer into the residual stream; it starts smaller the deeper it stands (BEiT)."""

    def __init__(self, size_in: int, size_out: int, layer: int):
        super().__init__(size_in, size_out)
        self.depth_scale = 1 / math.sqrt(2 * (layer + 1))


class LayerScale(nn.Module):
    """Learned gain per unit of a block's update (CaiT)."""

    def __init__(self, size: int, initial_gain: float):
        super().__init__()
        self.initial_gain = initial_gain
        self.gain = nn.Parameter(torch.full((size,), initial_gain))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.gain * x_BSD


class DropPath(nn.Module):
    """Leave out an update of some examples in training (stochastic depth, arXiv:1603.09382)."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, update_BSD: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return update_BSD
        kept = 1 - self.probability
        shape = (len(update_BSD), *[1] * (update_BSD.dim() - 1))
        return update_BSD * update_BSD.new_empty(shape).bernoulli_(kept) / kept


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, config: ModalityConfig, layer: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Writer(config.hidden_size, config.hidden_size, layer)

    def forward(
        self, x_BSD: Tensor, mask_B1SS: Tensor | None, bias_HSS: Tensor | None = None
    ) -> Tensor:
        """Attend to what the mask shows (True; its size may be 1), with a bias on the scores."""
        B, S, D = x_BSD.shape
        qkv = self.qkv(x_BSD).view(B, S, 3, self.num_heads, D // self.num_heads)
        q_BHSK, k_BHSK, v_BHSK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.config._attn_implementation == "sdpa":
            shown = mask_B1SS
            if bias_HSS is not None:
                shown = bias_HSS if shown is None else bias_HSS.masked_fill(~shown, float("-inf"))
            context = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=shown)
        else:
            scores_BHSS = q_BHSK @ k_BHSK.transpose(-2, -1) / math.sqrt(D // self.num_heads)
            if bias_HSS is not None:
                scores_BHSS = scores_BHSS + bias_HSS
            if mask_B1SS is not None:
                scores_BHSS = scores_BHSS.masked_fill(~mask_B1SS, float("-inf"))
            context = scores_BHSS.softmax(-1) @ v_BHSK
        return self.proj(context.transpose(1, 2).reshape(B, S, D))


class FeedForward(nn.Module):
    def __init__(self, config: ModalityConfig, layer: int):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Writer(config.intermediate_size, config.hidden_size, layer)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_BSD)))


class Block(GradientCheckpointingLayer):
    """Attention, then a feed-forward network, each added to the stream that it reads.

    A pre-norm block is x + scale1 Attention(norm1(x)), then x + scale2 FFN(norm2(x)); a post-norm
    block is norm1(x + scale1 Attention(x)), then norm2(x + scale2 FFN(x)). A part with experts is a
    `ModuleDict` by modality; LayerScale is always shared.
    """

    def __init__(self, config: ModalityConfig, layer: int):
        super().__init__()
        makers = {
            "norm1": lambda: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            "attention": lambda: Attention(config, layer),
            "norm2": lambda: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            "ffn": lambda: FeedForward(config, layer),
        }
        modalities = config.modalities(layer)
        for part, make in makers.items():
            with_experts = part in EXPERT_PARTS[config.sharing]
            experts = nn.ModuleDict({m: make() for m in modalities}) if with_experts else make()
            setattr(self, part, experts)
        self.norms_first = config.norm_position == "pre"
        self.dropout = nn.Dropout(config.dropout)
        last = max(1, config.num_hidden_layers - 1)
        self.drop_path = DropPath(config.drop_path * layer / last)
        self.scale1 = self.scale2 = nn.Identity()
        if config.layer_scale is not None:
            self.scale1 = LayerScale(config.hidden_size, config.layer_scale)
            self.scale2 = LayerScale(config.hidden_size, config.layer_scale)

    def _part(self, name: str, modality: str) -> nn.Module:
        part = getattr(self, name)
        return part[modality] if isinstance(part, nn.ModuleDict) else part

    def forward(
        self,
        x_BSD: Tensor,
        modality: str,
        mask_B1SS: Tensor | None,
        bias_HSS: Tensor | None = None,
    ) -> Tensor:
        norm1, norm2 = self._part("norm1", modality), self._part("norm2", modality)
        attention, ffn = self._part("attention", modality), self._part("ffn", modality)
        read_BSD = norm1(x_BSD) if self.norms_first else x_BSD
        update = attention(read_BSD, mask_B1SS, bias_HSS)
        x_BSD = x_BSD + self._dropped(self.scale1(update))
        if not self.norms_first:
            x_BSD = norm1(x_BSD)
        update = ffn(norm2(x_BSD) if self.norms_first else x_BSD)
        x_BSD = x_BSD + self._dropped(self.scale2(update))
        return x_BSD if self.norms_first else norm2(x_BSD)

    def _dropped(self, update_BSD: Tensor) -> Tensor:
        return self.drop_path(self.dropout(update_BSD))

    def forward_both(
        self, x_BSD: Tensor, num_text: int, mask_B11S: Tensor | None, bias_HSS: Tensor | None
    ) -> Tensor:
        """Let text and image tokens attend to each other; each has its own feed-forward network."""
        norm1, attention = self._part("norm1", "l"), self._part("attention", "l")  # shared
        update = attention(norm1(x_BSD), mask_B11S, bias_HSS)
        x_BSD = x_BSD + self._dropped(self.scale1(update))
        updates = [
            self._part("ffn", modality)(self._part("norm2", modality)(part))
            for modality, part in (("l", x_BSD[:, :num_text]), ("v", x_BSD[:, num_text:]))
        ]
        return x_BSD + self._dropped(self.scale2(torch.cat(updates, dim=1)))


class PositionBias(nn.Module):
    """Learned bias of the attention scores by the relative position of two tokens (BEiT, VLMo).

    The rows of the table are, in this order: the offsets of two patches, class token to patch,
    patch to class token, class token to itself; and, where texts have a bias too, text to image,
    image to text, the offsets of two words, and the same three for the text's class token. The
    columns are the heads, block by block where each block has its own.
    """

    def __init__(self, config: ModalityConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_layers = config.num_hidden_layers
        self.of_each_layer = config.relative_position_bias == "layer"
        self.side = config.image_size // config.patch_size
        self.text_distance = config.relative_text_distance
        image_rows = (2 * self.side - 1) ** 2 + 3
        text_rows = 2 * self.text_distance + 2 if self.text_distance else 0
        columns = self.num_heads * (self.num_layers if self.of_each_layer else 1)
        self.table = nn.Parameter(torch.zeros(image_rows + text_rows, columns))

    def forward(self, modality: str, num_tokens: int) -> list[Tensor] | None:
        """Biases [H, S, S] of one modality's tokens, block by block; None if it has none."""
        num_image = self.side**2 + 1
        num_text = {"v": 0, "l": num_tokens, "vl": num_tokens - num_image}[modality]
        num_image = 0 if modality == "l" else num_image
        if num_text > self.text_distance > 0:
            raise ValueError(
                f"a text of {num_text} tokens is longer than the relative positions reach: "
                f"relative_text_distance is {self.text_distance}"
            )
        if num_text and not self.text_distance:
            if modality == "l":
                return None
            image = self._gather(relative_rows(self.side, 0, 0, with_image=True))
            biases = F.pad(image, (num_text, 0, num_text, 0))
        else:
            biases = self._gather(
                relative_rows(self.side, self.text_distance, num_text, with_image=num_image > 0)
            )
        if self.of_each_layer:
            return list(biases.unflatten(0, (self.num_layers, self.num_heads)))
        return [biases] * self.num_layers

    def _gather(self, rows_SS: Tensor) -> Tensor:
        return self.table[rows_SS.to(self.table.device)].permute(2, 0, 1)


@lru_cache(maxsize=16)
def relative_rows(side: int, text_distance: int, num_text: int, with_image: bool) -> Tensor:
    """Row of the bias table for every two tokens [S, S]: text first, then the image."""
    num_image_rows = (2 * side - 1) ** 2 + 3
    image_II = _with_class_token(_patch_offsets(side), num_image_rows - 3)
    if not num_text:
        return image_II
    position_T = torch.arange(num_text - 1)
    offsets = position_T[None, :] - position_T[:, None] + text_distance - 2
    after_offsets = num_image_rows + 2 * text_distance - 1
    text_TT = _with_class_token(offsets + num_image_rows + 2, after_offsets)
    if not with_image:
        return text_TT
    num_image = len(image_II)
    to_image = torch.full((num_text, num_image), num_image_rows)
    to_text = torch.full((num_image, num_text), num_image_rows + 1)
    return torch.cat([torch.cat([text_TT, to_image], 1), torch.cat([to_text, image_II], 1)])


def _patch_offsets(side: int) -> Tensor:
    """Number of the offset between every two patches of a square, [P, P]."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offset_PP2 = place[:, None] - place[None, :] + side - 1
    return offset_PP2[..., 0] * (2 * side - 1) + offset_PP2[..., 1]


def _with_class_token(rows: Tensor, first_row: int) -> Tensor:
    """Put a class token in front: it to others, others to it, it to itself."""
    rows = F.pad(rows, (1, 0, 1, 0))
    rows[0, :], rows[:, 0], rows[0, 0] = first_row, first_row + 1, first_row + 2
    return rows


def as_floats(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Map bytes to -1..1; what is no bytes is normalised already."""
    return pixels.to(dtype) / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


class ImageEmbeddings(nn.Module):
    """Patches by a strided convolution, prefix tokens in front, learned positions, a norm.

    The first prefix token is the class token; DeiT has a second one. What `config` leaves out has
    no parameters.
    """

    cls_token: nn.Parameter | None
    positions: nn.Parameter | None
    mask_token: nn.Parameter | None

    def __init__(self, config: ModalityConfig):
        super().__init__()
        D, N = config.hidden_size, config.num_image_prefix_tokens
        self.image_size = config.image_size
        by_place = config.image_positions or config.relative_position_bias is not None
        self.num_tokens = config.num_image_tokens if by_place else None
        self.patches = nn.Conv2d(
            config.num_channels, D, config.patch_size, config.patch_size, bias=config.patch_bias
        )
        self.cls_token = nn.Parameter(torch.zeros(1, N, D)) if N else None
        self.positions = None
        if config.image_positions:
            self.positions = nn.Parameter(torch.zeros(1, config.num_image_tokens, D))
        self.norm = nn.Identity()
        if config.image_norm:
            self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D)) if config.masked_patches else None

    def forward(self, pixel_values_BCHW: Tensor, hidden_BP: Tensor | None = None) -> Tensor:
        """Embed images, patches where `hidden_BP` is true by the mask token alone."""
        pixel_values_BCHW = as_floats(pixel_values_BCHW, self.patches.weight.dtype)
        x_BID = self.patches(pixel_values_BCHW).flatten(2).transpose(1, 2)
        if hidden_BP is not None:
            assert self.mask_token is not None, "config.masked_patches makes the mask token"
            x_BID = torch.where(hidden_BP[..., None], self.mask_token, x_BID)
        if self.cls_token is not None:
            x_BID = torch.cat([self.cls_token.expand(x_BID.shape[0], -1, -1), x_BID], dim=1)
        if self.num_tokens not in (None, x_BID.shape[1]):
            height, width = pixel_values_BCHW.shape[-2:]
            raise ValueError(
                f"images of {height} x {width} pixels make {x_BID.shape[1]} tokens, and this model "
                f"has positions for {self.num_tokens}, of image_size {self.image_size}: "
                f"resize_images interpolates them"
            )
        if self.positions is not None:
            x_BID = x_BID + self.positions
        return self.norm(x_BID)


class TextEmbeddings(nn.Module):
    """Words, learned positions and, where the model has them, types of words; then BERT's norm.

    Positions count from 0, or ("after_padding", RoBERTa) from behind the padding id, and only the
    words that are no padding.
    """

    positions: nn.Parameter | None

    def __init__(self, config: ModalityConfig):
        super().__init__()
        D = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, D)
        self.types = nn.Embedding(config.num_text_types, D) if config.num_text_types else None
        self.positions = None
        if config.text_positions != "none":
            self.positions = nn.Parameter(torch.zeros(1, config.max_position_embeddings, D))
        self.padding = config.pad_token_id if config.text_positions == "after_padding" else None
        self.norm = nn.Identity()
        if config.text_norm:
            eps = config.text_norm_eps
            self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps if eps is None else eps)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, input_ids_BT: Tensor, token_type_ids_BT: Tensor | None = None) -> Tensor:
        x_BTD = self.words(input_ids_BT)
        if self.types is not None:
            if token_type_ids_BT is None:
                token_type_ids_BT = torch.zeros_like(input_ids_BT)
            x_BTD = x_BTD + self.types(token_type_ids_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self._positions(self.positions, input_ids_BT)
        return self.dropout(self.norm(x_BTD))

    def _positions(self, positions_1RD: Tensor, input_ids_BT: Tensor) -> Tensor:
        if self.padding is None:
            return positions_1RD[:, : input_ids_BT.shape[1]]
        num_tokens, num_positions = input_ids_BT.shape[1], positions_1RD.shape[1] - self.padding - 1
        if num_tokens > num_positions:
            raise ValueError(
                f"a text of {num_tokens} tokens is longer than the {num_positions} positions "
                f"behind the padding id"
            )
        is_word_BT = (input_ids_BT != self.padding).long()
        return positions_1RD[0, is_word_BT.cumsum(1) * is_word_BT + self.padding]


class JointAdapter(nn.Linear):
    """Fixed change of basis of one modality's stream, where it meets the other; starts as none.

    It is part of the state dict and counts among the parameters. No gradient reaches it, so
    training leaves it alone.
    """

    def __init__(self, size: int):
        super().__init__(size, size, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        # Loading makes every parameter require gradients, whatever it did before.
        return F.linear(input, self.weight.detach())


class MaskedWordHead(nn.Module):
    """BERT's masked-language-modelling head, its decoder not tied to the word embeddings."""

    def __init__(self, config: ModalityConfig):
        super().__init__()
        eps = config.layer_norm_eps if config.text_norm_eps is None else config.text_norm_eps
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.transform(x_ND))))


class MlpHead(nn.Module):
    """Linear, LayerNorm, GELU, Linear: the paper's VQA and pair-reasoning heads."""

    def __init__(self, size_in: int, size_inner: int, size_out: int, eps: float):
        super().__init__()
        self.inner = nn.Linear(size_in, size_inner)
        self.norm = nn.LayerNorm(size_inner, eps=eps)
        self.out = nn.Linear(size_inner, size_out)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.out(F.gelu(self.norm(self.inner(x_BD))))
