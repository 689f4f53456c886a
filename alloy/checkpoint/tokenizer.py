"""Vocabularies: which row of an embedding belongs to which token, where sources number them apart.

Merging row 17 with row 17 makes sense only if both are the same token. Where tokenizers differ, the
policy "base" keeps the base's tokenizer (without a base: the first source's), and "union" adds to
it every token that another source has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloy.checkpoint.reading import read_json, read_text, source_file, typed
from alloy.errors import CheckpointError, nearest

if TYPE_CHECKING:
    import numpy as np

POLICIES = ("same", "base", "union")
_LEGACY = (
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
)


@dataclass(frozen=True)
class Tokenizer:
    """Behaviour of a tokenizer, as far as its files say."""

    folder: Path
    tokens: Mapping[str, int] | None
    """Token to id, added tokens included; None where only a binary file knows."""
    behaviour: str
    """The rules that cut text, as canonical text: equal means interchangeable."""
    data: Mapping | None
    """The parsed tokenizer.json."""


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None where there is none.

    Raises:
        CheckpointError: a file that is not what a tokenizer's file is, with file and key.
    """
    if (path := source_file(folder, "tokenizer.json")) is not None:
        data = read_json(path)
        model = typed(data, "model", "an object", path)
        if model is None:
            raise CheckpointError(f"{path}: model is missing; save the tokenizer again")
        typed(model, "type", "text", path)
        tokens = {**_vocabulary(model, path), **_added(data, path)}
        merges = [_merge(m, path) for m in typed(model, "merges", "a list", path) or []]
        rest = {key: data.get(key) for key in ("normalizer", "pre_tokenizer")}
        behaviour = json.dumps(
            [model.get("type"), sorted(tokens.items()), merges, rest], sort_keys=True
        )
        return Tokenizer(folder, tokens, behaviour, data)
    tokens = None
    if (path := source_file(folder, "vocab.json")) is not None:
        tokens = _ids(read_json(path), path)
    elif (path := source_file(folder, "vocab.txt")) is not None:
        tokens = {token: i for i, token in enumerate(read_text(path).splitlines())}
    if tokens is not None and (path := source_file(folder, "added_tokens.json")) is not None:
        tokens = {**tokens, **_ids(read_json(path), path)}
    names = ("tokenizer.model", "spiece.model", "merges.txt")
    binary = [p for name in names if (p := source_file(folder, name)) is not None]
    if tokens is None and not binary:
        return None
    behaviour = json.dumps(sorted((tokens or {}).items())) + "".join(
        p.read_bytes().hex() for p in binary
    )
    return Tokenizer(folder, tokens, behaviour, None)


def _vocabulary(model: Mapping, path: Path) -> dict[str, int]:
    """Token to id of a model, whose vocabulary is a mapping or, of Unigram, a list of pieces."""
    vocab = model.get("vocab")
    if vocab is None:
        return {}
    if isinstance(vocab, dict):
        return _ids(vocab, path)
    pieces = vocab if isinstance(vocab, list) else [vocab]
    for piece in pieces:
        if not (
            isinstance(piece, list)
            and len(piece) == 2
            and isinstance(piece[0], str)
            and isinstance(piece[1], int | float)
        ):
            raise CheckpointError(
                f"{path}: model.vocab holds {piece!r:.60}; it must be pairs of token and score"
            )
    return {token: i for i, (token, _) in enumerate(pieces)}


def _ids(vocab: Mapping, path: Path) -> dict[str, int]:
    for token, i in vocab.items():
        if type(i) is not int or i < 0:
            raise CheckpointError(f"{path}: the id of {token!r} is {i!r:.60}; it must be a number")
    return dict(vocab)


def _added(data: Mapping, path: Path) -> dict[str, int]:
    """Added tokens and their ids."""
    result = {}
    for entry in typed(data, "added_tokens", "a list", path) or []:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or type(entry.get("id")) is not int:
            raise CheckpointError(
                f"{path}: added_tokens holds {entry!r:.60}; each has content and id"
            )
        result[content] = entry["id"]
    return result


