"""Search: proposals depend on seed and number, ranges are checked, the best is written."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import save_file

from alloy.errors import MergeError
from alloy.modality import ModalityConfig, ModalityModel
from tasks.models import align, choose, collect, evaluate, merge, prepare
from tasks.recipe.load import load
from tasks.recipe.section import ParamsError
from tasks.search import command as search
from tasks.search.objective import Objective, objective_of
from tasks.sources import fetch
from tests import recipes, tiny_models

CONFIG = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_joint_layers": 1, "num_attention_heads": 3,
    "intermediate_size": 12, "layer_scale": None, "image_size": 8, "patch_size": 4,
    "vocab_size": 12, "max_position_embeddings": 6,
    "embedding_size": 12, "num_answers": 4, "num_segment_classes": 4,
}  # fmt: skip


class Bowl(Objective):
    """A merge whose score is known: best where the ratio is 0.3 and both coefficients are 0.6."""

    method = "task_arithmetic"
    experts = ("v", "l")

    def __init__(self):
        self.asked, self.measured_by = [], {"data": "x"}

    def own(self):
        return {"options": {}, "coefficients": {"v": 0.1, "l": 0.2}}

    def arm(self, settings):
        if settings["coefficients"]["v"] > 0.95:
            raise MergeError("too much")
        return settings["coefficients"]

    def scores(self, arm):
        self.asked.append(dict(arm))
        return {"a": 50 - 100 * (arm["v"] - 0.6) ** 2, "b": 50 - 100 * (arm["l"] - 0.6) ** 2}

    def section(self, arm):
        return {"merge": {"arms": {"x": arm}}}


def ranges(objective, *settings):
    return [search.parse(setting, objective) for setting in settings]


BOTH = ("coefficients.v=0..1", "coefficients.l=0..1")


def test_a_search_that_goes_on_proposes_what_it_would_have_proposed(tmp_path):
    """Trials 0..15 at once equal 0..8 and then the rest; the first settings are the arm's own."""
    whole, parts = Bowl(), Bowl()
    at_once = search.search(
        whole, ranges(whole, *BOTH), num_trials=16, seed=3, folder=tmp_path / "a"
    )
    for num in (9, 16):
        found = search.search(
            parts, ranges(parts, *BOTH), num_trials=num, seed=3, folder=tmp_path / "b"
        )
    assert found == at_once
    assert whole.asked == parts.asked
    assert at_once[0].settings == {"coefficients.v": 0.1, "coefficients.l": 0.2}
    assert max(t.score for t in at_once) > 45 > at_once[0].score
    other = search.search(Bowl(), ranges(whole, *BOTH), num_trials=5, seed=4, folder=tmp_path / "c")
    assert [t.settings for t in other[1:]] != [t.settings for t in at_once[1:5]]


def test_settings_that_cannot_be_merged_are_told_and_not_scored(tmp_path):
    objective = Bowl()
    found = search.search(
        objective, ranges(objective, "coefficients.v=0.94..1", "coefficients.l=0..1"),
        num_trials=12, seed=0, folder=tmp_path,
    )  # fmt: skip
    refused = [t for t in found if t.problem]
    assert refused
    assert all(t.settings["coefficients.v"] > 0.95 and not t.scores for t in refused)
    assert "too much" in search.as_markdown(found)


def test_another_search_in_the_same_place_is_refused(tmp_path):
    objective = Bowl()
    search.search(objective, ranges(objective, *BOTH), num_trials=1, seed=0, folder=tmp_path)
    with pytest.raises(ParamsError, match="other seed; choose another --name"):
        search.search(objective, ranges(objective, *BOTH), num_trials=2, seed=1, folder=tmp_path)
    objective.measured_by = {"data": "y"}
    with pytest.raises(ParamsError, match="other measured_by"):
        search.search(objective, ranges(objective, *BOTH), num_trials=2, seed=0, folder=tmp_path)


WHOLE = {
    "kind": "models",
    "fetch": {"checkpoints": {"a": "given/a", "b": "given/b"}},
    "members": ["a", "b"],
    "merge": {"result": "average", "arms": {"average": {"method": "linear"}}},
    "evaluate": {"tssd_keep": 0.2},
    "register": {"name": "whole", "model": "merged"},
}
"""Whole checkpoints, merged as they are: nothing says how good the result is."""


def _write_recipe(folder):
    """A tiny modality recipe with its checkpoints, and one benchmark of eight pairs."""
    arms = {
        "interpolation": {
            "checkpoint": "specific",
            "method": "interpolation",
            "options": {"ratio": 0.5},
        },
        "linear": {"checkpoint": "specific", "method": "linear"},
    }
    tiny = recipes.experts(merge={"result": "linear", "arms": arms})
    recipes.write(folder, tiny=tiny, whole=WHOLE)
    torch.manual_seed(0)
    model = ModalityModel(ModalityConfig(sharing="none", **CONFIG)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder / "models/tiny/checkpoints/specific")
    pairs = {
        "pixel_values": torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8),
        "input_ids": torch.randint(1, 12, (8, 6)),
        "attention_mask": torch.ones(8, 6, dtype=torch.long),
    }
    data = folder / "data/tiny/retrieval"
    data.mkdir(parents=True)
    (data.parent / "manifest.json").write_text("{}")
    save_file(pairs, data / "validation.safetensors")


@pytest.fixture
def recipe(workspace):
    _write_recipe(workspace)
    return workspace


