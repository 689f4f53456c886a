"""Tensors with one row per token, and the row of each source that belongs to a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alloy.checkpoint.checks.defaults import default_of
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.sources import BASE, Sources
from alloy.checkpoint.config import flatten, text_part, vocabulary_size
from alloy.checkpoint.format import Entry
from alloy.checkpoint.reading import few
from alloy.checkpoint.tokenizer import (
    Tokenizer,
    Vocabulary,
    combine_vocabularies,
    difference,
    read_tokenizer,
)


def common_vocabulary(
    findings: Findings,
    sources: Sources,
    policy: str,
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to: int | None = None,
) -> Vocabulary | None:
    """The vocabulary of the result, or None where all sources number their tokens alike."""
    chosen = bool(tokens) or pad_to is not None
    folders, reference = sources.folders, sources.reference
    read = {name: findings.attempt(read_tokenizer, folder) for name, folder in folders.items()}
    tokenizers: dict[str, Tokenizer] = {name: t for name, t in read.items() if t is not None}
    sizes = {name: vocabulary_size(c.config) for name, c in sources.checkpoints.items()}
    owner = BASE if policy == "base" and BASE in tokenizers else reference
    if owner not in tokenizers:
        owner = next(iter(tokenizers), owner)
    differences = [
        text
        for name, other in tokenizers.items()
        if name != owner and (text := difference(owner, tokenizers[owner], name, other)) is not None
    ]
    known_sizes = {name: size for name, size in sizes.items() if size is not None}
    lacking = [name for name, size in sizes.items() if name not in tokenizers or size is None]
    if chosen and policy == "same":
        findings.problem(
            "tokens and pad_vocabulary_to choose rows of a common vocabulary: take "
            "tokenizer='base' or 'union'"
        )
        return None
    if not differences and not chosen:
        if len(set(known_sizes.values())) > 1:
            if policy == "same" or lacking:
                findings.problem(
                    f"vocab_size differs: {known_sizes}; take tokenizer='base' or 'union' (every "
                    "source then needs its tokenizer.json)"
                )
                return None
        else:
            if unread := [n for n in folders if n not in tokenizers and tokenizers]:
                findings.note(f"{few(unread)} has no tokenizer: its tokens were not compared")
            if policy != "same":
                findings.note(
                    f"tokenizer={policy!r} changes nothing: the vocabularies are the same"
                )
            return None
    elif policy == "same":
        for text in differences:
            findings.problem(
                f"{text}; merging rows of different tokens makes no sense: take tokenizer='union' "
                f"(all tokens) or tokenizer='base' (those of "
                f"{BASE if BASE in tokenizers else reference!r})"
            )
        return None
    if lacking:
        findings.problem(
            f"tokenizer={policy!r} needs tokenizer.json and vocab_size of every source; "
            f"{few(lacking)} lacks one"
        )
        return None
    ordered = {owner: tokenizers[owner], **tokenizers}
    return findings.attempt(
        combine_vocabularies, policy, owner, ordered, known_sizes, tokens, pad_to
    )


def is_embedding(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "shared")) and not is_head(name)


def is_head(name: str) -> bool:
    return any(word in name for word in ("head", "predictions", "embed_out"))


def ties_embeddings(config: Mapping | None) -> bool:
    """True if a model's head is its embeddings: as its config says, that of its language model, or
    where both are silent the default of its architecture.
    """
    parts = [part for part in (config, text_part(config or {})) if part]
    said = [part.get("tie_word_embeddings") for part in parts]
    if any(word is not None for word in said):
        return any(said)
    return any(default_of(part, "tie_word_embeddings") is True for part in parts)


def has_row_per_token(
    name: str, entries: Mapping[str, Entry], configs: Mapping[str, Mapping | None]
) -> bool:
    """True if a tensor's rows are tokens: as many, and no other size of the model equal."""
    sizes = {source: vocabulary_size(configs[source]) for source in entries}
    if not all(
        entry.shape and entry.shape[0] == sizes[source] for source, entry in entries.items()
    ):
        return False
    others = {
        value
        for source in entries
        for key, value in flatten(configs[source] or {})
        if not key.endswith("vocab_size") and value == sizes[source]
    }
    return not others or is_embedding(name) or is_head(name)
