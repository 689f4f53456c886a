"""Configs and processors compared: a difference that changes the function is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alloy.checkpoint.checks.defaults import default_of
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.config import flatten, text_part
from alloy.checkpoint.reading import read_json, source_file

PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files that say how pictures and sounds become inputs."""
GENERATION = "generation_config.json"

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")

_NO_MATTER = re.compile(
    r"(^|\.)(_?name_or_path|transformers_version|torch_dtype|dtype|use_cache|_commit_hash"
    r"|architectures|vocab_size|return_dict|output_(attentions|hidden_states|past|scores|router_logits)|gradient_checkpointing|problem_type"
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
        ours, theirs = _comparable(first, config)
        if ours is first:
            for key in ("model_type", "architectures"):
                if first.get(key) != config.get(key) and not _allowed(key, allow):
                    findings.problem(
                        f"different architectures: {key} is {first.get(key)!r} in {reference!r} "
                        f"and {config.get(key)!r} in {source!r}; merge models of one architecture, "
                        f"or say allow=[{key!r}]"
                    )
            if first.get("model_type") != config.get("model_type"):
                continue
        _compare(findings, (reference, ours), (source, theirs), allow)


def _compare(
    findings: Findings,
    first: tuple[str, Mapping],
    other: tuple[str, Mapping],
    allow: Sequence[str],
) -> None:
    """Two configs of one architecture, by source, key by key."""
    (reference, config), (source, other_config) = first, other
    ours, theirs = dict(flatten(config)), dict(flatten(other_config))
    differing = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
        and key != "model_type"
        and not _NO_MATTER.search(key)
        and not _allowed(key, allow)
    ]
    one_sided = [key for key in differing if key not in ours or key not in theirs]
    defaults = _equal_by_default(one_sided, config, other_config)
    for key in differing:
        if key in defaults:
            continue
        a, b = ours.get(key, "missing"), theirs.get(key, "missing")
        text = f"config {key} is {a!r} in {reference!r} and {b!r} in {source!r}"
        if _TRAINING_ONLY.search(key):
            findings.note(f"{text}: the result has that of {reference!r}")
        elif "tie_word_embeddings" in key:
            findings.problem(
                f"{text}: weights tied in one and not in the other; save both tied or both untied"
            )
        else:
            findings.problem(
                f"{text}; take models that agree, or say allow=[{key!r}] to take that of "
                f"{reference!r}"
            )


def _comparable(first: Mapping, other: Mapping) -> tuple[Mapping, Mapping]:
    """Two configs, or of one that holds a language model of the other's kind, that part of it."""
    for ours, theirs in ((first, other), (other, first)):
        part = text_part(ours)
        kinds = (
            None if part is None else (str(part.get("model_type")), str(theirs.get("model_type")))
        )
        if part is None or kinds is None or ours.get("model_type") == theirs.get("model_type"):
            continue
        if kinds[0] == kinds[1] or kinds[0].startswith(f"{kinds[1]}_"):
            plain = _of_language(part), _of_language(theirs)
            return plain if ours is first else plain[::-1]
    return first, other


def _of_language(config: Mapping) -> dict[str, Any]:
    """The config of a language model as far as it says how the model's body computes.

    Positions of pictures (mrope) are those of a text where there are none. A window that is
    switched off has no width. Special tokens are the tokenizer's.
    """
    plain = {
        k: v
        for k, v in config.items()
        if k not in (*_ROPE, "tie_word_embeddings") and not k.endswith("_token_id")
    }
    rope = {
        k: v
        for key in ("rope_scaling", "rope_parameters")
        for k, v in (config.get(key) or {}).items()
    }
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope = {k: v for k, v in rope.items() if k != "type" and not k.startswith("mrope")}
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    plain["rope_theta"] = theta
    plain["rope_scaling"] = {"rope_type": "default" if kind == "mrope" else kind, **rope}
    if not config.get("use_sliding_window", True):
        for key in ("sliding_window", "max_window_layers", "layer_types"):
            plain.pop(key, None)
    return plain


