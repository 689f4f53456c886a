"""Tiny models of several architectures, with their processors, and recipes that merge them."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ConvNextConfig,
    ConvNextImageProcessor,
    DistilBertConfig,
    ElectraConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RegNetConfig,
    ViTImageProcessor,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = len(LETTERS) + len(SPECIALS)

ARCHITECTURES: dict[str, tuple[str, Callable]] = {
    "ConvNextForImageClassification": (
        "images",
        lambda: ConvNextConfig(
            patch_size=4,
            hidden_sizes=[8, 12],
            depths=[1, 2],
            num_stages=2,
            image_size=32,
            num_labels=5,
        ),
    ),
    "RegNetForImageClassification": (
        "images",
        lambda: RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=5
        ),
    ),
    "DistilBertForMaskedLM": (
        "texts",
        lambda: DistilBertConfig(
            vocab_size=SIZE,
            dim=24,
            n_layers=2,
            n_heads=2,
            hidden_dim=20,
            max_position_embeddings=32,
        ),
    ),
    "OPTForCausalLM": (
        "texts",
        lambda: OPTConfig(
            vocab_size=SIZE,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=20,
            max_position_embeddings=32,
            word_embed_proj_dim=24,
            pad_token_id=0,
        ),
    ),
    "ElectraModel": (
        "texts",
        lambda: ElectraConfig(
            vocab_size=SIZE,
            embedding_size=12,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=32,
        ),
    ),
}  # fmt: skip
"""Class -> what it sees, and its config."""


def model(name: str, seed: int, **changes: object) -> PreTrainedModel:
    """A model whose weights are all random: none is 0 or 1 as fresh biases and norms are."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[name][1]()
    config.update(changes)
    made = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    """One token a letter."""
    words = {word: number for number, word in enumerate([*SPECIALS, *letters])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{word.strip('[]').lower()}_token": word for word in SPECIALS}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def save(made: PreTrainedModel, folder: Path) -> None:
    """Save a model with what it reads pictures or texts by."""
    made.save_pretrained(folder)
    name = type(made).__name__
    if name.startswith("ConvNext"):
        ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    elif ARCHITECTURES[name][0] == "images":
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        tokenizer().save_pretrained(folder)


def pictures(folder: Path, num: int = 24) -> None:
    """Noise of several brightnesses in a folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(num):
        pixels = rng.integers(0, 40 + 200 * i // num, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def letters(folder: Path, num: int = 20) -> None:
    """Files of random letters."""
    folder.mkdir(parents=True)
    drawn = random.Random(0)
    for i in range(num):
        (folder / f"{i}.txt").write_text(" ".join(drawn.choices(LETTERS, k=50)))


def recipe(calibration: dict, members: dict[int, list[str]], folder: str = "given") -> dict:
    """A recipe of kind "models" with one set, without labels."""
    names = [name for found in members.values() for name in found]
    return {
        "kind": "models",
        "fetch": {"checkpoints": {name: f"{folder}/{name}" for name in names}},
        "sets": {"pair": {"members": members, "calibration": "own"}},
        "prepare": {"seed": 0, "calibration": {"own": {**calibration}}},
        "collect": {"batch_size": 16, "joint": False, "grams": True},
        "align": {
            "alignments": {
                "identity": {"preset": "identity"},
                "mudsc": {"preset": "mudsc", "settings": {"weight_share": 0.5}},
            }
        },
        "merge": {
            "result": {"set": "pair", "seed": 0, "arm": "mudsc"},
            "arms": {
                "average": {"alignment": "identity", "method": "linear"},
                "mudsc": {"alignment": "mudsc", "method": "linear"},
            },
        },
        "evaluate": {
            "batch_size": 16,
            "tssd_keep": 0.2,
            "path_points": 3,
            "plane_points": 2,
            "curves": ["identity", "mudsc"],
        },
        "register": {"name": "mine", "model": "merged"},
    }