def _merge(merge: object, path: Path) -> str:
    """A merge as text; newer files write it as a pair."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) for p in parts):
        raise CheckpointError(f"{path}: model.merges holds {merge!r:.60}; each is two tokens")
    return " ".join(parts)


def difference(reference: str, first: Tokenizer, source: str, other: Tokenizer) -> str | None:
    """Describe how two tokenizers differ, or None if they do not."""
    if first.behaviour == other.behaviour:
        return None
    if first.tokens is None or other.tokens is None or first.tokens == other.tokens:
        return f"the tokenizers of {reference!r} and {source!r} cut text differently"
    ids = [t for t in first.tokens if t in other.tokens and first.tokens[t] != other.tokens[t]]
    ours = [t for t in first.tokens if t not in other.tokens]
    theirs = [t for t in other.tokens if t not in first.tokens]
    parts = [
        f"{len(tokens)} {what}, as {tokens[0]!r}"
        for tokens, what in (
            (ids, "tokens have other ids"),
            (ours, f"are in {reference!r} alone"),
            (theirs, f"are in {source!r} alone"),
        )
        if tokens
    ]
    return f"the tokenizers of {reference!r} and {source!r} differ: {'; '.join(parts)}"


@dataclass(frozen=True)
class Vocabulary:
    """The result's vocabulary and where its rows come from."""

    size: int
    tokens: Mapping[str, int]
    """Token to id."""
    added: frozenset[str]
    """Tokens that the reference lacks."""
    row_maps: Mapping[str, np.ndarray]
    """By source: for each row of the result the source's row, or -1."""
    files: Mapping[str, bytes]
    """Tokenizer files to write instead of the reference's; empty if its own serve."""
    left_out: tuple[str, ...] = ()
    """Files of the reference that no longer say the truth."""
    borrowed: Mapping[int, tuple[str | None, int]] = field(default_factory=dict)
    """For a row of the result, the source and row that stand in for sources that lack it; zeros
    where the source is None."""


def combine_vocabularies(
    policy: str,
    reference: str,
    tokenizers: Mapping[str, Tokenizer],
    sizes: Mapping[str, int],
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to: int | None = None,
) -> Vocabulary:
    """The vocabulary that a policy gives.

    Args:
        policy: "base" or "union".
        reference: the source whose ids the result keeps.
        tokenizers: by source.
        sizes: rows of each source's embeddings; rows beyond the tokens are padding.
        tokens: by token where its row comes from, as `merge_checkpoints` takes them.
        pad_to: the number of rows is a multiple of this; rows that are added are zeros.

    Raises:
        CheckpointError: a tokenizer whose tokens cannot be read, or of another kind than the
            reference's.
    """
    for source, tokenizer in tokenizers.items():
        if tokenizer.tokens is None or (policy == "union" and tokenizer.data is None):
            raise CheckpointError(
                f"{tokenizer.folder}: tokenizer={policy!r} needs a tokenizer.json; save it again "
                "from a fast tokenizer"
            )
        largest = max(tokenizer.tokens.values(), default=-1)
        if largest >= sizes[source]:
            raise CheckpointError(
                f"{tokenizer.folder}: token {_token_of(tokenizer.tokens, largest)!r} "
                f"has id {largest}, its embeddings have {sizes[source]} rows; "
                "resize the embeddings to the tokenizer first"
            )
    base = tokenizers[reference]
    ids = dict(base.tokens or {})
    new: dict[str, str] = {}
    if policy == "union":
        following = max(ids.values(), default=-1) + 1
        for source, tokenizer in tokenizers.items():
            for token, _ in sorted((tokenizer.tokens or {}).items(), key=lambda item: item[1]):
                if token not in ids:
                    ids[token], new[token] = following, source
                    following += 1
    size = max(sizes[reference], max(ids.values(), default=-1) + 1)
    token_at = {i: token for token, i in ids.items()}
    maps = {
        source: _row_map(token_at, tokenizer, sizes[source], size)
        for source, tokenizer in tokenizers.items()
    }
    borrowed = _borrowed(tokens or {}, ids, tokenizers, maps)
    if pad_to is not None and size % pad_to:
        import numpy as np

        padded = size + pad_to - size % pad_to
        gap = np.full(padded - size, -1, np.int64)
        maps = {source: np.concatenate([rows, gap]) for source, rows in maps.items()}
        borrowed |= dict.fromkeys(range(size, padded), (None, 0))
        size = padded
    if not new:
        return Vocabulary(size, ids, frozenset(), maps, {}, borrowed=borrowed)
    data = _extended(base, tokenizers, ids, new)
    text = json.dumps(data, ensure_ascii=False, indent=2).encode()
    files = {"tokenizer.json": text}
    return Vocabulary(size, ids, frozenset(new), maps, files, _LEGACY, borrowed)


