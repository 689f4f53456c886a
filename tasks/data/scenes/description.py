"""What scenes say of themselves: sizes, words, answers, classes, licences."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tasks.data.scenes.bank import Bank
from tasks.data.scenes.generator import SceneGenerator
from tasks.data.scenes.packages import source_versions
from tasks.data.scenes.words import ANSWERS, MAX_TOKENS, SEGMENTATION_CLASSES, tokenizer
from tasks.data.sets.description import Description
from tasks.recipe.experts import SceneParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def scenes_description(params: SceneParams, patch_size: int | None = None) -> Description:
    """The description of every benchmark on these scenes, with labels for patches of a size."""
    return Description(
        kind="questions",
        image_size=2 * params.cell_pixels,
        text_length=MAX_TOKENS,
        answers=ANSWERS,
        classes=SEGMENTATION_CLASSES,
        segment_cells=1 if patch_size is None else patch_size // params.label_pixels,
    )


@dataclass(frozen=True)
class SceneCorpus:
    """Training scenes with captions and statements, which a model is pre-trained on."""

    bank: Bank
    seed: int

    summary = "scenes composed on the fly from the train cells of tasks/data/scenes"
    licences = (
        "Licences of the data: drawings OpenMoji, CC BY-SA 4.0; digits MNIST, CC BY-SA 3.0. The "
        "NOTICE file names them."
    )

    def description(self, patch_size: int) -> Description:
        """Sizes, answers and classes, with labels for patches of a size."""
        return scenes_description(self.bank.params, patch_size)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return tokenizer()

    def batch(self, num: int, step: int) -> dict[str, Tensor]:
        """The examples of one step, made of its number."""
        return SceneGenerator(self.bank, "train", self.seed).batch(num, step)

    @property
    def sha256(self) -> str:
        """The digest of what scenes are composed of."""
        return self.bank.sha256

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells of the data that it was made from."""
        return {
            "cells_sha256": self.bank.sha256,
            "versions": source_versions(),
            "scenes": self.bank.params.model_dump(),
        }
