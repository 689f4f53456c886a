"""Examples and tutorials are true: they run, and print what their pages say."""

import importlib
import json
import math
import os
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
PAGES = REPOSITORY / "docs" / "tutorials"


@pytest.fixture
def example(monkeypatch):
    """An example as a module, by its name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    with patch.dict(os.environ):  # an example of a harness sets it offline
        yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def alike(printed: str, shown: str) -> bool:
    """Whether two outputs have the same words and nearly the same numbers: training varies."""
    number = r"-?\d+(?:\.\d+)?"
    if re.sub(number, "#", printed) != re.sub(number, "#", shown):
        return False
    pairs = zip(re.findall(number, printed), re.findall(number, shown), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.05, 0.15 * abs(float(b))) for a, b in pairs)


@pytest.mark.parametrize("name", ["symmetries", pytest.param("two_models", marks=pytest.mark.slow)])
def test_a_tutorial_prints_what_it_shows(example, name) -> None:
    """Every block runs, in order; outputs are those of the page, and the last one draws."""
    notebooks = example("notebooks")
    page = (PAGES / f"{name}.md").read_text()
    shown = [output for kind, _, output in notebooks.cells(page) if kind == "code"]
    results = notebooks.run(page)
    for (printed, _), output in zip(results, shown, strict=True):
        assert alike(printed, output), printed
    assert results[-1][1] is not None


@pytest.mark.parametrize("name", ["symmetries", "two_models"])
def test_a_notebook_is_its_tutorial(example, name) -> None:
    """`python examples/notebooks.py` was run after the page was edited."""
    notebooks = example("notebooks")
    page = (PAGES / f"{name}.md").read_text()
    written = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    figures = [
        b"" if any("data" in output for output in cell["outputs"]) else None
        for cell in written["cells"]
        if cell["cell_type"] == "code"
    ]
    made = notebooks.notebook(page, figures)
    assert [cell["source"] for cell in made["cells"]] == [c["source"] for c in written["cells"]]
    texts = [
        [output.get("text") for output in cell.get("outputs", [])]
        for notebook in (made, written)
        for cell in notebook["cells"]
    ]
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]


@pytest.mark.parametrize("name", ["language_models", "recipe"])
def test_a_tutorial_quotes_its_example(name) -> None:
    """Each block of Python stands in the example, which the tests below run."""
    program = (EXAMPLES / f"{name}.py").read_text()
    blocks = re.findall(
        r"^```python\n(.*?)^```", (PAGES / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    assert [block for block in blocks if block not in program] == []


@pytest.mark.slow
def test_towers_share_a_trunk(example, tmp_path) -> None:
    """Least squares keeps what the average of two towers loses."""
    scores = example("towers").main(num_steps=150, out=tmp_path)
    two, average, least_squares = scores.values()
    assert average < 0.3 < two - 0.1 < least_squares
    assert (tmp_path / "towers.png").is_file()


@torch.no_grad()
def perplexity(checkpoint: Path, text: str, passage: int, length: int) -> float:
    """Perplexity by byte: each byte once, after the bytes of its passage that a window holds."""
    model, losses = LlamaForCausalLM.from_pretrained(checkpoint).eval(), []
    for at in range(0, len(text), passage):
        ids = torch.tensor([*b"\n", *text[at : at + passage].encode()])
        for start in range(0, len(ids) - 1, length):
            end = min(start + length, len(ids) - 1)
            window = slice(max(0, end - length), end)
            logits = model(ids[None, window]).logits[0, start - end :]
            losses.append(F.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none"))
    return math.exp(torch.cat(losses).mean())


@pytest.mark.slow
def test_language_models_are_judged(example, tmp_path, monkeypatch) -> None:
    """Experts are best at their own text, the average better than the base at both, by lm-eval."""
    program = example("language_models")
    held_out = program.texts()["Python"][-program.HELD_OUT :]
    judge, direct = program.judge, {}

    def both(checkpoint, tasks):
        if checkpoint.name == "average":
            sizes = program.PASSAGE, program.LENGTH
            direct["average"] = perplexity(checkpoint, held_out, *sizes)
        return judge(checkpoint, tasks)

    monkeypatch.setattr(program, "judge", both)
    scores = program.main(num_steps=100, out=tmp_path)
    assert scores["average"]["Python"] == pytest.approx(direct["average"], rel=1e-3)
    for text in ("English", "Python"):
        assert scores[text][text] == min(of_texts[text] for of_texts in scores.values())
        assert scores["average"][text] < scores["base"][text]
    assert (tmp_path / "language_models.png").is_file()


def test_without_the_harness_one_sentence_says_how_to_install_it(example, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"is missing: pip install 'alloy-merge\[harness\]'"):
        example("language_models")


@pytest.mark.slow
def test_a_recipe_from_python_ends_with_its_report(example, tmp_path, capsys) -> None:
    """Nothing but the folder is written; the recipe's kept tensor is the first member's."""
    page = example("recipe").main(tmp_path / "recipe")
    assert "ties" in page.read_text()
    assert "The whole story" in capsys.readouterr().out
