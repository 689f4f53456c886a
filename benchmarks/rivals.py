"""Rivals on FS-Merge's problem: two ViTs of other starts and other tasks, and few images.

    python -m benchmarks.rivals             # writes benchmarks/results/rivals.md; 15 CPU minutes

The parents are those of the multitask recipe, each of which knows other digits. There are 16 or 100
images without labels, 800 with shifted copies, as FS-Merge has them (arXiv:2410.01483, table 1 and
3). Beside the merges of `benchmarks.gauge.multitask` stand four ways to train, each described from
its paper and none from its code. All have one loss: the squared error to what the parents answer,
where each example counts for a parent as much as that parent is sure of it.

distillation      every weight, from the average
FS-Merge          W = Σ_m M_m W_m U_m for every layer; M_m and U_m are a diagonal and a product of
                  rank 8, from the average on; folded into W at the end
learned matching  GLMC (arXiv:2506.22712): the second parent's stream, heads and neurons move within
                  its symmetries, permutations by straight-through, so that the average is good;
                  from weights and activations matched (`mudsc`), the share drawn from 0.4 to 0.6
dual              the same, and the first parent moves as well (arXiv:2606.23607)
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

from alloy.gauge.objective import Turn, act
from alloy.gauge.problem import embedded
from alloy.symmetry import SymmetrySpec, transport
from benchmarks.gauge.multitask import Batches, Pair, Weights, aligned_by, fitted, make_pair, merges
from tasks.data.classification import DATASETS, WRITERS, classes, encode
from tasks.evaluation.loading import load_any
from tasks.evaluation.outputs import answers
from tasks.models.measures.yardsticks import Labelled, as_candidate
from tasks.reports import markdown
from tasks.storage import write_file

RESULT = Path("benchmarks/results/rivals.md")
FOLDER = Path("benchmarks/results/rivals")  # a file a pair and number: an interrupted run goes on
RELEASED = Path("released/multitask")
SEEDS = (0, 1, 2)
NUMBERS = (16, 100)  # of images
AUGMENTED, SHIFT = 800, 2  # images with their shifted copies; pixels
STEPS, BATCH, RATE, RANK = 200, 100, 1e-3, 8

Parameters = Sequence[Tensor]
Maker = Callable[[], Weights]


class Problem:
    """Two parents, the images, and what the parents answer to them."""

    def __init__(self, seed: int, num: int) -> None:
        parents = {name: load_any(RELEASED / f"mnist_vit_{name}{seed}") for name in "ac"}
        known = classes("mnist")
        split = DATASETS["mnist"].read()["train"]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(split.labels), generator=generator)
        seen = encode(split.take(rows[:num]).examples, None)
        self.inputs = {name: shifted(tensor, generator) for name, tensor in seen.items()}
        self.pair = make_pair(parents, batches_of(self.inputs), known)
        self.answers_PNC = torch.stack(
            [
                torch.cat([answers(parent, b).rows for b in self.pair.batches])
                for parent in parents.values()
            ]
        )
        benchmark = WRITERS["mnist"].benchmark(
            seed=0, checkpoint=RELEASED / f"mnist_vit_a{seed}", validation=10, test=2000
        )
        self.yardstick = Labelled(benchmark["test"], known, 500)

    def score(self, weights: Weights) -> float:
        """Joint accuracy on test data, in per cent."""
        self.pair.model.load_state_dict(weights)
        return self.yardstick.score([as_candidate(self.pair.model)])["joint_accuracy"].value

    def train(self, parameters: Parameters, made: Maker, seed: int = 0) -> Weights:
        """The weights after STEPS steps of Adam on the parameters that they are made of."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(parameters, lr=RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(AUGMENTED, (BATCH,), generator=generator)
            batch = {name: tensor[rows] for name, tensor in self.inputs.items()}
            found_BC = functional_call(self.pair.model, made(), (), batch).logits
            errors_PB = (found_BC - self.answers_PNC[:, rows]).square().mean(-1)
            loss = (self.pair.shares_PN[:, rows] * errors_PB).sum(0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return {name: tensor.detach().clone() for name, tensor in made().items()}


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images and shifted copies, AUGMENTED in all."""
    copies = [images]
    while sum(map(len, copies)) < AUGMENTED:
        steps = torch.randint(-SHIFT, SHIFT + 1, (len(images), 2), generator=generator).tolist()
        moved = [image.roll(step, (-2, -1)) for image, step in zip(images, steps, strict=True)]
        copies.append(torch.stack(moved))
    return torch.cat(copies)[:AUGMENTED]


def batches_of(inputs: Weights) -> Batches:
    return [{k: v[i : i + BATCH] for k, v in inputs.items()} for i in range(0, AUGMENTED, BATCH)]


def mean_of(models: Sequence[Weights], shares: Sequence[float] = (0.5, 0.5)) -> Weights:
    return {
        name: sum(share * model[name] for share, model in zip(shares, models, strict=True))
        for name in models[0]
    }  # ty: ignore[invalid-explicit-return]


def distilled(problem: Problem) -> Weights:
    """Every weight is trained, from the average on."""
    start = mean_of(list(problem.pair.raw.values()))
    free = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    return problem.train([*free.values()], lambda: free)


def fs_merged(problem: Problem) -> Weights:
    """FS-Merge: matrices on both sides of every parent's layer are trained, and folded."""
    models, model = list(problem.pair.raw.values()), problem.pair.model
    generator = torch.Generator().manual_seed(0)
    free = {n: t.clone().requires_grad_() for n, t in mean_of(models).items()}
    layers: dict[str, list[tuple[Side, Side]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes = module.out_features, module.in_features
            layers[name] = [
                (Side(sizes[0], 0.5, generator), Side(sizes[1], 1.0, generator)) for _ in models
            ]
            del free[f"{name}.weight"]

    def made() -> Weights:
        folded = {
            f"{name}.weight": sum(
                left.matrix() @ own[f"{name}.weight"] @ right.matrix()
                for (left, right), own in zip(sides, models, strict=True)
            )
            for name, sides in layers.items()
        }
        return {**free, **folded}  # ty: ignore[invalid-explicit-return]

    sides = [p for pairs in layers.values() for pair in pairs for s in pair for p in s.parameters]
    return problem.train([*free.values(), *sides], made)


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
    """A model's transforms as parameters: rotations by Cayley, permutations straight through."""

    def __init__(self, spec: SymmetrySpec) -> None:
        self.spec, self.free = spec, {}
        for name, space in spec.spaces.items():
            rank = space.size - (space.kind == "orthogonal fixing ones")
            start = torch.eye(rank) if space.kind == "permutation" else torch.zeros(rank, rank)
            start = start.repeat(*spec.batch_shape(name), 1, 1)
            self.free[name] = start.requires_grad_()

    def of(self, weights: Weights) -> Weights:
        """The weights under the transforms."""
        turns = {
            name: Turn(self._matrix(name), s.depends_on) for name, s in self.spec.spaces.items()
        }
        return {name: self._moved(name, tensor, turns) for name, tensor in weights.items()}

    def _moved(self, name: str, tensor: Tensor, turns: Mapping[str, Turn]) -> Tensor:
        for dim, term in enumerate(self.spec.layout.get(name, ())):
            tensor = act(tensor, dim, term, turns)
        return tensor

    def _matrix(self, name: str) -> Tensor:
        free = self.free[name]
        if self.spec.spaces[name].kind == "permutation":
            rows, columns = linear_sum_assignment(free.detach().numpy(), maximize=True)
            hard = torch.zeros_like(free)
            hard[rows, columns] = 1
            return hard + free - free.detach()
        half = (free - free.mT) / 2
        eye = torch.eye(free.shape[-1])
        turned = torch.linalg.solve(eye - half, eye + half)
        return embedded(self.spec, name, turned.double()).to(turned)


def matched(problem: Problem, *, both: bool) -> tuple[Weights, dict[str, Weights]]:
    """The average of the parents where learned matching has brought them, and the moved parents."""
    pair: Pair = problem.pair
    other = list(pair.raw)[1]
    first, second = pair.weights.values()
    aligned = aligned_by(pair, "mudsc", weight_share=0.5)
    second = transport(second, pair.folded, aligned.transforms[other])
    moves = [Moves(pair.folded) for _ in range(1 + both)]
    generator = torch.Generator().manual_seed(1)

    def models() -> list[Weights]:
        return [moves[1].of(first) if both else first, moves[0].of(second)]

    def made() -> Weights:
        drawn = 0.4 + 0.2 * float(torch.rand((), generator=generator))
        share = drawn if torch.is_grad_enabled() else 0.5
        return mean_of(models(), (share, 1 - share))

    merged = problem.train([p for move in moves for p in move.free.values()], made)
    with torch.no_grad():
        moved = dict(zip(pair.weights, models(), strict=True))
    return merged, moved


def measure(seed: int, num: int) -> Iterator[tuple[str, float, float]]:
    """Arm, joint accuracy, CPU seconds."""
    problem = Problem(seed, num)
    first = next(iter(problem.pair.raw.values()))
    yield "a parent", problem.score(copy.deepcopy(first)), 0.0
    start = time.process_time()
    for name, weights, _ in merges(problem.pair):
        yield name, problem.score(weights), time.process_time() - start
        start = time.process_time()
    for name, arm in (("distillation", distilled), ("FS-Merge", fs_merged)):
        start = time.process_time()
        weights = arm(problem)
        yield name, problem.score(weights), time.process_time() - start
    for name, both in (("learned matching", False), ("dual learned matching", True)):
        start = time.process_time()
        weights, moved = matched(problem, both=both)
        seconds = time.process_time() - start
        yield name, problem.score(weights), seconds
        weights = fitted(problem.pair, weights, moved)
        yield f"{name}, least squares", problem.score(weights), time.process_time() - start


def page(found: Mapping[tuple[str, int], list[tuple[float, float]]]) -> str:
    """The results as Markdown."""
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        cells = [_shown([score for score, _ in found.get((arm, num), [])]) for num in NUMBERS]
        seconds = [s for num in NUMBERS for _, s in found.get((arm, num), [])]
        rows.append([arm, *cells, f"{fmean(seconds):.0f}"])
    header = ["merge", *(f"{num} images" for num in NUMBERS), "CPU s"]
    return (
        "# Rivals on two ViTs of other starts and other tasks\n\n"
        "`python -m benchmarks.rivals`. Joint accuracy in per cent on 2,000 test digits, mean and\n"
        "standard deviation over three pairs of parents without a common start. All see the same\n"
        f"images without labels, {AUGMENTED} with shifted copies; what trains takes {STEPS} steps\n"
        f"of {BATCH} images at {RATE}, not tuned. Rivals are written from their papers.\n"
        f"\n{markdown.table(header, rows, num_names=1)}\n"
    )


def _shown(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed, num in product(SEEDS, NUMBERS):
        file = FOLDER / f"{seed}_{num}.json"
        if not file.is_file():
            rows = []
            for arm, score, seconds in measure(seed, num):
                rows.append([arm, round(score, 2), round(seconds, 1)])
                print(f"{seed}, {num} images: {rows[-1]}", flush=True)
            file.write_text(json.dumps(rows) + "\n")
        for arm, score, seconds in json.loads(file.read_text()):
            found.setdefault((arm, num), []).append((score, seconds))
        with write_file(RESULT) as partial:
            partial.write_text(page(found))
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
