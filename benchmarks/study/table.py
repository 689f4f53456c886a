"""benchmarks/results/study.md: what has run, as means over seeds and half their range."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.distance.study import Correlation, Interval, Merge, correlations
from benchmarks.study.measure import Row, read
from benchmarks.study.params import study
from tasks.experts.measures.benchmarks import FINETUNED_ON_SCENES, FREE_ON_SCENES
from tasks.reports import markdown
from tasks.storage import write_file

TABLE = Path("benchmarks/results/study.md")
BASELINE = "agnostic"
FREE, TUNED = "R@1 without training", "mean after fine-tuning"


def table() -> None:
    """Write the Markdown file."""
    merged, tuned = read("merged"), read("finetuned")
    with write_file(TABLE) as partial:
        partial.write_text(text_of(merged, tuned))
    print(f"study: wrote {TABLE}: {progress(merged, tuned)}")


def text_of(merged: Sequence[Row], tuned: Sequence[Row]) -> str:
    """What the Markdown file says."""
    lines = "\n".join(
        [
            "# Initialisation, mechanism and architecture, over seeds",
            "",
            "`python -m benchmarks.study table` made this file from",
            "benchmarks/results/study/*.json.",
            "Cells are means over seeds ± half their range, on test data, in per cent; an arm of",
            "params/study.yaml stands here as soon as one seed has it.",
            "",
            progress(merged, tuned),
            *_section("Without training", merged, FREE_ON_SCENES),
            *_section("Fine-tuned jointly", fine_tuned(tuned, "joint"), FINETUNED_ON_SCENES),
            *_section("Fine-tuned each", fine_tuned(tuned, "each"), FINETUNED_ON_SCENES),
            *_beside_the_baseline(fine_tuned(tuned, "joint")),
            *_correlations(merged, tuned),
        ]
    )
    return lines + "\n"


def progress(merged: Sequence[Row], tuned: Sequence[Row]) -> str:
    """Say how much of the study has run."""
    params = study()
    seeds = len(params.seeds)
    return (
        f"Done: {len(merged)} of {seeds * len(params.arms)} merges and parents, "
        f"{len(tuned)} of {seeds * len(params.tunings())} fine-tunings; "
        f"{sum(r['cpu_seconds'] for r in [*merged, *tuned]) / 60:.0f} CPU minutes "
        "beside pre-training."
    )


def fine_tuned(rows: Sequence[Row], mode: str) -> list[Row]:
    """The rows of one mode: `joint` or `each`."""
    return [row for row in rows if row["mode"] == mode]


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows of each arm, in the params' order."""
    return {
        arm: own
        for arm in study().arms
        if (own := sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"]))
    }


def spread(values: Sequence[float]) -> str:
    """Format a mean and half the range; of one value, the value alone."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else mean


def _section(title: str, rows: Sequence[Row], benchmarks: Sequence[str]) -> Iterable[str]:
    if not rows:
        return
    yield from ("", f"## {title}", "")
    yield markdown.table(
        ["arm", "seeds", *benchmarks],
        [
            [arm, str(len(own)), *(spread([r["test"][b] for r in own]) for b in benchmarks)]
            for arm, own in by_arm(rows).items()
        ],
    )


def _beside_the_baseline(rows: Sequence[Row]) -> Iterable[str]:
    """Differences to the agnostic baseline of the same seed."""
    grouped = by_arm(rows)
    base = {row["seed"]: row["test"] for row in grouped.pop(BASELINE, [])}
    lines = []
    for arm, own in grouped.items():
        paired = [row for row in own if row["seed"] in base]
        if paired:
            cells = [
                spread([row["test"][b] - base[row["seed"]][b] for row in paired])
                for b in FINETUNED_ON_SCENES
            ]
            ahead = [sum(r["test"][b] > base[r["seed"]][b] for b in r["test"]) for r in paired]
            lines.append([arm, str(len(paired)), *cells, ", ".join(map(str, ahead))])
    if lines:
        yield from ("", "## After joint fine-tuning, minus the agnostic baseline of the seed", "")
        header = ["arm", "seeds", *FINETUNED_ON_SCENES, "benchmarks ahead, by seed"]
        yield markdown.table(header, lines)


def natural_merges(merged: Sequence[Row], tuned: Sequence[Row]) -> list[Merge]:
    """Collect the interpolations of every parent: their distances and outcomes."""
    after = {(r["seed"], r["arm"]): r["test"] for r in fine_tuned(tuned, "joint")}
    params, result = study(), []
    for row in merged:
        arm = params.arms.get(row["arm"])
        if arm is None or arm.method != "interpolation" or arm.options != {"ratio": 0.5}:
            continue
        if "distances" not in row:
            continue
        outcomes = {FREE: row["test"]["retrieval"]}
        if scores := after.get((row["seed"], row["arm"])):
            outcomes[TUNED] = statistics.mean(scores.values())
        name = f"{row['arm']} of seed {row['seed']}"
        shares = params.parents[arm.parent].sharing != "none"
        group = "a part is shared" if shares else "nothing is shared"
        result.append(Merge(name, group, row["distances"], outcomes))
    return result


def _correlations(merged: Sequence[Row], tuned: Sequence[Row]) -> Iterable[str]:
    points = natural_merges(merged, tuned)
    if len(points) < 2:
        return
    yield from ("", "## Distances of experts against outcomes", "")
    yield "Interpolations of all parents whose experts have matrices, 95 % intervals on Fisher's z;"
    yield "runs of one seed share batches and seed checkpoints, so intervals are too narrow."
    yield ""
    yield markdown.table(
        ["merges", "outcome", "distance", "number", "Pearson", "Spearman"],
        [
            [
                row.group,
                row.outcome,
                row.measure,
                str(row.num_merges),
                cell(row.pearson),
                cell(row.spearman),
            ]
            for row in correlations(points)
            if has_interval(row)
        ],
        num_names=3,
    )


def has_interval(row: Correlation) -> bool:
    """True of correlations over so many merges that they mean anything."""
    return row.num_merges > 3


def cell(interval: Interval) -> str:
    """Format a correlation with its interval; a perfect one has none."""
    if interval.value is None:
        return "constant"
    if interval.low == interval.high:
        return f"{interval.value:+.2f}"
    return f"{interval.value:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"
