"""Tiny models of many architectures, with ambiguous sizes on purpose.

Hidden = intermediate = sequence = vocabulary = labels = N, heads = head width = H, so that no axis is
told from another by its size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

N, H, BATCH = 16, 4, 2

TEXT = {
    "hidden_size": N,
    "intermediate_size": N,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "vocab_size": N,
    "max_position_embeddings": N,
    "num_labels": N,
}
VISION = {
    "hidden_size": N,
    "intermediate_size": N,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": N,
}
DECODER = {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER_DECODER = {
    "vocab_size": N,
    "d_model": N,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": N,
    "decoder_ffn_dim": N,
    "max_position_embeddings": N,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def ids(length: int = N, low: int = 3, high: int = N) -> torch.Tensor:
    return torch.randint(low, high, (BATCH, length), generator=torch.Generator().manual_seed(length))


def text(**more: Any) -> dict:
    return {"input_ids": ids(), **more}


def seq2seq() -> dict:
    return {"input_ids": ids(), "decoder_input_ids": ids(N - 2)}


def pixels(size: int = 16, channels: int = 3, name: str = "pixel_values") -> dict:
    generator = torch.Generator().manual_seed(size)
    return {name: torch.randn(BATCH, channels, size, size, generator=generator)}


def wave(length: int, name: str = "input_values") -> dict:
    return {name: torch.randn(BATCH, length, generator=torch.Generator().manual_seed(length))}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    model: str  # a class of transformers
    config: Callable[[], Any]
    inputs: Callable[[], Any]


def case(model: str, config: str, settings: dict, inputs: Callable[[], Any]) -> Case:
    return Case(model, lambda: getattr(hf, config)(**settings), inputs)


def build(name: str, attention: str | None = None) -> tuple[torch.nn.Module, Any]:
    entry = CASES[name]
    config = entry.config()
    torch.manual_seed(0)
    kwargs = {} if attention is None else {"attn_implementation": attention}
    model = getattr(hf, entry.model)._from_config(config, **kwargs)
    return model.eval(), entry.inputs()


def clip_like(text_config: str, vision_config: str, **more: Any) -> dict:
    return {"text_config": {**DECODER}, "vision_config": {**VISION}, "projection_dim": N, **more}


CASES: dict[str, Case] = {
    "bert": case("BertForMaskedLM", "BertConfig", TEXT, text),
    "bert_classifier": case("BertForSequenceClassification", "BertConfig", TEXT, text),
    "roberta": case(
        "RobertaForMaskedLM", "RobertaConfig", {**TEXT, "max_position_embeddings": N + 2}, text
    ),
    "distilbert": case(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": N, "hidden_dim": N, "n_layers": 2, "n_heads": H, "vocab_size": N,
         "max_position_embeddings": N},
        text,
    ),
    "vit": case("ViTForImageClassification", "ViTConfig", VISION, pixels),
    "deit": case("DeiTForImageClassification", "DeiTConfig", VISION, pixels),
    "dinov2": case("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 1}, pixels),
    "dinov2_swiglu": case(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**VISION, "mlp_ratio": 1, "use_swiglu_ffn": True},
        pixels,
    ),
    "beit": case(
        "BeitForImageClassification",
        "BeitConfig",
        {**VISION, "use_relative_position_bias": True, "use_mask_token": False},
        pixels,
    ),
    "clip": case(
        "CLIPModel", "CLIPConfig", clip_like("", ""), lambda: {**text(), **pixels()}
    ),
    "siglip": case(
        "SiglipModel", "SiglipConfig", clip_like("", ""), lambda: {**text(), **pixels()}
    ),
    "flava": case(
        "FlavaForPreTraining",
        "FlavaConfig",
        {
            "text_config": TEXT,
            "image_config": {**VISION, "vocab_size": N},
            "multimodal_config": {**VISION},
            "image_codebook_config": {"num_groups": 4, "hidden_size": 8, "vocab_size": N,
                                      "num_blocks_per_group": 1},
            "hidden_size": N,
            "projection_dim": N,
        },
        lambda: {**text(), **pixels(), "input_ids_masked": ids(), "bool_masked_pos": torch.ones(BATCH, 16, dtype=torch.long), "codebook_pixel_values": noise(BATCH, 3, 32, 32), "return_loss": False},
    ),
    "vilt": case(
        "ViltForQuestionAnswering",
        "ViltConfig",
        {**VISION, **TEXT, "image_size": 16, "patch_size": 4, "max_image_length": -1},
        lambda: {**text(), **pixels(), "pixel_mask": torch.ones(BATCH, 16, 16, dtype=torch.long)},
    ),
    "blip": case(
        "BlipForConditionalGeneration",
        "BlipConfig",
        {"text_config": {**DECODER, "encoder_hidden_size": N}, "vision_config": VISION,
         "projection_dim": N},
        lambda: {**text(), **pixels()},
    ),
    "whisper": case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**ENCODER_DECODER, "num_mel_bins": N, "max_source_positions": N, "max_target_positions": N},
        lambda: {"input_features": noise(BATCH, N, 2 * N), "decoder_input_ids": ids()},
    ),
    "wav2vec2": case(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**TEXT, "conv_dim": (N, N), "conv_kernel": (4, 4), "conv_stride": (4, 4),
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2,
         "apply_spec_augment": False},
        lambda: wave(16 * 16),
    ),
    "hubert": case(
        "HubertForCTC",
        "HubertConfig",
        {**TEXT, "conv_dim": (N, N), "conv_kernel": (4, 4), "conv_stride": (4, 4),
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2,
         "apply_spec_augment": False},
        lambda: wave(16 * 16),
    ),
    "llama": case("LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_key_value_heads": 2}, text),
    "qwen2": case("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "num_key_value_heads": 2}, text),
    "qwen3": case(
        "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "num_key_value_heads": 2, "head_dim": H}, text
    ),
    "phi3": case("Phi3ForCausalLM", "Phi3Config", {**DECODER, "num_key_value_heads": 2}, text),
    "gpt_neox": case(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**DECODER, "rotary_pct": 0.5}, text
    ),
    "mixtral": case(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**DECODER, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        text,
    ),
    "gpt2": case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": N, "n_layer": 2, "n_head": H, "n_inner": N, "vocab_size": N, "n_positions": N,
         "bos_token_id": 1, "eos_token_id": 2},
        text,
    ),
    "opt": case(
        "OPTForCausalLM",
        "OPTConfig",
        {**DECODER, "ffn_dim": N, "word_embed_proj_dim": N},
        text,
    ),
    "bloom": case(
        "BloomForCausalLM", "BloomConfig", {**DECODER, "n_layer": 2, "n_head": H}, text
    ),
    "t5": case(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": N, "d_ff": N, "d_kv": H, "num_heads": H, "num_layers": 2, "vocab_size": N,
         "decoder_start_token_id": 0},
        seq2seq,
    ),
    "bart": case("BartForConditionalGeneration", "BartConfig", ENCODER_DECODER, seq2seq),
    "swin": case(
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4, "mlp_ratio": 1.0, "num_labels": N},
        lambda: pixels(32),
    ),
    "resnet": case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic",
         "num_labels": N},
        lambda: pixels(32),
    ),
    "resnet_bottleneck": case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck",
         "num_labels": N},
        lambda: pixels(32),
    ),
    "convnext": case(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "patch_size": 4, "num_labels": N},
        lambda: pixels(32),
    ),
    "sam": case(
        "SamModel",
        "SamConfig",
        {
            "vision_config": {"hidden_size": N, "num_hidden_layers": 2, "num_attention_heads": H,
                              "image_size": 16, "patch_size": 4, "output_channels": N, "mlp_dim": N,
                              "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8},
            "prompt_encoder_config": {"hidden_size": N, "image_size": 16, "patch_size": 4,
                                      "mask_input_channels": 4},
            "mask_decoder_config": {"hidden_size": N, "mlp_dim": N, "num_attention_heads": 2,
                                    "num_hidden_layers": 2, "iou_head_hidden_dim": N},
        },
        lambda: {**pixels(), "input_points": torch.rand(BATCH, 1, 2, 2) * 16},
    ),
    "segformer": case(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [1, 1],
         "decoder_hidden_size": N, "num_labels": N},
        lambda: pixels(32),
    ),
    "ast": case(
        "ASTForAudioClassification",
        "ASTConfig",
        {**VISION, "max_length": 16, "num_mel_bins": 16, "time_stride": 4, "frequency_stride": 4},
        lambda: {"input_values": noise(BATCH, 16, 16)},
    ),
    "mamba": case(
        "MambaForCausalLM",
        "MambaConfig",
        {**DECODER, "state_size": 4, "time_step_rank": 4, "expand": 2},
        text,
    ),
    "llava": case(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"text_config": {"model_type": "llama", **DECODER, "num_key_value_heads": 2,
                         "max_position_embeddings": 64},
         "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": N},
         "image_token_index": 3, "vision_feature_layer": -1},
        lambda: {
            "input_ids": torch.cat([torch.full((BATCH, 16), 3), ids(8, 4)], 1), **pixels()
        },
    ),
}