def _borrowed(
    tokens: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, int],
    tokenizers: Mapping[str, Tokenizer],
    maps: Mapping[str, np.ndarray],
) -> dict[int, tuple[str | None, int]]:
    """Rows that stand in for those of single tokens; what is forced counts as missing everywhere.

    Raises:
        CheckpointError: a token, a source or a token of that source that is not there.
    """
    borrowed: dict[int, tuple[str | None, int]] = {}
    for token, entry in tokens.items():
        if token not in ids:
            raise CheckpointError(f"tokens: {token!r} is no token of the result")
        row, source = ids[token], str(entry.get("source"))
        if entry.get("zero"):
            borrowed[row] = (None, 0)
        else:
            if source not in tokenizers:
                raise CheckpointError(
                    f"tokens[{token!r}]: source {source!r}: {nearest(source, tokenizers)}"
                )
            known = tokenizers[source].tokens or {}
            wanted = entry.get("token", token)
            if isinstance(wanted, str) and wanted not in known:
                raise CheckpointError(f"tokens[{token!r}]: {source!r} has no token {wanted!r}")
            borrowed[row] = (source, known[wanted] if isinstance(wanted, str) else int(wanted))
        if entry.get("force"):
            for rows in maps.values():
                rows[row] = -1
    return borrowed


def _row_map(token_at: Mapping[int, str], tokenizer: Tokenizer, size: int, rows: int) -> np.ndarray:
    """Map each row of the result to the source's row of that token, padding to padding."""
    import numpy as np

    tokens = tokenizer.tokens or {}
    used = set(tokens.values())
    return np.array(
        [
            tokens.get(token_at[i], -1)
            if i in token_at
            else i
            if i < size and i not in used
            else -1
            for i in range(rows)
        ],
        np.int64,
    )


def _extended(
    base: Tokenizer,
    tokenizers: Mapping[str, Tokenizer],
    ids: Mapping[str, int],
    new: Mapping[str, str],
) -> dict:
    """The base's tokenizer.json with the new tokens, in the model or as added tokens.

    A Unigram model takes the pieces with the scores (log-probabilities) of the source that has
    them.
    """
    assert base.data is not None, "checked before"
    data = json.loads(json.dumps(base.data))
    kind = data["model"].get("type")
    added = {entry["content"] for entry in data.get("added_tokens") or []}
    for source, tokenizer in tokenizers.items():
        assert tokenizer.data is not None, "checked before"
        if tokenizer.data["model"].get("type") != kind:
            raise CheckpointError(
                f"{tokenizer.folder}: a {tokenizer.data['model'].get('type')} tokenizer has no "
                f"union with {base.folder}'s {kind}; choose tokenizer='base'"
            )
        mine = [token for token, owner in new.items() if owner == source]
        entries = {e["content"]: e for e in tokenizer.data.get("added_tokens") or []}
        for token in mine:
            if token in entries:
                if token not in added:
                    data["added_tokens"].append({**entries[token], "id": ids[token]})
            elif kind != "Unigram":
                data["model"]["vocab"][token] = ids[token]
        _add_merges(data["model"], tokenizer.data["model"].get("merges") or [], set(mine))
    if kind == "Unigram":
        _add_pieces(data["model"]["vocab"], tokenizers, ids)
    return data


def _add_pieces(pieces: list, tokenizers: Mapping[str, Tokenizer], ids: Mapping[str, int]) -> None:
    """Extend a Unigram model's list, in which a piece's position is its id, to all ids.

    Added tokens are matched first; in the model's list they fill their place, never chosen.
    """
    scores: dict[str, float] = {}
    for tokenizer in tokenizers.values():
        for token, score in tokenizer.data["model"]["vocab"] if tokenizer.data else ():
            scores.setdefault(token, score)
    token_at = {i: token for token, i in ids.items()}
    never = min(scores.values()) - 100
    for i in range(len(pieces), max(ids.values()) + 1):
        token = token_at.get(i, f"<unused_{i}>")
        pieces.append([token, scores.get(token, never)])


def _add_merges(model: dict, merges: Sequence, tokens: set[str]) -> None:
    """Merges that make new tokens, after the ones there are."""
    if not merges:
        return
    ours = model.setdefault("merges", [])
    as_text = bool(ours) and isinstance(ours[0], str)
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right in tokens:
            ours.append(f"{left} {right}" if as_text else [left, right])


def _token_of(tokens: Mapping[str, int], wanted: int) -> str:
    return next(token for token, i in tokens.items() if i == wanted)
