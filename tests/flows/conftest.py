"""Workspaces with a toy graph, real DVC in them and one real Prefect server for the session."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from alloy.modality import ModalityConfig, ModalityModel, copy_to_experts
from flows import database
from flows.pipeline import main
from tasks.data.scenes import words
from tasks.data.scenes.description import scenes_description
from tasks.experts.pretrain import model_config
from tasks.recipe.experts import ExpertsRecipe
from tasks.recipe.load import load, load_file
from tasks.recipe.pretraining import PretrainParams
from tests.servers import free_port

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PATIENCE = 900
"""Seconds after which something that was to happen has failed; never a promise of speed."""


def wait_until(holds: Callable[[], object]) -> None:
    """Wait as long as a machine may need that has ten times as much to do as cores for it."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def cpu_seconds() -> float:
    """CPU time of all children that have ended; unlike wall time it ignores other processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=10).status == 200
    except OSError:
        return False


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {".git", ".prefect", "tmp"} & set(path.relative_to(folder).parts)
    }


@pytest.fixture(scope="session")
def prefect_database() -> Path:
    """The environment's database of Prefect's, for all processes and the next run of the tests."""
    return database.make()


@pytest.fixture(scope="session")
def prefect_server(
    tmp_path_factory: pytest.TempPathFactory, prefect_database: Path
) -> Iterator[str]:
    """The API address of a Prefect server on loopback."""
    url = f"http://127.0.0.1:{(port := free_port())}/api"
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, home / database.NAME)
    command = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            env={**os.environ, "PREFECT_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            wait_until(lambda: answers(f"{url}/health") or server.poll() is not None)
            assert server.poll() is None, (home / "server.log").read_text()
            yield url
        finally:
            APILogWorker.drain_all(timeout=5)
            server.kill()  # it would wait for this process's connections


@dataclass
class Workspace:
    """A folder in which flows run."""

    folder: Path
    environment: dict[str, str]
    python: str = sys.executable

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a Python module; both its streams are one pipe, its process group is its own."""
        return subprocess.Popen(
            [self.python, "-m", *command],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *command: str) -> tuple[int, str]:
        """The exit status and everything that was said."""
        with self.start(*command) as process:
            try:
                said, _ = process.communicate(timeout=PATIENCE)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, said

    def control(self, name: str, value: object) -> None:
        (self.folder / "control" / name).write_text(str(value))

    def text(self, path: str) -> str:
        return (self.folder / path).read_text()

    def log(self) -> list[str]:
        """What the toy stages did since the last call."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def reached(self, line: str) -> bool:
        path = self.folder / "log"
        return path.exists() and line in path.read_text().splitlines()

    def processes(self) -> list[str]:
        """What still runs in this folder."""
        return [" ".join(command) for command in self._commands().values()]

    def pids(self, *words: str) -> list[int]:
        """The processes in this folder whose command holds these words, one after the other."""
        return [
            pid for pid, command in self._commands().items() if " ".join(words) in " ".join(command)
        ]

    def _commands(self) -> dict[int, list[str]]:
        found = {}
        for process in psutil.process_iter():
            try:
                here = process.cwd() == str(self.folder) and process.pid != os.getpid()
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process.cmdline()
            except psutil.Error:
                continue
        return found


def _environment(**more: str) -> dict[str, str]:
    # Settings of tools, and of the `make test` that runs this.
    ours = ("PREFECT_", "DVC_", "MLFLOW_", "MAKE", "MFLAGS", "ARGS", "SLOW", "ALLOY_")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"PATH": path} | more


def make_toy(folder: Path, url: str, recipes: Sequence[str] = ("toy",)) -> Workspace:
    """Recipes of three stages that do nothing but may be slow and may fail; none has run."""
    for name in ("params", "control", ".dvc"):
        (folder / name).mkdir(parents=True)
    for source, target in (
        (HERE / "toy_stage.py", "toy_stage.py"),
        (HERE / "toy_dvc.yaml", "dvc.yaml"),
        (REPOSITORY / ".dvc" / "config", ".dvc/config"),
        (REPOSITORY / ".dvc" / ".gitignore", ".dvc/.gitignore"),
        (REPOSITORY / ".dvcignore", ".dvcignore"),
        *((REPOSITORY / "params" / "modality.yaml", f"params/{name}.yaml") for name in recipes),
    ):
        shutil.copy(source, folder / target)
    for name in recipes[1:]:
        path = folder / "params" / f"{name}.yaml"
        path.write_text(path.read_text().replace("name: alloy-modality", f"name: alloy-{name}"))
    (folder / "params" / "recipes.yaml").write_text(yaml.safe_dump({"recipes": list(recipes)}))
    (folder / "params" / "promote.yaml").write_text("gates: {}\n")
    (folder / ".gitignore").write_text("/out/\n/log\n/.alloy/\n/.prefect/\n")
    workspace = Workspace(folder, _environment(PREFECT_API_URL=url))
    workspace.control("fetch.text", "checkpoint")
    workspace.control("merge.text", "method")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "toy")
    return workspace


@pytest.fixture(scope="session")
def new_toy(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Workspace:
    """A recipe `toy` that has not run yet."""
    return make_toy(tmp_path_factory.mktemp("new") / "toy", prefect_server)


@pytest.fixture(scope="session")
def first_run(new_toy: Workspace) -> tuple[Workspace, str]:
    """The toy after its first run, and what that run said."""
    (new_toy.folder / "reports" / "toy").mkdir(parents=True)
    table = f"|  | score |\n| --- | ---: |\n| {new_toy.folder} | 1.0 |\n"
    (new_toy.folder / "reports" / "toy" / "table.md").write_text(table)
    status, said = new_toy.run("flows.pipeline", "toy")
    assert status == 0, said
    return new_toy, said


@pytest.fixture
def toy(first_run: tuple[Workspace, str], tmp_path: Path) -> Workspace:
    """A copy of the toy in which everything is up to date."""
    done, _ = first_run
    shutil.copytree(done.folder, tmp_path / "toy")
    (tmp_path / "toy" / "log").unlink()
    return Workspace(tmp_path / "toy", dict(done.environment))


@pytest.fixture
def run_here(
    toy: Workspace,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., tuple[int, str]]:
    """Run `python -m flows.pipeline` in this process, to save imports: exit status and output."""
    monkeypatch.chdir(toy.folder)

    def run(*arguments: str) -> tuple[int, str]:
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            status = main(arguments)
        said = capfd.readouterr()
        logged = "\n".join(caplog.messages)
        caplog.clear()
        return status, said.out + said.err + logged

    return run


SMALL = {
    "prepare": {
        "calibration_examples": 32,
        "scenes": {"train_cells": 16, "cells": 8},
        "benchmarks": {
            name: {"train": 64 * finetuned, "validation": 32, "test": 32}
            for name, finetuned in {
                "vqa": 1,
                "retrieval": 1,
                "retrieval_hard": 1,
                "pair_reasoning": 1,
                "segmentation": 1,
                "masked_words": 0,
                "statements": 0,
            }.items()
        },
    },
    "collect": {"calibration_examples": 32, "batch_size": 16},
    "merge": {"arms": {"gauge_naive": {"gauge": {"steps": 4}}}},
    "finetune": {
        "batch_sizes": dict.fromkeys(
            ["vqa", "retrieval", "retrieval_hard", "pair_reasoning", "segmentation"], 8
        ),
        "training": {"num_steps": 4, "warmup_steps": 1, "log_every": 2, "save_every": 2},
        "stopping": {"validate_every": 2, "validation_examples": 16},
    },
    "evaluate": {"batch_size": 32},
}
"""What the small configuration changes of params/modality.yaml."""


def updated(params: dict, changes: dict) -> dict:
    """Change some of nested settings; a change of a missing one is a mistake of the test."""
    assert changes.keys() <= params.keys(), changes.keys() - params.keys()
    return params | {
        key: updated(params[key], value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def small_checkpoints(folder: Path) -> None:
    """Tiny, hardly trained models of the released checkpoints' kinds, related as those are."""
    generator = torch.Generator().manual_seed(0)
    params = load_file("pretrain", PretrainParams)
    recipe = load(params.recipe)
    assert isinstance(recipe, ExpertsRecipe)
    scene = recipe.prepare.scenes
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "embedding_size": 24,
        "num_attention_heads": 2,
    }
    shape = params.model.model_copy(update={**sizes, "num_hidden_layers": 2, "num_joint_layers": 1})

    def fresh(config: ModalityConfig, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return ModalityModel(config).state_dict()

    about = scenes_description(scene, shape.patch_size)
    shared = model_config(shape, about, words.tokenizer(), "all")
    experts = model_config(shape, about, words.tokenizer(), "none")
    seed = fresh(shared, 0)
    for name, config, weights, noise in (
        ("seed", shared, seed, 0.0),
        ("agnostic", shared, seed, 0.01),
        ("specific", experts, copy_to_experts(seed, experts), 0.01),
        ("specific_unseeded", experts, fresh(experts, 1), 0.0),
    ):
        model = ModalityModel(config)
        model.load_state_dict(
            {k: w + noise * torch.randn(w.shape, generator=generator) for k, w in weights.items()}
        )
        model.save_pretrained(folder / name)
        words.tokenizer().save_pretrained(folder / name)


@pytest.fixture(scope="session")
def new_small(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Workspace:
    """This repository as a newcomer would clone it, with a small configuration of its recipe."""
    folder = tmp_path_factory.mktemp("small") / "alloy"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file() and not name.startswith(
            ("released/", "dvc.lock", "reports/")
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    recipe = folder / "params" / "modality.yaml"
    recipe.write_text(
        yaml.safe_dump(updated(yaml.safe_load(recipe.read_text()), SMALL), sort_keys=False)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small_checkpoints(folder / "released" / "modality")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "small")
    return Workspace(folder, _environment(PREFECT_API_URL=prefect_server))


@pytest.fixture(scope="session")
def small_run(new_small: Workspace) -> tuple[Workspace, str]:
    """The small workspace after `make merge`'s own command, and what that said."""
    status, said = new_small.run("flows.pipeline", "modality")
    assert status == 0, said
    return new_small, said
