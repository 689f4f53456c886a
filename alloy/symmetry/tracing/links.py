"""Relations that operations state between units: one dataclass for each.

A relation speaks of dims of tensors. What follows for the group of a space is worked out in
`kinds.py`, when all terms are final; which axes read a space, in `reads.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from alloy.symmetry.tracing.recording.log import Value

Slot = tuple[Value, int]
"""A dim of a tensor."""


class Link(ABC):
    """A relation between the units of some dims."""

    @property
    @abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """The dims that are related."""


@dataclass(frozen=True)
class _Pair(Link):
    source: Slot
    target: Slot

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.source, self.target


class Same(_Pair):
    """Units pass from one dim to the other untouched, or are added to them."""


class Homogeneous(_Pair):
    """A function f of each unit, or of it and others of its kind, with f(s x) = s f(x) for s > 0.

    ReLU and the largest value of a window are such.
    """


class Dual(_Pair):
    """Two dims are contracted: what multiplies one by M multiplies the other by its inverse."""


class Odd(_Pair):
    """An odd function of each unit: signs pass."""


class Even(_Pair):
    """An even function of each unit: signs are lost."""


@dataclass(frozen=True)
class Order(Link):
    """Anything else: the operation allows the units of the dim to be permuted and no more."""

    slot: Slot

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.slot,)


@dataclass(frozen=True)
class Shift(_Pair):
    """A constant is added to each unit."""

    constant: float


@dataclass(frozen=True)
class Gained(Link):
    """The target is a gain times what has a scale of its own, plus a bias if there is one."""

    target: Slot
    gain: Slot
    bias: Slot | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.target, self.gain, *([self.bias] if self.bias else [])


@dataclass(frozen=True)
class Total(Link):
    """The units of a dim are summed."""

    slot: Slot

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.slot,)


@dataclass(frozen=True)
class View(Link):
    """All dims of a tensor before and after a view: places of a space go over in their order."""

    before: tuple[Slot, ...]
    after: tuple[Slot, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        return *self.before, *self.after


@dataclass(frozen=True)
class Piece(Link):
    """`part` is the units [start, end) of `whole`."""

    whole: Slot
    part: Slot
    start: int
    end: int

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.whole, self.part


@dataclass(frozen=True)
class Beside(Link):
    """`part` is what is left of `whole` when `cut`, a dim beside it, is sliced to [start, end)."""

    whole: Slot
    part: Slot
    cut: Slot
    start: int
    end: int

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.whole, self.part, self.cut


@dataclass(frozen=True)
class _Binary(Link):
    left: Slot
    right: Slot
    out: Slot

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.left, self.right, self.out


class Times(_Binary):
    """Units are multiplied one by one: signs multiply."""


class Over(_Binary):
    """Units are divided one by one: signs multiply."""


class Windows(_Binary):
    """Each unit is multiplied by its own window of a convolution and summed: signs multiply."""


@dataclass(frozen=True)
class RootMeanSquare(Link):
    """The source over its root mean square, times a gain if there is one."""

    source: Slot
    target: Slot
    gain: Slot | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.source, self.target, *([self.gain] if self.gain else [])


@dataclass(frozen=True)
class Standardised(Link):
    """The source less its mean over its deviation, times a gain plus a bias if there are any."""

    source: Slot
    target: Slot
    gain: Slot | None
    bias: Slot | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.source, self.target, *(s for s in (self.gain, self.bias) if s)


@dataclass(frozen=True)
class Rotation(Link):
    """Pairs of units are multiplied as complex numbers.

    The units of a pair are `stride_before` apart in the source and `stride_after` in the target.
    """

    source: Slot
    target: Slot
    stride_before: int
    stride_after: int

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.source, self.target
