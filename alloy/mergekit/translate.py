"""A configuration of mergekit as the request of a merge."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from alloy.checkpoint import MergeRequest, open_source
from alloy.checkpoint.checks.slices import is_before, layer_of, stack_of
from alloy.checkpoint.format import Checkpoint
from alloy.errors import MergeError, nearest
from alloy.mergekit.forms import plain, reference_of, refuse_other_forms
from alloy.mergekit.methods import ELSEWHERE, NEAREST, PEERS, Peer, finished
from alloy.mergekit.settings import number, setting_of
from alloy.merging.values import depths

_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype",
    "out_dtype", "tokenizer_source", "tokenizer", "chat_template",
)  # fmt: skip
_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
Scope = Mapping[str, Any] | None


@dataclass(frozen=True)
class Translation:
    """A merge request, and what to know about it."""

    request: MergeRequest
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Input:
    """A model within an output slice."""

    model: str
    start: int
    stop: int
    parameters: Scope


@dataclass(frozen=True)
class _Slice:
    inputs: tuple[_Input, ...]
    parameters: Scope

    @property
    def length(self) -> int:
        return self.inputs[0].stop - self.inputs[0].start


@dataclass
class _Config:
    """A configuration, with its models opened."""

    data: Mapping[str, Any]
    peer: Peer
    base: str | None
    slices: tuple[_Slice, ...]
    checkpoints: dict[str, Checkpoint]
    stack: str
    notes: list[str] = field(default_factory=list)


def merge_request(
    config: Mapping[str, Any],
    output: str | Path,
    *,
    locate: Callable[[str], Path] = Path,
) -> Translation:
    """The merge that a configuration of mergekit describes.

    Args:
        config: the parsed YAML.
        output: where the result goes.
        locate: where a model lies that the configuration names, `base+adapter` apart.

    Raises:
        MergeError: what mergekit refuses, or what has no counterpart here, with the nearest.
        CheckpointError: a model that cannot be opened.
    """
    notes: list[str] = []
    peer = _peer(config, notes)
    refuse_other_forms(config, notes)
    base = None if config.get("base_model") is None else reference_of(config["base_model"], notes)
    config = {**config, **plain(config, notes)}
    names, slices = _models(config), _slices(config)
    located = {name: _located(name, locate) for name in dict.fromkeys([*names, *_some(base)])}
    checkpoints = {name: open_source(path) for name, path in located.items()}
    first = checkpoints[names[0]]
    is_sliced = "slices" in config
    stack = stack_of(first, None) if is_sliced else ""
    parsed = _Config(config, peer, base, slices, checkpoints, stack, notes)
    sources = _sources(parsed)
    coefficients, options = _settings(parsed, sources)
    if peer.differs:
        notes.append(f"{config['merge_method']}: not mergekit's numbers: {peer.differs}")
    labels = _labels(sources)
    uses_base = base is not None and peer.base == "base"
    request = MergeRequest(
        peer.ours,
        {labels[name]: located[name] for name in sources},
        output,
        base=located[str(base)] if uses_base else None,
        coefficients=coefficients,
        options=options,
        dtype=_dtype(config),
        slices=[_our_slice(one, labels, base if uses_base else None) for one in slices]
        if is_sliced
        else (),
        stack=stack if is_sliced else None,
        **_tokenizer(config, parsed, labels, uses_base),
        chat_template=_chat_template(config),
        allow=("torch_dtype",),
    )
    return Translation(request, tuple(dict.fromkeys(notes)))


def _peer(config: Mapping[str, Any], notes: list[str]) -> Peer:
    """Our method, once the keys of the configuration are known."""
    if not isinstance(config, Mapping):
        raise MergeError(f"{config!r:.80}: a configuration is a mapping with merge_method")
    for key, nearest_thing in ELSEWHERE.items():
        if config.get(key):
            raise MergeError(f"{key}: {nearest_thing}")
    _refuse_misspelt(config)
    method = config.get("merge_method")
    if not isinstance(method, str):
        raise MergeError("merge_method is missing: what kind of merge is it?")
    if method not in PEERS:
        near = NEAREST.get(method)
        hint = f"the nearest is {near}" if near else nearest(method, PEERS)
        raise MergeError(f"merge_method {method!r} is none of mergekit 0.1.5's and ours: {hint}")
    ways = [key for key in ("models", "slices", "modules") if config.get(key)]
    if len(ways) != 1:
        raise MergeError(f"give exactly one of models, slices, modules; found {ways or 'none'}")
    if ways == ["modules"]:
        raise MergeError(
            "modules: parts of one model are merged apart; here one command merges one part and "
            "keeps the rest: --kept vision_tower --kept projector, or --stack for slices"
        )
    unknown = [key for key in config if key not in _TOP]
    if unknown:
        notes.append(
            f"ignored: {', '.join(map(str, unknown))}, which mergekit does not know either"
        )
    return PEERS[method]


def _refuse_misspelt(config: Mapping[str, Any]) -> None:
    """mergekit skips a key that it does not know, and with it what a misspelt one asks for."""
    absent = [key for key in _TOP if key not in config]
    for key in config:
        close = get_close_matches(str(key), absent, n=1, cutoff=0.8)
        if key not in _TOP and close:
            raise MergeError(f"{key!r} is no key of a configuration: did you mean {close[0]!r}?")


def _some(value: Any) -> list[str]:
    return [] if value is None else [str(value)]


def _models(config: Mapping[str, Any]) -> list[str]:
    """The models that are named, in order."""
    entries = config.get("models") or [
        source for one in config["slices"] for source in _list(one, "sources", "slices")
    ]
    if not isinstance(entries, list):
        raise MergeError(f"models: {entries!r:.80}: give a list, each with `model`")
    return list(dict.fromkeys(_name(entry) for entry in entries))


def _name(entry: Any) -> str:
    name = entry.get("model") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or not name:
        raise MergeError(f"{entry!r:.80}: each model is {{model: PATH, parameters: ...}}")
    return name


def _list(entry: Any, key: str, where: str) -> list[Any]:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, list) or not value:
        raise MergeError(f"{where}: {entry!r:.80}: it has a list of {key}")
    return value


def _located(name: str, locate: Callable[[str], Path]) -> str | Path:
    """The place of a model, `base+adapter` in its parts."""
    if "+" not in name or Path(name).exists():
        return locate(name)
    parts = name.split("+")
    if len(parts) != 2:
        raise MergeError(f"model {name!r}: one adapter on one model, MODEL+ADAPTER")
    return "+".join(str(locate(part)) for part in parts)


def _slices(config: Mapping[str, Any]) -> tuple[_Slice, ...]:
    """The output slices; whole models are one."""
    if config.get("models"):
        inputs = tuple(_Input(_name(e), 0, 0, _scope(e)) for e in config["models"])
        _refuse_twice("models", inputs)
        return (_Slice(inputs, None),)
    result = []
    for i, one in enumerate(config["slices"]):
        if one.get("base_model") is not None or one.get("residual_weight") is not None:
            raise MergeError(f"slices[{i}]: a base_model or residual_weight of a slice alone")
        inputs = []
        for source in _list(one, "sources", f"slices[{i}]"):
            layers = source.get("layer_range")
            if not isinstance(layers, list) or [type(n) for n in layers] != [int, int]:
                raise MergeError(
                    f"slices[{i}]: layer_range of {_name(source)!r} is [first, end], two whole "
                    f"numbers, not {layers!r:.40}"
                )
            inputs.append(_Input(_name(source), *layers, _scope(source)))
        if len({one.stop - one.start for one in inputs}) > 1:
            raise MergeError(f"slices[{i}]: all sources have the same number of layers")
        _refuse_twice(f"slices[{i}]", inputs)
        result.append(_Slice(tuple(inputs), _scope(one)))
    return tuple(result)


def _refuse_twice(where: str, inputs: Sequence[_Input]) -> None:
    """Sources are told apart by their names, so a model has one weight."""
    if len({one.model for one in inputs}) < len(inputs):
        raise MergeError(f"{where} has one model twice: give it under two paths (a link is one)")


def _scope(entry: Any) -> Scope:
    parameters = entry.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise MergeError(f"parameters: {parameters!r:.80}: give a mapping")
    return parameters


def _sources(config: _Config) -> list[str]:
    """Our models: all that are named, without what is our base; a base among them comes first, as
    the result has its form and its tokenizer.
    """
    names = list(dict.fromkeys(i.model for one in config.slices for i in one.inputs))
    if config.peer.base == "base":
        return [name for name in names if name != config.base]
    if config.peer.ours == "slerp" and config.base is None:
        raise MergeError("slerp needs base_model, which is the result at t=0")
    if config.base is not None and config.peer.base == "model":
        return [config.base, *(name for name in names if name != config.base)]
    return names


def _settings(config: _Config, sources: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Coefficients and options, resolved for every tensor of the result."""
    peer, data = config.peer, config.data
    _refuse_unknown(config)
    rows: dict[str, list[float]] = {}
    options: dict[str, dict[str, Any]] = {}
    for name, one, offset, depth in _tensors(config):
        if "slices" in data and _is_copied(config, one):
            continue
        shared: list[Scope] = [one.parameters, data.get("parameters")]
        values = {
            ours: setting_of(key, shared, name, depth, default)
            for key, (ours, default) in peer.shared.items()
        }
        of_models: dict[str, list[float]] = {ours: [] for ours, _ in peer.of_models.values()}
        row = []
        for source in sources:
            given = next((i for i in one.inputs if i.model == source), None)
            scopes = [None if given is None else given.parameters, *shared]
            tensor = (
                name
                if given is None or offset is None
                else _input_name(config, name, given.start + offset)
            )
            required = given is not None
            for key, (ours, default) in peer.of_models.items():
                value = setting_of(key, scopes, tensor, depth, default)
                of_models[ours].append(number(value, key))
            if peer.weights:
                value = setting_of("weight", scopes, tensor, depth, ... if required else 0.0)
                row.append(number(value, "weight"))
        if peer.ours == "slerp":
            t = number(values.pop("t"), "t")
            row = [1 - t, t]
        elif "t" in values:
            values["t"] = number(values["t"], "t")
        if peer.adds:
            row = _scales(row, shared, name, depth)
        if row:
            rows[name] = row
        for key, value in finished(peer, values).items():
            options.setdefault(key, {})[name] = value
        for key, of_model in of_models.items():
            options.setdefault(key, {})[name] = tuple(of_model)
    labels = list(_labels(sources).values())
    compact = {k: _by_model(_compact(v), labels, k) for k, v in options.items()}
    return (_compact(rows) if rows else None), {**peer.fixed, **compact}


