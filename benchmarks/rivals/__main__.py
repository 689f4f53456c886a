"""Rivals beside our merges, on FS-Merge's problem and on the modality experts, from few examples.

    python -m benchmarks.rivals             # both problems, some 60 CPU minutes
    python -m benchmarks.rivals experts     # one of them: vits, experts

Writes benchmarks/results/rivals.md. Beside our merges stand four ways to train, each described from
its paper and none from its code. All have one loss, the squared error to the parents' answers.

distillation      every weight, from the average
FS-Merge          W = Σ_m M_m W_m U_m for every merged layer (arXiv:2410.01483); M_m and U_m are a
                  diagonal and a product of rank 8, from the average on; folded into W at the end
learned matching  GLMC (arXiv:2506.22712): all members but the first move within their symmetries,
                  permutations by straight-through, so that the average is good; from weights and
                  activations matched, the shares drawn within a fifth of equal ones
dual              the same, and the first member moves as well (arXiv:2606.23607)
"""

import argparse
import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals import experts, vits
from benchmarks.rivals.experts import Experts
from benchmarks.rivals.methods import RIVALS, Merge
from benchmarks.rivals.table import LAYOUTS, Row, page
from benchmarks.rivals.vits import ViTs
from tasks.storage import write_file

RESULT = Path("benchmarks/results/rivals.md")
FOLDER = Path("benchmarks/results/rivals")  # a file a draw and number; an interrupted run goes on
PROBLEMS = {"vits": ViTs, "experts": Experts}
MERGES: Mapping[str, Mapping[str, Callable[[Any], Merge]]] = {
    "vits": vits.MERGES,
    "experts": experts.MERGES,
}
PARENT = "a parent"
DRAWS = (0, 1, 2)  # of the ViTs: pairs of parents


def run(name: str) -> None:
    """Measure the merges of one problem that have no row yet."""
    arms = {**MERGES[name], **RIVALS}
    for draw, num in product(DRAWS, LAYOUTS[name].numbers):
        file = FOLDER / f"{name}_{draw}_{num}.json"
        rows = read(file)
        missing = [arm for arm in (PARENT, *arms) if arm not in {row.arm for row in rows}]
        if not missing:
            continue
        problem = PROBLEMS[name](draw, num)
        for arm in missing:
            weights, seconds = (None, 0.0) if arm == PARENT else arms[arm](problem)
            scores = problem.parents() if weights is None else problem.score(weights)
            scores = {metric: round(score, 2) for metric, score in scores.items()}
            rows.append(Row(arm, scores, round(seconds, 1)))
            print(f"{name} {draw}, {num} {LAYOUTS[name].examples}: {rows[-1]}", flush=True)
            with write_file(file) as partial:
                made = ",\n".join(json.dumps(row._asdict()) for row in rows)
                partial.write_text(f"[\n{made}\n]\n")


def read(file: Path) -> list[Row]:
    """Read the rows that a draw has so far."""
    return [Row(**row) for row in json.loads(file.read_text())] if file.is_file() else []


def measured(name: str) -> dict[int, list[list[Row]]]:
    """Read a problem's rows, by number of examples and draw."""
    return {
        num: [read(file) for file in sorted(FOLDER.glob(f"{name}_*_{num}.json"))]
        for num in LAYOUTS[name].numbers
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("problem", nargs="?", choices=PROBLEMS)
    chosen = parser.parse_args().problem
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in [chosen] if chosen else PROBLEMS:
        run(name)
    results = {name: rows for name in PROBLEMS if any((rows := measured(name)).values())}
    with write_file(RESULT) as partial:
        partial.write_text(page(results))
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
