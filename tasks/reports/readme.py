"""The results in README.md: a recipe's tables between two marks."""

from pathlib import Path

from tasks.reports import tables
from tasks.storage import write_file

END = "<!-- end of results -->"


def start(recipe: str) -> str:
    """The mark before a recipe's results: the command that puts them there."""
    return f"<!-- results: python -m tasks.reports {recipe} --readme -->"


def write_readme(recipe: str, readme: Path = Path("README.md")) -> None:
    """Replace what stands between the two marks of the recipe's results.

    Raises ValueError where a mark is missing; nothing is written then.
    """
    text = readme.read_text()
    before, mark, rest = text.partition(start(recipe) + "\n")
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{readme}: expected the lines {start(recipe)!r} and {END!r}")
    with write_file(readme) as partial:
        partial.write_text(f"{before}{mark}{tables.read(recipe)}{end}{after}")
