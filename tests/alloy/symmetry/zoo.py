"""Tiny models of many architectures, with ambiguous sizes on purpose.

Hidden = intermediate = sequence = vocabulary = labels = N, heads = head width = H, so that no axis
is told from another by its size.
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
    return torch.randint(
        low, high, (BATCH, length), generator=torch.Generator().manual_seed(length)
    )


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
        {
            "dim": N,
            "hidden_dim": N,
            "n_layers": 2,
            "n_heads": H,
            "vocab_size": N,
            "max_position_embeddings": N,
        },
        text,
    ),
    "vit": case("ViTForImageClassification", "ViTConfig", VISION, pixels),
    "deit": case("DeiTForImageClassification", "DeiTConfig", VISION, pixels),
    "dinov2": case(
        "Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 1}, pixels
    ),
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
    "clip": case("CLIPModel", "CLIPConfig", clip_like("", ""), lambda: {**text(), **pixels()}),
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
            "image_codebook_config": {
                "num_groups": 4,
                "hidden_size": 8,
                "vocab_size": N,
                "num_blocks_per_group": 1,
            },
            "hidden_size": N,
            "projection_dim": N,
        },
        lambda: {
            **text(),
            **pixels(),
            "input_ids_masked": ids(),
            "bool_masked_pos": torch.ones(BATCH, 16, dtype=torch.long),
            "codebook_pixel_values": noise(BATCH, 3, 32, 32),
            "return_loss": False,
        },
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
        {
            "text_config": {**DECODER, "encoder_hidden_size": N},
            "vision_config": VISION,
            "projection_dim": N,
        },
        lambda: {**text(), **pixels()},
    ),
    "whisper": case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **ENCODER_DECODER,
            "num_mel_bins": N,
            "max_source_positions": N,
            "max_target_positions": N,
        },
        lambda: {"input_features": noise(BATCH, N, 2 * N), "decoder_input_ids": ids()},
    ),
    "wav2vec2": case(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **TEXT,
            "conv_dim": (N, N),
            "conv_kernel": (4, 4),
            "conv_stride": (4, 4),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 4,
            "num_feat_extract_layers": 2,
            "apply_spec_augment": False,
        },
        lambda: wave(16 * 16),
    ),
    "hubert": case(
        "HubertForCTC",
        "HubertConfig",
        {
            **TEXT,
            "conv_dim": (N, N),
            "conv_kernel": (4, 4),
            "conv_stride": (4, 4),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 4,
            "num_feat_extract_layers": 2,
            "apply_spec_augment": False,
        },
        lambda: wave(16 * 16),
    ),
    "llama": case("LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_key_value_heads": 2}, text),
    "qwen2": case("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "num_key_value_heads": 2}, text),
    "qwen3": case(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**DECODER, "num_key_value_heads": 2, "head_dim": H},
        text,
    ),
    "phi3": case("Phi3ForCausalLM", "Phi3Config", {**DECODER, "num_key_value_heads": 2}, text),
    "gpt_neox": case("GPTNeoXForCausalLM", "GPTNeoXConfig", {**DECODER, "rotary_pct": 0.5}, text),
    "mixtral": case(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**DECODER, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        text,
    ),
    "gpt2": case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": N,
            "n_layer": 2,
            "n_head": H,
            "n_inner": N,
            "vocab_size": N,
            "n_positions": N,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        text,
    ),
    "opt": case(
        "OPTForCausalLM",
        "OPTConfig",
        {**DECODER, "ffn_dim": N, "word_embed_proj_dim": N},
        text,
    ),
    "bloom": case("BloomForCausalLM", "BloomConfig", {**DECODER, "n_layer": 2, "n_head": H}, text),
    "t5": case(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": N,
            "d_ff": N,
            "d_kv": H,
            "num_heads": H,
            "num_layers": 2,
            "vocab_size": N,
            "decoder_start_token_id": 0,
        },
        seq2seq,
    ),
    "bart": case("BartForConditionalGeneration", "BartConfig", ENCODER_DECODER, seq2seq),
    "swin": case(
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "mlp_ratio": 1.0,
            "num_labels": N,
        },
        lambda: pixels(32),
    ),
    "resnet": case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [2, 1],
            "layer_type": "basic",
            "num_labels": N,
        },
        lambda: pixels(32),
    ),
    "resnet_bottleneck": case(
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [16, 32],
            "depths": [2, 1],
            "layer_type": "bottleneck",
            "num_labels": N,
        },
        lambda: pixels(32),
    ),
    "convnext": case(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {
            "hidden_sizes": [8, 16],
            "depths": [2, 2],
            "num_stages": 2,
            "patch_size": 4,
            "num_labels": N,
        },
        lambda: pixels(32),
    ),
    "sam": case(
        "SamModel",
        "SamConfig",
        {
            "vision_config": {
                "hidden_size": N,
                "num_hidden_layers": 2,
                "num_attention_heads": H,
                "image_size": 16,
                "patch_size": 4,
                "output_channels": N,
                "mlp_dim": N,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {
                "hidden_size": N,
                "image_size": 16,
                "patch_size": 4,
                "mask_input_channels": 4,
            },
            "mask_decoder_config": {
                "hidden_size": N,
                "mlp_dim": N,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "iou_head_hidden_dim": N,
            },
        },
        lambda: {**pixels(), "input_points": torch.rand(BATCH, 1, 2, 2) * 16},
    ),
    "segformer": case(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [1, 1],
            "decoder_hidden_size": N,
            "num_labels": N,
        },
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
        {
            "text_config": {
                "model_type": "llama",
                **DECODER,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": N},
            "image_token_index": 3,
            "vision_feature_layer": -1,
        },
        lambda: {"input_ids": torch.cat([torch.full((BATCH, 16), 3), ids(8, 4)], 1), **pixels()},
    ),
}


# Architectures beyond the list that the rules were written with.

GQA = {**DECODER, "num_key_value_heads": 2}
MORE = {
    "falcon_multi_query": case(
        "FalconForCausalLM",
        "FalconConfig",
        {
            **DECODER,
            "multi_query": True,
            "alibi": False,
            "new_decoder_architecture": False,
            "ffn_hidden_size": N,
        },
        text,
    ),
    "falcon_new": case(
        "FalconForCausalLM",
        "FalconConfig",
        {**DECODER, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": N},
        text,
    ),
    "falcon_old": case(
        "FalconForCausalLM",
        "FalconConfig",
        {
            **DECODER,
            "multi_query": False,
            "alibi": True,
            "new_decoder_architecture": False,
            "ffn_hidden_size": N,
        },
        text,
    ),
    "xlnet": case(
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": N, "d_model": N, "n_layer": 2, "n_head": H, "d_inner": N},
        text,
    ),
    "mpnet": case(
        "MPNetForMaskedLM", "MPNetConfig", {**TEXT, "max_position_embeddings": N + 2}, text
    ),
    "albert": case("AlbertForMaskedLM", "AlbertConfig", {**TEXT, "embedding_size": 8}, text),
    "electra": case("ElectraForMaskedLM", "ElectraConfig", {**TEXT, "embedding_size": 8}, text),
    "deberta_v2": case(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "pooler_hidden_size": N,
        },
        text,
    ),
    "deberta": case(
        "DebertaForMaskedLM",
        "DebertaConfig",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "pooler_hidden_size": N,
        },
        text,
    ),
    "modernbert": case(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            **TEXT,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "reference_compile": False,
        },
        text,
    ),
    "gemma": case(
        "GemmaForCausalLM",
        "GemmaConfig",
        {**GQA, "head_dim": H, "tie_word_embeddings": False},
        text,
    ),
    "gemma2": case(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GQA, "head_dim": H, "query_pre_attn_scalar": H},
        text,
    ),
    "gemma3": case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GQA, "head_dim": H, "query_pre_attn_scalar": H},
        text,
    ),
    "cohere": case("CohereForCausalLM", "CohereConfig", GQA, text),
    "olmo2": case("Olmo2ForCausalLM", "Olmo2Config", GQA, text),
    "starcoder2": case("Starcoder2ForCausalLM", "Starcoder2Config", GQA, text),
    "qwen2_moe": case(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **GQA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": N,
            "shared_expert_intermediate_size": N,
        },
        text,
    ),
    "qwen3_moe": case(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **GQA,
            "head_dim": H,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": N,
        },
        text,
    ),
    "deepseek_v3": case(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": H,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": N,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 4,
            "qk_nope_head_dim": 4,
            "first_k_dense_replace": 1,
        },
        text,
    ),
    "gpt_oss": case(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GQA, "head_dim": H, "num_local_experts": 4, "num_experts_per_tok": 2},
        text,
    ),
    "gptj": case(
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            "vocab_size": N,
            "n_positions": N,
            "n_embd": N,
            "n_layer": 2,
            "n_head": H,
            "rotary_dim": 2,
            "n_inner": N,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        text,
    ),
    "mpt": case(
        "MptForCausalLM",
        "MptConfig",
        {
            "d_model": N,
            "n_heads": H,
            "n_layers": 2,
            "expansion_ratio": 1,
            "max_seq_len": N,
            "vocab_size": N,
        },
        text,
    ),
    "codegen": case(
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {
            "vocab_size": N,
            "n_positions": N,
            "n_ctx": N,
            "n_embd": N,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 2,
            "n_inner": N,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        text,
    ),
    "dinov3": case(
        "DINOv3ViTModel", "DINOv3ViTConfig", {**VISION, "num_register_tokens": 2}, pixels
    ),
    "swinv2": case(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "mlp_ratio": 1.0,
            "num_labels": N,
        },
        lambda: pixels(32),
    ),
    "mobilevit": case(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "image_size": 32,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 4,
            "mlp_ratio": 1.0,
            "num_labels": N,
        },
        lambda: pixels(64),
    ),
    "levit": case(
        "LevitForImageClassificationWithTeacher",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [8, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
            "num_labels": N,
        },
        lambda: pixels(64),
    ),
    "pvt": case(
        "PvtForImageClassification",
        "PvtConfig",
        {
            "image_size": 64,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "mlp_ratios": [1, 1, 1, 1],
            "num_labels": N,
        },
        lambda: pixels(64),
    ),
    "trocr": case("TrOCRForCausalLM", "TrOCRConfig", {**ENCODER_DECODER, "is_decoder": True}, text),
    "speech2text": case(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {
            **ENCODER_DECODER,
            "input_feat_per_channel": N,
            "conv_channels": N,
            "max_source_positions": N,
            "max_target_positions": N,
        },
        lambda: {"input_features": noise(BATCH, 4 * N, N), "decoder_input_ids": ids()},
    ),
    "encodec": case(
        "EncodecModel",
        "EncodecConfig",
        {
            "num_filters": 4,
            "hidden_size": N,
            "codebook_size": N,
            "upsampling_ratios": [2, 2],
            "num_lstm_layers": 1,
            "target_bandwidths": [1.5],
            "sampling_rate": 800,
        },
        lambda: {"input_values": noise(BATCH, 1, 64)},
    ),
    "speecht5": case(
        "SpeechT5ForTextToSpeech",
        "SpeechT5Config",
        {
            **ENCODER_DECODER,
            "hidden_size": N,
            "speech_decoder_prenet_units": N,
            "speech_decoder_postnet_units": N,
            "num_mel_bins": N,
            "speaker_embedding_dim": N,
            "reduction_factor": 2,
            "encoder_max_relative_position": 8,
            "max_text_positions": N,
            "max_speech_positions": 64,
            "speech_decoder_prenet_dropout": 0.0,
        },
        lambda: {
            "input_ids": ids(),
            "decoder_input_values": noise(BATCH, N, N),
            "speaker_embeddings": noise(BATCH, N),
        },
    ),
    "m2m100": case("M2M100ForConditionalGeneration", "M2M100Config", ENCODER_DECODER, seq2seq),
    "pegasus": case("PegasusForConditionalGeneration", "PegasusConfig", ENCODER_DECODER, seq2seq),
    "longt5": case(
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        {
            "d_model": N,
            "d_ff": N,
            "d_kv": H,
            "num_heads": H,
            "num_layers": 2,
            "vocab_size": N,
            "decoder_start_token_id": 0,
            "local_radius": 3,
        },
        seq2seq,
    ),
    "longformer": case(
        "LongformerForMaskedLM",
        "LongformerConfig",
        {**TEXT, "attention_window": [4, 4], "max_position_embeddings": N + 2, "pad_token_id": 1},
        text,
    ),
    "bigbird": case(
        "BigBirdForMaskedLM", "BigBirdConfig", {**TEXT, "attention_type": "original_full"}, text
    ),
    "clap": case(
        "ClapModel",
        "ClapConfig",
        {
            "text_config": {**TEXT, "max_position_embeddings": N + 2},
            "audio_config": {
                "spec_size": 32,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "num_mel_bins": 16,
                "window_size": 4,
                "hidden_size": 16,
                "patch_embeds_hidden_size": 8,
                "depths": [1, 1],
                "num_attention_heads": [2, 4],
                "enable_fusion": False,
                "num_hidden_layers": 2,
                "mlp_ratio": 1.0,
            },
            "projection_dim": N,
        },
        lambda: {
            **text(),
            "input_features": noise(BATCH, 1, 64, 16),
            "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
        },
    ),
    "owlvit": case(
        "OwlViTForObjectDetection",
        "OwlViTConfig",
        {"text_config": DECODER, "vision_config": VISION, "projection_dim": N},
        lambda: {"input_ids": ids(), **pixels()},
    ),
    "detr": case(
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            "d_model": N,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": H,
            "decoder_attention_heads": H,
            "encoder_ffn_dim": N,
            "decoder_ffn_dim": N,
            "num_queries": N,
            "num_labels": N,
        },
        lambda: pixels(64),
    ),
    "groupvit": case(
        "GroupViTModel",
        "GroupViTConfig",
        {
            "text_config": DECODER,
            "vision_config": {
                **VISION,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 0],
            },
            "projection_dim": N,
            "projection_intermediate_dim": N,
        },
        lambda: {**text(), **pixels()},
    ),
    "xclip": case(
        "XCLIPModel",
        "XCLIPConfig",
        {
            "text_config": DECODER,
            "vision_config": {
                **VISION,
                "num_frames": 4,
                "mit_hidden_size": N,
                "mit_intermediate_size": N,
                "mit_num_attention_heads": H,
                "mit_num_hidden_layers": 1,
            },
            "projection_dim": N,
            "prompt_num_attention_heads": H,
            "prompt_layers": 1,
        },
        lambda: {**text(), "pixel_values": noise(BATCH, 4, 3, 16, 16)},
    ),
    "data2vec_text": case(
        "Data2VecTextForMaskedLM",
        "Data2VecTextConfig",
        {**TEXT, "max_position_embeddings": N + 2},
        text,
    ),
    "data2vec_audio": case(
        "Data2VecAudioForCTC",
        "Data2VecAudioConfig",
        {
            **TEXT,
            "conv_dim": (N, N),
            "conv_kernel": (4, 4),
            "conv_stride": (4, 4),
            "num_conv_pos_embeddings": 2,
            "conv_pos_kernel_size": 3,
            "num_conv_pos_embedding_groups": 4,
        },
        lambda: wave(256),
    ),
    "data2vec_vision": case(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        {**VISION, "use_relative_position_bias": True},
        pixels,
    ),
    "rwkv": case(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": N,
            "context_length": N,
            "hidden_size": N,
            "num_hidden_layers": 2,
            "intermediate_size": N,
            "attention_hidden_size": N,
        },
        text,
    ),
    "mamba2": case(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **DECODER,
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 4,
            "n_groups": 2,
            "expand": 2,
            "chunk_size": 8,
        },
        text,
    ),
    "jamba": case(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **GQA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        text,
    ),
    "convbert": case(
        "ConvBertForMaskedLM",
        "ConvBertConfig",
        {**TEXT, "embedding_size": N, "head_ratio": 2, "conv_kernel_size": 3},
        text,
    ),
    "squeezebert": case(
        "SqueezeBertForMaskedLM",
        "SqueezeBertConfig",
        {
            **TEXT,
            "embedding_size": N,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 1,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
        text,
    ),
    "funnel": case(
        "FunnelForMaskedLM",
        "FunnelConfig",
        {
            "vocab_size": N,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": N,
            "n_head": H,
            "d_head": H,
            "d_inner": N,
        },
        text,
    ),
    "perceiver": case(
        "PerceiverForMaskedLM",
        "PerceiverConfig",
        {
            "num_latents": 8,
            "d_latents": N,
            "d_model": N,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": H,
            "num_cross_attention_heads": H,
            "vocab_size": N,
            "max_position_embeddings": N,
        },
        lambda: {"inputs": ids()},
    ),
    "poolformer": case(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_labels": N, "mlp_ratio": 1.0},
        lambda: pixels(64),
    ),
    "regnet": case(
        "RegNetForImageClassification",
        "RegNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "groups_width": 4,
            "num_labels": N,
        },
        lambda: pixels(32),
    ),
    "fnet": case(
        "FNetForMaskedLM",
        "FNetConfig",
        {**{k: v for k, v in TEXT.items() if k != "num_attention_heads"}},
        text,
    ),
    "olmoe": case(
        "OlmoeForCausalLM", "OlmoeConfig", {**GQA, "num_experts": 4, "num_experts_per_tok": 2}, text
    ),
    "glm4": case(
        "Glm4ForCausalLM", "Glm4Config", {**GQA, "head_dim": H, "partial_rotary_factor": 0.5}, text
    ),
    "switch": case(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            "d_model": N,
            "d_ff": N,
            "d_kv": H,
            "num_heads": H,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "vocab_size": N,
            "num_experts": 4,
            "decoder_start_token_id": 0,
        },
        seq2seq,
    ),
    "mobilenet_v2": case(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"num_labels": N, "depth_multiplier": 0.25},
        lambda: pixels(64),
    ),
    "sew": case(
        "SEWForCTC",
        "SEWConfig",
        {
            **TEXT,
            "conv_dim": (N, N),
            "conv_kernel": (4, 4),
            "conv_stride": (4, 4),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 4,
            "squeeze_factor": 2,
        },
        lambda: wave(256),
    ),
    "dpt": case(
        "DPTForSemanticSegmentation",
        "DPTConfig",
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "num_labels": N,
        },
        pixels,
    ),
    "blip2": case(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "vision_config": VISION,
            "qformer_config": {**TEXT, "encoder_hidden_size": N, "cross_attention_frequency": 1},
            "text_config": {
                "model_type": "opt",
                **DECODER,
                "ffn_dim": N,
                "word_embed_proj_dim": N,
                "max_position_embeddings": 64,
            },
            "num_query_tokens": 8,
            "image_token_index": 3,
        },
        lambda: {"input_ids": torch.cat([torch.full((BATCH, 8), 3), ids(8, 4)], 1), **pixels()},
    ),
    "git": case(
        "GitForCausalLM",
        "GitConfig",
        {**DECODER, "max_position_embeddings": 64, "vision_config": VISION},
        lambda: {**text(), **pixels()},
    ),
    "roformer": case("RoFormerForMaskedLM", "RoFormerConfig", {**TEXT, "embedding_size": N}, text),
    "llama4": case(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**GQA, "head_dim": H, "intermediate_size_mlp": N, "num_local_experts": 2},
        text,
    ),
    "qwen2_vl": case(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {
                **GQA,
                "hidden_size": 2 * N,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 2],
                    "rope_theta": 1e4,
                },
            },
            "vision_config": {"depth": 1, "embed_dim": N, "hidden_size": 2 * N, "num_heads": H},
        },
        text,
    ),
    "nystromformer": case(
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        {**TEXT, "segment_means_seq_len": N, "num_landmarks": 4},
        text,
    ),
    "videomae": case(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {**VISION, "num_frames": 4},
        lambda: {"pixel_values": noise(BATCH, 4, 3, 16, 16)},
    ),
    "vit_mae": case(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **VISION,
            "decoder_hidden_size": N,
            "decoder_num_attention_heads": H,
            "decoder_intermediate_size": N,
            "decoder_num_hidden_layers": 1,
        },
        lambda: {**pixels(), "noise": torch.rand(BATCH, 16)},
    ),
}
CASES.update(MORE)
