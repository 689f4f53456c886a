"""Answers of the models to the first test examples, in pictures."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from tasks.data.examples import coloured, describe, words
from tasks.data.sets.images import decoded
from tasks.data.sets.rows import IMAGES
from tasks.evaluation.answers import normalised
from tasks.experts.report.grids import title
from tasks.experts.report.results import NUM_ANSWERS, Results
from tasks.reports.html import element, picture
from tasks.reports.report import Grid, Markup, Part

NOT_CHOSEN = "The first test examples, not chosen."
RIGHT, WRONG = element("span", "✓", style="yes"), element("span", "✗", style="no")


def retrieved(results: Results) -> list[Part]:
    """The best images for the first captions, by models before and after fine-tuning."""
    examples = results.examples["retrieval"]
    shown = [
        model
        for model in (results.naive, "merged", results.baseline, "finetuned")
        if "retrieval" in results.answers.get(model, {})
    ]
    rows = [
        [
            words(examples["input_ids"][i].tolist()),
            _scene(examples["pixel_values"][i], "the right image", "scene right"),
            *(
                _choices(examples, results.answers[model]["retrieval"][i].tolist(), right=i)
                for model in shown
            ),
        ]
        for i in range(NUM_ANSWERS)
    ]
    header = ["caption", "its image", *(_name(results, model) for model in shown)]
    return [
        f"The three images, of {len(examples['pixel_values']):,}, that each model finds closest to "
        "a caption. The right one has a green frame. These are the first test captions, not "
        "chosen.",
        Grid("", header, rows, numbers=False),
    ]


def _choices(examples: Mapping[str, Tensor], best: Sequence[int], *, right: int) -> Markup:
    """The images that a model finds, the best first."""
    pictures = (
        _scene(examples["pixel_values"][i], "the right image", "scene right")
        if i == right
        else _scene(examples["pixel_values"][i], "another image")
        for i in best
    )
    return element("div", *pictures, style="line")


def answered(results: Results, benchmark: str) -> list[Part]:
    """Questions or statements, the right answer, and that of each fine-tuned model."""
    models = _finetuned_models(results, benchmark)
    if not models:
        return []
    examples = results.examples[benchmark]
    rows = []
    for i in range(NUM_ANSWERS):
        label = int(examples["labels"][i])
        pixels = examples["pixel_values"][i]
        images = pixels if pixels.dim() == 4 else pixels[None]
        answers = (int(results.answers[model][benchmark][i]) for model in models)
        rows.append(
            [
                element("div", *(_scene(image, "a scene") for image in images), style="line"),
                words(examples["input_ids"][i].tolist()),
                describe(benchmark, label),
                *(_marked(describe(benchmark, a), right=a == label) for a in answers),
            ]
        )
    header = ["", "question", "answer", *(_name(results, model) for model in models)]
    return [NOT_CHOSEN, Grid("", header, rows, numbers=False)]


def asked(results: Results, benchmark: str) -> list[Part]:
    """Questions of a set, what people answered, and the answer of each fine-tuned model."""
    models = _finetuned_models(results, benchmark)
    if not models:
        return []
    data, names = results.examples[benchmark], ("false", "true")
    rows = []
    for i in range(min(NUM_ANSWERS, len(data))):
        row = data.rows[i]
        pictures = [
            np.array(decoded(row[c]).resize((96, 96))) for c in IMAGES[data.description.kind]
        ]
        if benchmark == "nlvr2":
            right = [names[row["label"]]]
        else:
            names, right = data.description.answers, [normalised(a) for a in row["answers"]]
        answers = [names[int(results.answers[model][benchmark][i])] for model in models]
        rows.append(
            [
                element("div", *(picture(p, "an image", "scene") for p in pictures), style="line"),
                row["text"],
                max(right, key=right.count),
                *(_marked(answer, right=answer in right) for answer in answers),
            ]
        )
    header = ["", "question", "answer", *(_name(results, model) for model in models)]
    return [NOT_CHOSEN, Grid("", header, rows, numbers=False)]


def _marked(answer: str, *, right: bool) -> Markup:
    return element("span", RIGHT if right else WRONG, f" {answer}")


def segmented(results: Results) -> list[Part]:
    """Label maps: the right one, and that of each fine-tuned model."""
    models = _finetuned_models(results, "segmentation")
    if not models:
        return []
    examples = results.examples["segmentation"]
    rows = [
        [
            _scene(examples["pixel_values"][i], "a scene"),
            _map(examples["labels"][i], "the right map"),
            *(_map(results.answers[m]["segmentation"][i], "a model's map") for m in models),
        ]
        for i in range(NUM_ANSWERS)
    ]
    header = ["image", "answer", *(_name(results, model) for model in models)]
    return [
        "Every square of an image gets the concept that it shows; a colour is a concept, white is "
        "background.",
        Grid("", header, rows, numbers=False),
    ]


def _name(results: Results, model: str) -> str:
    name = title(results, model)
    return f"{name}, fine-tuned" if model.startswith("finetuned") else name


def _finetuned_models(results: Results, benchmark: str) -> list[str]:
    return [
        model
        for model, answers in results.answers.items()
        if model.startswith("finetuned") and benchmark in answers
    ]


def _scene(pixels_3HW: Tensor, alternative: str, style: str = "scene") -> Markup:
    return picture(pixels_3HW.permute(1, 2, 0).numpy(), alternative, style)


def _map(labels_LL: Tensor, alternative: str) -> Markup:
    return picture(coloured(labels_LL.numpy().astype(int)), alternative, "scene map")
