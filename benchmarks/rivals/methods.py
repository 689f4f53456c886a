"""The rivals: distillation, FS-Merge and learned matching, for any members of one student.

All train under one loss, that of the problem, for STEPS steps of Adam. A member is what is merged,
under the student's names; not every member need have every weight, and what no member has is
shared.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from alloy.gauge.objective import Turn, act
from alloy.gauge.problem import embedded
from alloy.symmetry import SymmetrySpec

STEPS, RATE, RANK = 200, 1e-3, 8
SHIFT = 2  # pixels

T = TypeVar("T")
Weights = dict[str, Tensor]
Maker = Callable[[], Weights]
Merge = tuple[Weights, float]
"""Merged weights, and the CPU seconds of all that they need."""


@dataclass(frozen=True)
class Matching:
    """Members that move within their symmetries."""

    moves: Sequence["Moves"]
    placed: Callable[[], tuple[list[Weights], Weights]]
    """Members and shared weights where the moves bring them; differentiable."""


class Problem(Protocol):
    """Members, the data, and what the parents answer to them."""

    student: nn.Module
    members: list[Weights]
    shared: Weights

    def __hash__(self) -> int: ...

    def loss(self, weights: Weights, generator: torch.Generator) -> Tensor:
        """Distance to the parents' answers on a batch that the generator chooses."""
        ...

    def matching(self, *, both: bool) -> Matching:
        """Members that move from a matched start: all but the first, or (`both`) all."""
        ...

    def refitted(self, merged: Weights, members: list[Weights], shared: Weights) -> Weights:
        """Least squares of every layer, from an average of these members on."""
        ...


def timed(make: Callable[[], T]) -> tuple[T, float]:
    """What is made, and the CPU seconds that it took."""
    start = time.process_time()
    made = make()
    return made, time.process_time() - start


def train(problem: Problem, parameters: Sequence[Tensor], made: Maker, seed: int = 0) -> Weights:
    """The weights after STEPS steps of Adam on the parameters that they are made of."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    for _ in range(STEPS):
        loss = problem.loss(made(), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return {name: tensor.detach().clone() for name, tensor in made().items()}


def mean_of(members: Sequence[Weights], shares: Sequence[float] | None = None) -> Weights:
    """The mean of each weight over the members that have it, in these shares or equal ones."""
    shares = [1 / len(members)] * len(members) if shares is None else shares
    result = {}
    for name in {name: None for member in members for name in member}:
        own = [(s, m[name]) for s, m in zip(shares, members, strict=True) if name in m]
        total = sum(share for share, _ in own)
        result[name] = torch.stack([share / total * tensor for share, tensor in own]).sum(0)
    return result


def distilled(problem: Problem) -> Weights:
    """Every weight is trained, from the average on."""
    start = {**problem.shared, **mean_of(problem.members)}
    free = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    return train(problem, [*free.values()], lambda: free)


def fs_merged(problem: Problem) -> Weights:
    """FS-Merge: matrices on both sides of every member's layer are trained, and folded."""
    generator = torch.Generator().manual_seed(0)
    start = {**problem.shared, **mean_of(problem.members)}
    free = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    layers: dict[str, list[tuple[Side, Tensor, Side]]] = {}
    for name, module in problem.student.named_modules():
        own = [member[key] for member in problem.members if (key := f"{name}.weight") in member]
        if isinstance(module, nn.Linear) and own:
            sizes = module.out_features, module.in_features
            layers[name] = [
                (Side(sizes[0], 1 / len(own), generator), weight, Side(sizes[1], 1.0, generator))
                for weight in own
            ]
            del free[f"{name}.weight"]

    def made() -> Weights:
        folded = {
            f"{name}.weight": sum(
                left.matrix() @ own @ right.matrix() for left, own, right in parts
            )
            for name, parts in layers.items()
        }
        return {**free, **folded}  # ty: ignore[invalid-explicit-return]

    sides = [
        parameter
        for parts in layers.values()
        for left, _, right in parts
        for parameter in (*left.parameters, *right.parameters)
    ]
    return train(problem, [*free.values(), *sides], made)


class Side:
    """A diagonal and a product of low rank, which starts at zero."""

    def __init__(self, size: int, diagonal: float, generator: torch.Generator) -> None:
        self.diagonal = torch.full((size,), diagonal, requires_grad=True)
        self.down = (torch.randn(RANK, size, generator=generator) / size**0.5).requires_grad_()
        self.up = torch.zeros(size, RANK, requires_grad=True)
        self.parameters = (self.diagonal, self.down, self.up)

    def matrix(self) -> Tensor:
        return self.diagonal.diag() + self.up @ self.down


