"""Cost of a whole recipe of real sentence encoders, stage by stage: the CPU seconds of every stage.

    python -m benchmarks.sentences run FOLDER        in an empty or half-done workspace FOLDER
    python -m benchmarks.sentences table FOLDER      the table of what was measured so far

FOLDER has `sentences.jsonl` (column `text`, 1,000 rows) and four checkpoints of one architecture:
`given/base` (all-MiniLM-L6-v2), `given/one` and `given/two` (fine-tunes of it), `given/planted`
(the base with its units in another order). Three sets, six alignments, eight arms, curves of two.
Started again, it goes on with the stages that are missing. Each stage measures itself
(`.alloy/runs`), its jobs' processes included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from tasks.workers import num_cores

RESULTS = Path("benchmarks/results/sentences.md")
STAGES = ("fetch", "prepare", "collect", "align", "merge", "choose", "evaluate")
NAME = "sentences"
RECIPE = {
    "kind": "models",
    "fetch": {"checkpoints": {n: f"given/{n}" for n in ("base", "one", "planted", "two")}},
    "sets": {
        name: {"members": {0: pair}, "calibration": "text"}
        for name, pair in {
            "start": ["base", "one"],
            "planted": ["base", "planted"],
            "tunes": ["one", "two"],
        }.items()
    },
    "prepare": {
        "seed": 0,
        "calibration": {
            "text": {
                "dataset": "sentences.jsonl",
                "column": "text",
                "examples": 1000,
                "tokens": 32,
            }
        },
    },
    "collect": {"batch_size": 32, "joint": False, "grams": True},
    "align": {
        "alignments": {
            "identity": {"preset": "identity"},
            "git_rebasin": {"preset": "git_rebasin"},
            "dual": {"preset": "dual"},
            "mudsc": {"preset": "mudsc", "settings": {"weight_share": 0.5}},
            "searched": {
                "preset": "dual",
                "settings": {"weight_share": "search"},
                "score": "merge",
            },
            "orthogonal_heads": {"preset": "orthogonal", "settings": {"fold": False}},
        }
    },
    "merge": {
        "result": {"set": "start", "seed": 0, "arm": "ours"},
        "arms": {
            "average": {"alignment": "identity", "method": "linear"},
            **{
                name: {"alignment": name, "method": "linear"}
                for name in ("git_rebasin", "dual", "searched", "orthogonal_heads", "mudsc")
            },
            "regmean": {"alignment": "searched", "method": "regmean"},
            "ours": {
                "alignment": "searched",
                "method": "linear",
                "repair": {"permuted_least_squares": {"targets": "mean", "residual": True}},
            },
        },
    },
    "evaluate": {
        "batch_size": 50,
        "tssd_keep": 0.2,
        "path_points": 5,
        "curves": ["identity", "searched"],
    },
    "register": {"name": "alloy-sentences", "model": "merged"},
}


def write(folder: Path) -> None:
    """The recipe, in a workspace of its own."""
    params = folder / "params"
    params.mkdir(exist_ok=True)
    (params / "recipes.yaml").write_text(yaml.safe_dump({"recipes": [NAME]}))
    (params / f"{NAME}.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))


def run(folder: Path) -> None:
    """Run the stages that have not ended well yet."""
    write(folder)
    here = {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    for stage in STAGES:
        if stage not in _measured(folder):
            command = [sys.executable, "-m", f"tasks.{stage}", NAME]
            print(f"{stage}: load {os.getloadavg()[0]:.1f} at {time.strftime('%H:%M')}", flush=True)
            subprocess.run(command, cwd=folder, env={**os.environ, **here}, check=True)


def _measured(folder: Path) -> dict[str, dict]:
    """The last run of each stage that ended well."""
    rows = {}
    for file in sorted((folder / ".alloy/runs").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if not row["failed"]:
                rows[row["stage"]] = row
    return rows


def table(folder: Path) -> Iterator[str]:
    """The page of what was measured."""
    rows = _measured(folder)
    yield "# Cost of a recipe of sentence encoders"
    yield ""
    yield f"`python -m benchmarks.sentences`; {num_cores()} cores, which other work shared, so that"
    yield "CPU seconds (of all processes of a stage) say more than the clock. Three sets, six"
    yield "alignments, eight arms, 1,000 sentences of 32 tokens."
    yield ""
    yield "| stage | CPU s | clock s | peak MB |"
    yield "|---|---|---|---|"
    for stage in STAGES:
        if stage in rows:
            row = rows[stage]
            peak = row["peak_memory"] / 1e6
            yield f"| {stage} | {row['cpu_seconds']:.0f} | {row['seconds']:.0f} | {peak:,.0f} |"
    total = sum(rows[stage]["cpu_seconds"] for stage in STAGES if stage in rows)
    yield f"| together | {total:.0f} | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.what == "run":
        run(given.folder)
    RESULTS.write_text("\n".join(table(given.folder)) + "\n")


if __name__ == "__main__":
    main()
