"""Names: readable ones for the spaces of a spec, and those of the weights of a model's head.

`encoder.layer.0 heads` stands for what the spec calls `encoder.layer.0.attention.self.query.weight
[0]*0`. A name is for people: nothing is looked up by it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from alloy.symmetry.layout import Axis, Product, Sum, Term
from alloy.symmetry.spec import Space, SymmetrySpec


def display_names(spec: SymmetrySpec) -> Mapping[str, str]:
    """Give each space (and each fixed dim that others depend on) a name, all different."""
    units = {name: _units(spec, space) for name, space in spec.spaces.items()}
    inside = {name: _common(a.parameter for a in s.axes) for name, s in spec.spaces.items()}
    first = {name: space.axes[0].parameter for name, space in spec.spaces.items()}
    places = [  # ever longer, where names are equal
        {name: _layer(place) for name, place in inside.items()},
        {name: place or first[name].split(".")[0] for name, place in inside.items()},
        {name: first[name].rpartition(".")[0] for name in spec.spaces},
        {name: name for name in spec.spaces},
    ]
    names: dict[str, str] = {}
    for place in places:
        longer = {name: f"{place[name]} {units[name]}".strip() for name in spec.spaces}
        count = Counter(names.values())
        names = {n: longer[n] if count[names.get(n, "")] != 1 else names[n] for n in longer}
    return names | {name: f"{name} (fixed)" for name in spec.fixed}


def _units(spec: SymmetrySpec, space: Space) -> str:
    """Name the units of a space by how it lies on weights and what depends on it."""
    kernels = [axis for axis in space.axes if len(spec.layout[axis.parameter]) > 2]
    if spec.dependents(space.name):
        if kernels:
            return "groups" if all(axis.path for axis in kernels) else "experts"
        return "query groups" if space.depends_on else "heads"
    if space.depends_on:
        if any(_is_between(spec.layout[a.parameter][a.dim], a) for a in space.axes):
            return "queries of each head"
        parent = spec.spaces.get(space.depends_on[-1])
        whole = _units(spec, parent) if parent else "heads"
        return f"{_role(space.axes[0])} units of each {whole.removesuffix('s')}".strip()
    inside = _common(axis.parameter for axis in space.axes)
    if kernels and any(part.isdigit() for part in inside.split(".")):
        return "channels"
    if len({_layer(axis.parameter) for axis in space.axes if _is_deeper(axis, inside)}) > 1:
        return "stream"
    return "channels" if kernels else "neurons"


def _is_deeper(axis: Axis, place: str) -> bool:
    """Check whether an axis lies in a numbered layer below a place."""
    inner = axis.parameter.removeprefix(place).split(".")
    return any(part.isdigit() for part in inner)


def _is_between(term: Term, axis: Axis) -> bool:
    """Check whether an axis is neither the first nor the last factor of its product."""
    for step in axis.path[:-1]:
        if isinstance(term, Sum):
            term = term.parts[int(step[1:])]
        elif isinstance(term, Product):
            term = term.factors[int(step[1:])]
    if not isinstance(term, Product) or not axis.path:
        return False
    return 0 < int(axis.path[-1][1:]) < len(term.factors) - 1


def _common(parameters: Iterable[str]) -> str:
    """The modules that all the weights lie in, as a dotted path."""
    paths = [name.split(".")[:-1] for name in parameters]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False))
    return ".".join(column[0] for column in shared)


def _layer(place: str) -> str:
    """A dotted path up to its last number, if there is one: the layer."""
    parts = place.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def _role(axis: Axis) -> str:
    """The last module of a weight and the part of its dim: `query`, or `c_attn+2`."""
    module = axis.parameter.split(".")[-2:-1]
    return "".join([*module, *(step for step in axis.path if step.startswith("+"))])


def head_names(model: Any, names: Iterable[str]) -> set[str]:
    """Those of a model's tensors that make its head: its output layer, or what tells classes apart.

    The latter is all that stands beside the base model of a model of transformers.
    """
    last = end_of(model.get_output_embeddings)
    if last is not None:
        return {n for n in names if model.get_submodule(n.rpartition(".")[0]) is last}
    prefix = model.base_model_prefix
    if not prefix or not hasattr(model, prefix):
        return set()
    return {name for name in names if not name.startswith(f"{prefix}.")}


def end_of(get: Callable[[], Any]) -> Any:
    """The first or last layer of a model; None of one that reads no tokens, which may not know."""
    try:
        return get()
    except NotImplementedError:
        return None
