"""Check a spec by the model itself: random transforms must leave its outputs as they are.

Everything runs in float64 with parameters that are drawn at random, so that zeros and ones hide
nothing. What no output shows cannot be checked: a key bias, which softmax cancels, goes unnoticed.
"""

import contextlib
import copy
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as _Convolution
from torch.utils._pytree import tree_leaves, tree_map

from alloy.devices import beside
from alloy.errors import NotProvenError, SymmetryError
from alloy.symmetry.draws import random_transforms
from alloy.symmetry.float64 import Float64Shell, widened
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.tracing.recording.kernels import plain_kernels
from alloy.symmetry.tracing.recording.observe import Observe, observe_outputs
from alloy.symmetry.tracing.recording.refusals import refuse_untraceable
from alloy.symmetry.tracing.recording.trace import Inputs, listed_examples
from alloy.symmetry.transforms import Mover, Transforms, check_weights

TOLERANCE = 1e-9
"""Largest change of an output, relative to its spread, that counts as none (float64)."""
DEGENERATE = 1e-7
"""An output whose spread is below this part of its size proves nothing."""
_FAINT = 1e-6  # a spread over the batch below this part of the size is rounding
_HUGE = 1e30  # masks write the lowest number; it says nothing about the units


@dataclass(frozen=True)
class Validation:
    """Result of `validate`: the worst relative change, and the outputs that proved nothing."""

    worst_change: float
    spreads: tuple[float, ...]
    not_proven: tuple[int, ...]


def validate(
    model: nn.Module,
    spec: SymmetrySpec,
    example_inputs: Inputs | Sequence[Inputs],
    *,
    observe: Observe | None = None,
    trials: int = 3,
    seed: int = 0,
) -> Validation:
    """Check that random transforms leave a model's outputs unchanged, in float64.

    If an output changes by more than 1e-9 of its spread (standard deviation over the batch), each
    space is tried alone to find the culprit.

    Args:
        model: the module that was traced; it stays as it is.
        spec: the symmetries to check.
        example_inputs: keyword inputs of the model, or several.
        observe: as in `find_symmetries`.
        trials: number of random elements of the whole group.
        seed: of the random weights and transforms.

    Returns:
        The worst change, and the outputs that vary too little to prove anything.

    Raises:
        SymmetryError: an output changes; the message names the space.
        NotProvenError: no output varies enough to prove anything.
    """
    prober = Prober(model, spec, example_inputs, observe=observe, seed=seed)
    worst = 0.0
    for _ in range(trials):
        change = prober.change(random_transforms(spec, prober.generator))
        if not change <= TOLERANCE:
            raise SymmetryError(prober.accuse(change))
        worst = max(worst, change)
    return Validation(worst, prober.spreads, prober.not_proven)


