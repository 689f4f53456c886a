"""Find rotary position embeddings among the operations of a log, whatever code computes them.

A rotary embedding (arXiv:2104.09864) takes the coordinates of a vector in pairs, as complex
numbers, and multiplies each by a phase that depends on the position: z_j becomes (C_j + i S_j) z_j.
What it leaves free is what commutes with every phase: a rotation and a scale of each pair, a I + b
J.

Slices, negations, concatenations, products with tables and sums are evaluated symbolically, from a
tensor to its rotated version: each coordinate of the result is a polynomial in the coordinates of
the source and the entries of the tables. Where these are the rows a, -b and b, a of a complex
product in every pair, the operations become one, "rotary", with a rule of its own. Where they are
not, nothing is replaced, and the ordinary rules pin what they must.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from alloy.symmetry.tracing.recording.log import Call, Log, Value
from alloy.symmetry.tracing.tables import COPIES, VIEWS, Symbol, Tables, elementwise

Form = dict[tuple[int, tuple[Symbol, ...]], int]
"""A polynomial: (coordinate of the source, factors) -> coefficient."""

ROTARY = SimpleNamespace(_schema=SimpleNamespace(name="rotary", arguments=()), tags=())
"""The operation that takes the place of those of a rotary embedding."""

_CONTRACTIONS = {"mm", "addmm", "bmm", "baddbmm", "mv", "convolution"}
_ENDS = {"add", "sub", "cat"} | VIEWS
_MOST_CALLS = 40


class NotLinearError(Exception):
    """An operation is no linear map of the coordinates of its source."""


def with_rotations(calls: Sequence[Call], log: Log) -> list[Call]:
    """The calls, those of each rotary embedding replaced by one named "rotary".

    Its inputs: `self`, the `tables`, how many dims each table lacks in front (`shifts`), and how
    far apart the two coordinates of a pair are before and after it (`strides`).
    """
    finder = _Finder(calls, log)
    dropped: set[int] = set()
    substitutes: dict[int, Call] = {}
    for number, call in enumerate(calls):
        if call.name in _ENDS and call.outputs[0].id in finder.moving:
            region = finder.region(number)
            if region is not None:
                numbers, substitutes[number] = region
                dropped |= numbers
                del finder.producer[call.outputs[0].id]  # a boundary for what comes later
    return [
        substitutes.get(i, call)
        for i, call in enumerate(calls)
        if i not in dropped or i in substitutes
    ]


class _Finder:
    def __init__(self, calls: Sequence[Call], log: Log) -> None:
        self.calls = calls
        self.mutated = log.mutated_storages()
        self.kept = {v.id for v in log.roots} | log.read
        self.producer: dict[int, int] = {}
        self.users: dict[int, list[int]] = {}
        self.moving = _moving(calls, log)
        self.tables = Tables(calls, self.producer, self.mutated, log.buffers)
        for number, call in enumerate(calls):
            for value in call.tensors():
                self.users.setdefault(value.id, []).append(number)
            for value in call.outputs:
                self.producer[value.id] = number

    def region(self, end: int) -> tuple[set[int], Call] | None:
        """Replace the calls that rotate a tensor into the output of call `end`, if they do."""
        out = self.calls[end].outputs[0]
        frontier = {out.id: out}
        inside: set[int] = set()
        largest: tuple[set[int], Call] | None = None
        # From the result back to ever larger regions: the largest also sees units reordered first.
        while len(inside) < _MOST_CALLS:
            latest = max(frontier, key=lambda v: self.producer.get(v, -1))
            source = frontier[latest]
            if len(frontier) == 1 and inside and source.shape == out.shape:
                call = self._rotation(source, out, sorted(inside))
                if call is not None and self._closed(inside, out):
                    largest = (set(inside), call)
            number = self.producer.get(latest)
            if number is None or self.calls[number].name not in _LINEAR:
                return largest
            inside.add(number)
            for value in self.calls[number].outputs:
                frontier.pop(value.id, None)
            before = [v for v in self.calls[number].tensors() if v.id in self.moving]
            if not before or (self.calls[number].name == "mul" and len(before) > 1):
                return largest
            frontier |= {v.id: v for v in before}
        return largest

    def _closed(self, inside: set[int], out: Value) -> bool:
        """Check that only the result leaves the region, and nothing in it is written to."""
        inner = [v for n in inside for v in self.calls[n].outputs if v.id != out.id]
        return all(
            v.id not in self.kept
            and v.storage not in self.mutated
            and inside.issuperset(self.users.get(v.id, ()))
            for v in inner
        )

    def _rotation(self, source: Value, out: Value, inside: list[int]) -> Call | None:
        """The call that stands for a region, if it is a product of complex numbers."""
        width = source.shape[-1] if source.shape else 0
        written_to = source.storage in self.mutated
        if width % 2 or written_to or not any(self.calls[n].name == "mul" for n in inside):
            return None
        region = _Region(source, self.tables)
        try:
            for number in inside:
                region.apply(self.calls[number], number)
        except (NotLinearError, LookupError, ValueError, TypeError, AttributeError):
            return None
        rows = region.forms[out.id]
        layouts = [(before, after) for before in (width // 2, 1) for after in (width // 2, 1)]
        layouts.sort(key=lambda strides: strides[0] != strides[1])
        strides = next((s for s in layouts if _turns_pairs(rows, *s)), None)
        if strides is None:
            return None
        tables = {(v.id, shift): (v, shift) for v, shift in region.tables}.values()
        inputs = {
            "self": source,
            "tables": [v for v, _ in tables],
            "shifts": [shift for _, shift in tables],
            "strides": strides,
        }
        return Call(ROTARY, inputs, [out], self.calls[inside[-1]].module, out)


def _moving(calls: Sequence[Call], log: Log) -> set[int]:
    """Values computed by a contraction with weights: what may be rotated, where tables are not."""
    weighed, moving = set(log.trainable), set()
    for call in calls:
        ids = {v.id for v in call.tensors()}
        if not ids.isdisjoint(weighed):
            made = {v.id for v in call.outputs}
            weighed |= made
            if call.name in _CONTRACTIONS or "attention" in call.name or ids & moving:
                moving |= made
    return moving


def _turns_pairs(rows: np.ndarray, before: int, after: int) -> bool:
    """Say whether the map is a I + b J from each pair to its image, with b somewhere not zero."""
    turns = False
    for (j, k), (u, v) in zip(_pairs(len(rows), before), _pairs(len(rows), after), strict=True):
        upper, lower = _by_coordinate(rows[u]), _by_coordinate(rows[v])
        if not {*upper, *lower} <= {j, k}:
            return False
        minus_b = {m: -c for m, c in lower.get(j, {}).items()}
        if upper.get(j, {}) != lower.get(k, {}) or upper.get(k, {}) != minus_b:
            return False
        turns |= bool(minus_b)
    return turns


def _pairs(width: int, stride: int) -> list[tuple[int, int]]:
    return [(j, j + stride) for j in range(width) if not j // stride % 2]


def _by_coordinate(form: Form) -> dict[int, dict[tuple[Symbol, ...], int]]:
    parts: dict[int, dict[tuple[Symbol, ...], int]] = {}
    for (coordinate, factors), coefficient in form.items():
        if coefficient:
            parts.setdefault(coordinate, {})[factors] = coefficient
    return parts


def _plus(a: Form, b: Form, sign: int = 1) -> Form:
    total = dict(a)
    for term, coefficient in b.items():
        total[term] = total.get(term, 0) + sign * coefficient
    return total


def _times(form: Form, symbol: Symbol) -> Form:
    return {(j, tuple(sorted((*m, symbol)))): c for (j, m), c in form.items()}


def _negative(form: Form) -> Form:
    return {term: -coefficient for term, coefficient in form.items()}


class _Region:
    """Forms of the values between a source and its rotated version, over their trailing dims."""

    def __init__(self, source: Value, tables: Tables) -> None:
        self.lead = len(source.shape) - 1
        self.front = source.shape[:-1]
        units = np.empty(source.shape[-1], dtype=object)
        units[:] = [{(j, ()): 1} for j in range(len(units))]
        self.forms = {source.id: units}
        self.complex: set[int] = set()  # values whose forms end in a dim of real and imaginary part
        self.table_keys = tables
        self.tables: list[tuple[Value, int]] = []

    def apply(self, call: Call, number: int) -> None:
        first = next(v for v in call.tensors() if v.id in self.forms)
        turned = any(v.id in self.complex for v in call.tensors())
        if turned and call.name not in ("mul", "view_as_real", *COPIES):
            raise NotLinearError
        results = _LINEAR[call.name](self, call, first, number)
        for out, form in zip(call.outputs, results, strict=True):
            imaginary = 1 if out.id in self.complex else 0
            if out.shape[: self.lead] != self.front or not out.floating:
                raise NotLinearError
            if form.shape[: form.ndim - imaginary] != out.shape[self.lead :]:
                raise NotLinearError
            self.forms[out.id] = form

    def axis(self, dim: int, rank: int) -> int:
        """A dim of a tensor as an axis of its forms."""
        axis = dim % rank - self.lead
        if axis < 0:
            raise NotLinearError
        return axis


def _copy(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    if x.id in region.complex:
        region.complex.add(call.outputs[0].id)
    return [region.forms[x.id]]


def _neg(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    return [elementwise(_negative, region.forms[x.id])]


def _add(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    a, b = (call.inputs[k] for k in ("self", "other"))
    if call.inputs.get("alpha", 1) != 1 or a.shape != b.shape:
        raise NotLinearError
    sign = -1 if call.name == "sub" else 1
    forms = (region.forms[v.id] for v in (a, b))
    return [elementwise(lambda p, q: _plus(p, q, sign), *forms)]


def _mul(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    a, b = call.inputs["self"], call.inputs["other"]
    table = b if a is x else a
    form = region.forms[x.id]
    if not isinstance(table, Value):
        symbol = region.table_keys.number(table)
        return [elementwise(lambda f: _times(f, symbol), form)]
    shift = len(x.shape) - len(table.shape)
    if shift < 0 or not table.shape:
        raise NotLinearError
    keys = region.table_keys.keys(table, max(region.lead - shift, 0), number)
    region.tables.append((table, shift))
    if x.id not in region.complex:
        return [elementwise(_times, form, keys)]
    region.complex.add(call.outputs[0].id)
    real, imaginary = (region.table_keys.part(keys, part) for part in ("real", "imaginary"))
    re, im = form[..., 0], form[..., 1]
    products = (re, im, real, imaginary)
    minus = elementwise(lambda p, q, c, s: _plus(_times(p, c), _times(q, s), -1), *products)
    plus = elementwise(lambda p, q, c, s: _plus(_times(p, s), _times(q, c)), *products)
    return [np.stack([minus, plus], axis=-1)]


def _slice(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    if call.outputs[0].shape == x.shape:
        return [region.forms[x.id]]
    axis = region.axis(call.inputs["dim"], len(x.shape))
    bounds = slice(*(call.inputs[k] for k in ("start", "end", "step")))
    return [region.forms[x.id][(slice(None),) * axis + (bounds,)]]


def _select(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    axis = region.axis(call.inputs["dim"], len(x.shape))
    form = region.forms[x.id]
    if call.name == "unbind":
        return [form.take(i, axis) for i in range(form.shape[axis])]
    return [form.take(call.inputs["index"], axis)]


def _split(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    dim = call.inputs["dim"] % len(x.shape)
    axis = region.axis(dim, len(x.shape))
    bounds = np.cumsum([out.shape[dim] for out in call.outputs])[:-1]
    return np.split(region.forms[x.id], bounds, axis)


def _cat(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    axis = region.axis(call.inputs["dim"], len(call.outputs[0].shape))
    join = np.stack if call.name == "stack" else np.concatenate
    return [join([region.forms[v.id] for v in call.inputs["tensors"]], axis)]


def _view(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    out = call.outputs[0]
    if out.shape[: region.lead] != region.front or 0 in out.shape:
        raise NotLinearError
    return [region.forms[x.id].reshape(out.shape[region.lead :])]


def _transpose(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    axes = [region.axis(call.inputs[k], len(x.shape)) for k in ("dim0", "dim1")]
    return [region.forms[x.id].swapaxes(*axes)]


def _as_complex(region: _Region, call: Call, x: Value, number: int) -> list[np.ndarray]:
    if call.name == "view_as_complex":
        region.complex.add(call.outputs[0].id)
    return [region.forms[x.id]]


_LINEAR: dict[str, Callable[[_Region, Call, Value, int], list[np.ndarray]]] = {
    **dict.fromkeys(COPIES, _copy),
    **dict.fromkeys(VIEWS, _view),
    "unsqueeze": _view,
    "squeeze": _view,
    "neg": _neg,
    "add": _add,
    "sub": _add,
    "mul": _mul,
    "slice": _slice,
    "select": _select,
    "unbind": _select,
    "split": _split,
    "split_with_sizes": _split,
    "cat": _cat,
    "stack": _cat,
    "transpose": _transpose,
    "view_as_complex": _as_complex,
    "view_as_real": _as_complex,
}
"""Linear maps of coordinates: operation -> the forms of its outputs."""