class Moves:
    """A model's transforms as parameters: rotations by Cayley, permutations straight through.

    The spaces in `held` stay as they are.
    """

    def __init__(self, spec: SymmetrySpec, held: Sequence[str] = ()) -> None:
        self.spec, self.free = spec, {}
        for name, space in spec.spaces.items():
            if name in held:
                continue
            rank = space.size - (space.kind == "orthogonal fixing ones")
            start = torch.eye(rank) if space.kind == "permutation" else torch.zeros(rank, rank)
            start = start.repeat(*spec.batch_shape(name), 1, 1)
            self.free[name] = start.requires_grad_()

    def of(self, weights: Weights) -> Weights:
        """The weights under the transforms."""
        turns = {
            name: Turn(self.matrix(name), self.spec.spaces[name].depends_on) for name in self.free
        }
        return {name: self._moved(name, tensor, turns) for name, tensor in weights.items()}

    def _moved(self, name: str, tensor: Tensor, turns: Mapping[str, Turn]) -> Tensor:
        for dim, term in enumerate(self.spec.layout.get(name, ())):
            tensor = act(tensor, dim, term, turns)
        return tensor

    def matrix(self, name: str) -> Tensor:
        """The orthogonal matrix of a space that moves; differentiable."""
        free = self.free[name]
        if self.spec.spaces[name].kind == "permutation":
            hard = torch.eye(len(free))[_assigned(free.detach())]
            return hard + free - free.detach()
        half = (free - free.mT) / 2
        eye = torch.eye(free.shape[-1])
        turned = torch.linalg.solve(eye - half, eye + half)
        return embedded(self.spec, name, turned.double()).to(turned)


def _assigned(values: Tensor) -> Tensor:
    """The column of each row in the assignment of greatest value."""
    columns = values.argmax(1)
    if len(columns.unique()) == len(columns):  # as it is near the start
        return columns
    return torch.from_numpy(linear_sum_assignment(values.numpy(), maximize=True)[1])


def matched(problem: Problem, *, both: bool) -> tuple[Weights, list[Weights], Weights]:
    """The average where learned matching has brought the members; those, and what they share."""
    matching = problem.matching(both=both)
    generator = torch.Generator().manual_seed(1)

    def made() -> Weights:
        members, shared = matching.placed()
        shares = shares_of(len(members), generator) if torch.is_grad_enabled() else None
        return {**shared, **mean_of(members, shares)}

    merged = train(problem, [p for moves in matching.moves for p in moves.free.values()], made)
    with torch.no_grad():
        return merged, *matching.placed()


def shares_of(num: int, generator: torch.Generator) -> list[float]:
    """Shares that sum to 1, all but the last within a fifth of equal ones."""
    shares = [
        (0.8 + 0.4 * float(torch.rand((), generator=generator))) / num for _ in range(num - 1)
    ]
    return [*shares, 1 - sum(shares)]


def augmented(examples: Weights, num: int, generator: torch.Generator) -> Weights:
    """The examples and copies of them, `num` in all; the copies' images are shifted."""
    copies = [examples]
    while sum(map(_size, copies)) < num:
        steps = torch.randint(-SHIFT, SHIFT + 1, (_size(examples), 2), generator=generator).tolist()
        images = zip(examples["pixel_values"], steps, strict=True)
        moved = torch.stack([image.roll(step, (-2, -1)) for image, step in images])
        copies.append({**examples, "pixel_values": moved})
    return {name: torch.cat([copy[name] for copy in copies])[:num] for name in examples}


def _size(examples: Weights) -> int:
    return len(examples["pixel_values"])


@lru_cache(maxsize=1)
def _matched(problem: Problem, both: bool) -> tuple[tuple[Weights, list[Weights], Weights], float]:
    return timed(lambda: matched(problem, both=both))


def _average(problem: Problem, both: bool) -> Merge:
    (merged, _, _), seconds = _matched(problem, both)
    return merged, seconds


def _refitted(problem: Problem, both: bool) -> Merge:
    made, before = _matched(problem, both)
    merged, seconds = timed(lambda: problem.refitted(*made))
    return merged, before + seconds


RIVALS: Mapping[str, Callable[[Problem], Merge]] = {
    "distillation": lambda problem: timed(lambda: distilled(problem)),
    "FS-Merge": lambda problem: timed(lambda: fs_merged(problem)),
    "learned matching": partial(_average, both=False),
    "learned matching, least squares": partial(_refitted, both=False),
    "dual learned matching": partial(_average, both=True),
    "dual learned matching, least squares": partial(_refitted, both=True),
}
