"""All runs of pre-training of one seed, each on the same batches and of the same length.

The agnostic run is the baseline, and the common seeds are its states on the way. Every run keeps
the states that others begin with in `.alloy/study`, and goes on from its last step checkpoint.
"""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alloy.devices import chosen_device
from alloy.modality import ModalityModel
from benchmarks.study.params import Parent, StudyParams, study
from tasks.data.scenes.description import SceneCorpus
from tasks.experts.pretrain import config_for, fit, fresh_weights, load_corpus, with_experts
from tasks.recipe.pretraining import PretrainParams
from tasks.storage import read_json, sha256, write_folder, write_json
from tasks.training.loop import State, load_state

MADE = Path("models/study")
WORK = Path(".alloy/study")
TRUNK = "agnostic"
FACTS = "pretraining.json"
APART = 0.05
"""Distance between averaged checkpoints, of the schedule."""


def parents_of(seed: int) -> Path:
    return MADE / str(seed)


def train(seed: int) -> None:
    """Pre-train every parent of one seed into `models/study/<seed>`, those that are not there."""
    params = study()
    corpus = load_corpus(params.pretrain(seed))
    names = [TRUNK, *(name for name in params.parents if name != TRUNK)]
    for number, name in enumerate(names, start=1):
        run = Run(params, seed, name, corpus)
        print(f"study: seed {seed}: pre-training {number} of {len(names)}: {name}", flush=True)
        run.make()


class Run:
    """One parent of one seed."""

    def __init__(self, params: StudyParams, seed: int, name: str, corpus: SceneCorpus) -> None:
        self.study, self.name, self.corpus = params, name, corpus
        self.parent: Parent = params.parents[name]
        self.params = _constant(params.pretrain(seed), self.parent)
        self.work, self.target = WORK / str(seed) / name, parents_of(seed) / name
        self.trunk = WORK / str(seed) / TRUNK
        self.config = config_for(self.params.model, corpus, self.parent.sharing)

    @property
    def identity(self) -> str:
        """A digest of all that determines the weights, the code apart; not of averages of them."""
        own = self.parent.model_dump(exclude={"averaged"})
        shares = self.stops if self.name == TRUNK else [self.first]
        parts = [self.name, own, shares, self.params.model_dump(), self.corpus.sha256]
        text = json.dumps([*parts, torch.__version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def num_steps(self) -> int:
        return self.params.training.num_steps

    @property
    def first(self) -> int:
        """The step of the schedule with which the run begins."""
        return round(self.parent.share * self.num_steps)

    @property
    def stops(self) -> list[int]:
        """The steps whose states are kept: the seeds', or those that are averaged; the last."""
        if self.name == TRUNK:
            shares = {parent.share for parent in self.study.parents.values() if parent.share}
            return [*sorted(round(share * self.num_steps) for share in shares), self.num_steps]
        every = round(APART * self.num_steps)
        return [self.num_steps - every * i for i in reversed(range(self.parent.averaged))]

    def make(self) -> None:
        facts = {"identity": self.identity, "averaged": self.parent.averaged}
        path = self.target / FACTS
        if path.is_file() and {k: read_json(path)[k] for k in facts} == facts:
            print(f"study: {self.target} is what these params give: nothing to do", flush=True)
            return
        model = ModalityModel(self.config).to(chosen_device())
        start: State | None = None
        for step in self.stops:
            kept = self.state(step)
            if not self._is_kept(kept):
                start = start or self.start()
                self._fit(model, start, step)
                with write_folder(kept) as partial_folder:
                    shutil.copytree(self.work / "steps", partial_folder, dirs_exist_ok=True)
        states = [load_file(self.state(step) / "model.safetensors") for step in self.stops]
        model.load_state_dict(mean(states[-self.parent.averaged :]))
        with write_folder(self.target) as folder:
            model.cpu().save_pretrained(folder)
            if self.parent.share:
                seed = self.trunk / f"at_{self.first}" / "model.safetensors"
                shutil.copy(seed, folder / "seed.safetensors")
            write_json(folder / FACTS, {**facts, "params": self.params.model_dump()})
        print(f"study: wrote {self.target}, {model.num_parameters():,} parameters", flush=True)

    def state(self, step: int) -> Path:
        return self.work / f"at_{step}"

    def _is_kept(self, folder: Path) -> bool:
        path = folder / "progress.json"
        return path.is_file() and read_json(path)["identity"] == self.identity

    def start(self) -> State:
        if self.parent.share:
            return with_experts(load_state(self.trunk / f"at_{self.first}"), self.config)
        if self.parent.random or self.name == TRUNK:
            return State(fresh_weights(self.config, self.params.seed), {})
        shared = config_for(self.params.model, self.corpus, "all")
        return with_experts(State(fresh_weights(shared, self.params.seed), {}), self.config)

    def _fit(self, model: ModalityModel, start: State, stop_step: int) -> None:
        fit(
            model,
            self.params,
            self.corpus,
            folder=self.work / "steps",
            identity=self.identity,
            report=partial(_say, self.name),
            start=start,
            stop_step=stop_step,
        )


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average the weights of several checkpoints."""
    return {name: torch.stack([s[name] for s in states]).mean(dim=0) for name in states[0]}


def _constant(params: PretrainParams, parent: Parent) -> PretrainParams:
    """The params with the rates that the seed ends with, if the last checkpoints are averaged."""
    if parent.averaged == 1:
        return params
    plan = params.training
    rate = plan.rate(round(parent.share * plan.num_steps))
    assert plan.matrix_learning_rate is not None
    constant: dict[str, Any] = {
        "learning_rate": rate * plan.learning_rate,
        "matrix_learning_rate": rate * plan.matrix_learning_rate,
        "final_share": 1.0,
        "warmup_steps": 0,
    }
    return params.model_copy(update={"training": plan.model_copy(update=constant)})


def _say(name: str, kind: str, *values: object) -> None:
    if kind == "say":
        print(f"study: {name}: {values[0]}", flush=True)


def digest_of(seed: int, name: str) -> str:
    return sha256(parents_of(seed) / name / "model.safetensors")
