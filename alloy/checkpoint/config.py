"""What surrounds the weights: configs that must agree, and the files a model needs to be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# Files of the reference that the result needs too. Weights, optimizers, logs and cards are not among them.
COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jin*",
    "chat_template.json",
)
_MUST_AGREE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)

_NO_MATTER = re.compile(
    r"(^|\.)(_?name_or_path|transformers_version|torch_dtype|dtype|use_cache|_commit_hash|architectures"
    r"|vocab_size|return_dict|output_\w+|gradient_checkpointing|problem_type|finetuning_task"
    r"|task_specific_params|_attn_implementation\w*)$"
)
"""Keys that do not change what the model computes, or that have a check of their own."""
_TRAINING_ONLY = re.compile(
    r"(drop|initializer|mask_(time|feature)_|(bos|eos|pad|sep|cls|decoder_start)_token_id$|_loss|loss_"
    r"|router_aux|label_smoothing|apply_spec_augment)"
)
"""Keys that matter to training or generation only: a difference is told, not refused."""


def compare_configs(
    configs: Mapping[str, Mapping | None], allow: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Problems and notes about configs that differ, against the first that there is.

    Args:
        allow: glob patterns of keys that may differ.
    """
    problems, notes = [], []
    known = {source: config for source, config in configs.items() if config is not None}
    if not known:
        return [], []
    for source in configs.keys() - known.keys():
        notes.append(f"{source!r} has no config.json: its architecture was not compared")
    (reference, first), *others = known.items()
    for source, config in others:
        for key in ("model_type", "architectures"):
            if first.get(key) != config.get(key) and not _allowed(key, allow):
                problems.append(
                    f"different architectures: {key} is {first.get(key)!r} in {reference!r} and {config.get(key)!r} "
                    f"in {source!r}; merge models of one architecture, or say allow=[{key!r}]"
                )
        if first.get("model_type") != config.get("model_type"):
            continue
        ours, theirs = dict(flatten(first)), dict(flatten(config))
        for key in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(key), theirs.get(key)
            if a == b or _NO_MATTER.search(key) or key in ("model_type",) or _allowed(key, allow):
                continue
            text = f"config {key} is {a!r} in {reference!r} and {b!r} in {source!r}"
            if _TRAINING_ONLY.search(key) or key not in ours or key not in theirs:
                notes.append(f"{text}: the result has that of {reference!r}")
            elif "tie_word_embeddings" in key:
                problems.append(
                    f"{text}: weights tied in one and not in the other; save both tied or both untied"
                )
            else:
                problems.append(
                    f"{text}; take models that agree, or say allow=[{key!r}] to take that of {reference!r}"
                )
    return problems, notes


def compare_processors(
    folders: Mapping[str, Path], allow: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Problems and notes about processors and generation settings that differ from the first source's."""
    problems, notes = [], []
    if not folders:
        return problems, notes
    (reference, first), *others = folders.items()
    for source, folder in others:
        for name in (*_MUST_AGREE, "generation_config.json"):
            a, b = _read(first / name), _read(folder / name)
            if a is None or b is None:
                continue
            keys = sorted(
                k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and not _NO_MATTER.search(k)
            )
            if not keys or _allowed(name, allow):
                continue
            text = f"{name} of {reference!r} and {source!r} differ in {keys}"
            if name in _MUST_AGREE and not all(_TRAINING_ONLY.search(k) for k in keys):
                problems.append(f"{text}; take models that see alike, or say allow=[{name!r}]")
            else:
                notes.append(f"{text}: the result has that of {reference!r}")
    return problems, notes


def flatten(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested config as dotted keys; `None` counts as absent."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value and not key.endswith(("2id", "2label")):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def vocabulary_size(config: Mapping | None) -> int | None:
    """The number of rows of the embeddings, at the top of the config or in its text part."""
    if config is None:
        return None
    for part in (config, config.get("text_config") or {}):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def stored_transposed(config: Mapping | None) -> set[str]:
    """Names of the matrices that the architecture of a config stores [in, out].

    It is built on the meta device, without memory for its weights. None are known of an architecture
    that transformers lacks.
    """
    import torch  # here: merges that need no torch do not wait for it
    import transformers

    from alloy.statistics.points import transposed_weights

    kind = getattr(transformers, ((config or {}).get("architectures") or [""])[0], None)
    if config is None or kind is None:
        return set()
    with torch.device("meta"):
        return transposed_weights(kind(kind.config_class.from_dict(dict(config))))


def result_config(config: Mapping, *, dtype: str | None, vocab_size: int | None) -> dict[str, Any]:
    """The config of the result: the reference's, with the dtype and the vocabulary it really has."""
    result = json.loads(json.dumps(config))
    result.pop("_name_or_path", None)
    parts = [result] + [v for v in result.values() if isinstance(v, dict)]
    for part in parts:
        for key in ("torch_dtype", "dtype"):
            if dtype is not None and key in part:
                part[key] = dtype
    if dtype is not None and not {"dtype", "torch_dtype"} & result.keys():
        result["dtype"] = dtype
    if vocab_size is not None:
        for part in (result, result.get("text_config") or {}):
            if "vocab_size" in part:
                part["vocab_size"] = vocab_size
    return result


def files_like(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files of a folder whose names match one of the patterns."""
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.iterdir() if p.is_file() and any(fnmatchcase(p.name, q) for q in patterns)
    )


def _allowed(key: str, allow: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in allow)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None