def _is_copied(config: _Config, one: _Slice) -> bool:
    """True for a slice of one model, which is as it is unless it is scaled."""
    models = [i.model for i in one.inputs if i.model != config.base or config.peer.base != "base"]
    if len(models) > 1 or config.peer.ours == "passthrough":
        return False
    if len(one.inputs) > 1:
        raise MergeError(
            f"a slice of {models} and the base: slices of one model are copied here; give the "
            "scaled model a merge of its own first"
        )
    return True


def _by_model(value: Any, labels: Sequence[str], key: str) -> Any:
    """Values by model in our form; one value where all models have it."""
    if isinstance(value, dict):
        return {pattern: _by_model(v, labels, key) for pattern, v in value.items()}
    if not isinstance(value, tuple):
        return value
    if len({*value}) == 1 or key == "scale":
        return value[0]
    return dict(zip(labels, value, strict=True))


def _compact(values: Mapping[str, Any]) -> Any:
    """One value where all tensors have it, else the values by name."""
    distinct = {repr(value) for value in values.values()}
    if len(distinct) == 1:
        return next(iter(values.values()))
    return {glob.escape(name): value for name, value in values.items()}


def _tensors(config: _Config) -> Iterable[tuple[str, _Slice, int | None, float]]:
    """Every tensor of the result, its slice, its layer's place in it, and its depth there.

    What is outside of the layers belongs to the first or the last slice, and has depth 0.
    """
    first, last = config.slices[0], config.slices[-1]
    reference = config.checkpoints[first.inputs[0].model]
    if "slices" not in config.data:  # each stack of layers, an encoder's and a decoder's, has depth
        for name, depth in depths(reference.entries).items():
            yield name, first, None, depth if any(map(str.isdigit, name.split("."))) else 0.0
        return
    for name in reference.entries:
        if layer_of(name, config.stack) is None:
            yield name, (first if is_before(name) else last), None, 0.0
    number_ = 0
    for one in config.slices:
        model = config.checkpoints[one.inputs[0].model]
        for offset in range(one.length):
            depth = offset / (one.length - 1) if one.length > 1 else 1.0
            prefix = f"{config.stack}{one.inputs[0].start + offset}."
            for name in model.entries:
                if name.startswith(prefix):
                    new = f"{config.stack}{number_}.{name.removeprefix(prefix)}"
                    yield new, one, offset, depth
            number_ += 1