class Prober:
    """A model with random weights, in float64, and the outputs it should keep."""

    def __init__(
        self,
        model: nn.Module,
        spec: SymmetrySpec,
        example_inputs: Inputs | Sequence[Inputs],
        *,
        observe: Observe | None = None,
        seed: int = 0,
    ) -> None:
        refuse_untraceable(model)
        if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
            raise SymmetryError(
                "validate computes with the model: it needs weights, not a meta model"
            )
        self.spec = spec
        self.observe = observe or observe_outputs
        self.generator = torch.Generator().manual_seed(seed)
        self.shell = _shell(model)
        self.examples = [
            tree_map(widened, beside(self.shell.module, example))
            for example in listed_examples(example_inputs)
        ]
        check_weights(self.shell.slots, spec)
        own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        buffers = set(dict(model.named_buffers()))
        self.weights = random_weights(own, buffers, self.generator)
        drawn = {name for name, tensor in own.items() if _is_drawn(name, tensor, buffers)}
        for name in spec.folded:
            self.weights[name] = widened(own[name].detach().cpu().clone())
        with unit_outputs(self.shell.module, self.weights, set(spec.folded)):
            self.run(self.weights.__getitem__)
        self.outputs = self.run(self.weights.__getitem__)
        self.spreads = tuple(_spread(y) for y in self.outputs)
        others = self.run(partial(self._other, changed=drawn - set(spec.folded)))
        self.not_proven = tuple(
            i
            for i, (y, other) in enumerate(zip(self.outputs, others, strict=True))
            if not self.spreads[i] > DEGENERATE * _scale(y) or _change(y, other) == 0
        )
        if len(self.not_proven) == len(self.outputs):
            raise NotProvenError(
                f"not proven: none of the {len(self.outputs)} outputs varies over the batch "
                f"(spreads {[f'{s:.1e}' for s in self.spreads]}) and with the weights: give inputs "
                "that differ, or another observe="
            )

    def _other(self, name: str, changed: Container[str]) -> Tensor:
        """Another weight of the same distribution: larger, its entries in the opposite order."""
        weight = self.weights[name]
        return 1.25 * weight.flip([*range(weight.ndim)]) if name in changed else weight

    def run(self, weight: Callable[[str], Tensor]) -> list[Tensor]:
        """The observed outputs of the model with the weights that `weight` makes."""
        outputs: list[Tensor] = []
        self.shell.module.train().eval()  # forget what other weights gave (LeViT's biases)
        with plain_kernels(self.shell.module), torch.no_grad(), torch.random.fork_rng():
            for example in self.examples:
                torch.manual_seed(0)
                observed = self._forward(copy.deepcopy(example), weight)
                outputs += [t.clone() for t in tree_leaves(observed) if isinstance(t, Tensor)]
        return outputs

    def _forward(self, example: dict[str, Any], weight: Callable[[str], Tensor]) -> Any:
        narrow = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of constants that the model's code makes
        try:
            with self.shell.reading(weight):
                return self.observe(self.shell.module(**example))
        except SymmetryError:
            raise
        except Exception as failure:
            raise NotProvenError(
                f"not proven: the model's forward fails in float64 ({type(failure).__name__}: "
                f"{str(failure).split(chr(10))[0]})"
            ) from failure
        finally:
            torch.set_default_dtype(narrow)

    def change(self, transforms: Transforms, weights: Mapping[str, Tensor] | None = None) -> float:
        """Measure the largest change of an output, relative to its spread, under transport."""
        mover = Mover(self.spec, transforms)

        def moved(name: str) -> Tensor:
            return mover.move(self.weights[name], name) if weights is None else weights[name]

        return max(
            _change(before, after) / self.spreads[i]
            for i, (before, after) in enumerate(zip(self.outputs, self.run(moved), strict=True))
            if i not in self.not_proven
        )

    def accuse(self, change: float) -> str:
        """Name the spaces that change the outputs on their own."""
        changes = {
            name: self.change({name: random_transforms(self.spec, self.generator)[name]})
            for name in (*self.spec.spaces, *self.spec.diagonals)
        }
        guilty = sorted(
            (n for n in changes if not changes[n] <= TOLERANCE), key=lambda n: -changes[n]
        )
        if not guilty:
            return (
                f"random transforms of all spaces change the outputs by {change:.1e} of their "
                "spread, although each space alone leaves them unchanged: a dependency between "
                "spaces is wrong"
            )
        worst = guilty[0]
        what = f"diagonal {worst!r}"
        if space := self.spec.spaces.get(worst):
            what = f"space {worst!r} ({space.kind}, {space.size} units)"
        return (
            f"{what} is no symmetry: a random transform of it changes the outputs by "
            f"{changes[worst]:.1e} of their spread, {TOLERANCE:.0e} is allowed; {len(guilty)} of "
            f"{len(changes)} spaces and diagonals do"
        )


def _shell(model: nn.Module) -> Float64Shell:
    try:
        return Float64Shell(model)
    except Exception as failure:
        raise NotProvenError(
            f"not proven: the model cannot be copied ({type(failure).__name__}: {failure})"
        ) from failure


