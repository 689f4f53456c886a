"""The modality transformer's shape, and which parts of a block each modality owns."""

from collections.abc import Sequence
from typing import Literal, get_args

from transformers import PretrainedConfig

Sharing = Literal["none", "custom_attention", "custom_ffn", "custom_norms", "all"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]
NormPosition = Literal["pre", "post"]
FinalNorm = Literal["shared", "own", "none"]
RelativePositionBias = Literal["layer", "shared"]
TextPositions = Literal["learned", "after_padding", "none"]
ImagePooling = Literal["first", "mean"]
LowerBlocksSee = Literal["one", "both"]

_CHOICES = {
    "sharing": Sharing,
    "activation": Activation,
    "norm_position": NormPosition,
    "final_norm": FinalNorm,
    "text_positions": TextPositions,
    "image_pooling": ImagePooling,
    "lower_blocks_see": LowerBlocksSee,
}

EXPERT_PARTS: dict[str, tuple[str, ...]] = {
    "none": ("norm1", "attention", "norm2", "ffn"),
    "custom_attention": ("norm1", "attention"),
    "custom_ffn": ("norm2", "ffn"),
    "custom_norms": ("norm1", "norm2"),
    "all": (),
}
"""Parts of a block of which each modality has its own copy, an expert; the others are shared."""


