"""Make the notebooks, the figures and the outputs of the tutorials from their pages.

    python examples/notebooks.py              # all
    python examples/notebooks.py symmetries   # one

A tutorial is written once, as docs/tutorials/NAME.md. This runs its blocks of Python in order,
writes what each prints below it, saves its figure beside it and makes examples/NAME.ipynb.
"""

import base64
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "tutorials"
NOTEBOOKS = ("symmetries", "two_models")
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
_FIGURE = re.compile(r"^!\[[^\]]*\]\(\w+\.png\)\n\n?", re.MULTILINE)


def cells(page: str) -> Iterator[tuple[str, str, str]]:
    """Split a page into (markdown or code, source, output that the page shows)."""
    end = 0
    for block in _BLOCK.finditer(page):
        yield "markdown", page[end : block.start()], ""
        yield "code", block[1], block[2] or ""
        end = block.end()
    yield "markdown", page[end:], ""


def run(page: str) -> list[tuple[str, bytes | None]]:
    """Run the blocks of a page in one namespace: what each prints, and its figure as PNG."""
    namespace: dict[str, object] = {"__name__": "tutorial"}
    results = []
    for kind, source, _ in cells(page):
        if kind == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(source, "tutorial", "exec"), namespace)
            results.append((printed.getvalue(), _figure()))
    return results


def _figure() -> bytes | None:
    if not plt.get_fignums():
        return None
    buffer = io.BytesIO()
    plt.gcf().savefig(buffer, dpi=110, metadata={"Software": None})
    plt.close("all")
    return buffer.getvalue()


def with_outputs(page: str, outputs: Sequence[str]) -> str:
    """The page with what its blocks print below them."""
    printed = iter(outputs)

    def block(found: re.Match[str]) -> str:
        output = next(printed)
        shown = f"\n```text\n{output}```\n" if output else ""
        return f"```python\n{found[1]}```\n{shown}"

    return _BLOCK.sub(block, page)


def notebook(page: str, figures: Sequence[bytes | None]) -> Mapping[str, object]:
    """A page as a notebook (nbformat 4.5); links of the page lead to the site's sources."""
    made, pictures = [], iter(figures)
    for number, (kind, source, output) in enumerate(cells(page)):
        if kind == "markdown":
            source = re.sub(r"\]\(\.\./\.\./examples/", "](", _FIGURE.sub("", source))
            source = re.sub(r"\]\(\.\./(\w)", r"](../docs/\1", source)
            source = re.sub(r"\]\((\w+\.md)", r"](../docs/tutorials/\1", source)
        lines = source.strip().splitlines(keepends=True)
        if not lines:
            continue
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": _outputs(output, next(pictures))}
        made.append(cell)
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}


def _outputs(text: str, figure: bytes | None) -> list[Mapping[str, object]]:
    outputs: list[Mapping[str, object]] = []
    if text:
        lines = text.splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if figure is not None:
        png = base64.b64encode(figure).decode()
        data = {"image/png": png, "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


def main(names: Sequence[str]) -> None:
    for name in names:
        path = PAGES / f"{name}.md"
        results = run(path.read_text())
        page = with_outputs(path.read_text(), [text for text, _ in results])
        path.write_text(page)
        figures = [figure for _, figure in results]
        for figure in filter(None, figures):
            (PAGES / f"{name}.png").write_bytes(figure)
        text = json.dumps(notebook(page, figures), indent=1, ensure_ascii=False)
        (ROOT / "examples" / f"{name}.ipynb").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or NOTEBOOKS)
