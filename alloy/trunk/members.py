"""Members of a trunk: parts of models, under names that all of them share.

A part is a list of blocks (`vision_model.encoder.layers`) or any other module. What a weight is
called in the trunk is its name inside the part, behind the number of the block that it stands for.
What all members have corresponds; the rest stays each one's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alloy.checkpoint.names import renamed
from alloy.errors import MergeError, nearest

LISTS = (nn.ModuleList, nn.Sequential)
HEADS = {
    "the number of heads": r"(num|n)_(attention_)?heads?",
    "the number of heads of keys and values": r"(num|n)_(key_value|kv)_heads?",
    "the size of heads": r"(attention_)?head_(dim|size)",
}
"""What modules of attention call their heads."""
ACTIVE = ("Dropout", "Identity", "DropPath")  # what says nothing of a layer's kind


@dataclass(frozen=True, kw_only=True)
class Member:
    """A part of a model, as a user names it."""

    part: str
    """The module: `text_model.encoder.layers`."""
    checkpoint: str | None = None
    """The model that it is a part of; may be left out where there is one."""
    layers: Sequence[int] | None = None
    """Which of its blocks stand for the trunk's 0, 1, ...; by default all in their order."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Prefixes inside a block -> what the other members call them."""


@dataclass(frozen=True)
class Part:
    """A member that was found in its model."""

    name: str
    """Of the member."""
    checkpoint: str
    blocks: tuple[str, ...]
    """Modules of the model, by their number in the trunk; one for a part that is no list."""
    names: Mapping[str, str]
    """Name in the trunk -> name of the parameter in the model."""

    def modules(self) -> dict[str, str]:
        """Name in the trunk -> module of the model, for every module that has a parameter."""
        return {n.rpartition(".")[0]: own.rpartition(".")[0] for n, own in self.names.items()}


def find_parts(models: Mapping[str, nn.Module], members: Mapping[str, Member]) -> dict[str, Part]:
    """Find every member in its model.

    Raises:
        MergeError: a model or part that does not exist, blocks that a part does not have, numbers
            of blocks that differ, parts that overlap or are tied to something else.
    """
    if len(members) < 2:
        raise MergeError(f"a trunk needs two members or more; found {sorted(members)}")
    parts = {}
    for name, member in members.items():
        if not isinstance(member, Member):
            raise MergeError(
                f"member {name!r}: {member!r:.80}: give a part's name or alloy.Member(part=...)"
            )
        checkpoint = _checkpoint_of(name, member, models)
        parts[name] = _part(name, member, checkpoint, models[checkpoint])
    _refuse_other_depths(parts, models)
    _refuse_overlaps(parts, models)
    return parts


def _checkpoint_of(name: str, member: Member, models: Mapping[str, nn.Module]) -> str:
    if member.checkpoint is None and len(models) == 1:
        return next(iter(models))
    if member.checkpoint is None or member.checkpoint not in models:
        raise MergeError(
            f"member {name!r} is a part of checkpoint {member.checkpoint!r}: "
            f"{nearest(str(member.checkpoint), models)}"
        )
    return member.checkpoint


def _part(name: str, member: Member, checkpoint: str, model: nn.Module) -> Part:
    module = dict(model.named_modules()).get(member.part) if member.part else None
    if module is None:
        known = [n for n, m in model.named_modules() if isinstance(m, LISTS) and len(m)]
        raise MergeError(
            f"member {name!r}: {type(model).__name__} has no part {member.part!r}: "
            f"{nearest(member.part, known)}"
        )
    if not isinstance(module, LISTS):
        if member.layers is not None:
            raise MergeError(
                f"member {name!r}: layers says which blocks of a list are meant, and "
                f"{member.part!r} is one {type(module).__name__}: leave it out"
            )
        blocks, prefixes = [member.part], [""]
    else:
        chosen = list(range(len(module))) if member.layers is None else list(member.layers)
        wrong = [i for i in chosen if not isinstance(i, int) or not 0 <= i < len(module)]
        if wrong or len({*chosen}) < len(chosen) or not chosen:
            raise MergeError(
                f"member {name!r}: layers {chosen}: {member.part!r} has the blocks 0 to "
                f"{len(module) - 1}; name each at most once"
            )
        blocks = [f"{member.part}.{i}" for i in chosen]
        prefixes = [f"{i}." for i in range(len(chosen))]
    inside = {n for block in blocks for n, _ in model.get_submodule(block).named_parameters()}
    idle = [old for old in member.names if not any(n.startswith(old) for n in inside)]
    if idle:
        known = {".".join(n.split(".")[:k]) for n in inside for k in range(1, n.count(".") + 1)}
        raise MergeError(
            f"member {name!r}: names: nothing in a block begins with {idle[0]!r}: "
            f"{nearest(idle[0], known)}"
        )
    names = {}
    for block, prefix in zip(blocks, prefixes, strict=True):
        for own, _ in model.get_submodule(block).named_parameters(remove_duplicate=False):
            names[prefix + renamed(own, member.names)] = f"{block}.{own}"
    if not names:
        raise MergeError(f"member {name!r}: {member.part!r} has no weights")
    return Part(name, checkpoint, tuple(blocks), names)


