"""search: find the settings of an arm's merge that score best on validation data.

    python -m tasks.search RECIPE ARM KEY=RANGE [KEY=RANGE ...] --trials 30

Every trial merges with the settings that Optuna proposes (tree-structured Parzen estimator, seeded)
and measures the result on the validation splits of the recipe's benchmarks; the test splits are not
read. The first trial has the arm's own settings, where they lie in the ranges. A search that was
interrupted, or is given more trials, goes on where it stopped and proposes what it would have
proposed.

Without KEY=RANGE the arm's own section `search` says what is searched, by which of evaluate's
benchmarks and in which groups of layers; stage merge does that before it merges the arm.

A KEY is `options.NAME` or `coefficients.EXPERT` (recipes of kind "models": `coefficients.0`, `.1`,
... in the order of the members); with a glob pattern of tensor names behind it in brackets it holds
in these tensors, so that

    python -m tasks.search modality regmean options.shrinkage=0..1 options.ridge=1e-6..1:log python
    -m tasks.search modality interpolation 'options.ratio[blocks.0.*]=0..1' 'options.ratio[*]=0..1'

search two settings, and one setting apart for the first block and the rest. A RANGE is LOW..HIGH,
with `:log` on a logarithmic scale, or the values A,B,C. The parents must be fetched, and collected
where the method needs it.

Writes reports/search/<recipe>/<arm>/: study.log (Optuna's journal), trials.json, table.md,
plot.png, and best.yaml, the arm's section to paste into params/<recipe>.yaml.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import optuna
import yaml
from matplotlib.figure import Figure
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table

from alloy.errors import MergeError, nearest
from alloy.merging import MERGE_METHODS
from tasks.recipe.section import ParamsError
from tasks.reports import markdown
from tasks.search.objective import Objective, objective_of, own_objective_of
from tasks.storage import write_file, write_json

REPORTS = Path("reports/search")
SECTIONS = ("options", "coefficients")
_KEY = re.compile(r"(?P<section>\w+)\.(?P<name>\w+)(\[(?P<pattern>.+)\])?")

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Range:
    """Values of one setting: between two numbers, or one of several."""

    key: str
    section: str
    name: str
    pattern: str | None
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    whole: bool = False
    """Integers alone."""
    choices: tuple[Value, ...] = ()
    patterns: tuple[str, ...] = ()
    """Of tensors, where `pattern` is the name of a group of them."""

    def propose(self, trial: optuna.Trial) -> Value:
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        if self.choices:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        number = isinstance(value, float | int) and not isinstance(value, bool)
        return number and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Value, ...]:
        low_high = (int(self.low), int(self.high)) if self.whole else (self.low, self.high)
        return self.choices or low_high


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and the score of each benchmark."""

    number: int
    settings: Mapping[str, Value]
    scores: Mapping[str, float]
    problem: str | None = None
    """The reason there is no score: settings that cannot be merged."""

    @property
    def score(self) -> float:
        return fmean(self.scores.values()) if self.scores else -math.inf


class Subject(Protocol):
    """The method whose settings are searched, and the names of its coefficients."""

    method: str
    experts: Sequence[str]


def parse(setting: str, objective: Subject) -> Range:
    """KEY=RANGE, checked against what the method takes."""
    key, equals, text = setting.partition("=")
    match = _KEY.fullmatch(key)
    if not equals or match is None or match["section"] not in SECTIONS:
        raise ParamsError(
            f"{setting!r}: write options.NAME=LOW..HIGH, coefficients.EXPERT=LOW..HIGH, "
            "or ...=A,B,C"
        )
    section, name, pattern = match["section"], match["name"], match["pattern"]
    method = MERGE_METHODS[objective.method]
    known = list(method.options) if section == "options" else list(objective.experts)
    if section == "coefficients" and method.coefficients is None:
        raise ParamsError(
            f"{key}: method {objective.method!r} takes no coefficients, it has options "
            f"{sorted(method.options)}"
        )
    if name not in known:
        hint = nearest(name, known) if known else "it has none"
        raise ParamsError(f"{key}: method {objective.method!r}: {hint}")
    low, dots, high = text.removesuffix(":log").partition("..")
    if not dots:
        choices = tuple(yaml.safe_load(value) for value in text.split(","))
        settings = Range(key, section, name, pattern, choices=choices)
    else:
        try:
            bounds = float(low), float(high)
        except ValueError:
            raise ParamsError(f"{setting!r}: {low!r} and {high!r} must be numbers") from None
        whole = section == "options" and method.options[name].type is int
        settings = Range(
            key, section, name, pattern, *bounds, log=text.endswith(":log"), whole=whole
        )
        lowest = 0 if settings.log else -math.inf
        if not (lowest < settings.low < settings.high < math.inf):
            raise ParamsError(
                f"{setting!r}: LOW must be less than HIGH, both finite, and above 0 with :log"
            )
    if section == "options":
        for value in settings.ends:
            method.options[name].check(key, value)
    return settings


