"""The study of the gauge: what it buys without training, and where it stops (docs/gauge.md).

    python -m benchmarks.rerun benchmarks/gauge    # all that is stale: up to 210 CPU minutes
    python -m benchmarks.gauge train d96_m1_s0    # one model of params/gauge.yaml
    python -m benchmarks.gauge measure d96_m1_s0  # its merges; also of specific, wide144 ...
    python -m benchmarks.gauge ablate             # what may turn, calibration, starts
    python -m benchmarks.gauge multitask          # the multitask recipe's ViTs and BERTs
    python -m benchmarks.gauge finetune           # the recipe's fine-tuning afterwards
    python -m benchmarks.gauge cost               # search and least squares against width and depth
    python -m benchmarks.gauge figures            # docs/figures/gauge*.svg
    python -m benchmarks.gauge table              # benchmarks/results/gauge.md

Models go to models/gauge/, measurements to benchmarks/results/gauge/<stage>.json. A draw is a set
of training scenes and captions without labels. Every choice is made on the validation split, and
all scores are of that split, except those after fine-tuning. The study needs `data/modality` and
`data/multitask` (`python -m tasks.prepare RECIPE`), which `dvc repro` makes.
"""

import argparse
import sys

import torch

from alloy.errors import nearest
from benchmarks.gauge import merges
from benchmarks.gauge.ablate import ablate
from benchmarks.gauge.cost import cost
from benchmarks.gauge.figures import figures
from benchmarks.gauge.finetune import measure as finetune
from benchmarks.gauge.measure import measure
from benchmarks.gauge.multitask import measure as multitask
from benchmarks.gauge.params import study
from benchmarks.gauge.table import table
from benchmarks.gauge.train import train
from tasks.recipe.section import ParamsError


def _measure(name: str) -> None:
    params = study()
    released = params.measure.released
    known = [*released, *params.retrained, *params.models, *params.widened]
    if name not in known:
        raise ParamsError(f"{name!r} is no parent of params/gauge.yaml: {nearest(name, known)}")
    draws = released.get(name, params.measure.draws)
    every_arm = name in released or name in params.retrained
    merges.write(f"measure_{name}", list(measure(name, draws, every_arm=every_arm)))


def _ablate() -> None:
    params = study().ablate
    merges.write("ablate", list(ablate(params.parent, params.draws, params.examples)))


def _multitask() -> None:
    merges.write("multitask", list(multitask(study().multitask.sets)))


def _finetune() -> None:
    params = study().finetune
    merges.write("finetune", list(finetune(params.parent, params.runs)))


def _cost() -> None:
    merges.write("cost", list(cost()))


OF_A_MODEL = {"train": train, "measure": _measure}
OF_ALL = {
    "ablate": _ablate,
    "multitask": _multitask,
    "finetune": _finetune,
    "cost": _cost,
    "figures": figures,
    "table": table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gauge",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in OF_A_MODEL:
        commands.add_parser(name).add_argument("model")
    for name in OF_ALL:
        commands.add_parser(name)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if arguments.command in OF_A_MODEL:
            OF_A_MODEL[arguments.command](arguments.model)
        else:
            OF_ALL[arguments.command]()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.gauge: {error}")


if __name__ == "__main__":
    main()
