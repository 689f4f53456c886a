"""The study of the paper's three factors in the miniature, over seeds (params/study.yaml).

    python -m benchmarks.rerun benchmarks/study     # all that is stale: about 3 CPU hours
    python -m benchmarks.study train 0       # every run of pre-training of one seed
    python -m benchmarks.study measure 0     # its arms: scores and distances, without training
    python -m benchmarks.study tune 0        # the arms that are fine-tuned
    python -m benchmarks.study table         # benchmarks/results/study.md, of what is there
    python -m benchmarks.study figures       # docs/figures/study_*.svg, of what is there
    python -m benchmarks.study publish       # both, and the numbers of docs/study.md and results.md

Each goes on where it was stopped: runs from their last step checkpoint, rows from the last one in
benchmarks/results/study/. To finish one seed after the other:

    for seed in 0 1 2; do python -m benchmarks.rerun benchmarks/study tune@$seed; done
    python -m benchmarks.rerun benchmarks/study
"""

import argparse
import sys

import torch

from benchmarks.study.figures import figures
from benchmarks.study.measure import measure, tune
from benchmarks.study.page import page
from benchmarks.study.params import study
from benchmarks.study.table import table
from benchmarks.study.train import train
from tasks.recipe.section import ParamsError

OF_A_SEED = {"train": train, "measure": measure, "tune": tune}
OF_ALL = {"table": [table], "figures": [figures], "publish": [table, figures, page]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in OF_A_SEED:
        commands.add_parser(name).add_argument("seed", type=int)
    for name in OF_ALL:
        commands.add_parser(name)
    given = parser.parse_args()
    torch.set_num_threads(1)  # numbers do not depend on the number of cores, as in evaluate
    try:
        if given.command in OF_ALL:
            for write in OF_ALL[given.command]:
                write()
            return
        if given.seed not in study().seeds:
            raise ParamsError(f"params/study.yaml: seeds are {study().seeds}, not {given.seed}")
        OF_A_SEED[given.command](given.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.study: {error}")


if __name__ == "__main__":
    main()
