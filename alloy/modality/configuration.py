"""The modality transformer's shape, and which parts of a block each modality owns."""

from typing import Literal, get_args

from transformers import PretrainedConfig

Sharing = Literal["none", "custom_attention", "custom_ffn", "custom_norms", "all"]

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

    Raises:
        ValueError: sizes that do not fit one another, an unknown `sharing`.
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
        self._refuse_impossible_sizes()
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)

    def _refuse_impossible_sizes(self) -> None:
        if self.sharing not in EXPERT_PARTS:
            known = list(get_args(Sharing))
            raise ValueError(f"sharing {self.sharing!r} is unknown; choose one of {known}")
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

    @property
    def num_single_layers(self) -> int:
        """Number of lower blocks, which see one modality at a time."""
        return self.num_hidden_layers - self.num_joint_layers

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def modalities(self, layer: int) -> tuple[str, ...]:
        """Modalities with experts in a block: v and l everywhere, vl in the joint blocks."""
        return ("v", "l") if layer < self.num_single_layers else ("v", "l", "vl")
