"""The modality transformer (arXiv:2304.14933): one stack of blocks for images, texts and pairs.

Each part of a block (norms, attention, feed-forward network) is either shared by the modalities or
has one expert per modality: v (image tokens), l (text tokens), vl (both; the last M blocks only).
The dual-encoder pass runs every block on one modality; the joint pass runs the lower blocks on each
modality apart and the last M blocks on text and image tokens together.

Shapes: B batch, T text tokens, P patches, I = 1 + P image tokens, S any sequence, D hidden,
H heads, K channels of a head, E embedding, V vocabulary, A answers, C segment classes, G label
cells per side.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from alloy.modality.configuration import EXPERT_PARTS, ModalityConfig

FRESH_HEADS = ("answer_head.", "pair_head.", "segment_head.")
"""Heads that pre-training does not train: they answer the benchmarks, after fine-tuning."""


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


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, config: ModalityConfig, layer: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Writer(config.hidden_size, config.hidden_size, layer)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        B, S, D = x_BSD.shape
        qkv = self.qkv(x_BSD).view(B, S, 3, self.num_heads, D // self.num_heads)
        q_BHSK, k_BHSK, v_BHSK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.config._attn_implementation == "sdpa":
            context = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask_B11S)
        else:
            scores_BHSS = q_BHSK @ k_BHSK.transpose(-2, -1) / math.sqrt(D // self.num_heads)
            if mask_B11S is not None:
                scores_BHSS = scores_BHSS.masked_fill(~mask_B11S, float("-inf"))
            context = scores_BHSS.softmax(-1) @ v_BHSK
        return self.proj(context.transpose(1, 2).reshape(B, S, D))


class FeedForward(nn.Module):
    def __init__(self, config: ModalityConfig, layer: int):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Writer(config.intermediate_size, config.hidden_size, layer)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BSD)))


class Block(nn.Module):
    """Pre-norm block: x + scale1 Attention(norm1(x)), then x + scale2 FFN(norm2(x)).

    A part with experts is a `ModuleDict` by modality; LayerScale is always shared.
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
        self.dropout = nn.Dropout(config.dropout)
        self.scale1 = self.scale2 = nn.Identity()
        if config.layer_scale is not None:
            self.scale1 = LayerScale(config.hidden_size, config.layer_scale)
            self.scale2 = LayerScale(config.hidden_size, config.layer_scale)

    def _part(self, name: str, modality: str) -> nn.Module:
        part = getattr(self, name)
        return part[modality] if isinstance(part, nn.ModuleDict) else part

    def forward(self, x_BSD: Tensor, modality: str, mask_B11S: Tensor | None) -> Tensor:
        update = self._part("attention", modality)(self._part("norm1", modality)(x_BSD), mask_B11S)
        x_BSD = x_BSD + self.dropout(self.scale1(update))
        update = self._part("ffn", modality)(self._part("norm2", modality)(x_BSD))
        return x_BSD + self.dropout(self.scale2(update))


class ImageEmbeddings(nn.Module):
    """Patches by a strided convolution, a class token in front, learned positions."""

    def __init__(self, config: ModalityConfig):
        super().__init__()
        self.patches = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.hidden_size))

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        if pixel_values_BCHW.dtype == torch.uint8:
            pixel_values_BCHW = pixel_values_BCHW.to(self.positions.dtype) / 127.5 - 1
        patches_BPD = self.patches(pixel_values_BCHW).flatten(2).transpose(1, 2)
        cls_B1D = self.cls_token.expand(patches_BPD.shape[0], -1, -1)
        return torch.cat([cls_B1D, patches_BPD], dim=1) + self.positions


