"""Defaults of an architecture's config, read in the source of transformers.

Its config classes cost two to four seconds of imports, a merge's plan a tenth of one. They are
plain fields with plain defaults for the most part, so the text of the class says what a key means
that a config leaves out. What it does not say plainly is unknown here: the class itself is asked.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

UNKNOWN = object()
"""In place of a default: the source does not say it plainly."""

_BASES = {"PreTrainedConfig", "PretrainedConfig"}
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.FloorDiv: operator.floordiv,
    ast.Mult: operator.mul,
}


def default_of(config: Mapping, key: str) -> object:
    """The value of a dotted key that a config leaves out, or UNKNOWN."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = config.get(parent)
        if not isinstance(inner, Mapping):
            return UNKNOWN
        config = inner
    source = _source_of(str(config.get("model_type")))
    return UNKNOWN if source is None or last in config else source.value(config, last)


@dataclass(frozen=True)
class _Source:
    """The fields of one config class, as its text has them."""

    defaults: Mapping[str, object]
    derived: Mapping[str, ast.expr]
    """What a field becomes that is None, as an expression of others."""
    unsure: frozenset[str]
    """Fields that the class changes otherwise, and those that have a second name."""

    def value(self, config: Mapping, key: str) -> object:
        if key in config and config[key] is not None:
            return config[key]
        value = UNKNOWN if key in self.unsure else self.defaults.get(key, UNKNOWN)
        if value is None:
            return self._evaluated(config, self.derived[key]) if key in self.derived else UNKNOWN
        return value

    def _evaluated(self, config: Mapping, expression: ast.expr) -> object:
        if (field := _own_field(expression)) is not None:
            return self.value(config, field)
        if isinstance(expression, ast.BinOp) and type(expression.op) in _OPERATORS:
            combine = _OPERATORS[type(expression.op)]
            a, b = (self._evaluated(config, e) for e in (expression.left, expression.right))
            if isinstance(a, int) and isinstance(b, int) and b:
                return combine(a, b)
        return UNKNOWN


@cache
def _source_of(kind: str) -> _Source | None:
    """The class of a `model_type`; that of its language model where this holds several configs."""
    spec = find_spec("transformers")
    for name in (kind, kind.removesuffix("_text")):
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            folder = name.replace("-", "_")
            if not folder.isidentifier():
                continue
            file = Path(place) / "models" / folder / f"configuration_{folder}.py"
            if not file.is_file():
                continue
            classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
            of_kind = [c for c in classes if _constant(c, "model_type") == kind]
            if any("text_config" in _fields(c) for c in of_kind):
                of_kind = [c for c in classes if _constant(c, "base_config_key") == "text_config"]
            if len(of_kind) == 1:
                return _read(of_kind[0])
    return None


def _read(node: ast.ClassDef) -> _Source | None:
    if [getattr(base, "id", None) for base in node.bases] not in [[base] for base in _BASES]:
        return None
    derived: dict[str, ast.expr] = {}
    set_by_default: set[ast.AST] = set()
    unsure: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.If) and (found := _filled_in(part)) is not None:
            derived[found[0]] = found[1]
            set_by_default.update(ast.walk(part.body[0]))
        elif isinstance(part, ast.Call) and getattr(part.func, "id", None) == "setattr":
            return None
    for part in ast.walk(node):
        changed = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store | ast.Del)
        if isinstance(part, ast.Attribute) and changed and part not in set_by_default:
            unsure.add(part.attr)
    second = _constant(node, "attribute_map")
    if isinstance(second, dict):
        unsure |= {*second, *second.values()}
    return _Source(_fields(node), derived, frozenset(unsure))


def _filled_in(part: ast.If) -> tuple[str, ast.expr] | None:
    """Of `if self.x is None: self.x = ...` the field and the expression."""
    match part:
        case ast.If(
            test=ast.Compare(left=left, ops=[ast.Is()], comparators=[ast.Constant(value=None)]),
            body=[ast.Assign(targets=[target], value=value)],
            orelse=[],
        ) if (field := _own_field(left)) is not None and _own_field(target) == field:
            return field, value
    return None


def _own_field(expression: ast.expr) -> str | None:
    match expression:
        case ast.Attribute(value=ast.Name(id="self"), attr=attr):
            return attr
    return None


def _fields(node: ast.ClassDef) -> dict[str, object]:
    """Fields and their defaults; UNKNOWN where these are made by code."""
    fields: dict[str, object] = {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            fields[part.target.id] = UNKNOWN if part.value is None else _literal(part.value)
    return fields


def _constant(node: ast.ClassDef, name: str) -> object:
    values = [
        part.value
        for part in node.body
        if isinstance(part, ast.Assign)
        and [getattr(target, "id", None) for target in part.targets] == [name]
    ]
    return _literal(values[0]) if values else None


def _literal(expression: ast.expr) -> object:
    """The value of a literal, or of the keyword `default` of a call that checks values."""
    if isinstance(expression, ast.Call):
        given: Sequence[ast.keyword] = [k for k in expression.keywords if k.arg == "default"]
        return _literal(given[0].value) if given else UNKNOWN
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return UNKNOWN
