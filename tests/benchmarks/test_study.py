"""The study of the paper's factors: params that refuse, runs and rows that go on."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.study import page, table
from benchmarks.study import train as runs
from benchmarks.study.measure import Rows, read
from benchmarks.study.params import StudyParams, study
from tasks.data.scenes.bank import load_bank
from tasks.data.scenes.description import SceneCorpus
from tasks.recipe.experts import SceneParams
from tasks.recipe.section import ParamsError, validated

REPOSITORY = Path(__file__).parents[2]
MODEL = {"hidden_size": 12, "num_hidden_layers": 2, "num_joint_layers": 1, "embedding_size": 8}
MODEL |= {"num_attention_heads": 2, "intermediate_size": 20, "patch_size": 8}
MODEL |= {"layer_scale": None, "initializer_range": 0.1}


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    """The params of the study; the model, the bank and the steps are tiny."""
    made = yaml.safe_load((REPOSITORY / "params/study.yaml").read_text())
    made["pretraining"]["batch_size"] = 4
    made["pretraining"]["training"] |= {"num_steps": 20, "warmup_steps": 2, "save_every": 3}
    pretrain = yaml.safe_load((REPOSITORY / "params/pretrain.yaml").read_text()) | {"model": MODEL}
    monkeypatch.chdir(tmp_path)
    Path("params").mkdir()
    Path("params/pretrain.yaml").write_text(yaml.safe_dump(pretrain))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SceneCorpus:
    scenes = {"seed": 0, "cell_pixels": 8, "label_pixels": 4, "train_cells": 6, "cells": 6}
    scenes |= {"duplicates": 0.2, "drop": 0.3, "noise": 4}
    bank = load_bank(SceneParams.model_validate(scenes), tmp_path_factory.mktemp("cells"))
    return SceneCorpus(bank, seed=0)


@pytest.mark.slow
def test_all_arms_have_equal_budgets_and_go_on_from_states_of_one_run(
    values: dict, corpus: SceneCorpus
) -> None:
    """A seed is a state of the agnostic run, which nothing interrupts; what is made stays."""
    params = StudyParams.model_validate(values)
    for name in ("agnostic", "share50", "averaged70"):
        runs.Run(params, 0, name, corpus).make()
    trunk = runs.Run(params, 0, "agnostic", corpus)
    assert trunk.stops == [5, 10, 14, 20]
    weights = load_file(runs.parents_of(0) / "share50" / "seed.safetensors")
    kept = load_file(trunk.state(10) / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())

    alone = copy.deepcopy(values)
    alone["parents"] = {"agnostic": {"sharing": "all"}}
    alone["arms"] = {"agnostic": {"parent": "agnostic"}}
    whole = runs.Run(StudyParams.model_validate(alone), 0, "agnostic", corpus)
    made = load_file(whole.target / "model.safetensors")
    whole.work = Path("whole")
    whole.make()
    again = load_file(whole.target / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in made.items())

    averaged = runs.Run(params, 0, "averaged70", corpus)
    assert averaged.stops == [16, 17, 18, 19, 20]
    first = params.pretrain(0).training
    assert averaged.params.training.rate(19) == 1.0
    assert averaged.params.training.learning_rate == first.rate(14) * first.learning_rate
    states = [load_file(averaged.state(step) / "model.safetensors") for step in averaged.stops]
    target = load_file(averaged.target / "model.safetensors")
    name = "blocks.0.ffn.v.fc1.weight"
    assert torch.allclose(target[name], sum(s[name] for s in states) / 5)
    before = (averaged.target / "model.safetensors").stat().st_mtime_ns
    averaged.make()
    assert (averaged.target / "model.safetensors").stat().st_mtime_ns == before


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    """An interrupted stage goes on with its next row; rows that nothing names any more go."""
    path = tmp_path / "rows.json"
    rows = Rows(path, 3)
    for name in ("a", "b"):
        rows.add({"arm": name}, name, lambda name=name: {"score": name})

    def never() -> dict:
        raise AssertionError("measured again")

    rows = Rows(path, 3)
    rows.add({"arm": "b"}, "b", never)
    rows.add({"arm": "c"}, "c", lambda: {"score": "c"})
    assert {*Rows(path, 3).old} == {"a", "b", "c"}
    rows.close()
    assert {*Rows(path, 3).old} == {"b", "c"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": {"random": {"sharing": "none", "random": True, "share": 0.5}}}, "no common"),
        ({"parents": {"averaged70": {"sharing": "none", "averaged": 5}}}, "need a share"),
        ({"parents": {"agnostic": {"sharing": "none"}}}, "sharing all"),
        ({"arms": {"copied": {"parent": "copid"}}}, "copied"),
        ({"arms": {"x": {"parent": "copied", "method": "modality_arithmetic"}}}, "no seed"),
        ({"arms": {"x": {"parent": "copied", "method": "interpolate"}}}, "interpolation"),
    ],
)
def test_params_that_no_run_can_follow_are_refused(
    values: dict, change: dict, message: str
) -> None:
    for section, entries in change.items():
        values[section] |= entries
    with pytest.raises(ParamsError, match=message):
        validated("params/study.yaml", StudyParams, values)


def test_every_number_of_the_pages_is_one_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between marks is what the rows give; outside them the page has no result."""
    monkeypatch.chdir(REPOSITORY)
    params = study()
    for module in (page, table):
        monkeypatch.setattr(module, "study", lambda: params)
    merged, tuned = read("merged"), read("finetuned")
    text = page.PAGE.read_text()
    for name, part in page.blocks(merged, tuned).items():
        assert f"{page.mark(name)}\n{part}\n{page.END}" in text, name
        text = text.replace(part, "")
    assert re.findall(r"\d+\.\d+(?! \()", re.sub(r"arxiv\S+|arXiv\S+", "", text)) == []
    for name, part in page.overview(merged, tuned).items():
        assert f"{page.mark(name)}\n{part}\n{page.END}" in page.OVERVIEW.read_text()
    assert table.text_of(merged, tuned) == table.TABLE.read_text()


