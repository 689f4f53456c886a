"""Settings of the sources' tokenizers: chat templates, special tokens, padding, post-processing.

Two tokenizers that cut text alike may still begin and end it with other tokens, pad on other sides
or speak in other turns. The result has one source's files, so a setting that would be lost is
refused, and of several chat templates one is chosen by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.config import files_like
from alloy.checkpoint.reading import few, read_json, read_text, source_file
from alloy.checkpoint.tokenizer import Vocabulary
from alloy.errors import CheckpointError

AUTO = "auto"
"""As a chat template: the one that most sources have."""
_SETTINGS = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_MORE_TEMPLATES = "additional_chat_templates"
_SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip
_USE = (
    *_SPECIAL_TOKENS,
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy",
    "padding_side", "truncation_side", "split_special_tokens", "strip_accents",
    "tokenize_chinese_chars", "clean_up_tokenization_spaces", "use_default_system_prompt",
)  # fmt: skip
"""Settings that change which tokens a text becomes; the others are names, versions and limits."""
_DEFAULTS = {
    "add_eos_token": False,
    "add_prefix_space": False,
    "do_lower_case": False,
    "padding_side": "right",
    "split_special_tokens": False,
    "truncation_side": "right",
}
"""Values of settings that a tokenizer's files leave out."""
_OLD_NAME, _NEW_NAME = "additional_special_tokens", "extra_special_tokens"
"""transformers 5 lists under the new name what 4 lists under the old one."""
_AROUND = ("post_processor", "truncation", "padding", "decoder")
"""Parts of tokenizer.json around the model."""

Template = str | list[Any]


@dataclass(frozen=True)
class TextSettings:
    """Changes to the tokenizer files of the source that the result takes them from."""

    files: Mapping[str, bytes]
    """Files to write instead of that source's."""
    left_out: tuple[str, ...] = ()
    """Files of that source that no longer hold."""


def common_settings(
    findings: Findings,
    folders: Mapping[str, Path],
    speaker: str,
    models: Sequence[str],
    chat_template: str | None,
    allow: Sequence[str],
    *,
    compared: bool = True,
    vocabulary: Vocabulary | None = None,
) -> TextSettings:
    """Compare how the tokenizers are used, and choose the chat template.

    Args:
        speaker: the source whose tokenizer files the result has.
        models: the sources that are merged; the base counts where it speaks.
        chat_template: the source whose template is taken, a file, the template itself, or `AUTO`.
        compared: whether settings that differ are refused. Where the result has one source's
            embeddings, that source's tokenizer alone counts.
        vocabulary: of the result, where the sources' differ. Special tokens that it adds stay
            special; those that it lacks are nobody's loss.
    """
    read = {name: findings.attempt(_read, folder) for name, folder in folders.items()}
    settings = {name: value for name, value in read.items() if value is not None}
    special: dict[str, None] = {}
    for name in models if compared else ():
        if name != speaker and name in settings:
            theirs, added = _of_speaker(settings[name], vocabulary)
            special |= dict.fromkeys(added)
            if speaker in settings:
                _compare(findings, speaker, settings[speaker], name, theirs, allow)
    templates = {name: findings.attempt(_template, folder) for name, folder in folders.items()}
    known = {name: template for name, template in templates.items() if template}
    chosen = _chosen(findings, known, speaker, chat_template, bool(settings))
    if speaker not in folders:
        return TextSettings({})
    is_there = chosen == known.get(speaker) and not _more_templates(folders[speaker])
    if (new := None if is_there else chosen) is None and not special:
        return TextSettings({})
    return _changed(folders[speaker], new, list(special))