def _input_name(config: _Config, name: str, layer: int) -> str:
    return re.sub(rf"^{re.escape(config.stack)}\d+\.", f"{config.stack}{layer}.", name)


def _scales(row: list[float], scopes: Sequence[Scope], name: str, depth: float) -> list[float]:
    """Scales of task vectors: weights times lambda, over their sum where that is asked."""
    factor = number(setting_of("lambda", scopes, name, depth, 1.0), "lambda")
    if setting_of("normalize", scopes, name, depth, False):
        total = sum(row)
        factor /= total if abs(total) >= 1e-8 else 1.0
    return [weight * factor for weight in row]


def _refuse_unknown(config: _Config) -> None:
    """Settings that the method has not; a rescaling that ours lacks."""
    peer, method = config.peer, config.data["merge_method"]
    known = {*peer.shared, *peer.of_models, *peer.ignored}
    known |= {"weight"} if peer.weights else set()
    known |= {"normalize", "lambda", "rescale"} if peer.adds else set()
    known |= {"rescale"} if peer.ours in ("ties", "breadcrumbs_ties") else set()
    scopes = [config.data.get("parameters")]
    scopes += [one.parameters for one in config.slices]
    scopes += [i.parameters for one in config.slices for i in one.inputs]
    for scope in scopes:
        for key, value in (scope or {}).items():
            if key not in known:
                raise MergeError(f"parameters.{key}: {method} has none: {nearest(str(key), known)}")
            if key in ("int8_mask", "eps"):
                config.notes.append(f"{key} is ignored: it saves memory there, and none here")
            if key == "rescale" and value and "rescale" not in peer.shared:
                raise MergeError(
                    f"parameters.rescale: true: {method} scales what it keeps to the old sum of "
                    "magnitudes; there is none here, dare_ties comes nearest"
                )


def _our_slice(
    one: _Slice, labels: Mapping[str, str], base: str | None
) -> dict[str, tuple[int, int]]:
    return {"base" if i.model == base else labels[i.model]: (i.start, i.stop) for i in one.inputs}


def _labels(sources: Sequence[str]) -> dict[str, str]:
    """Names of the models: the last word of each, unless two share it."""
    words = {name: re.split(r"[/+]", name.rstrip("/"))[-1] for name in sources}
    twice = {w for w in words.values() if list(words.values()).count(w) > 1 or w == "base"}
    return {name: name if word in twice else word for name, word in words.items()}


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The result's dtype: out_dtype, else dtype; merges compute in float32 at least."""
    value = config.get("out_dtype") or config.get("dtype")
    return None if value is None else str(value)


def _tokenizer(
    config: Mapping[str, Any], parsed: _Config, labels: Mapping[str, str], uses_base: bool
) -> dict[str, Any]:
    """Our policy for vocabularies, and the sources of single tokens."""
    section = config.get("tokenizer")
    if section is not None and config.get("tokenizer_source"):
        raise MergeError("give tokenizer or tokenizer_source, not both")
    section = section or {}
    source = section.get("source", "union") if section else config.get("tokenizer_source")
    if source is None:
        return {}
    source = reference_of(source, parsed.notes)
    source = source.removeprefix("model:") if isinstance(source, str) else source
    owner = parsed.base if uses_base else next(iter(labels))
    known = {"union": "union", "base": "base", owner: "base"}
    if source not in known:
        raise MergeError(
            f"tokenizer of {source!r}: the result has that of the base ({owner!r}) or the union; "
            "list the model first, without a base, to take its own"
        )
    settings: dict[str, Any] = {"tokenizer": known[source]}
    if tokens := section.get("tokens"):
        settings["tokens"] = _tokens(tokens, parsed, labels, uses_base)
    if section.get("pad_to_multiple_of"):
        settings["pad_vocabulary_to"] = section["pad_to_multiple_of"]
    return settings


def _tokens(
    tokens: Any, parsed: _Config, labels: Mapping[str, str], uses_base: bool
) -> dict[str, dict[str, Any]]:
    """The sources of single tokens, in our form."""
    names = {**labels, **({str(parsed.base): "base"} if uses_base else {})}
    result = {}
    for token, entry in tokens.items():
        source, force = entry.get("source"), bool(entry.get("force", False))
        if isinstance(source, str):
            source = {"kind": "model_token", "model": source, "token": token}
        kind = (source or {}).get("kind")
        if kind == "zero":
            result[token] = {"zero": True, "force": force}
        elif kind == "model_token":
            model = reference_of(source.get("model"), [])
            if model not in names:
                raise MergeError(
                    f"tokenizer.tokens.{token}: {model!r}: {nearest(str(model), names)}"
                )
            wanted = source.get("token", source.get("token_id", token))
            result[token] = {"source": names[model], "token": wanted, "force": force}
        else:
            raise MergeError(f"tokenizer.tokens.{token}: {source!r:.80}: a model, or kind: zero")
    return result


def _chat_template(config: Mapping[str, Any]) -> str | None:
    value = config.get("chat_template")
    if value is None:
        return None
    if value in _TEMPLATES:
        raise MergeError(
            f"chat_template {value!r} is a file of mergekit's; give a model that has it, or the "
            "template's file or text"
        )
    return str(value)
