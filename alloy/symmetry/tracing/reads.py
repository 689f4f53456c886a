"""Roles of axes: which of a space's axes read it, and which write it.

A weight reads along the dims that are contracted with something that depends on the input; along
all others, and wherever it is added, multiplied or looked up, it writes. A tied embedding does
both. For a permutation it is all the same; for a map that loses units (zip, transport) it is not.
"""

import copy
from collections.abc import Iterator, Mapping

from alloy.symmetry.spec import Axis
from alloy.symmetry.tracing.classes import Variable
from alloy.symmetry.tracing.engine import Engine
from alloy.symmetry.tracing.kinds import Kinds
from alloy.symmetry.tracing.links import Dual, Slot
from alloy.symmetry.tracing.places import Atom
from alloy.symmetry.tracing.recording.log import Call
from alloy.symmetry.tracing.terms import Node


def roles(
    engine: Engine,
    atoms: Mapping[Atom, Node],
    axes: Mapping[Atom, Mapping[tuple[str, int, int], Axis]],
) -> tuple[frozenset[str], frozenset[str]]:
    """The axes (as strings) that read their space, and those of them that write it as well."""
    constant = _weights_alone(engine)
    inner = copy.copy(engine)  # how weights become the operands of the operations that use them
    inner.links = [
        link
        for link in engine.links
        if not isinstance(link, Dual) and all(value.id in constant for value, _ in link.slots)
    ]
    kinds = Kinds(inner, atoms)
    read, written = set[Variable](), set[Variable]()
    for call in engine.calls:
        if any(v.id in constant for v in call.outputs):
            continue
        contracted = set(_contracted(call))
        for value in call.tensors():
            if value.id in constant and value.id in engine.dims:
                for dim in range(len(value.shape)):
                    side = read if (value, dim) in contracted else written
                    side.update(kinds.variables((value, dim)))
    read, written = ({kinds.station.find(v)[0] for v in side} for side in (read, written))
    reading, both = set[str](), set[str]()
    for atom in atoms:
        for name, dim, place, variable in kinds.weight_variables(atom):
            root = kinds.station.find(variable)[0]
            if root in read:
                axis = str(axes[atom][name, dim, place])
                reading.add(axis)
                if root in written:
                    both.add(axis)
    return frozenset(reading), frozenset(both)


def _weights_alone(engine: Engine) -> set[int]:
    """Ids of values that no input of the model has touched."""
    constant = {value.id for value in engine.log.weights.values()}
    for call in engine.calls:
        tensors = list(call.tensors())
        if tensors and all(value.id in constant for value in tensors):
            constant.update(value.id for value in call.outputs)
    return constant


def _contracted(call: Call) -> Iterator[Slot]:
    """The dims of an operation's tensors that it sums over together with another tensor's."""
    name, inputs = call.name, call.inputs
    if name.startswith("convolution"):
        weight = inputs["weight"]
        if inputs["transposed"]:
            yield weight, 0
        elif weight.shape[1] > 1 or inputs["groups"] == 1:
            yield weight, 1
        return
    for left, right in _MATRIX_PRODUCTS.get(name, ()):
        if left in inputs and right in inputs:
            yield inputs[left], len(inputs[left].shape) - 1
            yield inputs[right], max(0, len(inputs[right].shape) - 2)


_MATRIX_PRODUCTS = {
    "mm": [("self", "mat2")],
    "bmm": [("self", "mat2")],
    "addmm": [("mat1", "mat2")],
    "baddbmm": [("batch1", "batch2")],
    "mv": [("self", "vec")],
    "dot": [("self", "tensor")],
    "vdot": [("self", "other")],
}
