"""benchmarks/results/gauge.md: every stage's rows as means and spreads."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gauge import merges
from benchmarks.gauge.figures import points
from benchmarks.gauge.merges import METHOD, NO_GAUGE, PARENT, PLAIN, UNWEIGHED
from benchmarks.gauge.params import study
from tasks.experts.measures.benchmarks import FINETUNED_ON_SCENES, FREE_ON_SCENES
from tasks.storage import write_file

TABLE = Path("benchmarks/results/gauge.md")
Rows = list[dict[str, Any]]


def table() -> None:
    """Write the Markdown file."""
    text = "\n".join(
        [
            "# The gauge of least error",
            "",
            "`python -m benchmarks.rerun benchmarks/gauge` made this file from",
            "benchmarks/results/gauge/*.json. Scores are of the validation split unless test is",
            "named. Cells are means over draws of the calibration data, seeds or runs, ± half",
            "their range. docs/gauge.md interprets them.",
            *_merges(),
            *_study(),
            *_ablations(),
            *_multitask(),
            *_finetuning(),
            *_cost(),
        ]
    )
    with write_file(TABLE) as partial:
        partial.write_text(text + "\n")
    print(f"gauge: wrote {TABLE}")


def _merges() -> Iterable[str]:
    rows = merges.read("measure_*")
    for name, title in (
        ("specific_unseeded", "No common seed"),
        ("specific", "Common seed"),
    ):
        seeds = [seed for seed in seeds_of(name) if any(row["parent"] == seed for row in rows)]
        own = [row for row in rows if row["parent"] in seeds]
        if not own:
            continue
        yield from ("", f"## {title}: every merge, {len(seeds)} seeds of pre-training")
        yield "Mean over seeds (each the mean over its draws), ± half the seeds' range; then the"
        yield "share of the parent's score."
        yield ""
        yield from _markdown(
            ["arm", *FREE_ON_SCENES, "kept: R@1, words, statements", "CPU s of the merge"],
            (
                [arm, *_over_seeds(own, arm), _kept(own, arm), _seconds(own, arm)]
                for arm, _ in _by(own, "arm")
            ),
        )
        for seed in seeds:
            here = [row for row in own if row["parent"] == seed]
            yield from ("", f"### {seed}")
            yield from _markdown(
                ["arm", "draws", *FREE_ON_SCENES],
                ([arm, len(same), *_scores(same)] for arm, same in _by(here, "arm")),
            )
            for arm in (METHOD, UNWEIGHED):
                searched = [row for row in here if row["arm"] == arm and "error" in row]
                if searched:
                    yield from _facts(searched[0])


def seeds_of(name: str) -> list[str]:
    """Name a released checkpoint, and those pre-trained like it with other seeds."""
    again = study().retrained
    return [name, *(other for other, made in again.items() if made.arm == name)]


def _means(rows: Rows, arm: str, metric: str) -> dict[str, float]:
    """Average an arm's scores by parent."""
    same = [row for row in rows if row["arm"] == arm]
    return {
        parent: statistics.mean(row["scores"][metric] for row in own)
        for parent, own in _by(same, "parent")
    }


def _over_seeds(rows: Rows, arm: str) -> list[str]:
    return [_spread(list(_means(rows, arm, metric).values())) for metric in FREE_ON_SCENES]


def _kept(rows: Rows, arm: str) -> str:
    cells = []
    for metric in ("retrieval", "masked_words", "statements"):
        whole = _means(rows, PARENT, metric)
        kept = [100 * score / whole[seed] for seed, score in _means(rows, arm, metric).items()]
        cells.append(f"{statistics.mean(kept):.0f} % ({min(kept):.0f} to {max(kept):.0f})")
    return ", ".join(cells)


def _seconds(rows: Rows, arm: str) -> str:
    same = [row for row in rows if row["arm"] == arm]
    return _spread([row.get("search_seconds", 0) + row["cpu_seconds"] for row in same])


