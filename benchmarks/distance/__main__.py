"""The study of distances: whether they predict how well weights merge.

arXiv:2304.14933 claims so; this study tests it on a sweep of merges. For every distance and outcome
it gives Pearson's and Spearman's correlation over the merges of the sweep, each with a 95 %
confidence interval and the number of merges. A good indicator correlates negatively with scores.

    python -m benchmarks.distance SWEEP

SWEEP is either a folder that holds the reports of several runs (each with plots/scores.json and
plots/distances.json, as `evaluate` writes them; distances are averaged over the pairs of experts,
arms are also compared each with itself across runs), or a YAML file that lists merges of any
checkpoints:

    keep: 0.2              # see alloy.distance
    zeros: exclude
    truncation: tensor
    merges:
      - name: a-b
        checkpoints: [models/a, models/b]  # distances are averaged over pairs
        base: models/seed                  # null: distances of weights; otherwise of task vectors
        outcomes: {accuracy: 61.2}

or a YAML file that describes merges of a modality recipe whose units are reordered, such as
benchmarks/distance/permuted.yaml; they are then made, measured and merged.

Writes the table to the terminal and to reports/distance/<SWEEP>.json.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.distance.study import CONFIDENCE, correlations, from_file, from_reports, table
from tasks.recipe.section import ParamsError
from tasks.storage import write_json

REPORTS = Path("reports")


def main(sweep: Path) -> Path:
    """Measure the merges of a sweep, print and write the correlations; return the file's path."""
    if not sweep.exists():
        raise ParamsError(
            f"{sweep} does not exist; give a folder of reports or a YAML file of merges"
        )
    merges = from_reports(sweep) if sweep.is_dir() else from_file(sweep)
    if len(merges) < 2:
        raise ParamsError(f"{sweep}: a correlation needs at least 2 merges, this has {len(merges)}")
    rows = correlations(merges)
    Console().print(table(rows))
    output = REPORTS / "distance" / f"{sweep.resolve().stem}.json"
    write_json(
        output,
        {
            "confidence": CONFIDENCE,
            "merges": [asdict(merge) for merge in merges],
            "correlations": [asdict(row) for row in rows],
        },
    )
    print(f"{len(merges)} merges, {len(rows)} correlations: {output}")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", type=Path, help="a folder of reports, or a YAML file of merges")
    try:
        main(parser.parse_args().sweep)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.distance: {error}")
