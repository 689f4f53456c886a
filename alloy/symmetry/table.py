"""A spec as text for people: its spaces, what is pinned and why, and what to know before use."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from alloy.symmetry.diagonal import Diagonal, Factor
from alloy.symmetry.names import display_names
from alloy.symmetry.spec import Space, SymmetrySpec

_AXES = 3
_PINNED = 12
_UNUSED = 12


def table(spec: SymmetrySpec) -> str:
    """Describe a spec: `print(spec)` and `alloy symmetry` show this."""
    return "\n".join(_lines(spec))


def summary(spec: SymmetrySpec) -> str:
    """Describe a spec in one line."""
    parts = [_count(len(spec.spaces), "space"), f"over {_count(len(spec.layout), 'weight')}"]
    parts += [_count(len(spec.diagonals), "diagonal")] if spec.diagonals else []
    for number, word in ((len(spec.pinned), "pinned"), (len(spec.unused), "unused")):
        parts += [f"{number} {word}"] if number else []
    parts += [_count(len(spec.warnings), "warning")] if spec.warnings else []
    return f"{parts[0]} {', '.join(parts[1:])}"


def _lines(spec: SymmetrySpec) -> Iterator[str]:
    names = display_names(spec)
    numbers = {name: str(i) for i, name in enumerate([*spec.spaces, *spec.fixed])}
    yield summary(spec)
    if spec.spaces:
        yield ""
        yield from _columns(
            ["#", "space", "size", "kind", "after folding norms", "per unit of", "where it lies"],
            [_row(space, names, numbers) for space in spec.spaces.values()],
        )
    for name, size in spec.fixed.items():
        yield f"{numbers[name]}: {name}, {size} units that cannot move, each with units of its own"
    if spec.diagonals:
        yield ""
        yield from _columns(
            ["each unit of", "may be scaled by", "which multiplies", "and divides"],
            [_scaling(diagonal, numbers) for diagonal in spec.diagonals.values()],
        )
    reasons: dict[str, list[str]] = {}
    for pinned in spec.pinned:
        reasons.setdefault(pinned.reason, []).append(f"{pinned.axis} ({pinned.size})")
    if reasons:
        yield ""
        yield from _columns(
            ["pinned because", "what"],
            [[[reason], _first(axes, _PINNED)] for reason, axes in reasons.items()],
        )
    for space, reason in spec.unfoldable.items():
        yield f"\n{names.get(space, space)} (space {numbers[space]}) cannot be folded: {reason}"
    if spec.unused:
        unused = ", ".join(_first(spec.unused, _UNUSED))
        yield f"\nnot reached by the example inputs, left as they are: {unused}"
    for operation, module in spec.unknown_operations.items():
        yield f"\nno rule for {operation} (in {module}): what it touches is pinned"
    for warning in spec.warnings:
        yield f"\nwarning: {warning}"


def _row(space: Space, names: Mapping[str, str], numbers: Mapping[str, str]) -> list[list[str]]:
    kind = [space.kind]
    if space.pair_stride:
        kind.append(f"pairs {space.pair_stride} apart")
    return [
        [numbers[space.name]],
        [names[space.name]],
        [str(space.size)],
        kind,
        [space.folded_kind if space.folded_kind != space.kind else ""],
        [", ".join(numbers[parent] for parent in space.depends_on)],
        _first([str(axis) for axis in space.axes], _AXES),
    ]


def _scaling(diagonal: Diagonal, numbers: Mapping[str, str]) -> list[list[str]]:
    units = diagonal.depends_on[-1]
    where = f"space {numbers[units]}" if units in numbers else f"{diagonal.shape[-1]}, pinned"
    sides = ([f for f in diagonal.factors if (f.exponent > 0) == up] for up in (True, False))
    return [
        [where],
        ["any number but 0" if diagonal.any_sign else "a positive number"],
        *(_first([_power(factor) for factor in side], _AXES) for side in sides),
    ]


def _power(factor: Factor) -> str:
    power = abs(factor.exponent)
    return str(factor.axis) + (f" by power {power}" if power > 1 else "")


def _first(items: Sequence[str], most: int) -> list[str]:
    more = len(items) - most
    return [*items[:most], *([f"and {more} more"] if more > 0 else [])]


def _columns(heads: list[str], rows: Iterable[list[list[str]]]) -> Iterator[str]:
    """Cells of several lines each, side by side."""
    cells = [[[head] for head in heads], *rows]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(heads))]
    for number, row in enumerate(cells):
        for i in range(max(map(len, row))):
            parts = [cell[i] if i < len(cell) else "" for cell in row]
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            yield "  ".join(padded).rstrip()
        if number == 0:
            yield "  ".join("-" * width for width in widths)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