def _equal_by_default(keys: Sequence[str], first: Mapping, other: Mapping) -> set[str]:
    """The keys whose value is the architecture's default, which one config leaves out.

    transformers writes what differs from its defaults, and reads old keys as new ones. Where its
    source does not say all of them plainly both configs are completed by it, which costs seconds;
    of an architecture that it lacks no default is known.
    """
    lacking = {k: first if k not in dict(flatten(first)) else other for k in keys}
    holding = {k: other if lacking[k] is first else first for k in keys}
    plain = {k for k in keys if _same(default_of(lacking[k], k), dict(flatten(holding[k])).get(k))}
    if len(plain) == len(keys):
        return plain
    complete = [_completed(config) for config in (first, other)]
    ours, theirs = complete
    if ours is None or theirs is None:
        return set()
    same = {k for k in ours.keys() | theirs.keys() if ours.get(k) == theirs.get(k)}
    differing = [
        k
        for k in (ours.keys() | theirs.keys()) - same
        if not _NO_MATTER.search(k) and not _TRAINING_ONLY.search(k)
    ]
    return {k for k in keys if k in same or (k not in ours and k not in theirs and not differing)}


def _same(a: object, b: object) -> bool:
    """Equal, and both a truth or none: 1 is not True."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _completed(config: Mapping) -> dict[str, Any] | None:
    """A config with the defaults of its architecture, as dotted keys; None where none are known."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    try:
        known = AutoConfig.for_model(**json.loads(json.dumps(config)))
    except Exception:  # a configuration that its own class refuses has no defaults
        return None
    return dict(flatten(known.to_dict()))


def files_of_owners(
    findings: Findings,
    folders: Mapping[str, Path],
    processor: str | None,
    generation_config: str | None,
) -> dict[str, str]:
    """The source of every file that the caller names one for; a problem where it has none."""
    wanted = {
        "processor": (processor, PROCESSOR),
        "generation_config": (generation_config, [GENERATION]),
    }
    owners: dict[str, str] = {}
    for key, (owner, files) in wanted.items():
        if owner is None:
            continue
        place = folders.get(owner)
        if place is None or not any((place / file).is_file() for file in files):
            findings.problem(f"{key}={owner!r}: that source has no {' or '.join(files)}")
        owners |= dict.fromkeys(files, owner)
    return owners


def compare_processors(
    findings: Findings,
    folders: Mapping[str, Path],
    allow: Sequence[str],
    settled: Sequence[str] = (),
) -> dict[str, Path]:
    """Processors see alike, and generation settings are those of the first source.

    Args:
        settled: files whose source the caller named.

    Returns:
        files that the first source lacks and another has: nobody else's can be meant.
    """
    elsewhere: dict[str, Path] = {}
    if not folders:
        return elsewhere
    (reference, first), *others = folders.items()
    for name in (name for name in (*PROCESSOR, GENERATION) if name not in settled):
        for source, folder in others:
            a, b = _read(first, name), _read(folder, name)
            if b is None:
                continue
            if a is None:
                if name in elsewhere and _read(elsewhere[name].parent, name) != b:
                    owner = elsewhere[name].parent
                    findings.problem(
                        f"{name} of {str(owner)!r} and {source!r} differ and {reference!r} has "
                        "none; list the source first whose file the result shall have"
                    )
                elif name not in elsewhere and not _allowed(name, allow):
                    elsewhere[name] = folder / name
                    findings.note(f"{name} is that of {source!r}: {reference!r} has none")
                continue
            keys = sorted(
                k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and not _NO_MATTER.search(k)
            )
            if not keys or _allowed(name, allow):
                continue
            text = f"{name} of {reference!r} and {source!r} differ in {keys}"
            if name in PROCESSOR and not all(_TRAINING_ONLY.search(k) for k in keys):
                findings.problem(f"{text}; take models that see alike, or say allow=[{name!r}]")
            else:
                findings.note(f"{text}: the result has that of {reference!r}")
    return elsewhere


def _allowed(key: str, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in allow)


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = source_file(folder, name)
    return None if path is None else read_json(path)