def _facts(row: dict[str, Any]) -> Iterable[str]:
    before, after = row["error"]
    yield ""
    yield (
        f"{row['arm']}: J {before:.3g} → {after:.3g} "
        f"(start: {row['start']}; after a few steps {row['errors_of_starts']}); "
        f"99 % of the energy in {row['dims']} of {row['width']} dims, "
        f"pooled {row['pooled'][0]} → {row['pooled'][1]}; "
        f"overlap {row['overlap'][0]} → {row['overlap'][1]}."
    )


def _study() -> Iterable[str]:
    parents = points(merges.read("measure_*"))
    if not parents:
        return
    yield from ("", "## What is kept of the parent, against how full its streams are")
    yield "Demand: the dims that hold 99 % of each expert's energy, summed and divided by the"
    yield "width, in the joint blocks (in all); weighted: by the sensitivities of the answers."
    yield "CPU seconds are those of the search, of the Grams in its gauge, and of sequential least"
    yield "squares."
    yield ""
    arms = (METHOD, NO_GAUGE, PLAIN)
    yield from _markdown(
        [
            "parent",
            "demand",
            "weighted",
            "parent R@1, words",
            *(f"{arm}: R@1, words kept" for arm in arms),
            "CPU s",
        ],
        (
            [
                point["parent"],
                f"{point['joint_demand']:.2f} ({point['demand']:.2f})",
                f"{point['weighted_joint_demand']:.2f}",
                ", ".join(f"{point[m]:.1f}" for m in ("retrieval", "masked_words")),
                *(
                    f"{point[f'{arm}: retrieval']:.0f} %, {point[f'{arm}: masked_words']:.0f} %"
                    if f"{arm}: retrieval" in point
                    else ""
                    for arm in arms
                ),
                point["seconds"],
            ]
            for point in sorted(parents, key=lambda point: point["joint_demand"])
        ),
    )


def _ablations() -> Iterable[str]:
    rows = merges.read("ablate")
    if rows:
        yield from ("", f"## {rows[0]['parent']}: {METHOD}, changed in one thing")
        yield from _markdown(
            ["changed", "draws", *FREE_ON_SCENES, "J"],
            (
                [
                    arm,
                    len(same),
                    *_scores(same),
                    f"{statistics.mean(r['error'][1] for r in same):.3g}",
                ]
                for arm, same in _by(rows, "arm")
            ),
        )


def _multitask() -> Iterable[str]:
    rows = merges.read("multitask")
    if rows:
        sets = [name for name, _ in _by(rows, "set")]
        yield from ("", "## Multitask recipe: joint accuracy, three seeds")
        yield from _markdown(
            ["arm", *sets],
            (
                [arm, *(_spread([r["joint"] for r in same if r["set"] == s]) for s in sets)]
                for arm, same in _by(rows, "arm")
            ),
        )


def _finetuning() -> Iterable[str]:
    rows = [row for row in merges.read("finetune") if row["split"] == "test"]
    if rows:
        yield from ("", f"## {rows[0]['parent']} after the recipe's fine-tuning, test split")
        yield from _markdown(
            ["arm", "runs", *FINETUNED_ON_SCENES],
            (
                [
                    arm,
                    len(same),
                    *(_spread([r["scores"][n] for r in same]) for n in FINETUNED_ON_SCENES),
                ]
                for arm, same in _by(rows, "arm")
            ),
        )


def _cost() -> Iterable[str]:
    rows = merges.read("cost")
    if rows:
        yield from ("", "## Cost: random models, one core, 64 examples")
        yield from _markdown(
            ["width", "layers", "s a step", "s before the first", "s of sequential least squares"],
            (
                [
                    r[k]
                    for k in (
                        "hidden",
                        "layers",
                        "step_seconds",
                        "match_seconds",
                        "sequential_seconds",
                    )
                ]
                for r in rows
            ),
        )


def _by(rows: Rows, key: str) -> list[tuple[str, Rows]]:
    """Group rows by value, in the order in which the values come."""
    return [
        (value, [r for r in rows if r[key] == value])
        for value in dict.fromkeys(r[key] for r in rows)
    ]


def _scores(rows: Rows) -> list[str]:
    return [_spread([row["scores"][name] for row in rows]) for name in FREE_ON_SCENES]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def _markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
