"""The study of the gauge: a pipeline that no recipe runs, and params that build its models."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
import torch
from dvc.repo import Repo

from alloy.modality import ModalityConfig, ModalityModel
from benchmarks.gauge.figures import points
from benchmarks.gauge.measure import dims_99
from benchmarks.gauge.merges import METHOD, NO_GAUGE, PARENT, PLAIN
from benchmarks.gauge.params import GaugeStudyParams, study
from benchmarks.gauge.table import _kept, _spread
from benchmarks.gauge.widen import widen
from benchmarks.rerun import PIPELINE, main, opened
from tasks.recipe.graph import write_graph
from tasks.recipe.load import load_file, recipes
from tasks.recipe.pretraining import PretrainParams
from tasks.recipe.section import ParamsError
from tests.recipes import with_whole_graph

REPOSITORY = Path(__file__).parents[2]
STUDY = "benchmarks/gauge/dvc.yaml"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def _opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder in which DVC knows the study and all recipes."""
    monkeypatch.chdir(with_whole_graph(tmp_path))
    write_graph(*recipes())
    folder = Path("benchmarks/gauge")
    folder.mkdir(parents=True)
    shutil.copy(REPOSITORY / folder / PIPELINE, folder)
    with opened(folder):
        yield
    assert not Path(STUDY).exists()


@pytest.mark.usefixtures("_opened")
def test_no_recipe_reads_what_the_study_writes_and_everything_is_measured() -> None:
    """Recipes never train a model of the study; every parent of the params has its stage."""
    with Repo() as repo:
        graph = repo.index.graph  # edges lead from a reader to what it reads
        own = {s for s in graph if str(s.path_in_repo) == STUDY}
        recipes = [s for s in graph if str(s.path_in_repo) == "dvc.yaml"]
        for stage in recipes:
            assert not own & networkx.descendants(graph, stage), stage
        by_name = {stage.name: stage for stage in own}
        table = {stage.name for stage in networkx.descendants(graph, by_name["table"])}
    params = study()
    parents = [f"measure@{n}" for n in params.models]
    parents += [f"measure_again@{n}" for n in params.retrained]
    parents += [f"measure_widened@{n}" for n in params.widened]
    parents += [f"measure_released@{n}" for n in params.measure.released]
    assert {*parents, "ablate", "multitask", "finetune", "cost"} <= table
    assert "prepare@modality" in table


def test_a_study_that_is_none_is_refused_with_those_there_are(capsys) -> None:
    assert main(["benchmarks/gague"]) == 2
    said = capsys.readouterr().err
    assert "benchmarks/gague/study.yaml is missing; studies are benchmarks/gauge, " in said


@pytest.mark.usefixtures("_opened")
def test_every_parameter_that_a_stage_names_is_there() -> None:
    """DVC finds out after the stage has run, and then does not record it."""
    with Repo() as repo:
        for stage in repo.index.graph:
            for parameters in stage.params if str(stage.path_in_repo) == STUDY else ():
                assert set(parameters.params) <= set(parameters.read_params()), stage


def test_params_build_the_models_of_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = study()
    for name, model in params.models.items():
        arm, made = params.pretrain(name)
        assert (arm, made.seed) == ("specific_unseeded", model.seed)
        assert made.model.hidden_size == model.width
        assert made.model.hidden_size % made.model.num_attention_heads == 0
    released = load_file("pretrain", PretrainParams)
    for name, again in params.retrained.items():
        arm, made = params.pretrain(name)
        assert (arm, made) == (again.arm, released.model_copy(update={"seed": again.seed}))
        assert made.seed != released.seed
    text = Path("params/gauge.yaml").read_text().replace("masked_share", "maskd_share")
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "gauge.yaml").write_text(text)
    monkeypatch.setattr("tasks.recipe.load.PARAMS", tmp_path / "params")
    with pytest.raises(ParamsError, match="unknown key 'maskd_share': did you mean 'masked_share'"):
        load_file("gauge", GaugeStudyParams)


def test_what_is_kept_is_a_share_of_the_parents_own_score() -> None:
    facts = {"cpu_seconds": 9, "search_seconds": 5, "width": 96}
    facts |= {"demand": 1.5, "joint_demand": 2.0, "weighted_joint_demand": 1.0}
    scores = [(PARENT, 80, 50), (METHOD, 60, 40), (NO_GAUGE, 40, 30), (PLAIN, 20, 5)]
    rows = [
        {"parent": "p", "arm": arm, "scores": {"retrieval": r, "masked_words": w}} | facts
        for arm, r, w in scores
    ]
    rows.append({**rows[1], "scores": {"retrieval": 64, "masked_words": 44}})
    (point,) = points(rows)
    assert point[f"{METHOD}: retrieval"] == pytest.approx(100 * 62 / 80)
    assert point[f"{PLAIN}: masked_words"] == pytest.approx(10)
    assert point["seconds"] == 14
    assert _spread([60, 64]) == "62.0 ± 2.0"
    other = [{**row, "parent": "q"} for row in rows[:2]]
    other[1]["scores"] = {"retrieval": 80, "masked_words": 25}
    rows = [{**r, "scores": {**r["scores"], "statements": 90}} for r in rows + other]
    assert _kept(rows, METHOD) == "89 % (78 to 100), 67 % (50 to 84), 100 % (100 to 100)"


def test_dims_are_counted_up_to_99_percent_of_the_energy() -> None:
    assert dims_99(torch.diag(torch.tensor([98.0, 1.0, 0.5, 0.5]))) == 2
    assert dims_99(torch.eye(200)) == 198


def test_a_model_in_a_wider_stream_is_the_same_function() -> None:
    """Twice as wide, with heads that do nothing: equal outputs; another width is refused."""
    torch.manual_seed(0)
    config = ModalityConfig(
        sharing="none",
        hidden_size=24,
        num_hidden_layers=2,
        num_joint_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        embedding_size=16,
        image_size=16,
        patch_size=8,
        vocab_size=30,
        max_position_embeddings=6,
        layer_scale=None,
        initializer_range=0.2,
        num_answers=0,
        num_segment_classes=0,
    )
    model = ModalityModel(config).double().eval()
    wide = widen(model, 48).double()
    inputs = {
        "pixel_values": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8),
        "input_ids": torch.randint(1, 30, (3, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6]),
    }
    assert wide.config.hidden_size == 48
    with torch.no_grad():
        for name, value in model(**inputs).items():
            if name != "joint_states":
                torch.testing.assert_close(wide(**inputs)[name], value, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="width 30: take a multiple of 12 of at least 24"):
        widen(model, 30)