def test_the_command_searches_by_pattern_and_writes_the_best_to_paste(recipe, capsys):
    """A trial scores what the pasted arm scores; only validation data can be read."""
    settings = ["options.ratio[blocks.0.*]=0..1", "options.ratio[*]=0.25,0.5,0.75"]
    search.main(["tiny", "interpolation", *settings, "--trials", "4", "--benchmarks", "retrieval"])
    folder = recipe / "reports/search/tiny/interpolation"
    trials = json.loads((folder / "trials.json").read_text())
    best = max(trials, key=lambda t: (t["scores"]["retrieval"], -t["number"]))
    arm = yaml.safe_load((folder / "best.yaml").read_text())["merge"]["arms"]["interpolation"]
    assert arm["options"] == {
        "ratio": {
            "blocks.0.*": best["settings"]["options.ratio[blocks.0.*]"],
            "*": best["settings"]["options.ratio[*]"],
        }
    }
    pasted = yaml.safe_load((recipe / "params/tiny.yaml").read_text())
    pasted["merge"]["arms"]["interpolation"] = arm
    (recipe / "params/tiny.yaml").write_text(yaml.safe_dump(pasted, sort_keys=False))
    objective = objective_of("tiny", "interpolation", ["retrieval"])
    own = {"options": objective.own()["options"], "coefficients": {}}
    assert objective.scores(objective.arm(own)) == best["scores"]
    assert "the best 4 of 4 trials" in capsys.readouterr().out
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "table.md").read_text().splitlines()) == 6


REFUSED = [
    (["nope", "linear", "options.normalize=true,false"], "'nope' is unknown: .*'tiny'"),
    (["whole", "average", "coefficients.0=0..1"], "average: no set with a benchmark has this arm"),
    (["tiny", "liner", "options.normalize=true,false"], "'liner' is no arm: did you mean 'linear'"),
    (["tiny", "interpolation", "options.ration=0..1"], "did you mean 'ratio'"),
    (["tiny", "interpolation", "options.ratio=0..2"], r"=2.0 is outside \[0, 1\]"),
    (["tiny", "interpolation", "options.ratio=1..0"], "LOW must be less than HIGH"),
    (["tiny", "interpolation", "options.ratio=0..1:log"], "above 0 with :log"),
    (["tiny", "interpolation", "options.ratio=a..b"], "must be numbers"),
    (["tiny", "interpolation", "options.ratio"], "write options.NAME=LOW..HIGH"),
    (["tiny", "interpolation", "ratio=0..1"], "write options.NAME=LOW..HIGH"),
    (["tiny", "interpolation", "coefficients.v=0..1"], "takes no coefficients"),
    (["tiny", "linear", "coefficients.x=0..1"], r"choose one of \['l', 'v', 'vl'\]"),
    (["tiny", "linear", "coefficients.v=0..1"], r"lack \['l'\]"),
    (
        ["tiny", "linear", "options.normalize=true,maybe"],
        "normalize='maybe': it must be true or false",
    ),
    (
        ["tiny", "interpolation", "options.ratio=0..1", "options.ratio[*]=0..1"],
        "all with a pattern or none",
    ),
    (["tiny", "interpolation", "options.ratio=0..1", "options.ratio=0..1"], "given twice"),
    (
        ["tiny", "interpolation", "options.ratio=0..1", "--benchmarks", "vqa"],
        "--benchmarks 'vqa': .*'retrieval'",
    ),
    (["tiny", "interpolation", "options.ratio=0..1", "--trials", "0"], "give at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_wrong_is_refused_before_a_trial(arguments, message, recipe):
    named = arguments if "--benchmarks" in arguments else [*arguments, "--benchmarks", "retrieval"]
    with pytest.raises(SystemExit) as stopped:
        search.main(named)
    assert re.search(message, str(stopped.value)), stopped.value
    assert not (recipe / "reports").exists()


@pytest.mark.slow
def test_a_recipe_of_kind_models_is_searched_by_joint_accuracy(workspace):
    """A trial scores what merge and evaluate give for the arm that is pasted."""
    kind = "ConvNextForImageClassification"
    for seed, name in enumerate("ab"):
        model = tiny_models.model(kind, seed, num_channels=1, num_labels=32)
        model.save_pretrained(workspace / "given" / name)
    recipe = tiny_models.recipe({"writer": "mnist", "examples": 32}, {0: ["a", "b"]})
    sizes = {"validation": 40, "test": 60}
    recipe["prepare"]["benchmarks"] = {"digits": {"writer": "mnist", "options": sizes}}
    recipe["sets"]["pair"]["benchmark"] = "digits"
    recipe["evaluate"]["curves"] = []
    recipes.write(workspace, mine=recipe)
    for stage in (fetch, prepare, collect, align):
        stage.main(load("mine"))
    search.main(["mine", "average", "coefficients.0=0..1", "coefficients.1=0..1", "--trials", "3"])
    folder = workspace / "reports/search/mine/average"
    trials = json.loads((folder / "trials.json").read_text())
    assert [t["problem"] for t in trials] == [None] * 3
    best = max(trials, key=lambda t: (t["scores"]["pair"], -t["number"]))
    arm = yaml.safe_load((folder / "best.yaml").read_text())["merge"]["arms"]["average"]
    assert arm["coefficients"] == list(best["settings"].values())
    recipe["merge"]["arms"]["average"] = arm
    recipes.write(workspace, mine=recipe)
    for stage in (merge, choose, evaluate):
        stage.main(load("mine"))
    metrics = json.loads((workspace / "reports/mine/plots/scores.json").read_text())
    found = [
        row["value"]
        for row in metrics
        if (row["model"], row["split"], row["metric"])
        == ("average", "validation", "joint_accuracy")
    ]
    assert found == [pytest.approx(best["scores"]["pair"], abs=1e-3)]
