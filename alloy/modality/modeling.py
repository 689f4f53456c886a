"""The modality transformer (arXiv:2304.14933): one stack of blocks for images, texts and pairs.

Each part of a block (norms, attention, feed-forward network) is either shared by the modalities or
has one expert per modality: v (image tokens), l (text tokens), vl (both; the last M blocks only).
The dual-encoder pass runs every block on one modality; the joint pass runs the lower blocks on each
modality apart and the last M blocks on text and image tokens together.

Shapes: B batch, T text tokens, P patches, N prefix tokens of an image (1 unless `config` says
otherwise), I = N + P image tokens, S any sequence, D hidden, E embedding, V vocabulary, A answers,
C segment classes, G label cells per side.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from alloy.modality.configuration import ModalityConfig
from alloy.modality.experts import MODALITIES
from alloy.modality.layers import (
    Block,
    ImageEmbeddings,
    JointAdapter,
    LayerScale,
    MaskedWordHead,
    MlpHead,
    PositionBias,
    TextEmbeddings,
)

FRESH_HEADS = ("answer_head.", "pair_head.", "segment_head.")
"""Heads that pre-training does not train: they answer the benchmarks, after fine-tuning."""


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
    final norm and heads are no part of an expert.
    """

    config_class = ModalityConfig
    config: ModalityConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012 (transformers declares a list)
    _supports_sdpa = True
    supports_gradient_checkpointing = True  # block by block: activation_checkpointing_enable()
    _no_split_modules = {"Block"}  # noqa: RUF012 (transformers declares a set)

    def __init__(self, config: ModalityConfig):
        super().__init__(config)
        D, E = config.hidden_size, config.embedding_size
        self.image_embeddings = ImageEmbeddings(config)
        self.text_embeddings = TextEmbeddings(config)
        # 0 text, 1 image, 2 a second image
        self.type_embeddings = nn.Embedding(1 + config.num_image_types, D)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        if config.joint_adapters:
            self.image_adapter, self.text_adapter = JointAdapter(D), JointAdapter(D)
        if config.relative_position_bias is not None:
            self.position_bias = PositionBias(config)
        self.norm = _final_norm(config)
        self.pooler = nn.Linear(D, D)
        self.image_projection = nn.Linear(D, E, bias=False)
        self.text_projection = nn.Linear(D, E, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if config.joint_contrast:
            self.joint_image_projection = nn.Linear(D, E, bias=False)
            self.joint_text_projection = nn.Linear(D, E, bias=False)
            self.joint_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if config.masked_patches:
            self.patch_head = nn.Linear(D, config.num_channels * config.patch_size**2)
        self.masked_word_head = MaskedWordHead(config)
        self.statement_head = nn.Linear(D, 2)
        eps = config.layer_norm_eps if config.head_norm_eps is None else config.head_norm_eps
        self.pair_head = MlpHead(2 * D, 2 * D, 2, eps)
        if config.num_answers:
            self.answer_head = MlpHead(D, 2 * D, config.num_answers, eps)
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
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=std)
            if module.positions is not None:
                init.trunc_normal_(module.positions, std=std)
            if module.mask_token is not None:
                init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, TextEmbeddings) and module.positions is not None:
            init.trunc_normal_(module.positions, std=std)
        elif isinstance(module, PositionBias):
            init.zeros_(module.table)
        elif isinstance(module, LayerScale):
            init.constant_(module.gain, module.initial_gain)
        elif isinstance(module, ModalityModel):
            init.constant_(module.logit_scale, math.log(1 / 0.07))
            if self.config.joint_contrast:
                init.constant_(module.joint_logit_scale, math.log(1 / 0.07))

    # The single-modality passes.

    def image_states(
        self,
        pixel_values_BCHW: Tensor,
        num_layers: int | None = None,
        image_type: int = 0,
        hidden_BP: Tensor | None = None,
    ) -> Tensor:
        """Image tokens after `num_layers` blocks (default: all), not normed, [B, I, D].

        `image_type` 1 is a second image, of a model that tells it from the first; patches where
        `hidden_BP` is true are hidden.
        """
        x_BID = self.image_embeddings(pixel_values_BCHW, hidden_BP)
        x_BID = x_BID + self.type_embeddings.weight[1 + image_type]
        return self.run_blocks(x_BID, "v", 0, num_layers)

    def text_states(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        num_layers: int | None = None,
        token_type_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Text tokens after `num_layers` blocks (default: all), not normed, [B, T, D]."""
        x_BTD = self.text_embeddings(input_ids_BT, token_type_ids_BT)
        x_BTD = x_BTD + self.type_embeddings.weight[0]
        return self.run_blocks(x_BTD, "l", 0, num_layers, key_mask(attention_mask_BT))

    def run_blocks(
        self,
        x_BSD: Tensor,
        modality: str,
        start: int,
        stop: int | None,
        mask_B11S: Tensor | None = None,
        tokens: str | None = None,
    ) -> Tensor:
        """Run the blocks from `start` up to `stop` (None: the last) with one modality's experts.

        `tokens` says what the tokens are ("v", "l" or "vl") where it is not what the experts are
        for: an image alone through the experts of pairs.
        """
        num_tokens = x_BSD.shape[1]
        mask_B1SS, biases = mask_B11S, None
        if modality in self.config.causal:
            mask_B1SS = causal_mask(num_tokens, mask_B11S, x_BSD.device)
        if self.config.relative_position_bias is not None:
            biases = self.position_bias(tokens or modality, num_tokens)
        for i in range(len(self.blocks))[start:stop]:
            bias_HSS = None if biases is None else biases[i]
            x_BSD = self.blocks[i](x_BSD, modality, mask_B1SS, bias_HSS)
        return x_BSD

    def final_norm(self, x: Tensor, modality: str) -> Tensor:
        """Norm behind the last block: shared, each modality's own, or none."""
        return self.norm[modality](x) if isinstance(self.norm, nn.ModuleDict) else self.norm(x)

    def encode_image(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Unit-length embeddings of images by the dual-encoder pass, [B, E]."""
        return self.embed_image(self.image_states(pixel_values_BCHW))

    def encode_text(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Unit-length embeddings of texts by the dual-encoder pass, [B, E]."""
        return self.embed_text(self.text_states(input_ids_BT, attention_mask_BT))

    def embed_image(self, states_BID: Tensor) -> Tensor:
        """Unit vectors of images for retrieval [B, E], from their states."""
        num_prefix = self.config.num_image_prefix_tokens
        pooled_BD = states_BID[:, 0]
        if self.config.image_pooling == "mean":
            pooled_BD = states_BID[:, num_prefix:].mean(1)
        return F.normalize(self.image_projection(self.final_norm(pooled_BD, "v")), dim=-1)

    def embed_text(self, states_BTD: Tensor) -> Tensor:
        """Unit vectors of texts for retrieval [B, E], from their states."""
        return F.normalize(self.text_projection(self.final_norm(states_BTD[:, 0], "l")), dim=-1)

    def embed_jointly(
        self, image_BID: Tensor, text_BTD: Tensor, attention_mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings by the second pair of projections, [B, E] each.

        Of the lower blocks' states: the joint blocks' experts of pairs run on each modality alone.
        """
        lower, mask = self.config.num_single_layers, key_mask(attention_mask_BT)
        image_BID = self.run_blocks(image_BID, "vl", lower, None, tokens="v")
        text_BTD = self.run_blocks(text_BTD, "vl", lower, None, mask, tokens="l")
        image_BE = self.joint_image_projection(self.final_norm(image_BID[:, 0], "vl"))
        text_BE = self.joint_text_projection(self.final_norm(text_BTD[:, 0], "vl"))
        return F.normalize(image_BE, dim=-1), F.normalize(text_BE, dim=-1)

    # The joint pass.

    def encode_joint(
        self,
        pixel_values_BCHW: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        image_type: int = 0,
    ) -> Tensor:
        """Text, then image tokens after the joint blocks and the norm, [B, T+I, D]."""
        if self.config.lower_blocks_see == "both":
            return self._encode_together(
                pixel_values_BCHW, input_ids_BT, attention_mask_BT, image_type
            )
        lower = self.config.num_single_layers
        return self.join_states(
            self.image_states(pixel_values_BCHW, lower, image_type),
            self.text_states(input_ids_BT, attention_mask_BT, lower),
            attention_mask_BT,
        )

    def join_states(self, image_BID: Tensor, text_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Run the joint blocks and the norm on the lower blocks' image and text states.

        Raises:
            ValueError: the lower blocks of this model's joint pass see both modalities.
        """
        if self.config.lower_blocks_see == "both":
            raise ValueError(
                "the lower blocks of this model see both modalities (lower_blocks_see): their "
                "states of one modality do not lead to the joint blocks; call encode_joint"
            )
        image_mask_BI = attention_mask_BT.new_ones(image_BID.shape[:2])
        mask = key_mask(torch.cat([attention_mask_BT, image_mask_BI], dim=1))
        if self.config.joint_adapters:
            image_BID, text_BTD = self.image_adapter(image_BID), self.text_adapter(text_BTD)
        x_BSD = torch.cat([text_BTD, image_BID], dim=1)
        x_BSD = self.run_blocks(x_BSD, "vl", self.config.num_single_layers, None, mask)
        return self.final_norm(x_BSD, "vl")

    def _encode_together(
        self,
        pixel_values_BCHW: Tensor,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        image_type: int,
    ) -> Tensor:
        """Run the joint pass of a model whose lower blocks see both modalities."""
        num_text, lower = input_ids_BT.shape[1], self.config.num_single_layers
        image_BID = self.image_states(pixel_values_BCHW, 0, image_type)
        x_BSD = torch.cat([self.text_states(input_ids_BT, attention_mask_BT, 0), image_BID], dim=1)
        image_mask_BI = attention_mask_BT.new_ones(image_BID.shape[:2])
        mask = key_mask(torch.cat([attention_mask_BT, image_mask_BI], dim=1))
        biases: list[Tensor | None] = [None] * lower
        if self.config.relative_position_bias is not None:
            biases = self.position_bias("vl", x_BSD.shape[1])
        for i, block in enumerate(self.blocks[:lower]):
            assert isinstance(block, Block)
            x_BSD = block.forward_both(x_BSD, num_text, mask, biases[i])
        return self.final_norm(self.run_blocks(x_BSD, "vl", lower, None, mask), "vl")

    def pool(self, states_BSD: Tensor) -> Tensor:
        """Pass the text's class token through a linear layer and tanh, [B, D]."""
        return torch.tanh(self.pooler(states_BSD[:, 0]))

    # Heads: from the states of `encode_joint`, or from images alone.

    def masked_word_logits(self, states: Tensor) -> Tensor:
        """Scores of the vocabulary for joint states of any shape [..., D] -> [..., V]."""
        return self.masked_word_head(states)

    def patch_logits(self, states_BID: Tensor) -> Tensor:
        """Pixels of the patches as the masked-patch head sees them, [B, P, C patch patch]."""
        patches_BPD = states_BID[:, self.config.num_image_prefix_tokens :]
        return self.patch_head(self.final_norm(patches_BPD, "v"))

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
        patches_BPD = image_BID[:, self.config.num_image_prefix_tokens :]
        labels = self.segment_head(self.final_norm(patches_BPD, "v")).view(B, side, side, G, G, C)
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
        if self.config.lower_blocks_see == "both":
            joint = self.encode_joint(pixel_values, input_ids, attention_mask)
        else:
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


def causal_mask(num_tokens: int, mask_B11S: Tensor | None, device: torch.device) -> Tensor:
    """Mask of the keys no later than their query; every query may see itself, [B or 1, 1, S, S]."""
    no_later_SS = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    if mask_B11S is None:
        return no_later_SS[None, None]
    itself_SS = torch.eye(num_tokens, dtype=torch.bool, device=device)
    return (mask_B11S & no_later_SS) | itself_SS


def _final_norm(config: ModalityConfig) -> nn.Module:
    if config.final_norm == "none":
        return nn.Identity()
    if config.final_norm == "shared":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    norms = {m: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for m in MODALITIES}
    return nn.ModuleDict(norms)


AutoConfig.register("modality", ModalityConfig)
AutoModel.register(ModalityConfig, ModalityModel)
