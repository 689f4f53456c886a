"""README and how-to pages are true: commands run, links and paths exist, numbers have a source."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import torch

from alloy.merging import MERGE_METHODS
from tasks.reports.publish import END, start
from tests.flows.conftest import PATIENCE, REPOSITORY, Workspace
from tests.servers import free_port

README = (REPOSITORY / "README.md").read_text()
PAGES = ("how_to/rerun.md", "operations.md", "how_to/checkpoints.md")
TEXT = "\n".join([README, *((REPOSITORY / "docs" / page).read_text() for page in PAGES)])
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
IDENTITY = {
    f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}


def test_links_and_paths_exist() -> None:
    """Every relative link, and every path of "Where things are" that a clone has, exists."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    table = README.partition("## Where things are")[2].partition("##")[0]
    paths = [
        path
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for path in row.split(", ")
    ]
    made = {"data/", "models/", "reports/", "mlflow.db", "mlartifacts/", ".prefect/"}
    for path in [*links, *({path.strip("`") for path in paths} - made)]:
        assert (REPOSITORY / path).exists(), path


def test_it_is_a_front_door() -> None:
    """At most 150 lines, one command to start, and the same first lines of Python as the site."""
    assert len(README.splitlines()) <= 150
    block = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    (code,) = block.findall(README)
    assert block.findall((REPOSITORY / "docs/index.md").read_text()) == [code]
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 12
    assert README.startswith("# Alloy: ")
    assert "alloy-merge" in README


def test_its_python_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = re.findall(
        r"^```python\n(.*?)^```\n+```text\n(.*?)^```", README, re.DOTALL | re.MULTILINE
    )[0]
    exec(code, {})
    assert capsys.readouterr().out == shown


def test_its_numbers_have_a_source() -> None:
    """Each row of the table names a command, and its numbers stand in what that command writes."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| `(.+?)` \|$", README, re.MULTILINE)
    numbers = {command: (before, after) for _, before, after, command in rows}
    tutorial = (REPOSITORY / "docs/tutorials/two_models.md").read_text()
    before, after = numbers.pop("python examples/notebooks.py two_models")
    assert f"barrier, as they are: {before}\nbarrier, aligned: {after}" in tutorial
    scores = json.loads((REPOSITORY / "benchmarks/results/reports/modality.json").read_text())
    r_at_1 = {m: f"{v['retrieval']['recall_at_1']:.1f}" for m, v in scores["test"].items()}
    assert numbers.pop("make merge") == (r_at_1["naive"], r_at_1["gauge_naive"])
    assert f"one model trained as a whole: {r_at_1['agnostic']}" in README
    measured = (REPOSITORY / "benchmarks/results/merge.md").read_text()
    seconds = dict(re.findall(r"^\| ([\w ]+) \| \d+ \| ([\d.]+) \|", measured, re.MULTILINE))
    before, after = numbers.pop("python -m benchmarks.merge")
    assert (f"{float(seconds['mergekit ties']):.0f}", f"{float(seconds['alloy ties']):.1f}") == (
        before,
        after,
    )
    assert numbers == {}


def test_what_make_merge_prints_is_in_the_results() -> None:
    """Every score of the block under `make merge` stands in a row of docs/results.md."""
    results = (REPOSITORY / "docs/results.md").read_text()
    block = README.partition("After fine-tuning:")[2].partition("The whole story")[0]
    for line in re.findall(r"^(\S.*?\S)  +(\d.*)$", block, re.MULTILINE):
        cells = " | ".join(re.split(r" {2,}", line[1].strip()))
        assert f"| {line[0]} | {cells} |" in results


@pytest.mark.parametrize("recipe", ["modality", "multitask"])
def test_every_number_of_the_results_is_in_the_metrics(recipe: str) -> None:
    """A score ± its error, rounded as the tables do, is one of the published run."""
    page = (REPOSITORY / "docs/results.md").read_text()
    tables = page.partition(start(recipe))[2].partition(END)[0]
    published = json.loads((REPOSITORY / f"benchmarks/results/reports/{recipe}.json").read_text())
    known = torch.tensor(
        [
            (value, values[name + error])
            for of_model in published["test"].values()
            for values in of_model.values()
            for name, value in values.items()
            for error in ("_spread", "_standard_error")
            if name + error in values
        ]
    )
    shown = set(re.findall(r"(-?[\d.]+) ± ([\d.]+)", tables))
    assert len(shown) > 50
    for cell in shown:
        off = (known - torch.tensor([float(number) for number in cell])).abs().amax(1)
        assert off.min() < 0.0501, cell


def test_all_methods_are_counted() -> None:
    assert f"{len(MERGE_METHODS)} methods" in README
    assert f"Alloy has {len(MERGE_METHODS)};" in (REPOSITORY / "docs/methods.md").read_text()


def test_badges_say_what_pyproject_says() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"python-{project['requires-python'].removeprefix('>=')}%2B" in README
    assert f"license-{project['license'].replace('-', ' ').replace(' ', '%20')}" in README


def test_the_figure_is_what_its_script_draws(tmp_path: Path) -> None:
    """docs/figures/merge.svg was written by docs/figures/merge.py."""
    shutil.copy(REPOSITORY / "docs/figures/merge.py", tmp_path)
    runpy.run_path(str(tmp_path / "merge.py"), run_name="__main__")
    assert (tmp_path / "merge.svg").read_text() == (
        REPOSITORY / "docs/figures/merge.svg"
    ).read_text()


def as_cloned(workspace: Workspace) -> Workspace:
    """Give a workspace an environment that `make` finds ready: links to this one's packages."""
    venv = workspace.folder / ".venv"
    venv.mkdir()
    for entry in (REPOSITORY / ".venv").iterdir():
        if entry.name != ".ready":
            (venv / entry.name).symlink_to(entry)
    (venv / ".ready").touch()
    return workspace


