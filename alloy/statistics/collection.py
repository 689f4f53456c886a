"""Statistics of several models' units on the same calibration data, in one streaming pass.

The models run side by side on each batch. Every space is observed where it is computed, at all
tokens of all blocks (`alloy.statistics.points`), and enters as sums (`alloy.statistics`): of each
unit, of its square, and of its product with every unit of the other models. With
`units="written"`, units that are linear in others that are observed (queries, keys, values, the
units of an MLP before its activation function) need no products of their own: cov(Wx, Vy) =
W cov(x, y) Vᵀ. Spaces that no module shows are read where a weight is multiplied
(`alloy.statistics.operands`), mixtures of experts with every expert on every token, so that all
models see the same.

Products are float32 matrix products of one batch, taken about a fixed centre (the first batch's
mean) so that large means cancel before they are squared, and added up in float64. Grams, whose
small eigenvalues least squares divides by, are float64 throughout. Units of experts can be too many
to multiply all with all: then the first MOST_SAMPLES tokens are kept as they are.

Shape legend: N tokens, D units of a point.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from typing import Literal

import torch
from torch import nn

from alloy.devices import device_of
from alloy.errors import CollectionError
from alloy.processes import ALONE, Processes
from alloy.statistics.observer import Observer, Seen
from alloy.statistics.points import LinearImage, linear_images
from alloy.statistics.products import Mapped, Products
from alloy.statistics.running import RunningSums, in_rounds
from alloy.statistics.sums import Pair, Statistics
from alloy.symmetry.parts import by_blocks
from alloy.symmetry.spec import SymmetrySpec
from alloy.types import Batch


@torch.no_grad()
def collect(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    *,
    joint: bool = False,
    grams: bool = False,
    pairs: Sequence[Pair] | None = None,
    units: Literal["written", "read"] = "read",
    processes: Processes = ALONE,
    threads: int = 1,
) -> Statistics:
    """Run calibration data through models side by side and sum up what their units compute.

    Padding does not count. An `attention_mask` [batch, tokens] applies to every activation with
    those tokens, a `decoder_attention_mask` to those of the decoder (without one, all
    `decoder_input_ids` count). Activations with other tokens, such as image patches or a pooled
    state, count whole.

    Args:
        models: modules by name, in evaluation mode; at least one. They may differ in sizes alone.
        batches: keyword inputs of the models' forward; moved to each model's device.
        spec: the symmetries of all models, or those of each by name where their widths differ.
        joint: also sum the products of units within a model, as merging units within a model needs.
        grams: also sum the Grams of the inputs of all linear layers.
        pairs: the pairs of models whose units are compared, all by default.
        units: "read", as the next layer sees them and as the papers compare them; or "written", as
            linear layers compute them, before any activation function. The latter costs next to
            nothing, because the moments of a linear image follow from those of its source
            (`alloy.statistics.points.linear_images`), and up to 3.6 points of joint accuracy on
            MLPs. Spaces that are no linear image are always read.
        processes: those that see the batches in turns, each given the same models and all batches.
        threads: how many models, and products of theirs, are computed at once on the CPU.

    Returns:
        The sums, as one immutable value, bit for bit the same in any number of processes and
        threads.

    Raises:
        CollectionError: models whose spaces differ or that see different tokens; activations that
            are not finite; no batches, or fewer than processes.
        MaskError: a mask that may belong to either of two token sequences.
    """
    running = RunningSums(processes)
    observers = _observers(models, spec, units, grams, running)
    products = Products(_pairs(tuple(models), pairs, joint), observers, running)
    with _several_at_once(threads) as mapped:
        for number, (batch, round_ends) in enumerate(in_rounds(batches, processes)):
            if batch is not None:
                alone = number == 0 or not _may_run_at_once(observers)
                seen = (
                    _one_by_one(observers, batch) if alone else _at_once(observers, batch, mapped)
                )
                products.add(seen, number, mapped)
            if number == 0:
                _share_centres(observers, processes)
            if round_ends:
                running.end_round()
    products.reduce()
    return products.statistics()


@contextmanager
def _several_at_once(threads: int) -> Generator[Mapped]:
    """A `map` on several threads, each computing what it would alone."""
    if threads < 2:
        yield map
        return
    given = (torch.get_num_threads(),)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=given) as pool:
        yield pool.map


def _one_by_one(observers: Mapping[str, Observer], batch: Batch) -> dict[str, Seen]:
    draw = torch.random.get_rng_state()  # models that draw (masks, noise) draw the same
    seen = {}
    for name, observer in observers.items():
        torch.random.set_rng_state(draw)
        seen[name] = observer.run(batch)
    return seen


def _may_run_at_once(observers: Mapping[str, Observer]) -> bool:
    """Return True if threads would share no state: no random draws, no operands, no device."""
    return not torch.is_autocast_enabled("cpu") and all(
        o.draws is False and not o.operands and device_of(o.model).type == "cpu"
        for o in observers.values()
    )


def _at_once(observers: Mapping[str, Observer], batch: Batch, mapped: Mapped) -> dict[str, Seen]:
    run = torch.no_grad()(lambda observer: observer.run(batch))
    return dict(zip(observers, mapped(run, observers.values()), strict=True))


def planned_bytes(
    models: Mapping[str, nn.Module],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    *,
    joint: bool = False,
    grams: bool = False,
    pairs: Sequence[Pair] | None = None,
    units: Literal["written", "read"] = "read",
) -> int:
    """The most bytes that the sums of `collect` take on the models' device, before it runs.

    They are float64 and grow with the square of the widths, not with the data. They take less where
    layers turn out to read one tensor.
    """
    observers = _observers(models, spec, units, grams, RunningSums())
    sizes = {name: observer.sizes() for name, observer in observers.items()}
    products = Products(_pairs(tuple(models), pairs, joint), observers, RunningSums())
    entries = sum(2 * size for own in sizes.values() for size in own.values())
    entries += sum(
        sizes[a][key] * sizes[b][key] for a, b in products.pairs for key in products.multiplied()
    )
    for observer in observers.values():
        blocks = (size for weight in observer.inputs for size in observer.gram_sizes(weight))
        entries += sum(rows * columns for rows, columns in blocks)
    return entries * torch.float64.itemsize


def _observers(
    models: Mapping[str, nn.Module],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    units: Literal["written", "read"],
    grams: bool,
    running: RunningSums,
) -> dict[str, Observer]:
    specs = dict.fromkeys(models, spec) if isinstance(spec, SymmetrySpec) else dict(spec)
    _check(models, specs)
    images = _common_images(models, specs) if units == "written" else dict.fromkeys(models, ())
    observers = {
        name: Observer(name, model, specs[name], images[name], grams, running)
        for name, model in models.items()
    }
    _require_same_spaces(list(observers.values()))
    return observers


def _share_centres(observers: Mapping[str, Observer], processes: Processes) -> None:
    """Give every process the means of the first batch, about which all of them sum."""
    if processes.size == 1:
        return
    own = {n: {key: c.cpu() for key, c in o.centres.items()} for n, o in observers.items()}
    first = processes.from_first(own)
    for name, observer in observers.items():
        device = device_of(observer.model)
        observer.centres = {key: centre.to(device) for key, centre in first[name].items()}
        observer.centres_are_known = True


def _check(models: Mapping[str, nn.Module], specs: Mapping[str, SymmetrySpec]) -> None:
    if not models:
        raise CollectionError("no models to observe")
    for name, model in models.items():
        if name not in specs:
            raise CollectionError(f"model {name!r} has no spec, only {sorted(specs)} do")
        if model.training:
            raise CollectionError(f"model {name!r} is in training mode: call eval() first")


def _common_images(
    models: Mapping[str, nn.Module], specs: Mapping[str, SymmetrySpec]
) -> dict[str, list[LinearImage]]:
    """The linear images of all models: of other widths others may be worth while."""
    images = {
        n: linear_images(specs[n], dict(model.named_modules())) for n, model in models.items()
    }
    common = set.intersection(*({i.units.space for i in own} for own in images.values()))
    common = {space for space in common if not any(by_blocks(s, space) for s in specs.values())}
    return {n: [i for i in own if i.units.space in common] for n, own in images.items()}


def _require_same_spaces(observers: Sequence[Observer]) -> None:
    first, *others = observers
    for other in others:
        for what, ours, theirs in (
            ("space", first.spec.spaces, other.spec.spaces),
            ("point", first.units, other.units),
        ):
            for name in (*ours, *theirs):
                if (name in ours) != (name in theirs):
                    owner, lacking = (first, other) if name in ours else (other, first)
                    raise CollectionError(
                        f"the specs of models {first.name!r} and {other.name!r} differ: "
                        f"{owner.name!r} has the {what} {name!r}, {lacking.name!r} has not"
                    )


def _pairs(names: tuple[str, ...], pairs: Sequence[Pair] | None, joint: bool) -> list[Pair]:
    if unknown := sorted({name for pair in pairs or () for name in pair} - set(names)):
        raise CollectionError(f"pairs of models {unknown}, which are not among {list(names)}")
    chosen = list(combinations(names, 2)) if pairs is None else list(pairs)
    return [*chosen, *((name, name) for name in names)] if joint else chosen
