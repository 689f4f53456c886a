"""A fold: what an adapter changes of one stored tensor, known from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alloy.checkpoint.format import Entry


@dataclass(frozen=True)
class Fold:
    """The tensor becomes `onto`, or stays the base's; then scaling * left @ right is added.

    The sum keeps the dtype of the base, computed in float32 or better and rounded once.
    """

    onto: Entry | None = None
    """The tensor that takes the base's place: of modules_to_save, a trained bias, embeddings."""
    left: Entry | None = None
    """`lora_B` [out, rank]; alone, the bias of `lora_B` [out]."""
    right: Entry | None = None
    """`lora_A` [rank, in]."""
    scaling: float = 1.0
    magnitude: Entry | None = None
    """DoRA: the norms [out] that the rows of the sum, as [out, in], are brought to."""
    turned: bool = False
    """The tensor is stored [in, out]: embeddings, and the Conv1D of GPT-2."""

    @property
    def entries(self) -> Iterator[Entry]:
        """The tensors of the adapter that are read."""
        for entry in (self.onto, self.left, self.right, self.magnitude):
            if entry is not None:
                yield entry