def _refuse_other_depths(parts: Mapping[str, Part], models: Mapping[str, nn.Module]) -> None:
    first, *others = parts.values()
    for other in others:
        if len(first.blocks) != len(other.blocks):
            for part in (first, other):
                _refuse_what_holds_a_list(part, models[part.checkpoint])
            raise MergeError(
                f"{first.name} has {len(first.blocks)} blocks and {other.name} "
                f"{len(other.blocks)}: say which goes with which, such as layers: "
                f"{{{first.name}: {list(range(min(len(first.blocks), len(other.blocks))))}, ...}}"
            )


def _refuse_what_holds_a_list(part: Part, model: nn.Module) -> None:
    """Raise MergeError for an encoder that was named in place of its blocks."""
    (block, *_), module = part.blocks, model.get_submodule(part.blocks[0])
    lists = [n for n, m in module.named_modules() if n and isinstance(m, LISTS) and len(m)]
    is_block = isinstance(model.get_submodule(block.rpartition(".")[0]), LISTS)
    if len(part.blocks) == 1 and lists and not is_block:
        raise MergeError(
            f"member {part.name!r}: {block!r} is one {type(module).__name__} and not a list of "
            f"blocks, as the other member's part is; its blocks are {block}.{lists[0]}"
        )


def _refuse_overlaps(parts: Mapping[str, Part], models: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for part in parts.values():
        model = models[part.checkpoint]
        named = dict(model.named_parameters(remove_duplicate=False))
        everywhere = Counter(id(p) for p in named.values())
        for own in part.names.values():
            if (other := owners.get(id(named[own]), part.name)) != part.name:
                raise MergeError(
                    f"the parts of members {other!r} and {part.name!r} overlap: both have {own}"
                )
            owners[id(named[own])] = part.name
            if everywhere[id(named[own])] > 1:
                alias = next(n for n, p in named.items() if p is named[own] and n != own)
                raise MergeError(
                    f"member {part.name!r}: {own} is the same weight as {alias}: the model uses "
                    "this part twice already"
                )


def common_names(parts: Mapping[str, Part], models: Mapping[str, nn.Module]) -> list[str]:
    """The trunk's names that every member has.

    Raises:
        MergeError: there are none, or a member has other kinds of layers under them.
    """
    first, *others = parts.values()
    names = [n for n in first.names if all(n in other.names for other in others)]
    if not names:
        other = others[0]
        raise MergeError(
            f"{first.name} and {other.name} have no weight of one name: {first.name} has "
            f"{_shown(first)}, {other.name} has {_shown(other)}; `names:` says what a prefix of "
            "one is called in the other"
        )
    for other in others:
        _refuse_other_kinds(first, other, names, models)
    return names


def _shown(part: Part) -> str:
    return ", ".join(list(part.names)[:3])


def _refuse_other_kinds(
    first: Part, other: Part, names: Sequence[str], models: Mapping[str, nn.Module]
) -> None:
    """Name the first difference between the layers of two members: kinds, shapes, activations."""
    ours, theirs = (models[part.checkpoint] for part in (first, other))
    for name in names:
        a, b = (m.get_parameter(p.names[name]) for m, p in ((ours, first), (theirs, other)))
        kinds = [
            kind_of(m.get_submodule(p.names[name].rpartition(".")[0]))
            for m, p in ((ours, first), (theirs, other))
        ]
        if kinds[0] != kinds[1]:
            raise MergeError(
                f"{name.rpartition('.')[0]} is a {kinds[0]} in {first.name} and a {kinds[1]} in "
                f"{other.name}"
            )
        if a.shape != b.shape:
            raise MergeError(
                f"{name} has shape {list(a.shape)} in {first.name} and {list(b.shape)} in "
                f"{other.name}: a trunk has one width"
            )
        heads, others = (_heads_around(m, p, name) for m, p in ((ours, first), (theirs, other)))
        for what in (what for what in heads if what in others):
            if heads[what] != others[what]:
                raise MergeError(
                    f"{name.rpartition('.')[0]}: {what} is {heads[what]} in {first.name} and "
                    f"{others[what]} in {other.name}: a trunk has the same heads everywhere"
                )
    for i, (block, another) in enumerate(zip(first.blocks, other.blocks, strict=True)):
        mine, others = (
            list(_activations(m.get_submodule(b))) for m, b in ((ours, block), (theirs, another))
        )
        if mine != others:
            raise MergeError(
                f"block {i} computes {', '.join(mine) or 'no activation'} in {first.name} and "
                f"{', '.join(others) or 'no activation'} in {other.name}"
            )


def kind_of(module: nn.Module) -> str:
    """The kind of a layer, whatever its architecture calls the class."""
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.LayerNorm):
        return "LayerNorm"
    name = type(module).__name__
    return "RMSNorm" if name.endswith("RMSNorm") else name


