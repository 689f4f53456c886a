"""A small model as it is served, what to send it, and what the answers cost."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alloy.modality import ModalityConfig, ModalityModel
from tasks.data.scenes.words import ANSWERS, MAX_TOKENS, VOCABULARY, tokenizer

SIDE = 16


def save_model(folder: Path, seed: int = 0) -> ModalityModel:
    torch.manual_seed(seed)
    config = ModalityConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_joint_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=8,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=MAX_TOKENS,
        embedding_size=8,
        num_answers=len(ANSWERS),
        num_segment_classes=3,
    )
    model = ModalityModel(config).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def picture(seed: int = 0, side: int = SIDE) -> tuple[str, np.ndarray]:
    """A random image as base64 PNG, and its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode(), pixels


def claim(image: str, width: int, height: int) -> str:
    """The base64 PNG with another size in its header: a bomb of a few bytes."""
    content = base64.b64decode(image)
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    crc = struct.pack(">I", zlib.crc32(header))
    return base64.b64encode(content[:12] + header + crc + content[33:]).decode()


def encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def save(picture: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def large_images(side: int) -> list[str]:
    """Images of the kinds that take most memory to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
    large = Image.fromarray(noise).resize((side, side), Image.Resampling.NEAREST)
    return [
        encode(save(large.convert("RGBA"), "PNG")),
        encode(save(large, "JPEG", progressive=True, subsampling=0)),
        encode(save(large.convert("CMYK"), "JPEG", progressive=True)),
    ]


def forget_peak() -> None:
    """Let this process's peak of memory start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak(process: int) -> int:
    """The most bytes of memory that a process has had; Linux alone says it."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
