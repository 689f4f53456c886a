"""Rules: the statement of each operation about the dims of its tensors, a function a kind.

Rules state equalities (`unify`, through `merged` and `set`), cuts and splits (`slice`, `view`),
what an operation fixes (`pin_dims`), and how it treats units (`link`, `mix`). Names are those of
ATen's schemas. An operation without a rule pins everything it touches and is reported: incomplete,
never wrong.
"""

from alloy.symmetry.tracing.rules import (
    attention,
    contractions,
    lookup,
    norms,
    pieces,
    pointwise,
    positions,
    reductions,
    shapes,
)
from alloy.symmetry.tracing.rules.registry import RULES

__all__ = [
    "RULES",
    "attention",
    "contractions",
    "lookup",
    "norms",
    "pieces",
    "pointwise",
    "positions",
    "reductions",
    "shapes",
]
