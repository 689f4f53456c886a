"""Paths of the workspace, which this module alone owns.

```
data/<recipe>/                      prepare: manifest.json, calibration and benchmarks
models/<recipe>/checkpoints/<name>/ fetch
models/<recipe>/statistics/         collect
models/<recipe>/transforms/         align
models/<recipe>/arms/               merge: every arm
models/<recipe>/merged/             choose: the arm that the recipe is about
models/<recipe>/choice.json         choose: which arm that is, and why
models/<recipe>/finetuned/          finetune: that arm, trained briefly
models/<recipe>/finetuned_arms/     finetune: the arms to compare it with
models/<recipe>/registered.json     register: which version of which model it is
models/<recipe>/registered.html     register: leads to that version in MLflow
reports/<recipe>/                   evaluate: metrics.json headline.json table.md report.html plots/
                                    and examples.safetensors, the values by example
.alloy/                             locks, and work that an interrupted stage goes on with
```
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

DATA, MODELS, REPORTS = Path("data"), Path("models"), Path("reports")
STATE = Path(".alloy")
CELLS = DATA / "cells"  # drawings that all recipes with scenes share
LOCK_FILE = Path("dvc.lock")


@dataclass(frozen=True)
class Workspace:
    """The paths of one recipe, relative to the repository."""

    recipe: str

    @property
    def params(self) -> Path:
        return Path("params") / f"{self.recipe}.yaml"

    @property
    def data(self) -> Path:
        return DATA / self.recipe

    @property
    def data_manifest(self) -> Path:
        return self.data / "manifest.json"

    @property
    def models(self) -> Path:
        return MODELS / self.recipe

    @property
    def checkpoints(self) -> Path:
        return self.models / "checkpoints"

    @property
    def statistics(self) -> Path:
        return self.models / "statistics"

    @property
    def transforms(self) -> Path:
        return self.models / "transforms"

    @property
    def arms(self) -> Path:
        return self.models / "arms"

    @property
    def merged(self) -> Path:
        return self.models / "merged"

    @property
    def choice(self) -> Path:
        return self.models / "choice.json"

    @property
    def finetuned(self) -> Path:
        return self.models / "finetuned"

    @property
    def finetuned_arms(self) -> Path:
        return self.models / "finetuned_arms"

    @property
    def registered(self) -> Path:
        return self.models / "registered.json"

    @property
    def registered_page(self) -> Path:
        return self.models / "registered.html"

    @property
    def reports(self) -> Path:
        return REPORTS / self.recipe

    @property
    def metrics(self) -> Path:
        return self.reports / "metrics.json"

    @property
    def examples(self) -> Path:
        return self.reports / "examples.safetensors"

    @property
    def table(self) -> Path:
        return self.reports / "table.md"

    @property
    def page(self) -> Path:
        return self.reports / "report.html"

    @property
    def plots(self) -> Path:
        return self.reports / "plots"

    def result(self, model: str) -> Path:
        """The model that is registered or shipped: `merged` or `finetuned`."""
        return self.models / model

    def work(self, stage: str) -> Path:
        """Files that an interrupted stage resumes from; they are no output."""
        return STATE / stage / self.recipe


def revision() -> str | None:
    """The commit, `+changes` behind it where tracked files differ; None without git.

    What stages and their graph write counts for nothing: `dvc.lock`, reports, `params/graph.yaml`.
    """
    written = [f":(exclude){place}" for place in (LOCK_FILE, REPORTS, "params/graph.yaml")]
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes.strip() else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout
