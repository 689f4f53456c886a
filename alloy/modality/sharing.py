"""Models of any class whose parts share one set of weights, stored once.

Two towers of a model that have become one trunk are two stacks of modules with the same parameters.
The model keeps its class; its config says under `alloy_trunk` which parameters are one, and which
blocks have a matrix in front or behind, where a stream enters the trunk's basis or leaves it
(`alloy.trunk`). `load_shared` reads such a checkpoint and restores the sharing; a checkpoint
without is loaded as it is. `save_shared` writes each shared tensor once. Training keeps the
sharing, because the modules own the same parameters.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from alloy.errors import CheckpointError
from alloy.symmetry.fold import add_matrices

KEY = "alloy_trunk"
"""The key of a config under which its sharing stands."""
ENTRY, EXIT = "trunk_entry", "trunk_exit"
"""The matrices of a block in front of its input and behind its output."""


@dataclass(frozen=True)
class Sharing:
    """The parts of a model that are one, as its config says it."""

    shared: Mapping[str, str] = field(default_factory=dict)
    """Name of a parameter or buffer -> the one that is stored."""
    entries: Mapping[str, int] = field(default_factory=dict)
    """Block -> width of the matrix in front of it."""
    exits: Mapping[str, int] = field(default_factory=dict)
    """Block -> width of the matrix behind it."""
    norms: tuple[str, ...] = ()
    """Gains of norms that have a matrix behind them."""

    def to_config(self) -> dict[str, Any]:
        return {**asdict(self), "norms": list(self.norms)}

    @staticmethod
    def of(config: Any) -> Sharing | None:
        """The sharing that a config (or its dict) has; None without one.

        Raises:
            CheckpointError: a sharing of another form than `to_config` gives.
        """
        given = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
        if given is None:
            return None
        if not _is_sharing(given):
            raise CheckpointError(
                f"{KEY} of the config is {given!r:.80}: it says `shared` (name: name), `entries` "
                "and `exits` (block: width) and `norms` (names); save the model again"
            )
        return Sharing(
            given.get("shared", {}),
            given.get("entries", {}),
            given.get("exits", {}),
            tuple(given.get("norms", ())),
        )


def _is_sharing(given: Any) -> bool:
    if not isinstance(given, Mapping):
        return False
    names, norms = given.get("shared", {}), given.get("norms", [])
    widths = [given.get(key, {}) for key in ("entries", "exits")]
    return (
        all(isinstance(part, Mapping) for part in (names, *widths))
        and all(isinstance(owner, str) for owner in names.values())
        and all(type(width) is int and width > 0 for part in widths for width in part.values())
        and isinstance(norms, list | tuple)
        and all(isinstance(norm, str) for norm in norms)
    )


def insert_matrices(model: nn.Module, sharing: Sharing) -> None:
    """Give a model the identity matrices that its sharing names, in place; the function stays."""
    add_matrices(model, sharing.norms)
    for places, name in ((sharing.entries, ENTRY), (sharing.exits, EXIT)):
        for place, width in places.items():
            block = model.get_submodule(place)
            matrix = nn.Linear(width, width, bias=False)
            nn.init.eye_(matrix.weight)
            block.add_module(name, matrix.to(next(block.parameters())))
            if name == ENTRY:
                block.register_forward_pre_hook(_enter, with_kwargs=True)
            else:
                block.register_forward_hook(_leave)


def _enter(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (block.trunk_entry(args[0]), *args[1:]), kwargs
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: block.trunk_entry(kwargs[name])}


def _leave(block: Any, _: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return block.trunk_exit(output)
    return (block.trunk_exit(output[0]), *output[1:])


def tie(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Let modules own one parameter together: that of the second name in each pair, in place.

    Raises:
        CheckpointError: a name that the model lacks, or two of other shapes.
    """
    for alias, owner in shared.items():
        (module, name), (source, theirs) = (_owner(model, n) for n in (alias, owner))
        own, stored = getattr(module, name), getattr(source, theirs)
        if own.shape != stored.shape:
            raise CheckpointError(
                f"{alias} is of shape {tuple(own.shape)} and cannot share {owner}, which is of "
                f"shape {tuple(stored.shape)}"
            )
        setattr(module, name, stored)
    _declare(model, shared)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    place, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(place)
        getattr(module, last)
    except AttributeError as error:
        raise CheckpointError(
            f"the config shares {name!r}, which {type(model).__name__} lacks: it is of another "
            "model, or of another release of transformers"
        ) from error
    return module, last


def _declare(model: Any, shared: Mapping[str, str]) -> None:
    """Tell transformers which parameters are one, so that its saving and tying keep it so."""
    if hasattr(model, "all_tied_weights_keys"):
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **shared}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **shared}


def save_shared(model: Any, folder: str | Path, *, expanded: bool = False) -> None:
    """Write a model of transformers, shared tensors once; its config says what is shared.

    Args:
        model: as `load_shared` or a merge of `alloy.trunk` gives it, or any other.
        expanded: write each tensor under all of its names, and no sharing: any tool then loads the
            model with its own `from_pretrained`.
        folder: absent or empty; it appears whole or stays as it is.

    Raises:
        CheckpointError: `expanded`, and the model has matrices that its class does not know; a
            folder that is a file or holds something.
    """
    place = Path(folder).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder; choose another or remove it")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as unfinished:
        made = Path(unfinished) / "model"
        _write(model, made, expanded=expanded)
        made.rename(place)


def _write(model: Any, folder: Path, *, expanded: bool) -> None:
    sharing = Sharing.of(model.config)
    if sharing is None or not expanded:
        model.save_pretrained(folder)
        return
    if sharing.entries or sharing.exits or sharing.norms:
        raise CheckpointError(
            "streams of this model enter the trunk through matrices that its own class does not "
            "have: save it as it is, and load it with alloy.load_shared"
        )
    whole = copy.deepcopy(model)
    for alias in sharing.shared:
        module, name = _owner(whole, alias)
        old = getattr(module, name)
        own = old.detach().clone()
        setattr(module, name, nn.Parameter(own) if isinstance(old, nn.Parameter) else own)
    kept = {a: o for a, o in whole.all_tied_weights_keys.items() if a not in sharing.shared}
    whole._tied_weights_keys = whole.all_tied_weights_keys = kept
    delattr(whole.config, KEY)
    whole.save_pretrained(folder)


def load_shared(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint in its own class, with what its config says is shared; in evaluation mode.

    A checkpoint whose config shares nothing is loaded by its class's `from_pretrained`.

    Args:
        folder: with config.json, which names a class of transformers, and safetensors.
        dtype: of the weights; by default that of the config.

    Raises:
        CheckpointError: no such class; weights that the sharing asks for are missing, or weights
            that the model does not have.
    """
    place = Path(folder)
    architecture = _class_of(place)
    config = architecture.config_class.from_pretrained(place, local_files_only=True)
    chosen = config.dtype if dtype is None else dtype
    sharing = Sharing.of(config)
    if sharing is None:
        return architecture.from_pretrained(place, dtype=chosen, local_files_only=True).eval()
    stored = _read(place)
    absent = sorted({owner for owner in sharing.shared.values() if owner not in stored})
    if absent:
        raise CheckpointError(
            f"{place}: its config shares {absent[0]}, which its weights lack "
            f"({len(absent)} such tensors)"
        )
    whole = stored | {alias: stored[owner] for alias, owner in sharing.shared.items()}
    matrices = {name for name in whole if _is_matrix(name, sharing)}
    try:
        model, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict={name: t for name, t in whole.items() if name not in matrices},
            dtype=chosen,
            output_loading_info=True,
        )
    except RuntimeError as error:  # of transformers, for shapes
        raise CheckpointError(f"{place} does not fit its own config.json: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    places = [*sharing.entries, *sharing.exits, *(n.rpartition(".")[0] for n in sharing.norms)]
    if unknown := sorted({*places} - {name for name, _ in model.named_modules()}):
        raise CheckpointError(
            f"{place}: its config has a matrix at {unknown[0]!r}, which is no part"
        )
    insert_matrices(model, sharing)
    own = dict(model.named_parameters(remove_duplicate=False))
    lacking = sorted(name for name in own if _is_matrix(name, sharing) and name not in matrices)
    if wrong or lacking:
        raise CheckpointError(f"{place} does not fit its own config.json: {wrong or lacking}")
    with torch.no_grad():
        for name in matrices:
            own[name].copy_(whole[name])
    tie(model, sharing.shared)
    return model.eval()


def _is_matrix(name: str, sharing: Sharing) -> bool:
    """True if a tensor is one of the matrices that a sharing names."""
    places = [*(f"{b}.{ENTRY}" for b in sharing.entries), *(f"{b}.{EXIT}" for b in sharing.exits)]
    places += [f"{gain.rpartition('.')[0]}.matrix" for gain in sharing.norms]
    return name.rpartition(".")[0] in places


def _class_of(folder: Path) -> Any:
    """The class of transformers that a checkpoint's config names first."""
    try:
        names = json.loads((folder / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no config.json that is JSON: {error}") from error
    for name in names:
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    raise CheckpointError(
        f"{folder}/config.json: architectures is {names}; it must name a class of transformers"
    )


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors."""
    index = folder / "model.safetensors.index.json"
    files: Iterable[str] = ["model.safetensors"]
    if index.is_file():
        try:
            files = sorted({*json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: corrupt ({error}); fetch or save it again") from error
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no file {name!r} of weights beside its config")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / name}: truncated or corrupt ({error}); fetch or save it again"
            ) from error
    return tensors


def with_sharing(model: Any, sharing: Sharing) -> Any:
    """Tie a model's parameters as a sharing says, matrices being there, and say so in its config.

    What the model shares already stays shared.
    """
    before = Sharing.of(model.config) or Sharing()
    sharing = replace(
        sharing,
        shared={**before.shared, **sharing.shared},
        entries={**before.entries, **sharing.entries},
        exits={**before.exits, **sharing.exits},
        norms=tuple(dict.fromkeys((*before.norms, *sharing.norms))),
    )
    tie(model, sharing.shared)
    setattr(model.config, KEY, sharing.to_config())
    return model