@pytest.mark.slow  # draws five figures
def test_publishing_the_rows_that_are_there_changes_no_page(tmp_path: Path) -> None:
    """The page's second command, in a copy: texts and figures stay as they were."""
    for name in ("docs", "params", "benchmarks"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    subprocess.run(
        [sys.executable, "-m", "benchmarks.study", "publish"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}, check=True,
    )  # fmt: skip
    pages = [page.PAGE, page.OVERVIEW, table.TABLE, *Path("docs/figures").glob("study_*.svg")]
    for path in pages:
        assert (tmp_path / path).read_text() == (REPOSITORY / path).read_text(), path


def test_the_seeds_of_the_page_are_stages_of_the_study() -> None:
    """The page's first command names stages that the study has."""
    text = (REPOSITORY / page.PAGE).read_text()
    loop = re.search(r"for seed in ([\d ]+); do .* (\w+)@\$seed; done", text)
    assert loop
    stages = yaml.safe_load((REPOSITORY / "benchmarks/study/study.yaml").read_text())["stages"]
    params = yaml.safe_load((REPOSITORY / "params/study.yaml").read_text())
    assert stages[loop[2]]["foreach"] == "${seeds}"
    assert [int(seed) for seed in loop[1].split()] == params["seeds"]


def test_figures_are_drawn_from_the_rows_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the five carries the digest of the rows, and the page shows it."""
    monkeypatch.chdir(REPOSITORY)
    drawn = sorted(Path("docs/figures").glob("study_*.svg"))
    assert len(drawn) == 5
    for path in drawn:
        assert f"rows {page.digest()}" in path.read_text()
        assert f"](figures/{path.name})" in page.PAGE.read_text()


def scores(**of_arms: list[float]) -> dict:
    """Scores of arms by seed, the same on all five benchmarks."""
    return {
        arm: {seed: dict.fromkeys(page.TITLES, value) for seed, value in enumerate(values)}
        for arm, values in of_arms.items()
    }


@pytest.mark.parametrize(
    ("ours", "answer"),
    [
        ([2.0, 3.0, 4.0], "Yes, of these runs: `share70_sequential` in every seed"),
        ([2.0, 1.0, 4.0], "Not reliably: `share70_sequential` in 2 of 3 seeds"),
        ([1.0, 1.0, 0.0], "No: no seeded merge is ahead on all five benchmarks in any seed"),
    ],
)
def test_the_answer_follows_the_seeds(
    ours: list[float], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All five in all seeds, in some, in none; an equal score is not ahead."""
    monkeypatch.chdir(REPOSITORY)
    lines = list(page.baseline(scores(agnostic=[1.0, 1.0, 1.0], share70_sequential=ours)))
    assert answer in lines[0].replace("\n", " ")


def test_arms_are_compared_within_a_seed() -> None:
    """A seed that one arm lacks does not count; random starts are no seeded merge."""
    given = scores(agnostic=[1.0, 5.0], share50_sequential=[2.0, 3.0, 9.0])
    assert page.differences(given, "share50_sequential", "agnostic") == [1.0, -2.0]
    assert page.says([1.0, -2.0]) == "ahead in 1 of 2 seeds"
    assert page.says([0.001, 0.0]) == "not ahead in all 2 seeds"
    assert page.signed([1.0, -2.0]) == "-0.5 ± 1.5"


def test_a_seed_that_has_not_run_to_the_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    row = {"seed": 1, "cpu_seconds": 60.0}
    text = page.progress([row], [row, row])
    assert "Of seed 1 there are 1 of 42 merges and parents, 2 of 21 fine-tunings." in text
    assert "to the end" not in text
