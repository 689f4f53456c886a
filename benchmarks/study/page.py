"""docs/study.md, and the seeds in docs/results.md: all that stands between marks there.

Whatever has a number is written here from the rows that are there, so no sentence of the pages can
say more than the seeds do. Comparisons are paired: two arms of one seed have seen the same batches.
"""

import hashlib
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.distance.study import Correlation, correlations
from benchmarks.study.measure import RESULTS, Row, read
from benchmarks.study.params import study
from benchmarks.study.table import (
    BASELINE,
    by_arm,
    cell,
    fine_tuned,
    has_interval,
    natural_merges,
    spread,
)
from tasks.experts.measures.benchmarks import FINETUNED_ON_SCENES
from tasks.reports import markdown
from tasks.storage import write_file

PAGE, OVERVIEW = Path("docs/study.md"), Path("docs/results.md")
TITLES = dict(
    zip(
        FINETUNED_ON_SCENES,
        ("VQA", "Retrieval", "Hard retrieval", "Pairs", "Segmentation"),
        strict=True,
    )
)
PAPER = {
    "vqa": "VQAv2 +3",
    "retrieval": "COCO +7, Flickr30k +14",
    "pair_reasoning": "NLVR2 +25",
} | {"segmentation": "ADE20k +3"}
"""The gains over naive merging in the abstract of arXiv:2304.14933, of its own data."""
RECIPE = "share50_interpolation"
RANDOM, COPIED = "random_interpolation", "copied_interpolation"
NAIVE = {"random starts": RANDOM, "one copied start": COPIED}
OF_SEEDS = {
    BASELINE: "agnostic baseline",
    "random_interpolation": "naive, random starts",
    "copied_interpolation": "naive, one copied start",
    "share50_interpolation": "interpolation, seed of 50 %",
    "share70_interpolation": "interpolation, seed of 70 %",
    "share50_sequential": "sequential, seed of 50 %",
    "share70_sequential": "sequential, seed of 70 %",
    "averaged70_sequential": "sequential, seed of 70 %, averaged",
    "random_gauge": "in the gauge, random starts",
}


@dataclass(frozen=True)
class Comparison:
    """An arm beside another of the same seed, both fine-tuned jointly."""

    says: str
    first: str
    second: str


COMPARISONS = {
    "initialisation": [
        Comparison("one copied start, beside random starts", COPIED, RANDOM),
        Comparison("a seed of 25 %, beside none", "share25_interpolation", COPIED),
        Comparison("of 50 %, beside 25 %", "share50_interpolation", "share25_interpolation"),
        Comparison("of 70 %, beside 50 %", "share70_interpolation", "share50_interpolation"),
        Comparison("trained as one model, beside 70 %", BASELINE, "share70_interpolation"),
    ],
    "mechanism": [
        Comparison("arithmetic, scale 0.4, beside interpolation", "share50_arithmetic40", RECIPE),
        Comparison("RegMean, beside interpolation", "share50_regmean", RECIPE),
        Comparison("sequential, beside interpolation", "share50_sequential", RECIPE),
        Comparison(
            "sequential in the gauge, beside sequential", "share50_gauge", "share50_sequential"
        ),
        Comparison("random starts: in the gauge, beside interpolation", "random_gauge", RANDOM),
        Comparison("random starts, in the gauge, beside the baseline", "random_gauge", BASELINE),
        Comparison("not merged at all, beside sequential", "share50", "share50_sequential"),
    ],
    "sharing": [
        Comparison("custom attention, beside sharing nothing", "attention50_interpolation", RECIPE),
        Comparison("custom FFN, beside sharing nothing", "ffn50_interpolation", RECIPE),
        Comparison("custom norms, beside sharing nothing", "norms50_interpolation", RECIPE),
        Comparison("custom norms, beside sharing all", "norms50_interpolation", BASELINE),
    ],
    "averaging": [
        Comparison(
            "the merge, beside the last checkpoint's", "averaged70_sequential", "share70_sequential"
        ),
        Comparison("the baseline, beside its last checkpoint", "averaged_agnostic", BASELINE),
        Comparison(
            "the merge, beside the baseline's last checkpoint", "averaged70_sequential", BASELINE
        ),
        Comparison(
            "the merge, beside the averaged baseline", "averaged70_sequential", "averaged_agnostic"
        ),
    ],
}

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
"""arm -> seed -> benchmark -> per cent on test data, after joint fine-tuning."""


