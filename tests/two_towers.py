"""Tiny models of transformers with two towers, and examples that reach both."""

import torch
import transformers

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
IMAGES = {"image_size": 12, "patch_size": 4}
WORDS = {"vocab_size": 50, "max_position_embeddings": 14, "bos_token_id": 2, "eos_token_id": 1}
TOWERS = {
    "siglip": ("vision_model.encoder.layers", "text_model.encoder.layers"),
    "clip": ("vision_model.encoder.layers", "text_model.encoder.layers"),
    "flava": ("image_model.encoder.layer", "text_model.encoder.layer"),
    "whisper": ("model.encoder.layers", "model.decoder.layers"),
    "blip": ("vision_model.encoder.layers", "text_encoder.encoder.layer"),
    "chinese_clip": ("vision_model.encoder.layers", "text_model.encoder.layer"),
    "clap": ("audio_model.audio_encoder.layers.0.blocks", "text_model.encoder.layer"),
    "vilt": ("encoder.layer", "encoder.layer"),
}


def config(kind: str, **changes):
    """A config of a tiny model; `text` and `vision` change its towers."""
    text = {**SIZES, **WORDS, "pad_token_id": 0, **changes.pop("text", {})}
    vision = {**SIZES, **IMAGES, **changes.pop("vision", {})}
    match kind:
        case "siglip":
            text = {**text, "projection_size": vision["hidden_size"]}
            return transformers.SiglipConfig(vision_config=vision, text_config=text)
        case "clip":
            return transformers.CLIPConfig(
                vision_config=vision, text_config=text, projection_dim=20
            )
        case "flava":
            return transformers.FlavaConfig(
                image_config=vision, text_config=text, multimodal_config=SIZES, projection_dim=20,
                hidden_size=24,
            )  # fmt: skip
        case "whisper":
            return transformers.WhisperConfig(
                d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=50,
                num_mel_bins=8, max_source_positions=10, max_target_positions=12, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
                begin_suppress_tokens=None,
            )  # fmt: skip
        case "blip":
            return transformers.BlipConfig(
                vision_config=vision, text_config={**text, "encoder_hidden_size": 24},
                projection_dim=20, image_text_hidden_size=20,
            )  # fmt: skip
        case "chinese_clip":
            return transformers.ChineseCLIPConfig(
                vision_config=vision, text_config=text, projection_dim=20
            )
        case "clap":
            audio = {
                "spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 8,
                "window_size": 2, "hidden_size": 24, "patch_embeds_hidden_size": 12,
                "depths": [2, 1], "num_attention_heads": [2, 4], "num_hidden_layers": 2,
                "enable_fusion": False,
            }  # fmt: skip
            return transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=20)
        case "vilt":
            return transformers.ViltConfig(**SIZES, **IMAGES, **WORDS)
    raise AssertionError(kind)


CLASSES = {
    "siglip": "SiglipModel",
    "clip": "CLIPModel",
    "flava": "FlavaModel",
    "whisper": "WhisperForConditionalGeneration",
    "blip": "BlipForImageTextRetrieval",
    "chinese_clip": "ChineseCLIPModel",
    "clap": "ClapModel",
    "vilt": "ViltModel",
}


def model(kind: str, seed: int = 0, **changes):
    """A tiny model of a kind, of weights as far apart as training leaves them."""
    torch.manual_seed(seed)
    made = getattr(transformers, CLASSES[kind])(config(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def examples(kind: str, num: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a kind's forward."""
    torch.manual_seed(seed)
    words = torch.randint(3, 50, (num, 8))
    if kind == "whisper":
        return {"input_features": torch.randn(num, 8, 20), "decoder_input_ids": words}
    if kind == "clap":
        return {"input_features": torch.randn(num, 1, 128, 8), "input_ids": words}
    return {"pixel_values": torch.randn(num, 3, 12, 12), "input_ids": words}