class ModalityConfig(PretrainedConfig):
    """Sizes of the modality transformer; the defaults are the base model of arXiv:2304.14933.

    The settings behind `joint_adapters` let other architectures' towers stand in it
    (`alloy.modality.towers`).

    Args:
        sharing: what the modalities share: "none" (modality-specific), "custom_attention",
            "custom_ffn" and "custom_norms" (only that part, with its norm, is specific), "all"
            (modality-agnostic).
        num_joint_layers: how many of the last blocks see image and text together.
        layer_scale: initial LayerScale gain; None for no LayerScale.
        num_answers: classes of the answer head; 0 leaves the head out.
        num_segment_classes: classes of the segmentation head; 0 leaves the head out.
        segment_cells: number of labels along one side of a patch.
        joint_adapters: whether a fixed matrix per modality stands where its stream enters the
            joint blocks, for models whose streams have bases of their own
            (`alloy.modality.streams`).
        activation: of the feed-forward networks.
        norm_position: "pre", before attention and feed-forward network, or "post", behind each
            update (BERT).
        final_norm: the norm behind the last block: one that the modalities share, one of their
            own, or none.
        causal: modalities of which a token sees only itself and the tokens before it.
        relative_position_bias: whether attention scores have BEiT's learned bias by relative
            position: a table of each block's own ("layer"), one for all blocks ("shared"), or None.
        relative_text_distance: length of the longest text with a relative position bias; 0 if only
            images have one.
        num_image_prefix_tokens: learned tokens in front of the patches: 1 is the class token.
        image_positions: whether image tokens have learned positions.
        image_norm: whether a norm stands between image embeddings and blocks (CLIP).
        patch_bias: whether the patch embedding has a bias.
        image_pooling: what stands for the image: its "first" token or the "mean" of its patches.
        text_positions: "learned", from 0 on; "after_padding", from behind the padding id, without
            padding (RoBERTa); or "none".
        text_norm: whether a norm stands between text embeddings and blocks.
        text_norm_eps: of that norm and the masked-word head's, if other than `layer_norm_eps`.
        num_text_types: number of learned types of words (BERT's segments).
        lower_blocks_see: in the joint pass, whether a token of the lower blocks attends to its
            "one" modality or to "both" (VLMo, whose modalities share attention).
        head_norm_eps: of the norms in the answer and pair heads, if other than `layer_norm_eps`.
        drop_path: probability that training leaves out the last block's updates of an example;
            that of the blocks before rises to it from 0 (stochastic depth).
        embedding_dropout: of the text embeddings.
        num_image_types: learned types of images: 2 tell NLVR2's second image from its first.
        joint_contrast: whether images and texts have a second pair of contrastive projections,
            behind the joint blocks (vl-merging, VLMo).
        masked_patches: whether a head predicts the pixels of hidden patches (SimMIM).

    Raises:
        ValueError: sizes that do not fit one another, an unknown choice.
    """

    model_type = "modality"

    def __init__(
        self,
        sharing: Sharing = "all",
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_joint_layers: int = 2,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        layer_norm_eps: float = 1e-6,
        layer_scale: float | None = 0.1,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        vocab_size: int = 30522,
        max_position_embeddings: int = 40,
        pad_token_id: int = 0,
        embedding_size: int = 768,
        num_answers: int = 3129,
        num_segment_classes: int = 150,
        segment_cells: int = 1,
        joint_adapters: bool = False,
        activation: Activation = "gelu",
        norm_position: NormPosition = "pre",
        final_norm: FinalNorm = "shared",
        causal: Sequence[str] = (),
        relative_position_bias: RelativePositionBias | None = None,
        relative_text_distance: int = 0,
        num_image_prefix_tokens: int = 1,
        image_positions: bool = True,
        image_norm: bool = False,
        patch_bias: bool = True,
        image_pooling: ImagePooling = "first",
        text_positions: TextPositions = "learned",
        text_norm: bool = True,
        text_norm_eps: float | None = None,
        num_text_types: int = 0,
        lower_blocks_see: LowerBlocksSee = "one",
        head_norm_eps: float | None = None,
        drop_path: float = 0.0,
        embedding_dropout: float = 0.0,
        num_image_types: int = 1,
        joint_contrast: bool = False,
        masked_patches: bool = False,
        **kwargs,
    ):
        self.sharing = sharing
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_joint_layers = num_joint_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.layer_scale = layer_scale
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.embedding_size = embedding_size
        self.num_answers = num_answers
        self.num_segment_classes = num_segment_classes
        self.segment_cells = segment_cells
        self.joint_adapters = joint_adapters
        self.activation = activation
        self.norm_position = norm_position
        self.final_norm = final_norm
        self.causal = list(causal)
        self.relative_position_bias = relative_position_bias
        self.relative_text_distance = relative_text_distance
        self.num_image_prefix_tokens = num_image_prefix_tokens
        self.image_positions = image_positions
        self.image_norm = image_norm
        self.patch_bias = patch_bias
        self.image_pooling = image_pooling
        self.text_positions = text_positions
        self.text_norm = text_norm
        self.text_norm_eps = text_norm_eps
        self.num_text_types = num_text_types
        self.lower_blocks_see = lower_blocks_see
        self.head_norm_eps = head_norm_eps
        self.drop_path = drop_path
        self.embedding_dropout = embedding_dropout
        self.num_image_types = num_image_types
        self.joint_contrast = joint_contrast
        self.masked_patches = masked_patches
        self._refuse_unknown_choices()
        self._refuse_impossible_sizes()
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)

    def _refuse_unknown_choices(self) -> None:
        for setting, choices in _CHOICES.items():
            if (value := getattr(self, setting)) not in get_args(choices):
                known = list(get_args(choices))
                raise ValueError(f"{setting} {value!r} is unknown; choose one of {known}")
        if self.relative_position_bias not in (known := [None, *get_args(RelativePositionBias)]):
            raise ValueError(
                f"relative_position_bias {self.relative_position_bias!r} is unknown; "
                f"choose one of {known}"
            )
        if strange := set(self.causal) - {"v", "l", "vl"}:
            raise ValueError(f"causal names {sorted(strange)}; the modalities are v, l and vl")

    def _refuse_impossible_sizes(self) -> None:
        for divisor, dividend in (
            ("num_attention_heads", "hidden_size"),
            ("patch_size", "image_size"),
        ):
            if getattr(self, dividend) % getattr(self, divisor):
                raise ValueError(
                    f"{dividend} {getattr(self, dividend)} is no multiple of "
                    f"{divisor} {getattr(self, divisor)}"
                )
        if not 0 <= self.num_joint_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_joint_layers {self.num_joint_layers} must lie between 0 and "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        if self.relative_position_bias is not None and self.num_image_prefix_tokens != 1:
            raise ValueError(
                f"a relative position bias is for images with one class token, not for "
                f"num_image_prefix_tokens {self.num_image_prefix_tokens}"
            )
        if self.lower_blocks_see == "both" and (
            "attention" in EXPERT_PARTS[self.sharing]
            or "norm1" in EXPERT_PARTS[self.sharing]
            or self.norm_position == "post"
        ):
            raise ValueError(
                f"lower blocks see both modalities where these share a pre-norm attention, not "
                f"with sharing {self.sharing!r} and norm_position {self.norm_position!r}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path {self.drop_path} must lie between 0 and 1")
        if self.num_image_types not in (1, 2):
            raise ValueError(f"num_image_types {self.num_image_types} must be 1 or 2")
        if self.num_image_prefix_tokens == 0 and self.image_pooling == "first":
            raise ValueError(
                "without prefix tokens no first token stands for the image: "
                "image_pooling must be 'mean'"
            )

    @property
    def num_single_layers(self) -> int:
        """Number of lower blocks, which see one modality at a time."""
        return self.num_hidden_layers - self.num_joint_layers

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Tokens of an image: its patches and what is put before them."""
        return self.num_image_prefix_tokens + self.num_patches

    def modalities(self, layer: int) -> tuple[str, ...]:
        """Modalities with experts in a block: v and l everywhere, vl in the joint blocks."""
        return ("v", "l") if layer < self.num_single_layers else ("v", "l", "vl")