def page() -> None:
    """Write what stands between the marks of both pages."""
    merged, tuned = read("merged"), read("finetuned")
    for path, parts in ((PAGE, blocks(merged, tuned)), (OVERVIEW, overview(merged, tuned))):
        text = path.read_text()
        for name, part in parts.items():
            text = replaced(text, name, part)
        with write_file(path) as partial:
            partial.write_text(text)
        print(f"study: wrote {path}")


def mark(name: str) -> str:
    return f"<!-- study, {name}: python -m benchmarks.study publish -->"


END = "<!-- end of study -->"


def replaced(text: str, name: str, part: str) -> str:
    """Put a part between its marks.

    Raises:
        ValueError: the page has no such marks.
    """
    before, start, rest = text.partition(mark(name))
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"expected the lines {mark(name)!r} and {END!r}")
    return f"{before}{start}\n{part}\n{end}{after}"


def digest() -> str:
    """A digest of all rows, which figures carry."""
    text = b"".join(path.read_bytes() for path in sorted(RESULTS.glob("*.json")))
    return hashlib.sha256(text).hexdigest()[:16]


def blocks(merged: Sequence[Row], tuned: Sequence[Row]) -> dict[str, str]:
    """Write every generated part of the page by name."""
    scores = joint(tuned)
    return {
        "progress": progress(merged, tuned),
        "paper": "\n".join(paper(merged, tuned, scores)),
        **{name: comparisons(rows, scores) for name, rows in COMPARISONS.items()},
        "baseline": "\n".join(baseline(scores)),
        "each": each(tuned),
        "distances": "\n".join(distances(merged, tuned)),
    }


def joint(tuned: Sequence[Row]) -> Scores:
    rows = by_arm(fine_tuned(tuned, "joint"))
    return {arm: {row["seed"]: row["test"] for row in own} for arm, own in rows.items()}


def progress(merged: Sequence[Row], tuned: Sequence[Row]) -> str:
    """Say which seeds are whole, and what of the others is there."""
    params = study()
    whole, parts = [], []
    for seed in params.seeds:
        counts = [
            (sum(row["seed"] == seed for row in merged), len(params.arms), "merges and parents"),
            (sum(row["seed"] == seed for row in tuned), len(params.tunings()), "fine-tunings"),
        ]
        if all(num == planned for num, planned, _ in counts):
            whole.append(str(seed))
        else:
            done = ", ".join(f"{num} of {planned} {what}" for num, planned, what in counts)
            parts.append(f"Of seed {seed} there are {done}.")
    if whole:
        seeds, have = ("Seed", "has") if len(whole) == 1 else ("Seeds", "have")
        parts.insert(0, f"{seeds} {_listed(whole)} {have} run to the end.")
    minutes = sum(row["cpu_seconds"] for row in [*merged, *tuned]) / 60
    cost = f"Merging, fine-tuning and scoring took {minutes:.0f} CPU minutes beside pre-training."
    return "\n".join([*parts, cost])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def differences(
    scores: Scores, first: str, second: str, benchmark: str | None = None
) -> list[float]:
    """Return first minus second of every seed that has both: of a benchmark, or of the mean."""
    ours, theirs = scores.get(first, {}), scores.get(second, {})
    return [
        _value(ours[seed], benchmark) - _value(theirs[seed], benchmark)
        for seed in sorted(ours.keys() & theirs.keys())
    ]


def _value(test: Mapping[str, float], benchmark: str | None) -> float:
    return statistics.mean(test.values()) if benchmark is None else test[benchmark]


def comparisons(rows: Sequence[Comparison], scores: Scores) -> str:
    """Make a table of paired differences of the mean over the five benchmarks."""
    lines = []
    for row in rows:
        if values := differences(scores, row.first, row.second):
            by_seed = ", ".join(f"{value:+.2f}" for value in values)
            lines.append([row.says, signed(values), by_seed, says(values)])
    header = ["fine-tuned jointly, mean of five benchmarks", "points", "by seed", "so"]
    return markdown.table(header, lines)


