"""Towers that can be imported: one entry a kind, by the type of the model and the tower's name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alloy.errors import CheckpointError, nearest
from alloy.modality.configuration import Activation
from alloy.modality.towers.architecture import (
    Architecture,
    FirstOf,
    Joined,
    Names,
    Required,
    from_config,
)

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def _blocks(
    layer: str, *, norm1: str, qkv: tuple[str, str, str], proj: str, norm2: str, fc1: str, fc2: str
) -> Names:
    """Names of a block's parts, given below its layer."""
    return {
        "blocks.{i}.norm1": f"{layer}.{norm1}",
        "blocks.{i}.attention.qkv": Joined(tuple(f"{layer}.{name}" for name in qkv)),
        "blocks.{i}.attention.proj": f"{layer}.{proj}",
        "blocks.{i}.norm2": f"{layer}.{norm2}",
        "blocks.{i}.ffn.fc1": f"{layer}.{fc1}",
        "blocks.{i}.ffn.fc2": f"{layer}.{fc2}",
    }


def _activation(setting: str):
    def activation(config: Any) -> Activation:
        name = getattr(config, setting)
        if name not in _ACTIVATIONS:
            raise CheckpointError(
                f"{config.model_type}: activation {name!r} is none of the modality transformer's; "
                f"{nearest(str(name), _ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    return activation


def _side(setting: str):
    def side(config: Any) -> int:
        size = getattr(config, setting)
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise CheckpointError(
                f"{config.model_type}: {setting} {size} is not square, and images of the modality "
                f"transformer are"
            )
        return sides.pop()

    return side


_SIZES = {
    "hidden_size": from_config("hidden_size"),
    "num_hidden_layers": from_config("num_hidden_layers"),
    "num_attention_heads": from_config("num_attention_heads"),
    "intermediate_size": from_config("intermediate_size"),
    "layer_norm_eps": from_config("layer_norm_eps"),
    "activation": _activation("hidden_act"),
    "layer_scale": None,
}
_IMAGES = {
    "image_size": _side("image_size"),
    "patch_size": _side("patch_size"),
    "num_channels": from_config("num_channels"),
}
_WORDS = {
    "vocab_size": from_config("vocab_size"),
    "max_position_embeddings": from_config("max_position_embeddings"),
    "pad_token_id": lambda config: config.pad_token_id or 0,
}
_BERT_WORDS = {**_WORDS, "num_text_types": from_config("type_vocab_size")}
_ENCODER_ONLY = {
    "is_decoder": Required(False, "it is a decoder, whose importer does not exist"),
    "add_cross_attention": Required(False, "it has cross-attention"),
    "position_embedding_type": Required("absolute", "its positions are not absolute"),
}

# Images: ViT and what came of it.

_VIT_BLOCKS = _blocks(
    "layers.{i}",
    norm1="layernorm_before",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    norm2="layernorm_after",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
_VIT_EMBEDDINGS = {
    "image_embeddings.cls_token": "embeddings.cls_token",
    "image_embeddings.positions": "embeddings.position_embeddings",
    "image_embeddings.patches": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_VIT_OUTSIDE = (r"pooler\..*", r"embeddings\.mask_token")

VIT = Architecture(
    inputs="images",
    names={**_VIT_EMBEDDINGS, **_VIT_BLOCKS},
    settings={**_SIZES, **_IMAGES},
    outside=_VIT_OUTSIDE,
)

DEIT = Architecture(
    inputs="images",
    names={
        **_VIT_EMBEDDINGS,
        **_VIT_BLOCKS,
        "image_embeddings.cls_token": Joined(
            ("embeddings.cls_token", "embeddings.distillation_token"), dim=1
        ),
    },
    settings={**_SIZES, **_IMAGES, "num_image_prefix_tokens": 2},
    outside=_VIT_OUTSIDE,
)

DINOV2 = Architecture(
    inputs="images",
    names={
        **_VIT_EMBEDDINGS,
        **_blocks(
            "encoder.layer.{i}",
            norm1="norm1",
            qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            proj="attention.o_proj",
            norm2="norm2",
            fc1="mlp.fc1",
            fc2="mlp.fc2",
        ),
        "blocks.{i}.scale1.gain": "encoder.layer.{i}.layer_scale1.lambda1",
        "blocks.{i}.scale2.gain": "encoder.layer.{i}.layer_scale2.lambda1",
    },
    settings={
        **_SIZES,
        **_IMAGES,
        "intermediate_size": lambda config: int(config.hidden_size * config.mlp_ratio),
        "layer_scale": from_config("layerscale_value"),
    },
    outside=_VIT_OUTSIDE,
    required={"use_swiglu_ffn": Required(False, "its feed-forward networks are gated (SwiGLU)")},
)

_TABLE = "relative_position_bias_table"

BEIT = Architecture(
    inputs="images",
    names={
        **_VIT_EMBEDDINGS,
        **_VIT_BLOCKS,
        "blocks.{i}.scale1.gain": "layers.{i}.lambda_1",
        "blocks.{i}.scale2.gain": "layers.{i}.lambda_2",
        "position_bias.table": FirstOf(
            (
                Joined((f"layers.{{i}}.relative_position_bias.{_TABLE}",), dim=1),
                f"shared_position_bias.{_TABLE}",
            )
        ),
        "norm": FirstOf(("pooler.layernorm", "layernorm")),
    },
    settings={
        **_SIZES,
        **_IMAGES,
        "layer_scale": lambda config: config.layer_scale_init_value or None,
        "image_positions": from_config("use_absolute_position_embeddings"),
        "image_pooling": lambda config: "mean" if config.use_mean_pooling else "first",
        "relative_position_bias": lambda config: (
            "layer"
            if config.use_relative_position_bias
            else "shared"
            if config.use_shared_relative_position_bias
            else None
        ),
    },
    outside=(r"embeddings\.mask_token", r".*relative_position_index"),
    optional={("pooler.layernorm.weight", "layernorm.weight"): {"final_norm": "none"}},
)

# Images and texts side by side: CLIP and SigLIP.

_CLIP_BLOCKS = _blocks(
    "encoder.layers.{i}",
    norm1="layer_norm1",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    norm2="layer_norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
_CLIP_TEXT_NAMES = {
    "text_embeddings.words": "embeddings.token_embedding",
    "text_embeddings.positions": "embeddings.position_embedding.weight",
    **_CLIP_BLOCKS,
    "norm": "final_layer_norm",
}
_CLIP_IMAGE_NAMES = {
    "image_embeddings.positions": "embeddings.position_embedding.weight",
    "image_embeddings.patches": "embeddings.patch_embedding",
    **_CLIP_BLOCKS,
    "norm": "post_layernorm",
}
_POSITION_IDS = (r"embeddings\.position_ids",)

CLIP_VISION = Architecture(
    inputs="images",
    subconfig="vision_config",
    names={
        **_CLIP_IMAGE_NAMES,
        "image_embeddings.cls_token": "embeddings.class_embedding",
        "image_embeddings.norm": "pre_layrnorm",
    },
    settings={**_SIZES, **_IMAGES, "image_norm": True, "patch_bias": False},
    outside=_POSITION_IDS,
)

CLIP_TEXT = Architecture(
    inputs="texts",
    subconfig="text_config",
    names=_CLIP_TEXT_NAMES,
    settings={**_SIZES, **_WORDS, "text_norm": False, "causal": ["l"]},
    outside=_POSITION_IDS,
)

SIGLIP_VISION = Architecture(
    inputs="images",
    subconfig="vision_config",
    names=_CLIP_IMAGE_NAMES,
    settings={**_SIZES, **_IMAGES, "num_image_prefix_tokens": 0, "image_pooling": "mean"},
    outside=(r"head\..*", *_POSITION_IDS),
)

SIGLIP_TEXT = Architecture(
    inputs="texts",
    subconfig="text_config",
    names=_CLIP_TEXT_NAMES,
    settings={**_SIZES, **_WORDS, "text_norm": False},
    outside=(r"head\..*", *_POSITION_IDS),
)

# Texts: BERT and RoBERTa, whose norms stand behind the updates.

_BERT_EMBEDDINGS = {
    "text_embeddings.words": "embeddings.word_embeddings",
    "text_embeddings.types": "embeddings.token_type_embeddings",
    "text_embeddings.positions": "embeddings.position_embeddings.weight",
    "text_embeddings.norm": "embeddings.LayerNorm",
}
_BERT_NAMES = {
    **_BERT_EMBEDDINGS,
    **_blocks(
        "encoder.layer.{i}",
        norm1="attention.output.LayerNorm",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        proj="attention.output.dense",
        norm2="output.LayerNorm",
        fc1="intermediate.dense",
        fc2="output.dense",
    ),
}
_BERT_SETTINGS = {**_SIZES, **_BERT_WORDS, "norm_position": "post", "final_norm": "none"}
_BERT_OUTSIDE = (r"pooler\..*", r"embeddings\.(position|token_type)_ids")

BERT = Architecture(
    inputs="texts",
    names=_BERT_NAMES,
    settings=_BERT_SETTINGS,
    outside=_BERT_OUTSIDE,
    required=_ENCODER_ONLY,
)

ROBERTA = replace(BERT, settings={**_BERT_SETTINGS, "text_positions": "after_padding"})

# Images, texts and pairs: FLAVA.

_FLAVA_BLOCKS = {
    **_blocks(
        "encoder.layer.{i}",
        norm1="layernorm_before",
        qkv=(
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
        ),
        proj="attention.output.dense",
        norm2="layernorm_after",
        fc1="intermediate.dense",
        fc2="output.dense",
    ),
    "norm": "layernorm",
}

FLAVA_IMAGE = Architecture(
    inputs="images",
    subconfig="image_config",
    names={**_VIT_EMBEDDINGS, **_FLAVA_BLOCKS},
    settings={**_SIZES, **_IMAGES},
    outside=_VIT_OUTSIDE,
)

FLAVA_TEXT = Architecture(
    inputs="texts",
    subconfig="text_config",
    names={**_BERT_EMBEDDINGS, **_FLAVA_BLOCKS},
    settings={**_SIZES, **_BERT_WORDS},
    outside=_BERT_OUTSIDE,
)

FLAVA_MULTIMODAL = Architecture(
    inputs="states",
    subconfig="multimodal_config",
    names=_FLAVA_BLOCKS,
    settings=_SIZES,
    outside=(r"pooler\..*", r"cls_token"),
)

# Speech: Whisper. Its encoder reads states of sounds, which its convolutions make.

_WHISPER_BLOCKS = {
    **_blocks(
        "layers.{i}",
        norm1="self_attn_layer_norm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        proj="self_attn.out_proj",
        norm2="final_layer_norm",
        fc1="fc1",
        fc2="fc2",
    ),
    "norm": "layer_norm",
}
_WHISPER_SETTINGS = {
    "hidden_size": from_config("d_model"),
    "activation": _activation("activation_function"),
    "layer_norm_eps": 1e-5,
    "layer_scale": None,
}

WHISPER_ENCODER = Architecture(
    inputs="states",
    names=_WHISPER_BLOCKS,
    settings={
        **_WHISPER_SETTINGS,
        "num_hidden_layers": from_config("encoder_layers"),
        "num_attention_heads": from_config("encoder_attention_heads"),
        "intermediate_size": from_config("encoder_ffn_dim"),
    },
    outside=(r"conv[12]\..*", r"embed_positions\..*"),
)

WHISPER_DECODER = Architecture(
    inputs="texts",
    names={
        "text_embeddings.words": "embed_tokens",
        "text_embeddings.positions": "embed_positions.weight",
        **_WHISPER_BLOCKS,
    },
    settings={
        **_WHISPER_SETTINGS,
        "num_hidden_layers": from_config("decoder_layers"),
        "num_attention_heads": from_config("decoder_attention_heads"),
        "intermediate_size": from_config("decoder_ffn_dim"),
        "vocab_size": from_config("vocab_size"),
        "max_position_embeddings": from_config("max_target_positions"),
        "pad_token_id": lambda config: config.pad_token_id or 0,
        "text_norm": False,
        "causal": ["l"],
    },
    left_out={"cross-attention": r"layers\.\d+\.encoder_attn(_layer_norm)?\..*"},
)

ARCHITECTURES: Mapping[str, Mapping[str, Architecture]] = {
    "beit": {"": BEIT},
    "bert": {"": BERT},
    "clip": {"vision_model": CLIP_VISION, "text_model": CLIP_TEXT},
    "clip_text_model": {"": CLIP_TEXT},
    "clip_vision_model": {"": CLIP_VISION},
    "deit": {"": DEIT},
    "dinov2": {"": DINOV2},
    "flava": {
        "image_model": FLAVA_IMAGE,
        "text_model": FLAVA_TEXT,
        "multimodal_model": FLAVA_MULTIMODAL,
    },
    "flava_image_model": {"": FLAVA_IMAGE},
    "flava_multimodal_model": {"": FLAVA_MULTIMODAL},
    "flava_text_model": {"": FLAVA_TEXT},
    "roberta": {"": ROBERTA},
    "siglip": {"vision_model": SIGLIP_VISION, "text_model": SIGLIP_TEXT},
    "siglip_text_model": {"": SIGLIP_TEXT},
    "siglip_vision_model": {"": SIGLIP_VISION},
    "vit": {"": VIT},
    "whisper": {"encoder": WHISPER_ENCODER, "decoder": WHISPER_DECODER},
    "xlm-roberta": {"": ROBERTA},
}
"""By the type of the model, then by the name of the part; "" where the model is one tower."""
