"""Sets of checkpoints, and a job for each set and seed: shared by the stages of kind "models".

models/<recipe>/statistics/specs/<digest>.json        collect: symmetries, by architecture
models/<recipe>/statistics/<set>/<seed>/              collect: statistics.safetensors, report.json
models/<recipe>/transforms/<set>/<seed>/              align: <alignment>.safetensors, report.json
models/<recipe>/arms/<set>/<seed>/<arm>/[<member>/]   merge: one a member where tails differ
models/<recipe>/merged/                               choose: the arm that the recipe is about
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import progress as bars
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from alloy.errors import CheckpointError
from alloy.processes import Processes
from alloy.symmetry import SymmetrySpec
from tasks.evaluation.loading import load_any, load_config, model_class
from tasks.evaluation.outputs import by_length, trimmed
from tasks.recipe.models import ModelsRecipe, ModelsSet
from tasks.storage import folder_digest, sha256
from tasks.workers import num_cores, share_cores, side_by_side
from tasks.workers.together import agree
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = 4  # calibration examples that symmetries are traced and checked with
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "label2id")

Report = Callable[..., None]


class Progress:
    """Says how far a long piece of work has come, where nothing was said for a while."""

    def __init__(self, title: str, report: Report, seconds: float = 15.0) -> None:
        self.title, self.report, self.seconds = title, report, seconds
        self.said, self.num = time.monotonic(), 0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self.said >= self.seconds:
            self.said = now
            self.report("say", f"{self.title}: {text}")

    def count(self, what: str) -> None:
        """One more is done, of things that are called so."""
        self.num += 1
        self(f"{self.num} {what}")


class Told:
    """Says which of several jobs begins and which is done; `flows.sets` reads the lines."""

    def __init__(self, num_jobs: int, say: Callable[[str], None]) -> None:
        self._num_jobs, self._say = num_jobs, say
        self._began: dict[str, float] = {}
        self._num_done = 0

    def begin(self, name: str) -> None:
        self._began[name] = time.monotonic()
        if self._num_jobs > 1:
            self._say(f"{name} begins")

    def end(self, name: str) -> None:
        self._num_done += 1
        if self._num_jobs > 1:
            seconds = time.monotonic() - self._began[name]
            self._say(f"{name} is done after {seconds:.1f} s, {self._num_done} of {self._num_jobs}")


@dataclass(frozen=True)
class Job:
    """One set of one recipe with the members of one seed."""

    recipe: ModelsRecipe
    set: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.set}/{self.seed}"

    @property
    def workspace(self) -> Workspace:
        return self.recipe.workspace

    @property
    def entry(self) -> ModelsSet:
        """The set as the recipe describes it."""
        return self.recipe.sets[self.set]

    @property
    def members(self) -> list[str]:
        return self.entry.members[self.seed]

    @property
    def folders(self) -> dict[str, Path]:
        """The members' checkpoints; the first is the reference. An adapter's is `base+adapter`."""
        fetched, folder = self.recipe.fetch, self.workspace.checkpoints
        return {name: fetched.folder(name, folder) for name in self.members}

    @property
    def calibration(self) -> Path:
        return self.workspace.data / "calibration" / f"{self.entry.calibration}.safetensors"

    @property
    def held_out(self) -> Path | None:
        """The calibration data's further examples, which no merge sees, as far as there are any."""
        assert self.recipe.prepare is not None
        if not self.recipe.prepare.calibration[str(self.entry.calibration)].held_out:
            return None
        return self.workspace.data / "held_out" / f"{self.entry.calibration}.safetensors"

    def seen(self) -> list[dict[str, Tensor]]:
        """The calibration examples in batches, texts by length, without needless padding."""
        _, collect, _ = self.recipe.calibrated
        inputs = by_length(load_file(self.calibration))
        return [trimmed(batch) for batch in batches(inputs, collect.batch_size)]

    @property
    def benchmark(self) -> Path | None:
        """The folder of the set's labelled examples."""
        if self.entry.benchmark is None:
            return None
        return self.workspace.data / "benchmarks" / self.entry.benchmark

    def within(self, folder: Path) -> Path:
        """This job's part of a stage's output: `statistics`, `transforms` or `arms`."""
        return folder / self.set / str(self.seed)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """A module of the reference's architecture to run weights in; it keeps the last ones."""
        return load_any(self.folders[self.members[0]])

    def models(self) -> dict[str, PreTrainedModel]:
        return {name: load_any(folder) for name, folder in self.folders.items()}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {name: load_weights(folder) for name, folder in self.folders.items()}

    def specs(self, statistics: Path | None = None) -> dict[str, SymmetrySpec]:
        """The symmetries of each member, as collect traced them."""
        folder = statistics or self.workspace.statistics
        return {name: read_spec(folder, self, name) for name in self.members}