def _read(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder's tokenizer by name, or None where there are none."""
    result: dict[str, Any] = {}
    for name in (_SPECIAL, _SETTINGS):
        if (path := source_file(folder, name)) is not None:
            data = read_json(path)
            result |= {key: _plain(data[key]) for key in _USE if data.get(key) is not None}
    if isinstance(result.get(_NEW_NAME), list):
        result[_OLD_NAME] = result.pop(_NEW_NAME)
    if (path := source_file(folder, "tokenizer.json")) is not None:
        data = read_json(path)
        result |= {key: _without_ids(data[key]) for key in _AROUND if data.get(key) is not None}
    return {key: value for key, value in result.items() if value not in ([], {}, "")} or None


def _plain(value: Any) -> Any:
    """A special token's text alone, without its flags."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _without_ids(value: Any) -> Any:
    """A part of a tokenizer without its ids, which differ where vocabularies do."""
    if isinstance(value, dict):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("ids", "pad_id")}
    if isinstance(value, list):
        return [_without_ids(item) for item in value if type(item) is not int]
    return value


def _of_speaker(
    theirs: Mapping[str, Any], vocabulary: Vocabulary | None
) -> tuple[Mapping[str, Any], list[str]]:
    """Another source's settings about tokens that the speaker has too; its special tokens that the
    result's vocabulary adds to these.
    """
    listed = theirs.get(_OLD_NAME)
    if vocabulary is None or not isinstance(listed, list):
        return theirs, []
    shared = [t for t in listed if t in vocabulary.tokens and t not in vocabulary.added]
    others = {key: value for key, value in theirs.items() if key != _OLD_NAME}
    added = [token for token in listed if token in vocabulary.added]
    return (others | {_OLD_NAME: shared} if shared else others), added


def _compare(
    findings: Findings,
    speaker: str,
    ours: Mapping[str, Any],
    name: str,
    theirs: Mapping[str, Any],
    allow: Sequence[str],
) -> None:
    """Refuse settings of another source that the speaker lacks or contradicts, unless allowed."""
    lost = [
        key
        for key, value in theirs.items()
        if ours.get(key, _DEFAULTS.get(key)) != value
        and (key in ours or key in (*_SPECIAL_TOKENS, *_AROUND, *_DEFAULTS))
        and not any(fnmatchcase(f"tokenizer.{key}", pattern) for pattern in allow)
    ]
    if lost:
        differences = ", ".join(
            f"{key} is {_short(ours.get(key))} in {speaker!r} and {_short(theirs[key])} in {name!r}"
            for key in lost[:3]
        )
        more = f", {few(lost[3:])} too" if len(lost) > 3 else ""
        keys = [f"tokenizer.{key}" for key in lost]
        findings.problem(
            f"tokenizers are used differently: {differences}{more}; make them agree, "
            f"or say allow={keys} to take what {speaker!r} says"
        )


def _short(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 50 else text[:47] + "..."


def _template(folder: Path) -> Template | None:
    """The chat template of a folder: a file of its own, or a key of the settings; or several by
    name, one of which may be in a file of its own.
    """
    path = source_file(folder, _TEMPLATE)
    if more := _more_templates(folder):
        named = more if path is None else {"default": read_text(path), **more}
        return [{"name": name, "template": template} for name, template in named.items()]
    if path is not None:
        return read_text(path)
    for name in (_TEMPLATE_JSON, _SETTINGS):
        if (path := source_file(folder, name)) is not None:
            template = read_json(path).get("chat_template")
            if isinstance(template, str | list) and template:
                return template
            if template:
                raise CheckpointError(f"{path}: chat_template is {template!r:.60}; it must be text")
    return None


def _more_templates(folder: Path) -> dict[str, str]:
    """The templates by name that lie in a folder of their own."""
    inner = folder / _MORE_TEMPLATES
    is_own = inner.is_dir() and not inner.is_symlink()
    files = files_like(inner, ("*.jinja",)) if is_own else []
    return {file.stem: read_text(file) for file in files}


def _chosen(
    findings: Findings,
    templates: Mapping[str, Template],
    speaker: str,
    wanted: str | None,
    tokenizers: bool,
) -> Template | None:
    """The template of the result, or None where no source has one."""
    if wanted is not None:
        if wanted in templates:
            return templates[wanted]
        if wanted == AUTO and templates:
            return _commonest(findings, templates)
        if "{{" in wanted or "{%" in wanted:
            if not tokenizers and not templates:
                findings.problem("chat_template: no source has a tokenizer to use it")
            return wanted
        path = Path(wanted)
        if path.is_file():
            if not tokenizers:
                findings.problem(f"chat_template={wanted!r}: no source has a tokenizer to use it")
            return findings.attempt(read_text, path)
        findings.problem(
            f"chat_template={wanted!r}: no file, and no source with a chat template; "
            f"{few(list(templates)) or 'none'} has one"
        )
        return None
    different: list[Template] = []
    for template in templates.values():
        if template not in different:
            different.append(template)
    if len(different) > 1:
        findings.problem(
            f"the chat templates of {few(list(templates))} differ; "
            f"say which the result should have: chat_template={next(iter(templates))!r}, or a file"
        )
        return None
    if different and speaker not in templates:
        findings.note(f"the chat template is that of {few(list(templates))}: {speaker!r} has none")
    return different[0] if different else None


def _commonest(findings: Findings, templates: Mapping[str, Template]) -> Template:
    """The template that most sources have; the first of those that equally many have."""
    counts = Counter(json.dumps(template) for template in templates.values())
    most = max(counts.values())
    source, chosen = next((n, t) for n, t in templates.items() if counts[json.dumps(t)] == most)
    findings.note(f"the chat template is that of {source!r} and {most} of {len(templates)} sources")
    return chosen


def _changed(folder: Path, template: Template | None, special: Sequence[str]) -> TextSettings:
    """The files that give a folder's tokenizer this template and no other, and special tokens."""
    files: dict[str, bytes] = {}
    path = source_file(folder, _SETTINGS)
    settings = {} if path is None else read_json(path)
    if special:
        key = _NEW_NAME if isinstance(settings.get(_NEW_NAME), list) else _OLD_NAME
        settings[key] = [*(settings.get(key) or []), *special]
    if isinstance(template, str):
        settings.pop("chat_template", None)
        files[_TEMPLATE] = template.encode()
    elif template is not None:
        settings["chat_template"] = template
    if path is not None or special or isinstance(template, list):
        files[_SETTINGS] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    left_out = () if template is None else (_TEMPLATE, _TEMPLATE_JSON)
    return TextSettings(files, left_out)
