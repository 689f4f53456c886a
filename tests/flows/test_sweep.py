"""Sweeps: every combination once, each in a copy of the workspace."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo, lock_repo
from dvc.repo.experiments.exceptions import ExpQueueEmptyError
from dvc.repo.experiments.queue import tempdir
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from flows.experiment import OwnQueue
from flows.sweep import called, combinations, main, task_runner
from tasks.recipe.section import ParamsError
from tests.flows.conftest import Workspace, git, snapshot
from tests.servers import free_port


@pytest.fixture
def here(toy: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(toy.folder)
    return toy


def _files(workspace: Workspace) -> dict[str, bytes]:
    """All files but DVC's memory of runs, which grows by those of the experiments."""
    return {
        name: content
        for name, content in snapshot(workspace.folder).items()
        if not name.startswith(".dvc/cache/runs/")
    }


def test_every_combination_once(here: Workspace) -> None:
    """The combinations are the product of the settings' values."""
    found = combinations("toy", ["merge.result=regmean,aligned", "align.max_sweeps=1,2"])
    assert found == [
        ("merge.result=regmean", "align.max_sweeps=1"),
        ("merge.result=regmean", "align.max_sweeps=2"),
        ("merge.result=aligned", "align.max_sweeps=1"),
        ("merge.result=aligned", "align.max_sweeps=2"),
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("merge.resutl=x", "params/toy.yaml.merge has no 'resutl': did you mean 'result'?"),
        ("mrege.result=x", "params/toy.yaml has no 'mrege': did you mean 'merge'?"),
        ("merge.result.deep=x", "params/toy.yaml.merge.result has no 'deep'"),
        ("merge.result", "expected section.key=value,value"),
        ("merge.result=https://u:S3cret@h", "'merge.result=https://***@h' holds a secret"),
    ],
)
def test_a_setting_of_nothing_is_refused(here: Workspace, setting: str, message: str) -> None:
    """A setting that names no key of the recipe is refused with the nearest right one."""
    with pytest.raises(ParamsError) as refused:
        combinations("toy", [setting])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (("merge.arms.a.options.density=0.3", "finetune.seed=2"), "s-1-density=0.3-seed=2"),
        (("merge.result=a b:c~d",), "s-1-result=a_b_c_d"),
        (("merge.result=..",), "s-1-result=_"),
        (("merge.result=x.lock",), "s-1-result=x"),
        (("merge.result=" + 99 * "x",), "s-1-result=" + 73 * "x"),
    ],
)
def test_names_hold_the_values_as_git_allows(settings, name, tmp_path):
    assert called("s", 1, settings) == name
    subprocess.run(["git", "check-ref-format", f"refs/exps/{name}"], check=True, cwd=tmp_path)


def test_processes_side_by_side_take_their_own_experiments(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process has put into DVC's stash is left to it."""
    monkeypatch.setattr(tempdir, "TempDirQueue", OwnQueue)  # as flows.experiment does
    with Repo() as one, Repo() as other:
        queues = [repo.experiments.tempdir_queue for repo in (one, other)]
        for name, repo, queue in zip("ab", (one, other), queues, strict=True):
            with lock_repo(repo):
                queue.put(name=name, params={"params/toy.yaml": [f"merge.result={name}"]})
        for name, queue in zip("ab", queues, strict=True):
            entry, executor = queue.get()
            assert entry.name == name
            taken = yaml.safe_load(Path(executor.root_dir, "params", "toy.yaml").read_text())
            assert taken["merge"]["result"] == name
            with pytest.raises(ExpQueueEmptyError):
                queue.get()


@pytest.mark.slow
def test_sixteen_settings_at_eight_workers_of_a_scheduler(
    here: Workspace, prefect_server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """None is lost or fails but those that cannot work: these are shown, with values and reason.

    Each is a DVC experiment; the workspace is what it was.
    """
    pytest.importorskip("distributed")
    here.control("merge.refuses", "ratio: 0.8")
    git(here.folder, "add", "control")
    git(here.folder, "commit", "--quiet", "--message", "a setting that the stage refuses")
    before = _files(here)
    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    started = [
        here.start(f"distributed.cli.dask_{what}", *arguments, "--no-dashboard")
        for what, arguments in (
            ("scheduler", ("--host", host, "--port", port)),
            ("worker", (address, "--nthreads", "8", "--no-nanny")),
        )
    ]
    ratios = [f"0.{i}" for i in range(1, 9)]
    try:
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            status = main([
                "toy", f"merge.arms.naive.options.ratio={','.join(ratios)}",
                "merge.result=aligned,naive", "--to", "merge", "--workers", f"dask://{address}",
            ])  # fmt: skip
    finally:
        for process in started:
            process.kill()
            process.communicate()
    said = capfd.readouterr().out
    assert status == 1, said
    assert "2 of 16 experiments failed" in said
    for i, result in ((15, "aligned"), (16, "naive")):
        name = f"sweep-{i}-ratio=0.8-result={result}"
        [line] = [line for line in said.splitlines() if line.startswith(f"| {name} ")]
        assert f"merge.arms.naive.options.ratio=0.8, merge.result={result}" in line
        assert "failed: merge: refuses ratio: 0.8" in line
    made = {f"-ratio={ratio}-result={r}" for ratio in ratios[:-1] for r in ("aligned", "naive")}
    assert {re.sub(r"^sweep-\d+", "", name) for name in experiments(here)} == made
    assert _files(here) == before


def experiments(workspace: Workspace) -> list[str]:
    status, said = workspace.run("dvc", "exp", "list", "--name-only")
    assert status == 0, said
    return said.split()


def test_workers_are_threads_or_dask():
    dask = pytest.importorskip("prefect_dask").DaskTaskRunner
    assert isinstance(task_runner("3"), ThreadPoolTaskRunner)
    assert isinstance(task_runner("dask:3"), dask)
    assert isinstance(task_runner("dask://host:8786"), dask)


@pytest.mark.parametrize("workers", ["0", "-1", "many", "dask", "dask:", "dask:0", "dask://"])
def test_refuses_workers_that_are_none(workers):
    with pytest.raises(ParamsError, match="expected a number from 1 on, dask:NUMBER or dask://"):
        task_runner(workers)