@contextlib.contextmanager
def unit_outputs(
    model: nn.Module, weights: Mapping[str, Tensor], kept: Container[str]
) -> Generator[None]:
    """Rescale random weights while the model runs, so that no layer's signal dies or explodes.

    Each layer with a matrix (or kernels) is scaled as it first runs, so that its outputs differ
    over the batch by 1 (standard deviation; over everything where the batch agrees), its bias is
    moved so that they are near zero on average. Running statistics of norms are moved to those of
    their inputs. Weights in `kept` stay as they are, and so does what a module makes of several.
    """
    names = {id(p): name for name, p in [*model.named_parameters(), *model.named_buffers()]}
    done: set[str] = set()

    def first(tensor: Any) -> Tensor | None:
        """The weight behind a slot of the model, if it is to be scaled and was not yet."""
        name = names.get(id(tensor), "")
        if name not in weights or name in done or name in kept:
            return None
        done.add(name)
        return weights[name]

    def scale(module: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        spread = _spread(output)
        if not spread > _FAINT * _scale(output):
            spread = float(output.std()) if output.numel() > 1 else 0.0
        if not 0 < spread < _HUGE or (weight := first(module.weight)) is None:
            return None
        weight.div_(spread)
        output = output / spread
        if (bias := first(getattr(module, "bias", None))) is not None:
            drawn = bias.clone()
            bias.div_(spread)
            at = 1 if isinstance(module, _Convolution) else -1
            if output.shape[at] == bias.numel():
                shift = 0.3 * drawn - output.movedim(at, -1).flatten(0, -2).mean(0)
                bias.add_(shift)
                output = (output.movedim(at, -1) + shift).movedim(-1, at)
        return output

    def centre(module: Any, inputs: tuple[Tensor, ...]) -> None:
        mean, var = first(module.running_mean), first(module.running_var)
        if mean is not None and var is not None:
            x = inputs[0].transpose(0, 1).flatten(1)
            spread = x.var(1, correction=0)
            mean.add_(x.mean(1))
            var.mul_(spread + spread.mean())  # a channel that hardly varies is not blown up

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(getattr(module, "running_var", None), Tensor):
                stack.callback(module.register_forward_pre_hook(centre).remove)
            elif isinstance(weight, Tensor) and weight.ndim > 1 and not any(module.children()):
                stack.callback(module.register_forward_hook(scale).remove)
        yield


def random_weights(
    weights: Mapping[str, Tensor], buffers: Iterable[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights that hide nothing: no zeros, no ones, gains and variances positive.

    Matrices have rows of norm about 1.5: deep stacks neither fade nor explode. Of the buffers only
    constant ones (fresh batch statistics) are drawn; others may be tables or flags.
    """
    drawn: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    buffers = set(buffers)
    for name, tensor in weights.items():
        if id(tensor) in seen:
            drawn[name] = drawn[seen[id(tensor)]]
            continue
        seen[id(tensor)] = name
        old = tensor.detach()
        if not _is_drawn(name, tensor, buffers):
            drawn[name] = widened(old.cpu().clone())
        elif old.ndim >= 2 and old[0].numel() > 1:
            drawn[name] = _normal(old.shape, generator) * (1.5 / old[0].numel() ** 0.5)
        elif old.numel() and bool((old > 0).all()):
            drawn[name] = 0.5 + torch.rand(old.shape, generator=generator, dtype=torch.float64)
        else:
            drawn[name] = 0.3 * _normal(old.shape, generator)
    return drawn


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws in float32, which is several times as fast, as float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()


def _is_drawn(name: str, tensor: Tensor, buffers: Container[str]) -> bool:
    """True if `random_weights` draws a weight; of buffers it draws constant ones."""
    if not tensor.dtype.is_floating_point:
        return False
    return name not in buffers or (
        tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
    )


def _finite(y: Tensor) -> Tensor:
    return y.isfinite() & (y.abs() < _HUGE)


def _scale(y: Tensor) -> float:
    finite = y[_finite(y)]
    return float(finite.abs().mean()) if finite.numel() else 0.0


def _spread(y: Tensor) -> float:
    """Average standard deviation over the batch; over all elements if there is one example."""
    y = torch.where(_finite(y), y, 0)
    if y.ndim and y.shape[0] > 1:
        return float(y.std(0).mean())
    return float(y.std()) if y.numel() > 1 else 0.0


def _change(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape or not torch.equal(_finite(before), _finite(after)):
        return float("inf")
    finite = _finite(before)
    return float((before - after)[finite].abs().max()) if finite.any() else 0.0
