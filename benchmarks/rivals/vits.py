"""FS-Merge's problem: two ViTs of other starts that know other digits, and few images.

The parents are those of the multitask recipe. An example counts for a parent as much as that parent
is sure of it.
"""

import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from alloy.symmetry import transport
from benchmarks.gauge.multitask import aligned_by, fitted, make_pair, merges
from benchmarks.rivals.methods import Matching, Merge, Moves, Weights, augmented
from tasks.data.classification import DATASETS, WRITERS, classes, encode
from tasks.evaluation.loading import load_any
from tasks.evaluation.outputs import answers
from tasks.models.measures.yardsticks import Labelled, as_candidate

RELEASED = Path("released/multitask")
AUGMENTED, BATCH = 800, 100  # images with their shifted copies


class ViTs:
    """Two parents, the images, and what the parents answer to them."""

    def __init__(self, draw: int, num: int) -> None:
        parents = {name: load_any(RELEASED / f"mnist_vit_{name}{draw}") for name in "ac"}
        known = classes("mnist")
        split = DATASETS["mnist"].read()["train"]
        generator = torch.Generator().manual_seed(draw)
        rows = torch.randperm(len(split.labels), generator=generator)
        seen = encode(split.take(rows[:num]).examples, None)
        self.inputs = augmented(seen, AUGMENTED, generator)
        batches = [
            {name: tensor[i : i + BATCH] for name, tensor in self.inputs.items()}
            for i in range(0, AUGMENTED, BATCH)
        ]
        self.pair = make_pair(parents, batches, known)
        self.student = self.pair.model
        self.members, self.shared = list(self.pair.raw.values()), {}
        self.answers_PNC = torch.stack(
            [torch.cat([answers(parent, b).rows for b in batches]) for parent in parents.values()]
        )
        benchmark = WRITERS["mnist"].benchmark(
            seed=0, checkpoint=RELEASED / f"mnist_vit_a{draw}", validation=10, test=2000
        )
        self.yardstick = Labelled(benchmark["test"], known, 500)

    def score(self, weights: Weights) -> dict[str, float]:
        """Joint accuracy on test data, in per cent."""
        self.student.load_state_dict(weights)
        scores = self.yardstick.score([as_candidate(self.student)])
        return {"joint accuracy": scores["joint_accuracy"].value}

    def parents(self) -> dict[str, float]:
        """The score of the first parent alone."""
        return self.score(self.members[0])

    @cached_property
    def merges(self) -> dict[str, Merge]:
        """Our merges by name; what follows the gauge counts the search, too."""
        result: dict[str, Merge] = {}
        start = time.process_time()
        for name, weights, _ in merges(self.pair):
            seconds = time.process_time() - start
            if name == "gauge + least squares":
                seconds += result["gauge + closed form"][1]
            result[name] = weights, seconds
            start = time.process_time()
        return result

    def loss(self, weights: Weights, generator: torch.Generator) -> Tensor:
        """Squared error to the parents, each in its share of the example."""
        rows = torch.randint(AUGMENTED, (BATCH,), generator=generator)
        batch = {name: tensor[rows] for name, tensor in self.inputs.items()}
        logits_BC = functional_call(self.student, weights, (), batch).logits
        errors_PB = (logits_BC - self.answers_PNC[:, rows]).square().mean(-1)
        return (self.pair.shares_PN[:, rows] * errors_PB).sum(0).mean()

    def matching(self, *, both: bool) -> Matching:
        """The second parent, or both, from where `mudsc` has brought the second."""
        pair, other = self.pair, list(self.pair.raw)[1]
        first, second = pair.weights.values()
        aligned = aligned_by(pair, "mudsc", weight_share=0.5)
        second = transport(second, pair.folded, aligned.transforms[other])
        moves = [Moves(pair.folded) for _ in range(1 + both)]

        def placed() -> tuple[list[Weights], Weights]:
            return [moves[1].of(first) if both else first, moves[0].of(second)], {}

        return Matching(moves, placed)

    def refitted(self, merged: Weights, members: list[Weights], shared: Weights) -> Weights:
        """Least squares, each example as its surer parent has it."""
        del shared
        return fitted(self.pair, merged, dict(zip(self.pair.raw, members, strict=True)))


def _merge(problem: ViTs, name: str) -> Merge:
    return problem.merges[name]


_NAMES = (
    "average",
    "mudsc",
    "least squares",
    "mudsc + least squares",
    "closed form",
    "gauge + closed form",
    "gauge + least squares",
)
MERGES: Mapping[str, Callable[[ViTs], Merge]] = {n: partial(_merge, name=n) for n in _NAMES}
"""Our merges, of `benchmarks.gauge.multitask`."""