def jobs(recipe: ModelsRecipe) -> list[Job]:
    """Every set with each of its seeds."""
    return [Job(recipe, name, seed) for name, seed in recipe.jobs()]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's state dict as its model has it, on the CPU."""
    model = load_any(folder, torch.device("cpu"))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def read_spec(statistics: Path, job: Job, member: str) -> SymmetrySpec:
    path = statistics / "specs" / f"{architecture(job, member)}.json"
    return SymmetrySpec.from_json(path.read_text())


def architecture(job: Job, member: str) -> str:
    """A digest of config and inputs, equal for checkpoints whose symmetries are equal."""
    folder = job.folders[member]
    config = load_config(folder).to_dict()
    config["id2label"] = len(config.get("id2label") or ())
    sizes = {name: value for name, value in config.items() if name not in PASSING}
    key = [model_class(folder).__name__, job.entry.calibration, sizes]
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def refuse_other_architectures(job: Job) -> None:
    """Raise CheckpointError, naming the first difference, unless the members are of one class."""
    (first, ours), *others = job.folders.items()
    for name, folder in others:
        kinds = model_class(ours).__name__, model_class(folder).__name__
        if kinds[0] != kinds[1]:
            raise CheckpointError(
                f"set {job.set!r}: {first} is a {kinds[0]}, {name} a {kinds[1]}; merge "
                "models of one class"
            )


def agree_on_data(processes: Processes, planned: Sequence[Job]) -> None:
    """Raise ProcessError unless all processes have the same recipe, checkpoints and data."""
    if processes.size == 1:
        return
    folders = {folder for job in planned for folder in job.folders.values()}
    files = {job.calibration for job in planned}
    digests = {str(path): folder_digest(path) for path in sorted(folders)}
    digests |= {str(path): sha256(path) for path in sorted(files)}
    agree(processes, {**digests, "the recipe": planned[0].recipe.model_dump_json()})


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file; tensors that share memory (one Gram of three layers) are copied."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        shared = tensor.numel() > 0 and tensor.data_ptr() in seen
        own[name] = tensor.clone() if shared else tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(own, file)


def batches(inputs: Mapping[str, Tensor], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Examples, batch by batch."""
    num = len(next(iter(inputs.values())))
    for start in range(0, num, batch_size):
        yield {name: tensor[start : start + batch_size] for name, tensor in inputs.items()}


def first_examples(file: Path, num: int = EXAMPLES) -> dict[str, Tensor]:
    return {name: tensor[:num] for name, tensor in load_file(file).items()}


def run_jobs(
    title: str,
    work: Callable[..., None],
    arguments: Mapping[str, tuple],
    steps: Mapping[str, int],
    *,
    here: bool = False,
    show: bool = True,
    devices: Sequence[str] = (),
) -> dict[str, Any]:
    """Run `work(*arguments[name], report)` for every job, as many at once as there are cores.

    `report("step")` moves the progress bar, of `steps[name]` for each job; `report("say", line)`
    prints; `report("result", value)` hands back the result of the job. One job alone runs here, and
    with `here` each after the other; a tensor's operations have one thread, so that results do not
    depend on the number of cores. Cores that no job has for itself take batches of one
    (`tasks.workers.in_order`). With `devices` the jobs queue for these.

    Where the output is no terminal, a line says which of several jobs begins and which is done.
    """
    results: dict[str, Any] = {}
    share_cores(1 if here else len(arguments))
    text = bars.TextColumn("{task.description}")
    columns = (text, bars.BarColumn(), bars.TimeElapsedColumn())
    console = Console()
    with bars.Progress(
        *columns, console=console, transient=True, disable=not (show and console.is_terminal)
    ) as progress:
        bar = progress.add_task(title, total=sum(steps.values()))

        def say(text: str) -> None:
            line = f"{title}: {text}"
            progress.console.print(line, soft_wrap=True, markup=False, highlight=False)

        told = Told(len(arguments) if show and not console.is_terminal else 0, say)

        def receive(name: str, what: str, *values: Any) -> None:
            if what == "step":
                progress.advance(bar)
            elif what == "say":
                say(str(values[0]))
            elif what == "begin":
                told.begin(name)
            elif what == "end":
                told.end(name)
            else:
                results[name] = values[0]

        if here or len(arguments) == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for name, given in arguments.items():
                    _one_job(work, *given, partial(receive, name))
            finally:
                torch.set_num_threads(threads)
        else:
            side_by_side(
                partial(_one_job, work), arguments, receive, at_once=num_cores(), devices=devices
            )
    return results


def _one_job(work: Callable[..., None], *given: Any) -> None:
    """Do the work of a job, and report when it begins and ends."""
    *_, report = given
    report("begin")
    work(*given)
    report("end")
