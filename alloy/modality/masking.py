"""Words hidden whole, as BERT's later versions hide them.

Shapes: B texts, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a word that no loss counts: what `torch.nn.functional.cross_entropy` ignores."""

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the chosen tokens: behind the mask token, and another token at random; the rest stay."""


@dataclass(frozen=True)
class Masking:
    """The facts about a tokenizer that hiding whole words needs."""

    mask_token_id: int
    continues_V: Tensor
    """True for tokens that go on with the word before."""
    special_V: Tensor
    """True for tokens that are no words, such as the class token."""
    share: float = 0.15
    """Of a text's tokens."""


def masking_of(tokenizer: Any, share: float) -> Masking:
    """Read the mask token, and which tokens begin words, off a tokenizer of transformers.

    Raises:
        ValueError: a tokenizer without a mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no mask token, so no word can be hidden: "
            f"it has {', '.join(sorted(tokenizer.special_tokens_map))}"
        )
    tokens: Sequence[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = torch.zeros(len(tokens), dtype=torch.bool)
    special[[i for i in tokenizer.all_special_ids if i < len(tokens)]] = True
    return Masking(
        mask_token_id=tokenizer.mask_token_id,
        continues_V=torch.tensor(_continues(tokens)) & ~special,
        special_V=special,
        share=share,
    )


def _continues(tokens: Sequence[str]) -> list[bool]:
    """WordPiece marks what goes on, SentencePiece and byte-level pairs mark what begins."""
    if any(token.startswith("##") for token in tokens):
        return [token.startswith("##") for token in tokens]
    for begins in ("\u2581", "\u0120"):
        if any(token.startswith(begins) for token in tokens):
            return [not token.startswith(begins) for token in tokens]
    return [False] * len(tokens)


def mask_whole_words(
    input_ids_BT: Tensor, attention_mask_BT: Tensor, masking: Masking, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hide words in random order until a share of each text's tokens is chosen, at least one.

    A word that would exceed the share stays. Of the chosen tokens 80 % become the mask token, 10 %
    any token, 10 % stay; all of them are to be predicted.

    Returns:
        The ids and the labels (`IGNORED` where nothing is chosen), both [B, T].
    """
    ids = input_ids_BT.cpu()
    is_word = attention_mask_BT.cpu().bool() & ~masking.special_V[ids]
    begins = is_word & ~masking.continues_V[ids]
    begins |= is_word & ~torch.nn.functional.pad(is_word, (1, -1))  # after what is no word
    chosen = torch.zeros_like(is_word)
    order = torch.rand(ids.shape, generator=generator)
    for row in range(len(ids)):
        chosen[row] = _chosen(is_word[row], begins[row], order[row], masking.share)
    draw = torch.rand(ids.shape, generator=generator)
    others = torch.randint(len(masking.special_V), ids.shape, generator=generator)
    hidden = ids.masked_fill(chosen & (draw < MASKED_SHARE), masking.mask_token_id)
    replaced = chosen & (draw >= MASKED_SHARE) & (draw < MASKED_SHARE + RANDOM_SHARE)
    hidden = torch.where(replaced, others, hidden)
    labels = ids.masked_fill(~chosen, IGNORED)
    device = input_ids_BT.device
    return hidden.to(device), labels.to(device)


def _chosen(is_word_T: Tensor, begins_T: Tensor, order_T: Tensor, share: float) -> Tensor:
    word_T = begins_T.long().cumsum(0) * is_word_T  # 0: no word
    sizes = torch.bincount(word_T, minlength=1)
    sizes[0] = 0
    wanted = max(1, round(share * int(sizes.sum())))
    taken, total = torch.zeros(len(sizes), dtype=torch.bool), 0
    for word in (word_T[i] for i in order_T.argsort() if begins_T[i]):
        size = int(sizes[word])
        if total + size <= wanted or total == 0:
            taken[word] = True
            total += size
        if total >= wanted:
            break
    return taken[word_T] & is_word_T