def settle(ranges: Sequence[Range], values: Mapping[str, Value]) -> dict[str, dict[str, Any]]:
    """Options and coefficients as a recipe has them: a pattern's values below their pattern."""
    settled: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for r in ranges:
        place = settled[r.section]
        if r.pattern is None:
            place[r.name] = values[r.key]
            continue
        for pattern in r.patterns or (r.pattern,):
            outer, inner = (r.name, pattern) if r.section == "options" else (pattern, r.name)
            place.setdefault(outer, {})[inner] = values[r.key]
    return settled


def own_values(
    ranges: Sequence[Range], own: Mapping[str, Mapping[str, Any]]
) -> dict[str, Value] | None:
    """The recipe's own settings as a proposal, or None where one lies outside its range."""
    values: dict[str, Any] = {}
    for r in ranges:
        given = own[r.section]
        value = given.get(r.name)
        if r.pattern is not None:
            outer, inner = (r.name, r.pattern) if r.section == "options" else (r.pattern, r.name)
            value = given.get(outer)
            value = value.get(inner) if isinstance(value, Mapping) else given.get(r.name)
        if type(value) is int and not (r.choices or r.whole):
            value = float(value)
        if not r.holds(value):
            return None
        values[r.key] = value
    return values


def search(
    objective: Objective,
    ranges: Sequence[Range],
    *,
    num_trials: int,
    seed: int,
    folder: Path,
    report: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:
    """Try settings up to `num_trials`, those of an earlier run included.

    A proposal depends on the seed and its number alone.

    Raises:
        ParamsError: an earlier search in the folder looked for something else.
    """
    about = _about(objective, ranges, seed)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(
        storage=storage, study_name="search", direction="maximize", load_if_exists=True
    )
    before = study.user_attrs.get("about")
    described = json.loads(json.dumps(about, default=str))
    if before is None:
        study.set_user_attr("about", described)
    elif before != described:
        differing = [key for key in described if before.get(key) != described[key]]
        raise ParamsError(
            f"{folder} has a search with other {', '.join(differing)}; choose another --name, "
            "or remove it"
        )
    while len(done := _trials(study)) < num_trials:
        number = len(done)
        trial = _ask(study, ranges, number, seed, objective)
        values = {r.key: r.propose(trial) for r in ranges}
        try:
            scores = objective.scores(objective.arm(settle(ranges, values)))
            tried = Trial(number, values, scores)
        except (MergeError, ParamsError) as error:
            tried = Trial(number, values, {}, str(error))
        for key, value in asdict(tried).items():
            trial.set_user_attr(key, value)
        if tried.scores:
            study.tell(trial, tried.score)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        report(tried)
    return done[:num_trials]


def _about(objective: Objective, ranges: Sequence[Range], seed: int) -> dict[str, Any]:
    """All that a search depends on."""
    return {
        "ranges": [_described(r) for r in ranges],
        "seed": seed,
        "method": objective.method,
        "own": {section: dict(values) for section, values in objective.own().items()},
        "measured_by": dict(objective.measured_by),
    }


def _described(r: Range) -> dict[str, Any]:
    """A range as data; searches from before there were groups stay known."""
    whole = asdict(r) | {"choices": list(r.choices), "patterns": list(r.patterns)}
    return {name: value for name, value in whole.items() if name != "patterns" or value}


def _ask(
    study: optuna.Study, ranges: Sequence[Range], number: int, seed: int, objective: Objective
) -> optuna.Trial:
    """The next trial. One that an interruption left without a score is not counted."""
    study.sampler = optuna.samplers.TPESampler(seed=seed + 7919 * number)
    own = own_values(ranges, objective.own())
    if number == 0 and own is not None:
        study.enqueue_trial(own)
    return study.ask()


def _trials(study: optuna.Study) -> list[Trial]:
    """Finished trials, in order."""
    finished = [t for t in study.get_trials(deepcopy=False) if "number" in t.user_attrs]
    return [
        Trial(**{key: t.user_attrs[key] for key in ("number", "settings", "scores", "problem")})
        for t in finished
        if t.state.is_finished()
    ]


def write(
    objective: Objective,
    trials: Sequence[Trial],
    folder: Path,
    best: Trial,
    ranges: Sequence[Range],
) -> str:
    """Table, plot and the best arm's section; the section as text."""
    write_json(folder / "trials.json", [asdict(trial) for trial in trials])
    arm = objective.arm(settle(ranges, best.settings))
    text = yaml.safe_dump(objective.section(arm), sort_keys=False)
    heading = (
        f"# trial {best.number} of {len(trials)}: {best.score:.3f} on validation data; "
        "goes into params/<recipe>.yaml\n"
    )
    for name, content in (("best.yaml", heading + text), ("table.md", as_markdown(trials))):
        with write_file(folder / name) as file:
            file.write_text(content)
    with write_file(folder / "plot.png") as file:
        plot(trials, ranges).savefig(file, format="png", dpi=110, metadata={"Software": None})
    return text


def as_markdown(trials: Sequence[Trial]) -> str:
    """All trials, best first."""
    head, rows = _cells(trials)
    return markdown.table(head, rows, num_names=len(head)) + "\n"


def table(trials: Sequence[Trial], most: int = 15) -> Table:
    head, rows = _cells(trials)
    columns = [Column(escape(name), overflow="fold") for name in head]
    result = Table(*columns, title=f"the best {min(most, len(rows))} of {len(rows)} trials")
    for row in rows[:most]:
        result.add_row(*map(escape, row))
    return result


def _cells(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    benchmarks = list(dict.fromkeys(name for trial in trials for name in trial.scores))
    settings = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    rows = []
    for trial in sorted(trials, key=lambda t: (-t.score, t.number)):
        scores = [f"{trial.scores[name]:.2f}" if trial.scores else "-" for name in benchmarks]
        values = [_shown(trial.settings.get(key)) for key in settings]
        mean = f"{trial.score:.3f}" if trial.scores else trial.problem or "-"
        rows.append([str(trial.number), mean, *scores, *values])
    return ["trial", "mean", *benchmarks, *settings], rows


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(trials: Sequence[Trial], ranges: Sequence[Range]) -> Figure:
    """The score of every trial and the best so far, then the score against each setting."""
    scored = [trial for trial in trials if trial.scores]
    numbers, scores = [t.number for t in scored], [t.score for t in scored]
    figure = Figure(figsize=(3.6 * (1 + len(ranges)), 3.4), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(ranges), sharey=True, squeeze=False)[0]
    first.plot(numbers, scores, "o", color="#8c9bab", label="trial")
    best = [max(scores[: i + 1]) for i in range(len(scores))]
    first.step(numbers, best, where="post", color="#e07b39", label="best so far")
    first.set_xlabel("trial")
    first.set_ylabel("mean validation score, %")
    first.legend(frameon=False, fontsize=8)
    for axis, r in zip(others, ranges, strict=True):
        values = [t.settings[r.key] for t in scored]
        axis.scatter(
            [str(v) for v in values] if r.choices else values, scores, c=numbers, cmap="viridis"
        )
        axis.set_xscale("log" if r.log else "linear") if not r.choices else None
        axis.set_xlabel(r.key, fontsize=8)
    for axis in (first, *others):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def run(
    recipe: str,
    arm: str,
    settings: Sequence[str],
    *,
    num_trials: int,
    seed: int = 0,
    benchmarks: Sequence[str] | None = None,
    name: str | None = None,
) -> Path:
    """Search, print and write; the folder of what was written."""
    objective = objective_of(recipe, arm, benchmarks)
    ranges = [parse(setting, objective) for setting in settings]
    return _run(objective, ranges, num_trials, seed, REPORTS / recipe / (name or arm))


def run_own(recipe: str, arm: str, best: Path | None = None) -> Path:
    """Search as the arm's own section `search` says; the folder of what was written.

    Args:
        best: a file for the arm that was found, without its search.
    """
    objective = own_objective_of(recipe, arm)
    ranges = [
        each
        for key, (text, groups) in objective.settings().items()
        for each in in_groups(parse(f"{key}={text}", objective), groups)
    ]
    about = json.dumps([_about(objective, ranges, objective.search.seed)], default=str)
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    folder = REPORTS / recipe / f"{arm}-{digest}"
    _run(objective, ranges, objective.search.trials, objective.search.seed, folder, best)
    return folder


def in_groups(r: Range, groups: Mapping[str, Sequence[str]]) -> list[Range]:
    """The setting once for each group of tensors."""
    if groups and r.pattern is not None:
        raise ParamsError(f"{r.key}: it has a pattern: leave that out, or `groups`")
    return [
        replace(r, key=f"{r.key}[{label}]", pattern=label, patterns=tuple(patterns))
        for label, patterns in groups.items()
    ] or [r]


def _run(
    objective: Objective,
    ranges: Sequence[Range],
    num_trials: int,
    seed: int,
    folder: Path,
    written: Path | None = None,
) -> Path:
    _refuse_clashes(ranges)
    objective.arm(settle(ranges, {r.key: r.ends[0] for r in ranges}))
    console = Console()
    with Progress(transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("search", total=num_trials)

        def show(trial: Trial) -> None:
            progress.update(
                bar, completed=trial.number + 1, description=f"search: {trial.score:.2f}"
            )

        trials = search(
            objective, ranges, num_trials=num_trials, seed=seed, folder=folder, report=show
        )
    best = max(trials, key=lambda t: (t.score, -t.number))
    if not best.scores:
        raise ParamsError(f"no trial could be merged; the first: {trials[0].problem}")
    console.print(table(trials))
    print(write(objective, trials, folder, best, ranges))
    if written is not None:
        arm = objective.arm(settle(ranges, best.settings))
        with write_file(written) as file:  # in its own order: of patterns the first one decides
            file.write_text(json.dumps(arm.model_dump(mode="json", exclude={"search"})))
    print(f"search: {folder}: best of {len(trials)} trials is {best.number}, {best.score:.3f}")
    return folder


def _refuse_clashes(ranges: Sequence[Range]) -> None:
    """One setting twice, or with and without patterns."""
    if not ranges:
        raise ParamsError(
            "nothing to search: give options.NAME=LOW..HIGH or coefficients.EXPERT=LOW..HIGH"
        )
    keys = [r.key for r in ranges]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ParamsError(f"{repeated[0]} is given twice")
    for section, group in (("options", "name"), ("coefficients", "section")):
        mine = [r for r in ranges if r.section == section]
        for label in {getattr(r, group) for r in mine}:
            of_one = [r for r in mine if getattr(r, group) == label]
            if len({r.pattern is None for r in of_one}) > 1:
                raise ParamsError(f"{', '.join(r.key for r in of_one)}: all with a pattern or none")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe of params/recipes.yaml with benchmarks")
    parser.add_argument("arm", help="an arm of its section merge")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=RANGE", help="by default the arm's section `search`"
    )
    parser.add_argument("--best", type=Path, help="a file for the arm that its own search found")
    parser.add_argument(
        "--trials", type=int, default=30, help="in all, those of earlier runs included"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--benchmarks", nargs="+", help="by default all that need no training")
    parser.add_argument("--name", help="of the folder; by default the arm's")
    given = parser.parse_args(arguments)
    try:
        if not given.settings:
            run_own(given.recipe, given.arm, given.best)
            return
        if given.trials < 1:
            raise ParamsError(f"--trials {given.trials}: give at least 1")
        run(
            given.recipe, given.arm, given.settings, num_trials=given.trials, seed=given.seed,
            benchmarks=given.benchmarks, name=given.name,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"search: {error}")