def signed(values: Sequence[float]) -> str:
    """Format a mean with its sign and half the range; of one value, the value alone."""
    text = spread(values)
    return text if text.startswith("-") else f"+{text}"


def says(values: Sequence[float]) -> str:
    """Say in which seeds the first arm is ahead, by the digits that are shown."""
    ahead = sum(round(value, 2) > 0 for value in values)
    if len(values) == 1:
        return f"{'ahead' if ahead else 'not ahead'} in the one seed"
    if ahead in (0, len(values)):
        return f"{'ahead' if ahead else 'not ahead'} in all {len(values)} seeds"
    return f"ahead in {ahead} of {len(values)} seeds"


def paper(merged: Sequence[Row], tuned: Sequence[Row], scores: Scores) -> Iterator[str]:
    """What the paper claims in its abstract, beside what the seeds say."""
    lines = []
    for benchmark, title in TITLES.items():
        cells = [
            signed(values) if (values := differences(scores, RECIPE, naive, benchmark)) else ""
            for naive in NAIVE.values()
        ]
        lines.append([title, PAPER.get(benchmark, ""), *cells])
    header = ["gain of the recipe over naive merging, points", "the paper, on its data"]
    yield markdown.table([*header, *(f"here, over {name}" for name in NAIVE)], lines, num_names=2)
    yield ""
    yield from _wrapped(
        f"**Gains over naive merging.** {_gains(scores)}",
        f"**Matching the agnostic baseline.** {_matching(scores)}",
        f"**Distances foretell outcomes.** {_foretelling(merged, tuned)}",
    )


def _gains(scores: Scores) -> str:
    values = [
        value
        for naive in NAIVE.values()
        for benchmark in TITLES
        for value in differences(scores, RECIPE, naive, benchmark)
    ]
    ahead = sum(value > 0 for value in values)
    if ahead == len(values):
        return "Agrees: on every benchmark, over both naive arms, in every seed."
    return (
        f"Agrees in part: in {ahead} of {len(values)} comparisons of a benchmark, a naive arm and "
        "a seed."
    )


def _matching(scores: Scores) -> str:
    parts = []
    for arm in (RECIPE, "share70_interpolation", "share50_sequential", "share70_sequential"):
        if values := differences(scores, arm, BASELINE):
            parts.append(f"`{arm}` {signed(values)} points ({says(values)})")
    behind = all(value < 0 for value in differences(scores, RECIPE, BASELINE))
    verdict = (
        "Does not agree for the paper's own recipe, half of the steps and interpolation, which is "
        "behind in every seed."
        if behind
        else "Agrees: the paper's own recipe is not behind in every seed."
    )
    return f"{verdict} Beside the baseline, in the mean of the five: {'; '.join(parts)}."


def _foretelling(merged: Sequence[Row], tuned: Sequence[Row]) -> str:
    rows = [row for row in _intervals(merged, tuned) if row.group == "all merges"]
    clear = [r for r in rows if r.spearman.high is not None and r.spearman.high < 0]
    verdict = "Agrees" if len(clear) == len(rows) else "Agrees in part"
    return (
        f"{verdict}: of the {len(rows)} rank correlations of a distance with an outcome over all "
        f"merges, {len(clear)} have an interval below 0."
    )


def _intervals(merged: Sequence[Row], tuned: Sequence[Row]) -> list[Correlation]:
    return [row for row in correlations(natural_merges(merged, tuned)) if has_interval(row)]


def distances(merged: Sequence[Row], tuned: Sequence[Row]) -> Iterator[str]:
    """Make a table of the correlations over all merges, with their intervals."""
    rows = [row for row in _intervals(merged, tuned) if row.group == "all merges"]
    outcomes = list(dict.fromkeys(row.outcome for row in rows))
    names = {"l2": "L2", "cosine": "1 - cosine", "ssd": "SSD", "tssd": "TSSD"}
    place = {(row.measure, row.outcome): row for row in rows}
    counts = {outcome: place["l2", outcome].num_merges for outcome in outcomes}
    header = ["Spearman (95 % interval)", *(f"{o}, {counts[o]} merges" for o in outcomes)]
    yield markdown.table(
        header,
        [[title, *(cell(place[m, o].spearman) for o in outcomes)] for m, title in names.items()],
    )
    yield ""
    header[0] = "Pearson (95 % interval)"
    yield markdown.table(
        header,
        [[title, *(cell(place[m, o].pearson) for o in outcomes)] for m, title in names.items()],
    )


