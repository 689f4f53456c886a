"""Configs and processors compared: a difference that changes the function is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.config import flatten

_MUST_AGREE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)

_NO_MATTER = re.compile(
    r"(^|\.)(_?name_or_path|transformers_version|torch_dtype|dtype|use_cache|_commit_hash"
    r"|architectures|vocab_size|return_dict|output_\w+|gradient_checkpointing|problem_type"
    r"|finetuning_task|task_specific_params|_attn_implementation\w*)$"
)
"""Keys that do not change what the model computes, or that have a check of their own."""
_TRAINING_ONLY = re.compile(
    r"(drop|initializer|mask_(time|feature)_|(bos|eos|pad|sep|cls|decoder_start)_token_id$"
    r"|_loss|loss_|router_aux|label_smoothing|apply_spec_augment)"
)
"""Keys that matter to training or generation only: a difference is a note, not refused."""


def compare_configs(
    findings: Findings, configs: Mapping[str, Mapping | None], allow: Sequence[str]
) -> None:
    """Every config says what the first one does, as far as it changes what a model computes.

    Args:
        allow: glob patterns of keys that may differ.
    """
    known = {source: config for source, config in configs.items() if config is not None}
    if not known:
        return
    for source in configs.keys() - known.keys():
        findings.note(f"{source!r} has no config.json: its architecture was not compared")
    (reference, first), *others = known.items()
    for source, config in others:
        for key in ("model_type", "architectures"):
            if first.get(key) != config.get(key) and not _allowed(key, allow):
                findings.problem(
                    f"different architectures: {key} is {first.get(key)!r} in {reference!r} and "
                    f"{config.get(key)!r} in {source!r}; merge models of one architecture, or say "
                    f"allow=[{key!r}]"
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
                findings.note(f"{text}: the result has that of {reference!r}")
            elif "tie_word_embeddings" in key:
                findings.problem(
                    f"{text}: weights tied in one and not in the other; save both tied or both "
                    "untied"
                )
            else:
                findings.problem(
                    f"{text}; take models that agree, or say allow=[{key!r}] to take that of "
                    f"{reference!r}"
                )


def compare_processors(
    findings: Findings, folders: Mapping[str, Path], allow: Sequence[str]
) -> None:
    """Processors see alike, and generation settings are those of the first source."""
    if not folders:
        return
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
                findings.problem(f"{text}; take models that see alike, or say allow=[{name!r}]")
            else:
                findings.note(f"{text}: the result has that of {reference!r}")


def _allowed(key: str, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in allow)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None
