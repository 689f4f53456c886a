"""Write and print what evaluation found.

    python -m tasks.experts.report RECIPE             # print the tables of the last evaluation
    python -m tasks.experts.report RECIPE --readme    # and put them into README.md, between its marks

`write` makes metrics.json, plots/ (PNG and the rows as JSON for `dvc plots`), table.md and report.html in
`reports/<recipe>/`. Only test scores are shown; metrics.json and plots/scores.json have both splits.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tasks.experts.measures.benchmarks import BENCHMARKS, METRIC_TITLES
from tasks.experts.results import Results, ScoreRow, shown_rows
from tasks.recipe.load import read
from tasks.reports import tables
from tasks.storage import write_file, write_folder, write_json

REPORTS = Path("reports")
CAPTIONS = {
    False: "Training-free: test score in per cent ± standard error",
    True: "After fine-tuning: test score in per cent ± standard error",
}


def write(results: Results) -> None:
    """Everything that `reports/<recipe>/` holds, each output whole or as it was."""
    from tasks.experts import (
        charts,
        page,  # matplotlib is slow to import, and printing does not need it
    )

    folder = REPORTS / results.recipe
    with write_folder(folder / "plots") as plots:
        for name, rows in (("scores", results.scores), ("distances", results.distances)):
            write_json(plots / f"{name}.json", [asdict(row) for row in rows])
        drawn = charts.draw(results, plots)
        html = page.render(results, {plots / name: text for name, text in drawn.items()})
    with write_file(folder / "report.html") as partial:
        partial.write_text(html)
    with write_file(folder / "table.md") as partial:
        partial.write_text(markdown(results.scores))
    write_json(folder / "metrics.json", metrics(results.scores))


def metrics(scores: Sequence[ScoreRow]) -> dict:
    """split -> model -> benchmark -> its main metric and that metric's standard error."""
    nested: dict = {}
    for row in scores:
        if row.kind != "guess" and row.metric == BENCHMARKS[row.benchmark].metric:
            nested.setdefault(row.split, {}).setdefault(row.model, {})[row.benchmark] = {
                row.metric: row.value,
                f"{row.metric}_standard_error": row.standard_error,
            }
    return nested


def cells(scores: Sequence[ScoreRow], finetuned: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one table of test scores."""
    rows = shown_rows(scores, finetuned=finetuned)
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    shown = {(row.title, row.benchmark): row for row in rows}
    titles = dict.fromkeys(title for title, _ in shown)
    header = [
        "",
        *(f"{BENCHMARKS[b].title}, {METRIC_TITLES[BENCHMARKS[b].metric]}" for b in benchmarks),
    ]
    return header, [[t, *(_cell(shown.get((t, b))) for b in benchmarks)] for t in titles]


def _cell(row: ScoreRow | None) -> str:
    if row is None:
        return ""
    if row.kind == "guess":
        return f"{row.value:.1f}"
    return f"{row.value:.1f} ± {row.standard_error:.1f}"


def markdown(scores: Sequence[ScoreRow]) -> str:
    parts = []
    for finetuned, caption in CAPTIONS.items():
        header, rows = cells(scores, finetuned)
        parts.append(f"{caption}\n\n{tables.markdown(header, rows)}")
    return "\n\n".join(parts) + "\n"


def write_readme(recipe: str, readme: Path = Path("README.md")) -> None:
    """Replace what stands between the two marks of the recipe's results.

    Raises ValueError where a mark is missing; nothing is written then.
    """
    text = readme.read_text()
    start = f"<!-- results: python -m tasks.experts.report {recipe} --readme -->\n"
    before, found, rest = text.partition(start)
    _, end, after = rest.partition("<!-- end of results -->")
    if not found or not end:
        raise ValueError(
            f"{readme}: expected the lines {start.strip()!r} and '<!-- end of results -->'"
        )
    with write_file(readme) as partial:
        partial.write_text(f"{before}{found}{tables.read(recipe)}{end}{after}")


def main(recipe: str, readme: bool = False) -> None:
    read(recipe)  # refuses an unknown recipe
    tables.show(recipe)
    if readme:
        write_readme(recipe)