def seeded(scores: Scores) -> list[str]:
    """The merges of experts that went on from a common seed."""
    params = study()
    return [
        arm
        for arm in scores
        if params.arms[arm].method is not None and params.parents[params.arms[arm].parent].share
    ]


def baseline(scores: Scores) -> Iterator[str]:
    """Answer whether a seeded merge passes the agnostic baseline on all five benchmarks."""
    base, lines, passes = scores.get(BASELINE, {}), [], {}
    for arm in seeded(scores):
        seeds = sorted(scores[arm].keys() & base.keys())
        if not seeds:
            continue
        ahead = [sum(scores[arm][s][b] > base[s][b] for b in TITLES) for s in seeds]
        passes[arm] = (sum(num == len(TITLES) for num in ahead), len(seeds))
        cells = [signed(differences(scores, arm, BASELINE, b)) for b in TITLES]
        lines.append((sum(ahead) / len(seeds), [arm, *cells, ", ".join(map(str, ahead))]))
    best = max((num / seeds for num, seeds in passes.values()), default=0)
    some = [arm for arm, (num, seeds) in passes.items() if num]
    trials = sum(seeds for _, seeds in passes.values())
    if not some:
        answer = "No: no seeded merge is ahead on all five benchmarks in any seed."
    elif best == 1:
        named = _listed([f"`{arm}`" for arm in some if passes[arm][0] == passes[arm][1]])
        answer = f"Yes, of these runs: {named} in every seed that has run."
    else:
        named = _listed([f"`{arm}` in {passes[arm][0]} of {passes[arm][1]} seeds" for arm in some])
        answer = f"Not reliably: {named}, no other, and none in all seeds."
    luck = (
        f"{trials} merges were compared; were each comparison the toss of a coin, about "
        f"{trials / 2 ** len(TITLES):.1f} of them would be ahead on all five."
    )
    yield from _wrapped(f"**{answer}** {luck}")
    lines.sort(key=lambda line: -line[0])
    header = ["minus the baseline, points", *TITLES.values(), "benchmarks ahead, by seed"]
    yield markdown.table(header, [line for _, line in lines])


def each(tuned: Sequence[Row]) -> str:
    """Make a table of a model for each benchmark, beside one model for all."""
    one, own = by_arm(fine_tuned(tuned, "joint")), by_arm(fine_tuned(tuned, "each"))
    lines = [
        [f"{arm}, {words}", *(spread([row["test"][b] for row in rows[arm]]) for b in TITLES)]
        for arm in own
        for words, rows in (("one for all", one), ("one each", own))
        if arm in rows
    ]
    return markdown.table(["test data, %", *TITLES.values()], lines)


def overview(merged: Sequence[Row], tuned: Sequence[Row]) -> dict[str, str]:
    """Make the table of docs/results.md: the arms that tell the story, over seeds."""
    free = {(row["arm"], row["seed"]): row["test"]["retrieval"] for row in merged}
    scores, lines = joint(tuned), []
    for arm, title in OF_SEEDS.items():
        if of_arm := scores.get(arm):
            r_at_1 = spread([free[arm, seed] for seed in sorted(of_arm)])
            own = [spread([test[b] for test in of_arm.values()]) for b in TITLES]
            lines.append([title, str(len(of_arm)), r_at_1, *own])
    header = ["test data, %", "seeds", "R@1, merged alone", *TITLES.values()]
    return {"seeds": markdown.table(header, lines)}


def _wrapped(*paragraphs: str) -> Iterator[str]:
    """Break paragraphs as the pages' prose is broken, an empty line behind each."""
    for paragraph in paragraphs:
        yield textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)
        yield ""
