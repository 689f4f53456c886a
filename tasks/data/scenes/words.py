"""The words of all texts about scenes: vocabulary, tokenizer, token ids."""

from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

from tasks.data.scenes.drawings import CONCEPTS

POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
RELATIONS = ("left-of", "right-of", "above", "below")
NUM_CELLS = len(POSITIONS)
SPECIALS = ("[PAD]", "[CLS]", "[MASK]", "[UNK]")
WORDS = ("what", "where", "is", "there", "in", "both", "only-one", "first")
VOCABULARY = (*SPECIALS, *WORDS, *POSITIONS, *RELATIONS, *CONCEPTS)
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
PAD = TOKEN["[PAD]"]
MAX_TOKENS = 1 + 2 * NUM_CELLS  # the longest text is a caption of four objects

ANSWERS = (*CONCEPTS, *POSITIONS)  # of visual questions, in the order of the head's outputs
SEGMENTATION_CLASSES = ("background", *CONCEPTS)


def tokenizer() -> "PreTrainedTokenizerFast":
    """The word-level tokenizer of all texts; `save_pretrained` puts it beside a checkpoint."""
    from transformers import PreTrainedTokenizerFast  # slow to import, and only this needs it

    words = Tokenizer(models.WordLevel(vocab=TOKEN, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", TOKEN["[CLS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_max_length=MAX_TOKENS,
    )


def tokens(words: tuple[str, ...]) -> np.ndarray:
    """The token of each word."""
    return np.array([TOKEN[word] for word in words])


POSITION_TOKENS, RELATION_TOKENS, CONCEPT_TOKENS = (
    tokens(POSITIONS),
    tokens(RELATIONS),
    tokens(CONCEPTS),
)


def texts(num: int, *columns: np.ndarray | str) -> np.ndarray:
    """Token ids [num, MAX_TOKENS] of texts given word by word: a word for all, or ids [num]."""
    ids = np.full((num, MAX_TOKENS), PAD)
    ids[:, 0] = TOKEN["[CLS]"]
    for place, column in enumerate(columns, start=1):
        ids[:, place] = TOKEN[column] if isinstance(column, str) else column
    return ids
