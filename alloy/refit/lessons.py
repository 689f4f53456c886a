"""Lessons: data, teachers, and the weight of each teacher and of each answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.errors import MergeError

Batch = Mapping[str, Any]


def _call(module: nn.Module, batch: Batch) -> object:
    return module(**beside(module, batch))


def _own_masks(module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return beside(module, batch)


@dataclass(frozen=True)
class Units:
    """An affine map from the units of one model to those of another."""

    matrix: Tensor
    shift: Tensor

    def bring(self, x: Tensor, dim: int) -> Tensor:
        """Activations whose units lie along `dim`, in the other model's units."""
        brought = x.movedim(dim, -1) @ self.matrix.T.to(x) + self.shift.to(x)
        return brought.movedim(-1, dim)


@dataclass(frozen=True)
class Sensitivity:
    """The change of a model's answers with a layer's outputs (`alloy.refit.sensitivity`).

    The mean over examples of what an error e of the layer's outputs does to the answers, squared,
    is taken to be the mean of the sum over samples n of s_n e_nᵀ H e_n.
    """

    samples: Sequence[Sequence[Tensor]]
    """s, by batch and by call: shaped as the layer's outputs, without their units."""
    units_GOO: Tensor
    """H of the units of each group, float64, the mean of its diagonal 1."""


@dataclass(frozen=True)
class Teacher:
    """A model that the student follows, in evaluation mode."""

    module: nn.Module
    layers: Mapping[str, str] | None = None
    """Student's layer -> what it is called here; by default all that can be fitted, by their own
    names.
    """
    units: Mapping[str, Units] = field(default_factory=dict)
    """By student's layer, what brings what it writes into the student's units; by default they are
    these.
    """

    def in_students_units(self, layer: str, target: Tensor, dim: int) -> Tensor:
        """Bring what a layer of the teacher computes into the student's units, along a dim."""
        return self.units[layer].bring(target, dim) if layer in self.units else target


@dataclass(frozen=True)
class Lesson:
    """Data, the teachers that the student follows on them, and how to run any of these models."""

    teachers: Sequence[Teacher]
    batches: Iterable[Batch]
    """Read once for all layers that read one tensor."""
    shares: Tensor | None = None
    """[P] or [P, examples] of column sums 1: how much each teacher counts; equally by default."""
    forward: Callable[[Any, Batch], object] = _call
    masks: Callable[[Any, Batch], Mapping[str, Tensor]] = _own_masks
    """The masks of samples that count, by names as `alloy.statistics.masks` knows them; by default
    in the batch.
    """
    sensitivities: Mapping[str, Sensitivity] | None = None
    """By student's layer, of the teacher (there is one then); by default all samples and units
    count alike.
    """
    places: Mapping[str, str] | None = None
    """Layer -> the module of the student in which this lesson's data reach it, for a student that
    has one layer in several places (towers that share a trunk, `alloy.trunk`). By default a layer
    is called what its module is.
    """

    def shares_of(self, start: int, size: int) -> Tensor:
        """The weight of each teacher in the next examples, [P, size or 1]."""
        num = len(self.teachers)
        if self.shares is None:
            return torch.full((num, 1), 1 / num, dtype=torch.float64)
        if self.shares.ndim == 1:
            return self.shares[:, None]
        return self.shares[:, start : start + size]

    def weights_of(self, layer: str, batch: int) -> Sequence[Tensor]:
        """The weight of a layer's samples in each of its calls; () where all count alike.

        Raises:
            MergeError: sensitivities of other layers or fewer batches.
        """
        if self.sensitivities is None:
            return ()
        if layer not in self.sensitivities:
            raise MergeError(f"the sensitivities lack {layer}: they were taken of other layers")
        samples = self.sensitivities[layer].samples
        if batch >= len(samples):
            raise MergeError(
                f"the sensitivities of {layer} are of {len(samples)} batches, not of these"
            )
        return samples[batch]