def run(workspace: Workspace, script: str) -> str:
    """What a block says; it must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=workspace.folder,
        env=workspace.environment | IDENTITY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def serve_and_stop(workspace: Workspace, command: str) -> str:
    """Run a command that serves until Ctrl-C; press that when it says that it serves."""
    environment = workspace.environment | {"ARGS": f"--port {free_port()}"}
    log = workspace.folder / "serve.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=workspace.folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        deadline = time.monotonic() + PATIENCE
        while "Serving modality" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE)
    said = log.read_text()
    log.unlink()
    return said


@pytest.mark.slow
def test_every_command_of_the_readme_runs(new_small: Workspace, tmp_path: Path) -> None:
    """All blocks run in order in a clone with small settings; `make test` is the Makefile's."""
    # The README's commands write recipes and models: others read the workspace as it is.
    shutil.copytree(new_small.folder, tmp_path / "alloy", symlinks=True)
    workspace = as_cloned(Workspace(tmp_path / "alloy", new_small.environment))
    # What is another machine, or a long run of its own, in the text.
    elsewhere = {
        "make test\n": "ARGS=tests/test_makefile.py make test\n",
        "http://server:4200/api": workspace.environment["PREFECT_API_URL"],
    }
    said = {}
    for number, block in enumerate(BLOCKS):
        if block.strip() == "make serve":
            said[block] = serve_and_stop(workspace, "make serve")
            assert "Stopped." in said[block]
            continue
        script = block
        for written, here in elsewhere.items():
            script = script.replace(written, here)
        activated = "" if number == 0 else "source .venv/bin/activate\n"
        said[block] = run(workspace, activated + script)
    assert "The whole story: reports/modality/report.html" in said[BLOCKS[0]]
    [refreshed] = [text for block, text in said.items() if "--refresh" in block]
    assert "fetch@modality" in refreshed
    assert "merge@modality" not in refreshed
    [promoted] = [text for block, text in said.items() if "flows.promote" in block]
    assert "is the champion" in promoted
    assert "was rolled back" in promoted
    assert (workspace.folder / "models" / "mine" / "registered.json").is_file()
    assert workspace.processes() == []