def _heads_around(model: nn.Module, part: Part, name: str) -> dict[str, int]:
    """Numbers and sizes of heads that the modules of a block around a weight say they have."""
    block = next(b for b in part.blocks if part.names[name].startswith(f"{b}."))
    path, known = part.names[name].rpartition(".")[0], {}
    while path.startswith(block) and not known:
        counts = vars(model.get_submodule(path)).items()
        known = {
            what: value
            for what, pattern in HEADS.items()
            for key, value in counts
            if type(value) is int and re.fullmatch(pattern, key)
        }
        path = path.rpartition(".")[0]
    return known


def _activations(block: nn.Module) -> Iterator[str]:
    """Modules of a block without weights or parts, in their order."""
    for module in block.modules():
        bare = not any(True for _ in module.children()) and not any(
            True for _ in module.parameters()
        )
        name = type(module).__name__
        if bare and not any(word in name for word in ACTIVE):
            yield name


@torch.no_grad()
def refuse_other_calls(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, Part],
    names: Sequence[str],
    data: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Raise MergeError unless the data reach every layer once, in one order in all members."""
    orders: dict[str, list[str]] = {}
    for checkpoint, model in models.items():
        here = [part for part in parts.values() if part.checkpoint == checkpoint]
        orders |= record_calls(model, here, names, data[checkpoint])
    (first, ours), *others = orders.items()
    for other, theirs in others:
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                raise MergeError(
                    f"layer {i} to be computed is {a} in {first} and {b} in {other}: a trunk has "
                    "one order of layers (norms before the layers, or behind them; `layers` in "
                    "the order in which they run)"
                )


def record_calls(
    model: Any, parts: Sequence[Part], names: Sequence[str], batch: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """The trunk's modules in the order in which each member's part calls them in a pass.

    Raises:
        MergeError: a layer that the data never reach or that the model calls more than once.
    """
    wanted = {n.rpartition(".")[0] for n in names}
    order: dict[str, list[str]] = {part.name: [] for part in parts}
    handles = [
        model.get_submodule(place).register_forward_hook(
            lambda *_, member=part.name, layer=layer: order[member].append(layer)
        )
        for part in parts
        for layer, place in part.modules().items()
        if layer in wanted
    ]
    try:
        model(**batch)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise MergeError(
            f"{type(model).__name__} does not run on {sorted(batch)}: {error}; give what each of "
            f"{[part.name for part in parts]} reads"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for part in parts:
        counts = Counter(order[part.name])
        layers = [n for n, own in part.modules().items() if n in wanted and _is_called(model, own)]
        if never := sorted(layer for layer in layers if not counts[layer]):
            raise MergeError(
                f"the data never reach {part.modules()[never[0]]} of member {part.name!r}: they "
                f"have {sorted(batch)}; give what that part reads, too"
            )
        if twice := [layer for layer, num in counts.items() if num > 1]:
            raise MergeError(
                f"member {part.name!r}: the model calls {part.modules()[twice[0]]} "
                f"{counts[twice[0]]} times in a pass: a part that is used more than once cannot "
                "be given other weights for one use"
            )
    return order


def _is_called(model: nn.Module, place: str) -> bool:
    """True if a module is a layer that runs, not only a bearer of parameters."""
    return isinstance(model.get_submodule(place), (nn.Linear, nn.LayerNorm, nn.Conv2d))
