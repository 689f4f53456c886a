"""The form of a configuration: which of its values are mappings, lists, texts and numbers.

It is checked once, before anything reads it, so that a slip in the YAML is named by its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alloy.errors import MergeError

_NAMES: Mapping[type, str] = {
    Mapping: "a mapping",
    list: "a list",
    str: "a text",
    int: "a whole number",
    bool: "true or false",
}
_FORMS: Mapping[str, tuple[type, ...]] = {
    "models": (list,),
    "slices": (list,),
    "base_model": (str, Mapping),
    "parameters": (Mapping,),
    "dtype": (str,),
    "out_dtype": (str,),
    "tokenizer_source": (str, Mapping),
    "tokenizer": (Mapping,),
    "chat_template": (str,),
}
_TOKENIZER: Mapping[str, tuple[type, ...]] = {
    "source": (str, Mapping),
    "tokens": (Mapping,),
    "pad_to_multiple_of": (int,),
}
_TOKEN: Mapping[str, tuple[type, ...]] = {"source": (str, Mapping), "force": (bool,)}


def refuse_other_forms(config: Mapping[str, Any], notes: list[str]) -> None:
    """Refuse values of another kind than their key's; note keys of sections that nothing reads.

    Raises:
        MergeError: the first such value, with its place.
    """
    _check(config, _FORMS, "")
    section = config.get("tokenizer") or {}
    _check(section, _TOKENIZER, "tokenizer.", notes)
    for token, entry in (section.get("tokens") or {}).items():
        _expect(entry, (Mapping,), f"tokenizer.tokens.{token}")
        _check(entry, _TOKEN, f"tokenizer.tokens.{token}.", notes)
    _refuse_other_filters(config, "")


def _check(
    section: Mapping[str, Any],
    forms: Mapping[str, tuple[type, ...]],
    where: str,
    notes: list[str] | None = None,
) -> None:
    for key, value in section.items():
        if key in forms and value is not None:
            _expect(value, forms[key], f"{where}{key}")
        elif key not in forms and notes is not None:
            notes.append(f"ignored: {where}{key}, which mergekit does not know either")


def _expect(value: Any, kinds: Sequence[type], where: str) -> None:
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        raise MergeError(
            f"{where}: {value!r:.80}: it must be {' or '.join(_NAMES[kind] for kind in kinds)}"
        )


def _refuse_other_filters(value: Any, where: str) -> None:
    """Filters are parts of names, wherever conditions stand."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else pairs:
        if key in ("filter", "pattern") and inner is not None:
            _expect(inner, (str,), f"{where}{key}")
        _refuse_other_filters(inner, f"{where}{key}.")


ENTRY = ("model", "parameters", "layer_range")


def plain(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The models and slices with every model as text."""

    def entry(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if unknown := [key for key in given if key not in ENTRY]:
            raise MergeError(
                f"{unknown[0]!r} of model {given.get('model')!r}: a model has {', '.join(ENTRY)}; "
                "an adapter is written MODEL+ADAPTER"
            )
        return {**given, "model": reference_of(given.get("model"), notes)}

    if isinstance(config.get("models"), list):
        return {"models": [entry(one) for one in config["models"]]}
    if isinstance(config.get("slices"), list):
        return {
            "slices": [
                {**one, "sources": [entry(source) for source in one["sources"]]}
                if isinstance(one, Mapping) and isinstance(one.get("sources"), list)
                else one
                for one in config["slices"]
            ]
        }
    return {}


def reference_of(value: Any, notes: list[str]) -> Any:
    """A model as text: a path, or a mapping with model (path and revision) and lora."""
    if not isinstance(value, Mapping):
        return value
    if "override_architecture" in value:
        notes.append("override_architecture is ignored: tensors are merged by their names")
    parts = []
    for part in (value.get("model"), value.get("lora")):
        if isinstance(part, Mapping):
            revision = part.get("revision")
            part = f"{part.get('path')}@{revision}" if revision else part.get("path")
        if part is not None:
            parts.append(str(part))
    return "+".join(parts)