class TextEmbeddings(nn.Module):
    """Words and learned positions, normalised as in BERT."""

    def __init__(self, config: ModalityConfig):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Parameter(
            torch.zeros(1, config.max_position_embeddings, config.hidden_size)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        num_tokens = input_ids_BT.shape[1]
        return self.norm(self.words(input_ids_BT) + self.positions[:, :num_tokens])


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
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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


@dataclass
class ModalityOutput(ModelOutput):
    """Outputs for a batch of images and texts; None where the model lacks the head."""

    image_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    joint_states: Tensor | None = None
    masked_word_logits: Tensor | None = None
    statement_logits: Tensor | None = None
    answer_logits: Tensor | None = None
    segment_logits: Tensor | None = None


class ModalityModel(PreTrainedModel):
    """Images, texts and pairs through one stack of blocks, with the paper's heads.

    Images are `[B, 3, H, W]`, uint8 or float with 0..255 mapped to -1..1; texts are int64 ids and a
    mask (1 = token) `[B, T]`, the class token first. Merging merges `blocks.*`; embeddings, the
    final norm and heads are shared.
    """

    config_class = ModalityConfig
    config: ModalityConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012 (transformers declares a list)
    _supports_sdpa = True
    _no_split_modules = {"Block"}  # noqa: RUF012 (transformers declares a set)

    def __init__(self, config: ModalityConfig):
        super().__init__(config)
        D, E = config.hidden_size, config.embedding_size
        self.image_embeddings = ImageEmbeddings(config)
        self.text_embeddings = TextEmbeddings(config)
        self.type_embeddings = nn.Embedding(2, D)  # 0 text, 1 image
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        if config.joint_adapters:
            self.image_adapter, self.text_adapter = JointAdapter(D), JointAdapter(D)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.pooler = nn.Linear(D, D)
        self.image_projection = nn.Linear(D, E, bias=False)
        self.text_projection = nn.Linear(D, E, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.masked_word_head = MaskedWordHead(config)
        self.statement_head = nn.Linear(D, 2)
        self.pair_head = MlpHead(2 * D, 2 * D, 2, config.layer_norm_eps)
        if config.num_answers:
            self.answer_head = MlpHead(D, 2 * D, config.num_answers, config.layer_norm_eps)
        if config.num_segment_classes:
            labels = config.segment_cells**2 * config.num_segment_classes
            self.segment_head = nn.Linear(D, labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, JointAdapter):
            init.eye_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            init.trunc_normal_(module.weight, std=std * getattr(module, "depth_scale", 1.0))
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ImageEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.positions, std=std)
        elif isinstance(module, TextEmbeddings):
            init.trunc_normal_(module.positions, std=std)
        elif isinstance(module, LayerScale):
            init.constant_(module.gain, module.initial_gain)
        elif isinstance(module, ModalityModel):
            init.constant_(module.logit_scale, math.log(1 / 0.07))

    # The single-modality passes.

    def image_states(self, pixel_values_BCHW: Tensor, num_layers: int | None = None) -> Tensor:
        """Image tokens after `num_layers` blocks (default: all), not normed, [B, I, D]."""
        x_BID = self.image_embeddings(pixel_values_BCHW) + self.type_embeddings.weight[1]
        return self.run_blocks(x_BID, "v", 0, num_layers)

    def text_states(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, num_layers: int | None = None
    ) -> Tensor:
        """Text tokens after `num_layers` blocks (default: all), not normed, [B, T, D]."""
        x_BTD = self.text_embeddings(input_ids_BT) + self.type_embeddings.weight[0]
        return self.run_blocks(x_BTD, "l", 0, num_layers, key_mask(attention_mask_BT))

    def run_blocks(
        self,
        x_BSD: Tensor,
        modality: str,
        start: int,
        stop: int | None,
        mask_B11S: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks from `start` up to `stop` (None: the last) with one modality's experts."""
        for block in self.blocks[start:stop]:
            x_BSD = block(x_BSD, modality, mask_B11S)
        return x_BSD

    def encode_image(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Unit-length embeddings of images by the dual-encoder pass, [B, E]."""
        return self.embed_image(self.image_states(pixel_values_BCHW))

    def encode_text(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Unit-length embeddings of texts by the dual-encoder pass, [B, E]."""
        return self.embed_text(self.text_states(input_ids_BT, attention_mask_BT))

    def embed_image(self, states_BID: Tensor) -> Tensor:
        return F.normalize(self.image_projection(self.norm(states_BID[:, 0])), dim=-1)

    def embed_text(self, states_BTD: Tensor) -> Tensor:
        return F.normalize(self.text_projection(self.norm(states_BTD[:, 0])), dim=-1)

    # The joint pass.

    def encode_joint(
        self, pixel_values_BCHW: Tensor, input_ids_BT: Tensor, attention_mask_BT: Tensor
    ) -> Tensor:
        """Text, then image tokens after the joint blocks and the norm, [B, T+I, D]."""
        lower = self.config.num_single_layers
        return self.join_states(
            self.image_states(pixel_values_BCHW, lower),
            self.text_states(input_ids_BT, attention_mask_BT, lower),
            attention_mask_BT,
        )

    def join_states(self, image_BID: Tensor, text_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Run the joint blocks and the norm on the lower blocks' image and text states."""
        image_mask_BI = attention_mask_BT.new_ones(image_BID.shape[:2])
        mask = key_mask(torch.cat([attention_mask_BT, image_mask_BI], dim=1))
        if self.config.joint_adapters:
            image_BID, text_BTD = self.image_adapter(image_BID), self.text_adapter(text_BTD)
        x_BSD = torch.cat([text_BTD, image_BID], dim=1)
        return self.norm(self.run_blocks(x_BSD, "vl", self.config.num_single_layers, None, mask))

    def pool(self, states_BSD: Tensor) -> Tensor:
        """Pass the text's class token through a linear layer and tanh, [B, D]."""
        return torch.tanh(self.pooler(states_BSD[:, 0]))

    # Heads: from the states of `encode_joint`, or from images alone.

    def masked_word_logits(self, states: Tensor) -> Tensor:
        """Scores of the vocabulary for joint states of any shape [..., D] -> [..., V]."""
        return self.masked_word_head(states)

    def statement_logits(self, states_BSD: Tensor) -> Tensor:
        """Scores of the text being false (0) or true (1) of the image, [B, 2]."""
        return self.statement_head(self.pool(states_BSD))

    def answer_logits(self, states_BSD: Tensor) -> Tensor:
        """Scores of the answers to the text's question about the image, [B, A]."""
        return self.answer_head(self.pool(states_BSD))

    def pair_logits(self, left_BSD: Tensor, right_BSD: Tensor) -> Tensor:
        """Scores of the text being false (0) or true (1) of two images, each joined with it."""
        return self.pair_head(torch.cat([self.pool(left_BSD), self.pool(right_BSD)], dim=-1))

    def segment_logits(self, image_BID: Tensor) -> Tensor:
        """Class scores of G labels per patch side, from `image_states`, [B, C, h G, w G]."""
        B, side = image_BID.shape[0], self.config.image_size // self.config.patch_size
        G, C = self.config.segment_cells, self.config.num_segment_classes
        labels = self.segment_head(self.norm(image_BID[:, 1:])).view(B, side, side, G, G, C)
        return labels.permute(0, 5, 1, 3, 2, 4).reshape(B, C, side * G, side * G)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> ModalityOutput:
        """Run both passes and every head that needs one image and one text."""
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        lower = self.config.num_single_layers
        image = self.image_states(pixel_values, lower)
        text = self.text_states(input_ids, attention_mask, lower)
        joint = self.join_states(image, text, attention_mask)
        image = self.run_blocks(image, "v", lower, None)
        text = self.run_blocks(text, "l", lower, None, key_mask(attention_mask))
        config = self.config
        return ModalityOutput(
            image_embeddings=self.embed_image(image),
            text_embeddings=self.embed_text(text),
            joint_states=joint,
            masked_word_logits=self.masked_word_logits(joint[:, : input_ids.shape[1]]),
            statement_logits=self.statement_logits(joint),
            answer_logits=self.answer_logits(joint) if config.num_answers else None,
            segment_logits=self.segment_logits(image) if config.num_segment_classes else None,
        )


def key_mask(attention_mask_BS: Tensor) -> Tensor:
    """Mask of the keys that every query may see, [B, 1, 1, S]."""
    return attention_mask_BS[:, None, None, :].bool()


AutoConfig.register("modality", ModalityConfig)
AutoModel.register(ModalityConfig, ModalityModel)
