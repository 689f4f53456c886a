"""Statistics of models, moved as an alignment moves the models.

Sums over the units of a space follow its units, and the Grams of a layer's inputs the spaces that
the layer reads: what a model collected before it was aligned becomes what it would collect after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from alloy.alignment.grams import transport_grams
from alloy.alignment.matching import is_identity
from alloy.alignment.moves import move_units
from alloy.alignment.report import is_orthogonal
from alloy.errors import AlignmentError
from alloy.statistics.sums import Place, Statistics, Warned
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transforms


def transport_statistics(
    statistics: Statistics,
    specs: Mapping[str, SymmetrySpec],
    transforms: Mapping[str, Transforms],
) -> Statistics:
    """The statistics that models would have after `transport` of each, by model.

    A space that some transform stretches is left out, with a warning: its sums do not say which
    side of the stretch they are of.

    Raises:
        AlignmentError: statistics of models without transforms; a space that a matrix turns, if the
            statistics lack the products within a model.
    """
    if missing := sorted(set(statistics.names) - set(transforms)):
        raise AlignmentError(
            f"statistics of {missing} cannot be moved: the alignment is of {sorted(transforms)}"
        )
    stretched = {
        space
        for own in transforms.values()
        for space, t in own.items()
        if t.matrix is not None and not is_orthogonal(t.matrix)
    }
    stretched |= {
        t.depends_on[-1]
        for own in transforms.values()
        for t in own.values()
        if t.scale is not None and not is_identity(t)
    }
    return replace(
        statistics,
        places={
            space: tuple(_PlaceMover(space, specs, transforms, place).moved() for place in places)
            for space, places in statistics.places.items()
            if space not in stretched
        },
        noticed=(*statistics.noticed, *map(_left_out, sorted(stretched & set(statistics.places)))),
        grams={
            name: transport_grams(grams, specs[name], transforms[name])
            for name, grams in statistics.grams.items()
        },
    )


class _PlaceMover:
    """Moves the sums of one place."""

    def __init__(
        self,
        space: str,
        specs: Mapping[str, SymmetrySpec],
        transforms: Mapping[str, Transforms],
        place: Place,
    ) -> None:
        self.space, self.specs, self.place = space, specs, place
        self.transforms = {name: _without_signs(t) for name, t in transforms.items()}
        if not place.keeps_sign:
            self.transforms = transforms

    def moved(self) -> Place:
        place = self.place
        return replace(
            place,
            sums={name: self._rows(total, name) for name, total in place.sums.items()},
            squares={name: self._squares(name) for name in place.squares},
            products={
                (a, b): self._rows(self._rows(product, a).T, b).T.contiguous()
                for (a, b), product in place.products.items()
            },
            samples={name: self._rows(x.T, name).T for name, x in place.samples.items()},
        )

    def _rows(self, units: Tensor, name: str) -> Tensor:
        """Units along the first dim, the batch of the spaces depended on flattened with them."""
        spec, transforms = self.specs[name], self.transforms[name]
        shape = (*spec.batch_shape(self.space), spec.spaces[self.space].size)
        moved = move_units(units.reshape(*shape, *units.shape[1:]), self.space, spec, transforms)
        return moved.reshape(units.shape)

    def _squares(self, name: str) -> Tensor:
        transform = self.transforms[name].get(self.space)
        if transform is None or transform.matrix is None:
            plain = {n: _without_signs({n: t})[n] for n, t in self.transforms[name].items()}
            spec = self.specs[name]
            shape = (*spec.batch_shape(self.space), spec.spaces[self.space].size)
            squares = self.place.squares[name]
            return move_units(squares.reshape(shape), self.space, spec, plain).flatten()
        if (name, name) not in self.place.products:
            raise AlignmentError(
                f"the alignment rotates space {self.space!r}: to move its sums of squares, collect "
                f"with joint=True, or collect again, of the aligned models"
            )
        product = self.place.products[name, name]
        return self._rows(self._rows(product, name).T, name).diagonal().clone()


def _left_out(space: str) -> Warned:
    return Warned(
        "unobserved space",
        f"the alignment stretches the units of space {space!r}: collect again, of the aligned "
        f"models, to compare them",
    )


def _without_signs(transforms: Transforms) -> Transforms:
    return {
        name: t if t.matrix is not None or t.permutation is None else replace(t, signs=None)
        for name, t in transforms.items()
    }
