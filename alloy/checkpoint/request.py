"""The settings of a merge: one value that the API, the command line and recipes make.

An argument means what it says or is refused: no string is taken for the list of its letters, no
truth for a number, no number for a path. The checks are here, once, whoever calls.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.names import changes_by_source
from alloy.checkpoint.checks.slices import parse_slices
from alloy.checkpoint.checks.sources import BASE
from alloy.checkpoint.format import DTYPE_NAMES
from alloy.checkpoint.tokenizer import POLICIES
from alloy.errors import MergeError, nearest
from alloy.merging import MERGE_METHODS

Paths = Sequence[str | Path] | Mapping[str, str | Path]
Coefficients = Sequence[Any] | Mapping[str, Sequence[Any]] | Mapping[str, Any]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_LARGEST_SHARD = 1 << 60


@dataclass(frozen=True)
class MergeRequest:
    """The arguments of `merge_checkpoints`, which explains them, except how the work is done."""

    method: str
    sources: Paths
    output: str | Path
    base: str | Path | None = field(default=None, kw_only=True)
    coefficients: Coefficients | None = field(default=None, kw_only=True)
    statistics: Paths | None = field(default=None, kw_only=True)
    dtype: str | None = field(default=None, kw_only=True)
    shard_bytes: int | str | None = field(default=None, kw_only=True)
    tokenizer: str = field(default="same", kw_only=True)
    tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)
    pad_vocabulary_to: int | None = field(default=None, kw_only=True)
    chat_template: str | Path | None = field(default=None, kw_only=True)
    processor: str | None = field(default=None, kw_only=True)
    generation_config: str | None = field(default=None, kw_only=True)
    names: Mapping[str, str] | Mapping[str, Mapping[str, str]] = field(
        default_factory=dict, kw_only=True
    )
    kept: Sequence[str] = field(default=(), kw_only=True)
    slices: Sequence[Mapping[str, Sequence[int]]] = field(default=(), kw_only=True)
    stack: str | None = field(default=None, kw_only=True)
    copy: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    drop: Sequence[str] = field(default=(), kw_only=True)
    allow: Sequence[str] = field(default=(), kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The method's settings, and what a method that runs the model is given to run."""

    def checked(self, findings: Findings) -> MergeRequest:
        """This request in one form, every argument of its kind; a problem for each that is not.

        Sources are a mapping from name to path, without the base; coefficients by source are a
        list; a size is a number; a dtype has its name; changes of names are by source.
        """
        one_of(self.method, MERGE_METHODS, "method")  # raises: all else depends on it
        sources = named_paths(self.sources)
        known = [*sources, *([] if self.base is None else [BASE])]
        attempt = findings.attempt
        return replace(
            self,
            sources=sources,
            output=attempt(a_path, self.output, "output"),
            base=None if self.base is None else attempt(a_path, self.base, "base"),
            coefficients=attempt(_coefficients, self.coefficients, list(sources)),
            statistics=attempt(_statistics, self.statistics, list(sources)),
            dtype=attempt(_dtype, self.dtype),
            shard_bytes=None if self.shard_bytes is None else attempt(num_bytes, self.shard_bytes),
            tokenizer=attempt(one_of, self.tokenizer, POLICIES, "tokenizer"),
            tokens=attempt(_tokens, self.tokens, known) or {},
            pad_vocabulary_to=attempt(_multiple, self.pad_vocabulary_to),
            chat_template=attempt(_text_or_path, self.chat_template, "chat_template"),
            processor=attempt(_source, self.processor, "processor", known),
            generation_config=attempt(_source, self.generation_config, "generation_config", known),
            names=attempt(changes_by_source, self.names, known) or {},
            kept=attempt(patterns, self.kept, "kept") or (),
            slices=attempt(parse_slices, self.slices, known) or (),
            stack=attempt(_text, self.stack, "stack"),
            copy=attempt(_texts_by_text, self.copy, "copy") or {},
            drop=attempt(patterns, self.drop, "drop") or (),
            allow=attempt(patterns, self.allow, "allow") or (),
            options=attempt(_options, self.options) or {},
        )

    @property
    def choices(self) -> dict[str, Any]:
        """The settings that are not the defaults, for the record."""
        choices = {
            "dtype": self.dtype,
            "shard_bytes": self.shard_bytes,
            "tokenizer": self.tokenizer,
            "tokens": {token: dict(entry) for token, entry in self.tokens.items()},
            "pad_vocabulary_to": self.pad_vocabulary_to,
            "chat_template": None if self.chat_template is None else str(self.chat_template),
            "processor": self.processor,
            "generation_config": self.generation_config,
            "names": dict(self.names),
            "kept": list(self.kept),
            "slices": [dict(one) for one in self.slices],
            "stack": self.stack,
            "copy": dict(self.copy),
            "drop": list(self.drop),
            "allow": list(self.allow),
        }
        return {k: v for k, v in choices.items() if v not in (None, "same", {}, [])}


