"""The surroundings of the weights: the config, and the files that a model needs to be loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alloy.checkpoint.reading import source_file

# Files of the reference that the result needs too; no weights, optimizers, logs or cards.
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
    for part in (config, text_part(config) or {}):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def text_key(config: Mapping) -> str | None:
    """The key under which a config holds that of its language model."""
    keys = ("text_config", "llm_config", "language_config")
    return next((key for key in keys if isinstance(config.get(key), Mapping)), None)


def text_part(config: Mapping) -> Mapping | None:
    """The config of the language model within a model of several modalities, or None.

    Old configs hold it at the top, beside those of the encoders.
    """
    if (key := text_key(config)) is not None:
        return config[key]
    encoders = [key for key in ("vision_config", "audio_config") if key in config]
    if not encoders:
        return None
    return {key: value for key, value in config.items() if key not in encoders}


def stored_transposed(config: Mapping | None, names: Iterable[str]) -> set[str]:
    """The names whose matrices the architecture of a config stores [in, out].

    It is built on the meta device, without memory for its weights. A file may hold a model with a
    head or without, so names are compared without the prefixes that one of both lacks. None are
    known of an architecture that transformers lacks.
    """
    model = skeleton(config)
    if model is None:
        return set()
    from alloy.statistics.points import transposed_weights  # here: it imports torch

    experts = {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if getattr(module, "is_transposed", False)
        for weight, value in module.named_parameters(recurse=False)
        if value.ndim == 3
    }
    transposed = transposed_weights(model) | experts
    plain = {_tail(name) for name in model.state_dict() if name not in transposed}
    tails = {_tail(name) for name in transposed} - plain
    return {name for name in names if name in transposed or _tail(name) in tails}


def stored_names(config: Mapping | None) -> dict[str, str]:
    """The name in the file of every tensor that the model has under a name of its own.

    transformers renames tensors as it loads and saves (`vit.layers.0.attention.q_proj` is stored as
    `vit.encoder.layer.0.attention.attention.query`); those that it splits or joins have none. Empty
    for an architecture that transformers lacks.
    """
    model = skeleton(config)
    if model is None:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    tensors = model.state_dict()
    names = {id(tensor): name for name, tensor in tensors.items()}
    saved = revert_weight_conversion(model, dict(tensors))
    return {names[id(t)]: name for name, t in saved.items() if id(t) in names}


def model_names(config: Mapping | None, names: Iterable[str]) -> dict[str, str]:
    """The model's own name of every stored tensor, as transformers renames it while it loads.

    Empty for an architecture that transformers lacks.
    """
    model = skeleton(config)
    if model is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    own = model.state_dict()
    return {
        name: rename_source_key(name, renamings, [], model.base_model_prefix, own)[0]
        for name in names
    }


def parts_of_model(config: Mapping | None, names: Iterable[str]) -> dict[str, set[str]]:
    """The stored tensors of each part of a model, as its architecture has them.

    Parts are towers (by the kind of their configs), embeddings, head, norms of the language model,
    and projector, the rest of a model of several modalities. The head of a model that says no words
    is what stands beside its base model. Empty for an architecture that transformers lacks.
    """
    model = skeleton(config)
    if model is None:
        return {}
    from transformers import PreTrainedModel

    from alloy.symmetry.names import end_of, head_names  # with torch, which a merge may not need

    towers = {
        group: [
            f"{path}."
            for path, module in model.named_modules()
            if path
            and isinstance(module, PreTrainedModel)
            and type(module.config) is type(getattr(model.config, key, None))
        ]
        for group, key in (("vision_tower", "vision_config"), ("audio_tower", "audio_config"))
    }
    text = type(model.config.get_text_config())
    body = [
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and path and type(module.config) is text
    ]
    norms = {p for p, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    groups: dict[str, set[str]] = {}
    known = model_names(config, names)
    first, head = end_of(model.get_input_embeddings), head_names(model, known.values())
    for name, own in known.items():
        module = own.rpartition(".")[0]
        tower = next((g for g, paths in towers.items() if own.startswith(tuple(paths))), None)
        end = "head" if own in head else None
        if first is not None and first is model.get_submodule(module):
            end = "embeddings"
        if tower or end:
            groups.setdefault(str(tower or end), set()).add(name)
        elif not own.startswith(tuple(body)) and any(towers.values()):
            groups.setdefault("projector", set()).add(name)
        elif module in norms:
            groups.setdefault("norms", set()).add(name)
    return groups


def skeleton(config: Mapping | None) -> Any:
    """The model of a config on the meta device, without memory; None where it cannot be built."""
    kind = class_of(config)
    if config is None or kind is None:
        return None
    import torch

    try:
        with torch.device("meta"):
            return kind(kind.config_class.from_dict(dict(config)))
    except Exception:  # a configuration that its own class refuses says nothing
        return None


def is_tied(config: Mapping | None) -> bool:
    """True if the model has a head that its config ties to the embeddings."""
    kind = class_of(config) if config else None
    if config is None or kind is None:
        return bool(config and config.get("tie_word_embeddings"))
    if not getattr(kind, "_tied_weights_keys", None):
        return False
    try:
        complete = kind.config_class.from_dict(dict(config))
    except Exception:  # a configuration that its own class refuses says nothing
        return bool(config.get("tie_word_embeddings"))
    parts = (complete, complete.get_text_config())
    return any(getattr(part, "tie_word_embeddings", False) for part in parts)


def _tail(name: str) -> str:
    """Cut a name before its first number, as no prefix changes the rest: `0.attn.c_attn.weight`."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[start:])


def class_of(config: Mapping | None) -> Any:
    """The class that a config names, or the plain model of its type."""
    import transformers

    for name in (config or {}).get("architectures") or ():
        if (kind := getattr(transformers, name, None)) is not None:
            return kind
    try:
        return transformers.MODEL_MAPPING[
            transformers.CONFIG_MAPPING[str((config or {}).get("model_type"))]
        ]
    except KeyError:
        return None


def result_config(config: Mapping, *, dtype: str | None, vocab_size: int | None) -> dict[str, Any]:
    """The config of the result: the reference's, with the dtype and vocabulary it really has."""
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
    names = sorted(
        p.name for p in folder.iterdir() if any(fnmatchcase(p.name, q) for q in patterns)
    )
    return [file for name in names if (file := source_file(folder, name)) is not None]
