"""Gates of promotion that fit their recipe: evaluate measures the scores that they compare."""

from collections.abc import Collection, Iterator, Mapping

from alloy.errors import nearest
from tasks.recipe.benchmarks import refuse_less
from tasks.recipe.experts import ExpertsRecipe
from tasks.recipe.load import Recipe, load_file, recipes
from tasks.recipe.models import PROBABILITIES, ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import Gates, PromoteParams

WHERE = "params/promote.yaml"
MEASURED = ("validation", "test")  # the splits of benchmarks with labels


def check_gates(recipe: Recipe) -> None:
    """Refuse gates that no result of the recipe could pass, and gates of unknown recipes.

    Raises:
        ParamsError: names the key and the nearest right name.
    """
    gates, known = load_file("promote", PromoteParams).gates, recipes()
    for name in gates:
        if name not in known:
            raise ParamsError(
                f"{WHERE}: gates.{name}: no recipe has this name: {nearest(name, known)}"
            )
    if recipe.name in gates:
        for key, name, choices in _names(recipe, gates[recipe.name]):
            if name not in choices:
                raise ParamsError(
                    f"{WHERE}: gates.{recipe.name}.{key}: {name!r}: {nearest(name, list(choices))}"
                )


def _names(recipe: Recipe, gates: Gates) -> Iterator[tuple[str, str, Collection[str]]]:
    """Every name that gates take from the recipe: where it stands, and what there is."""
    if not isinstance(recipe, ExpertsRecipe):
        _check_scores(recipe, gates)
    splits = _splits(recipe)
    yield "model", gates.model, _models(recipe)
    measured = list(splits)
    if (
        isinstance(recipe, ExpertsRecipe)
        and recipe.finetune
        and gates.model.startswith("finetuned")
    ):
        measured = list(recipe.finetune.batch_sizes)
    for benchmark in gates.benchmarks:
        yield "benchmarks", benchmark, measured
        yield "split", gates.split, splits[benchmark]


def _splits(recipe: Recipe) -> Mapping[str, Collection[str]]:
    """The splits on which each benchmark is measured."""
    if isinstance(recipe, ExpertsRecipe):
        return dict.fromkeys(recipe.prepare.names, MEASURED)
    own = {name: (split,) for name, split in recipe.evaluate.measured.items()}
    if not recipe.is_calibrated:
        return own
    return own | {
        name: MEASURED if entry.benchmark else (recipe.split(name),)
        for name, entry in recipe.sets.items()
    }


def _check_scores(recipe: ModelsRecipe, gates: Gates) -> None:
    """Raise ParamsError where a gate asks for a score that nothing measures, or measures badly."""
    where, params = f"{WHERE}: gates.{recipe.name}", recipe.evaluate
    if not recipe.is_calibrated and not params.measured:
        raise ParamsError(
            f"{where}: {recipe.where} has no sections prepare, collect and align, and no "
            "evaluate.benchmarks: its members are merged as they are and have no scores; leave "
            "out its gates, or give benchmarks"
        )
    for name, gate in gates.metrics.items():
        metric, key = gate.metric, f"{where}.benchmarks.{name}"
        if gate.better == "more":
            try:
                refuse_less(key, metric)
            except ValueError as why:
                raise ParamsError(f"{why}, or say so: {{metric: {metric}, better: less}}") from why
        mteb = params.harness.mteb if params.harness else None
        if gate.error is None and mteb and name in mteb.tasks:
            raise ParamsError(
                f"{key}: MTEB gives no standard errors, by which gates decide: take another "
                f"benchmark, or give an error: {{metric: {metric}, error: 0.5}}"
            )
        metrics = params.metrics_of(name)
        if metrics is not None and metric not in metrics:
            raise ParamsError(f"{key}: {metric!r}: {nearest(metric, metrics)}")


def _models(recipe: Recipe) -> list[str]:
    """The models of `metrics.json`."""
    arms = ["merged", *recipe.merge.arms]
    finetuned = [] if recipe.finetune is None else ["finetuned"]
    finetuned += [f"finetuned_{arm}" for arm in (recipe.finetune.arms if recipe.finetune else ())]
    if not isinstance(recipe, ExpertsRecipe):
        if not recipe.is_calibrated:
            return [*arms, *recipe.measured_models, *finetuned]
        arms += recipe.measured_models if recipe.evaluate.measured else []
        members = max(len(m) for entry in recipe.sets.values() for m in entry.members.values())
        return [
            *arms,
            *finetuned,
            "ensemble",
            PROBABILITIES,
            *(f"parent_{number}" for number in range(members)),
        ]
    return [*arms, *recipe.evaluate.checkpoints, *recipe.evaluate.ensembles, *finetuned]
