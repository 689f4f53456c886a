"""Choose each model's transforms, within its symmetries, so that merging leaves the smallest error.

J (`alloy.gauge.objective`), summed over the linear layers, needs weights and Grams alone. Two kinds
of step alternate, neither of which may raise it:

- continuous: residual streams and the units within a head turn by Cayley transforms
  Q (I - S/2)⁻¹ (I + S/2), S skew-symmetric, so every iterate is orthogonal; Adam descends on S;
- discrete: heads and neurons are assigned to those of the other models.

J has many minima. The search starts from several gauges, follows each a little, and the best on J
to the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alloy.devices import device_of
from alloy.errors import GaugeError
from alloy.gauge.assignment import match
from alloy.gauge.descent import turn
from alloy.gauge.objective import bias_of, closed_form, layers_of, transported
from alloy.gauge.problem import Problem, Transformed
from alloy.gauge.starts import STARTS, begin, given
from alloy.gauge.streams import StreamUse, stream_use
from alloy.statistics.moments import Gram
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transform, Transforms
from alloy.types import Weights

_PROBE = 0.25  # the share of a round's steps that a start gets before the best is chosen


@dataclass(frozen=True)
class Gauge:
    """The result of a search. `transforms[m]` brings model m to where merging costs least."""

    transforms: tuple[dict[str, Transform], ...]
    error_before: float
    error_after: float
    start: str
    """The start that won, "identity" also where nothing lowered J."""
    errors: Mapping[str, float]
    """J by start after its first steps."""
    streams: tuple[StreamUse, ...]
    history: tuple[float, ...] = field(repr=False)
    """J of the winner after each round."""


def search_gauge(
    models: Sequence[Weights],
    spec: SymmetrySpec,
    grams: Sequence[Mapping[str, Gram]],
    *,
    reference: int = 0,
    fixed: Sequence[str] = (),
    held: Collection[tuple[int, str]] = (),
    starts: Sequence[str] = STARTS,
    initial: Mapping[str, Sequence[Transforms]] | None = None,
    ridge: float = 1e-3,
    max_rounds: int = 6,
    steps: int = 60,
    learning_rate: float = 0.02,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Gauge:
    """Find the transforms of each model that minimise J; the reference model stays as it is.

    The search takes the time of `max_rounds * steps` evaluations of J. Each needs, per layer,
    matrix products and one Cholesky factorisation of its inputs' width: width³ x layers x models.

    Args:
        models: state dicts, each with all of the spec's weights or some (as an expert has).
        spec: what may move. Fold norms first, so that streams may turn.
        grams: for each model, Grams of the inputs of its linear layers, by weight. With a constant
            1 as the last input, biases are merged by least squares, too.
        fixed: spaces that stay as they are in every model (the stream, if models share it).
        held: pairs of a model's number and a space without dependents that stays as it is in that
            model.
        starts: names from `STARTS`; axes are the principal axes of what each model reads from a
            stream, brought together or apart.
        initial: further starts by name: transforms of each model, such as an alignment. Those of
            the reference and of fixed spaces count as the identity.
        ridge: λ of J, in units of a layer's mean eigenvalue.
        steps: continuous steps per round; a round that lowers J by less than `tolerance` is the
            last.
        generator: shuffles the order in which discrete spaces are visited.
        device: where J is computed; by default where the models lie.

    Returns:
        the transforms, on the CPU, and what they are worth.

    Raises:
        GaugeError: no layer in common, Grams that do not fit, unknown starts or spaces, no start,
            a negative number.
    """
    initial = {} if initial is None else initial
    if unknown := sorted(set(starts) - set(STARTS)):
        raise GaugeError(f"starts {unknown} are unknown; choose of {list(STARTS)}")
    if unknown := sorted({*fixed, *(space for _, space in held)} - set(spec.spaces)):
        raise GaugeError(f"fixed spaces {unknown} are not in the spec")
    for name, value in {"steps": steps, "max_rounds": max_rounds, "ridge": ridge}.items():
        if not value >= 0:
            raise GaugeError(f"{name}={value!r}: it must not be negative")
    _check_initial(initial, starts, spec, len(models))
    if not 0 <= reference < len(models):
        raise GaugeError(f"reference {reference} is none of {len(models)} models")
    problem = Problem(
        layers=layers_of(models, grams, spec, device),
        spec=spec,
        num_models=len(models),
        reference=reference,
        fixed=frozenset(fixed),
        held=frozenset(held),
        ridge=ridge,
    )

    def improved(gauge: Transformed, steps: int) -> Transformed:
        return turn(problem, match(problem, gauge, generator), steps, learning_rate=learning_rate)

    before = problem.total(problem.at_rest())
    begun = {start: begin(problem, start) for start in dict.fromkeys(starts)}
    begun |= {start: given(problem, transforms) for start, transforms in initial.items()}
    probe = max(1, round(_PROBE * steps))
    tried = {start: improved(gauge, probe) for start, gauge in begun.items()}
    errors = {start: problem.total(gauge) for start, gauge in tried.items()}
    best = min(errors, key=lambda start: errors[start])
    gauge, history = tried[best], [errors[best]]
    for _ in range(max_rounds):
        gauge = improved(gauge, steps)
        history.append(problem.total(gauge))
        if history[-1] > (1 - tolerance) * history[-2]:
            break
    if history[-1] >= before:
        gauge, best, history = problem.at_rest(), "identity", [before]
    return Gauge(
        transforms=gauge,
        error_before=before,
        error_after=history[-1],
        start=best,
        errors=errors,
        streams=tuple(
            use
            for space in problem.streams
            if (use := stream_use(problem, space, gauge)) is not None
        ),
        history=tuple(history),
    )


def _check_initial(
    initial: Mapping[str, Sequence[Transforms]],
    starts: Sequence[str],
    spec: SymmetrySpec,
    num_models: int,
) -> None:
    if not starts and not initial:
        raise GaugeError(
            f"there is no start: name one of {list(STARTS)}, or give initial transforms"
        )
    for name, transforms in initial.items():
        if name in STARTS:
            raise GaugeError(f"initial {name!r} is the name of a start: choose another")
        if len(transforms) != num_models:
            raise GaugeError(
                f"initial {name!r} moves {len(transforms)} models; there are {num_models}"
            )
        if unknown := sorted({space for own in transforms for space in own} - set(spec.spaces)):
            raise GaugeError(f"initial {name!r} moves {unknown}, which are not in the spec")


def merge_layers(
    models: Sequence[Weights],
    spec: SymmetrySpec,
    grams: Sequence[Mapping[str, Gram]],
    transforms: Sequence[Transforms],
    *,
    ridge: float = 1e-3,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """W* of every layer under the transforms, in float64; biases where Grams have a constant.

    They are computed on `device`, by default the models', where they also lie in the end.
    """
    merged = {}
    for layer in layers_of(models, grams, spec, device):
        moved = transported(layer, spec, transforms)
        weight = closed_form(moved.weight_MOI, moved.gram_MII, ridge).to(device_of(models[0]))
        if layer.has_constant:
            if (bias := bias_of(layer.name)) in spec.layout:
                merged[bias] = weight[:, -1]
            weight = weight[:, :-1]
        stored = weight if layer.dim == 1 else weight.T
        merged[layer.name] = stored.reshape(models[layer.models[0]][layer.name].shape)
    return merged
