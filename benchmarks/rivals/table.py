"""The rivals' scores as Markdown."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from benchmarks.rivals import experts, vits
from benchmarks.rivals.methods import STEPS
from tasks.reports import markdown


class Row(NamedTuple):
    """A merge and its scores."""

    arm: str
    scores: Mapping[str, float]  # per cent
    seconds: float  # of CPU


class Layout(NamedTuple):
    """A problem's title, its numbers of examples, and the text above its table."""

    title: str
    numbers: Sequence[int]
    examples: str
    text: str


LAYOUTS = {
    "vits": Layout(
        "Two ViTs of other starts and other tasks",
        (16, 100),
        "images",
        "Joint accuracy in per cent on 2,000 test digits, mean and standard deviation over pairs\n"
        "of parents without a common start. All see the same images without labels,\n"
        f"{vits.AUGMENTED} with shifted copies; what trains takes {STEPS} steps of {vits.BATCH}.\n",
    ),
    "experts": Layout(
        "The experts of one modality transformer without a common seed",
        (16, 128),
        "scenes",
        "Retrieval, masked words and statements in per cent on validation data, mean and standard\n"
        "deviation over draws of scenes. All see the same scenes and captions without labels,\n"
        f"{experts.AUGMENTED} with shifted copies, half of the captions with hidden words; what\n"
        f"trains takes {STEPS} steps of {experts.BATCH}.\n",
    ),
}


def page(results: Mapping[str, Mapping[int, Sequence[Sequence[Row]]]]) -> str:
    """The results as Markdown, by problem and number of examples: the rows of each draw."""
    sections = [
        f"## {layout.title}\n\n{layout.text}{_counted(layout, draws)}\n\n{_table(layout, draws)}\n"
        for name, draws in results.items()
        for layout in [LAYOUTS[name]]
    ]
    return (
        "# Rivals\n\n"
        "`python -m benchmarks.rivals`. Rivals are written from their papers, not from their\n"
        "code, and not tuned; all that trains has one loss, the squared error to the parents'\n"
        "answers. CPU seconds are of a busy machine, means over both numbers.\n\n"
        + "\n".join(sections)
    )


def _counted(layout: Layout, draws: Mapping[int, Sequence[Sequence[Row]]]) -> str:
    counts = (f"{num} {layout.examples}, {len(draws.get(num, []))}" for num in layout.numbers)
    return f"Draws: {'; '.join(counts)}."


def _table(layout: Layout, draws: Mapping[int, Sequence[Sequence[Row]]]) -> str:
    rows = [row for num in layout.numbers for draw in draws.get(num, []) for row in draw]
    metrics = list(rows[0].scores)
    table = []
    for arm in dict.fromkeys(row.arm for row in rows):
        cells = [
            _shown([r.scores[metric] for draw in draws.get(num, []) for r in draw if r.arm == arm])
            for num in layout.numbers
            for metric in metrics
        ]
        table.append([arm, *cells, f"{fmean(row.seconds for row in rows if row.arm == arm):.0f}"])
    titles = [
        f"{num} {layout.examples}" if len(metrics) == 1 else f"{num} {layout.examples}: {metric}"
        for num in layout.numbers
        for metric in metrics
    ]
    return markdown.table(["merge", *titles, "CPU s"], table, num_names=1)


def _shown(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"
