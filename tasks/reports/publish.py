"""The results that the repository shows: docs/results.md, and the metrics that its tables are of.

A recipe's tables stand between two marks of the page. Its metrics on test data, with the commit
that they are of, go to `benchmarks/results/reports/`, where a test finds every number of the page.
"""

import json
from pathlib import Path

from tasks.reports import tables
from tasks.storage import read_json, write_file
from tasks.workspace import Workspace, revision

PAGE = Path("docs/results.md")
METRICS = Path("benchmarks/results/reports")
END = "<!-- end of results -->"


def start(recipe: str) -> str:
    """The mark before a recipe's results: the command that puts them there."""
    return f"<!-- results: python -m tasks.reports {recipe} --publish -->"


def publish(recipe: str, page: Path = PAGE, metrics: Path = METRICS) -> None:
    """Put a recipe's tables between the two marks of its results, and its metrics beside.

    Raises ValueError where a mark or the tables are missing; nothing is written then.
    """
    text = page.read_text()
    before, mark, rest = text.partition(start(recipe) + "\n")
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{page}: expected the lines {start(recipe)!r} and {END!r}")
    shown = tables.read(recipe)
    measured = read_json(Workspace(recipe).metrics)
    with write_file(page) as partial:
        partial.write_text(f"{before}{mark}{shown}{end}{after}")
    metrics.mkdir(parents=True, exist_ok=True)
    published = {"recipe": recipe, "commit": revision(), "test": measured.get("test", measured)}
    with write_file(metrics / f"{recipe}.json") as partial:
        partial.write_text(json.dumps(published, sort_keys=True, separators=(",", ":")) + "\n")
