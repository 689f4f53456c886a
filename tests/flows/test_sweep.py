"""Sweeps: every combination once, each in a copy of the workspace."""

import shutil
import subprocess

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from flows.sweep import combinations, main, task_runner
from tasks.recipe.section import ParamsError
from tests.flows.conftest import Workspace, snapshot


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


@pytest.mark.slow
def test_a_sweep_leaves_the_workspace_alone(
    here: Workspace, prefect_server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each combination becomes a DVC experiment, two at a time; the workspace is what it was."""
    before = _files(here)
    settings = "merge.result=aligned,interpolation,naive"
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        status = main(["toy", settings, "--to", "register", "--workers", "2"])
    assert status == 0, capfd.readouterr()
    dvc = shutil.which("dvc", path=here.environment["PATH"]) or "dvc"
    listed = subprocess.run(
        [dvc, "exp", "list", "--name-only"],
        cwd=here.folder,
        env=here.environment,
        capture_output=True,
        text=True,
    )
    assert set(listed.stdout.split()) == {"sweep-1", "sweep-2", "sweep-3"}
    assert _files(here) == before


def test_workers_are_threads_or_dask():
    dask = pytest.importorskip("prefect_dask").DaskTaskRunner
    assert isinstance(task_runner("3"), ThreadPoolTaskRunner)
    assert isinstance(task_runner("dask:3"), dask)
    assert isinstance(task_runner("dask://host:8786"), dask)


@pytest.mark.parametrize("workers", ["0", "-1", "many", "dask", "dask:", "dask:0", "dask://"])
def test_refuses_workers_that_are_none(workers):
    with pytest.raises(ParamsError, match="expected a number from 1 on, dask:NUMBER or dask://"):
        task_runner(workers)