def one_of(value: object, known: Any, what: str) -> str:
    """The value, which must be one of these names."""
    if not isinstance(value, str):
        raise MergeError(f"{what}={value!r}: it must be text; choose one of {sorted(known)}")
    if value not in known:
        if what == "method":
            raise MergeError(f"method {value!r} is unknown: {nearest(value, known)}")
        raise MergeError(f"{what}={value!r}: {nearest(value, known)}")
    return value


def named_paths(sources: object) -> dict[str, Path]:
    """The sources by name: as given, or after their folders (`#2` and so on where those repeat)."""
    if isinstance(sources, str | Path):
        raise MergeError("give several sources, as a list of paths or a mapping from name to path")
    if not isinstance(sources, Mapping | list | tuple):
        raise MergeError(
            f"sources={_shown(sources)}: give a list of paths or a mapping from name to path"
        )
    if not sources:
        raise MergeError("no source: give at least one checkpoint")
    if isinstance(sources, Mapping):
        named = {}
        for name, path in sources.items():
            if not isinstance(name, str) or not name.strip() or not name.isprintable():
                raise MergeError(f"a source is called {name!r}; give it a name of one line of text")
            if name == BASE:
                raise MergeError(
                    f"a source is called {BASE!r}, which means the base; give it another name"
                )
            named[name] = a_path(path, f"source {name!r}")
        return named
    named = {}
    for i, given in enumerate(sources):
        path = a_path(given, f"sources[{i}]")
        stem = path.stem if path.suffix == ".safetensors" else path.name or path.resolve().name
        count = sum(name == stem or name.startswith(f"{stem}#") for name in named)
        named[f"{stem}#{count + 1}" if count or stem == BASE else stem] = path
    return named


def a_path(value: object, what: str) -> Path:
    """A path of the file system."""
    if not isinstance(value, str | os.PathLike) or isinstance(value, bytes):
        raise MergeError(f"{what}={_shown(value)}: give a path")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise MergeError(f"{what}={_shown(text)}: give a path")
    return Path(text)


def patterns(value: object, what: str) -> tuple[str, ...]:
    """A list of texts."""
    if value is None:
        return ()
    if isinstance(value, str):
        raise MergeError(f"{what}={value!r}: give a list, {what}=[{value!r}]")
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise MergeError(f"{what}={_shown(value)}: give a list of patterns")
    return tuple(value)


def num_bytes(size: object) -> int:
    """A size as a number, or as people write it: `5GB`.

    Raises:
        MergeError: no number, an unknown unit, or no size that a file can have.
    """
    number: float | int
    if isinstance(size, str):
        unit = next((unit for unit in _UNITS if size.strip().endswith(unit)), "")
        try:
            number = float(size.strip().removesuffix(unit)) * _UNITS.get(unit, 1)
        except ValueError:
            raise MergeError(
                f"shard_bytes={size!r}: write a number and one of {', '.join(_UNITS)}"
            ) from None
    elif isinstance(size, Integral) and not isinstance(size, bool):
        number = int(size)
    else:
        raise MergeError(f"shard_bytes={_shown(size)}: give a whole number, or a size as '5GB'")
    if not 1 <= number <= _LARGEST_SHARD:
        raise MergeError(f"shard_bytes={size!r}: give a positive number of bytes")
    return int(number)


def num_threads(threads: object) -> int | None:
    """A number of workers, or None for all cores."""
    if threads is None:
        return None
    if not isinstance(threads, Integral) or isinstance(threads, bool) or threads < 1:
        raise MergeError(
            f"threads={_shown(threads)}: give at least 1, or leave it out for all cores"
        )
    return int(threads)


def _coefficients(value: object, sources: Sequence[str]) -> Any:
    """Numbers in the order of the sources, or such rows by pattern."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _row(value, "coefficients", sources)
    if not value:
        raise MergeError("coefficients={}: give one number for each source")
    numbers = any(isinstance(row, Real) or row is None for row in value.values())
    if numbers or value.keys() == set(sources):
        if value.keys() != set(sources):
            raise MergeError(
                f"coefficients={_shown(dict(value))}: give one number for each of the sources "
                f"{list(sources)}, or a list of numbers for each pattern of tensor names"
            )
        return _row([value[name] for name in sources], "coefficients", sources)
    rows = {}
    for pattern, row in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise MergeError(f"coefficients: {pattern!r} is no pattern of tensor names")
        if isinstance(row, Mapping):
            if row.keys() != set(sources):
                raise MergeError(
                    f"coefficients of {pattern!r}: give one number for each of {list(sources)}"
                )
            row = [row[name] for name in sources]
        rows[pattern] = _row(row, f"coefficients of {pattern!r}", sources)
    return rows


def _row(value: Any, what: str, sources: Sequence[str]) -> list[Any]:
    if isinstance(value, Real | str | bytes) or not _is_sequence(value):
        raise MergeError(
            f"{what}={_shown(value)}: give a list with one number for each of the sources "
            f"{list(sources)}"
        )
    row = []
    for number in value:
        if _is_gradient(number):
            row.append(number)
            continue
        if not isinstance(number, Real) or isinstance(number, bool):
            raise MergeError(f"{what}: {_shown(number)} is no number")
        row.append(float(number))
        if not math.isfinite(row[-1]):
            raise MergeError(f"{what}: they must be finite, this is {row[-1]}")
    return row


def _is_gradient(value: object) -> bool:
    """A value that changes over depth, which the method's own check looks at."""
    return isinstance(value, list) or (
        isinstance(value, Mapping) and value.keys() == {"from", "to"}
    )


def _is_sequence(value: Any) -> bool:
    """A list, a tuple, an array or a tensor of one dimension."""
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def _statistics(value: object, sources: Sequence[str]) -> Paths | None:
    """One file for each source, by name."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): a_path(path, f"statistics[{name!r}]") for name, path in value.items()}
    if not isinstance(value, list | tuple):
        raise MergeError(f"statistics={_shown(value)}: give one file for each of {list(sources)}")
    return [a_path(path, f"statistics[{i}]") for i, path in enumerate(value)]


def _dtype(value: object) -> str | None:
    """A dtype's name; torch's own dtypes have one too."""
    if value is None:
        return None
    return one_of(str(value).removeprefix("torch."), DTYPE_NAMES, "dtype")


def _text_or_path(value: object, what: str) -> str | None:
    if value is None:
        return None
    return str(a_path(value, what))


def _texts_by_text(value: object, what: str) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) and text for pair in value.items() for text in pair
    ):
        raise MergeError(f"{what}={_shown(value)}: give a mapping, {what}={{'pattern': 'source'}}")
    return dict(value)


def _tokens(value: object, sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By token the source of its row (and its token there), or zeros; `force` for all sources."""
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise MergeError(f"tokens={_shown(value)}: give by token {{'source': NAME}}")
    for token, entry in value.items():
        if unknown := entry.keys() - {"source", "token", "zero", "force"}:
            raise MergeError(
                f"tokens[{token!r}]: {sorted(unknown)}: say source, token, zero, force"
            )
        if bool(entry.get("zero")) == ("source" in entry):
            raise MergeError(f"tokens[{token!r}]={_shown(entry)}: a source, or zero: true")
        if "source" in entry:
            one_of(entry["source"], sources, f"tokens[{token!r}].source")
    return {str(token): dict(entry) for token, entry in value.items()}


def _multiple(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise MergeError(f"pad_vocabulary_to={_shown(value)}: give a whole number from 1 on")
    return int(value)


def _text(value: object, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise MergeError(f"{what}={_shown(value)}: it must be text")
    return value


def _source(value: object, what: str, known: Sequence[str]) -> str | None:
    """The name of a source, the base's included."""
    return None if value is None else one_of(value, known, what)


def _options(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise MergeError(f"options={_shown(value)}: give a mapping from name to value")
    return dict(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
