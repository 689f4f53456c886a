"""Recipes of kind "models": any architecture, from folders to a merged model and its report."""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ConvNextImageProcessor

import alloy
from alloy.refit import repair
from alloy.symmetry import with_kind
from tasks.evaluation.outputs import Answers
from tasks.models import align, choose, collect, evaluate, merge, prepare
from tasks.models.measures.scores import merge_score, surest
from tasks.models.measures.yardsticks import Labelled, Unlabelled, as_candidate
from tasks.models.shared.alignment import load_alignment
from tasks.models.shared.jobs import jobs
from tasks.recipe.calibration import ModelsCalibration
from tasks.recipe.load import load, load_models
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import Gates
from tasks.registry import promotion, register, tracking
from tasks.sources import fetch
from tests import tiny_models

STAGES = (fetch, prepare, collect, align, merge, choose, evaluate)
OWN = {
    "images": {"images": "photos", "examples": 24},
    "texts": {"texts": "letters", "examples": 24, "tokens": 16},
}
CONVNEXT, OPT = "ConvNextForImageClassification", "OPTForCausalLM"
QUICK = (CONVNEXT, "DistilBertForMaskedLM")  # of the architectures that every run passes


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of each architecture, pictures and texts."""
    folder = tmp_path_factory.mktemp("given")
    for name in tiny_models.ARCHITECTURES:
        for seed, member in enumerate("ab"):
            tiny_models.save(tiny_models.model(name, seed), folder / name / member)
    tiny_models.pictures(folder / "photos")
    tiny_models.letters(folder / "letters")
    return folder


@pytest.fixture
def workspace(tmp_path: Path, given: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(given / "photos", tmp_path / "photos")
    shutil.copytree(given / "letters", tmp_path / "letters")
    (tmp_path / "params").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(workspace: Path, given: Path) -> Callable[..., None]:
    """Write the recipe `mine` that merges an architecture's two checkpoints, and bring those."""

    def write(name: str, change: Callable[[dict], None] = lambda recipe: None) -> None:
        shutil.copytree(given / name, workspace / "given", dirs_exist_ok=True)
        recipe = tiny_models.recipe(OWN[tiny_models.ARCHITECTURES[name][0]], {0: ["a", "b"]})
        change(recipe)
        (workspace / "params/recipes.yaml").write_text("recipes: [mine]\n")
        (workspace / "params/mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    return write


def run(*stages) -> None:
    for stage in stages or STAGES:
        stage.main(load("mine"))


def change_params(change: Callable[[dict], None]) -> None:
    path = Path("params/mine.yaml")
    recipe = yaml.safe_load(path.read_text())
    change(recipe)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def scores(model: str, split: str = "calibration") -> dict[str, float]:
    return json.loads(Path("reports/mine/metrics.json").read_text())[split][model]["pair"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name not in QUICK else [])
        for name in tiny_models.ARCHITECTURES
    ],
)
def test_any_architecture_passes_every_stage_without_code(write, workspace, name) -> None:
    """Folders become a model that transformers loads and a report, for classes unknown to alloy."""
    code = "".join(path.read_text() for path in Path(alloy.__file__).parent.rglob("*.py"))
    words = re.findall(r"\b\w+\b(?!=)", code.lower())  # an option of a compiler is called opt=, too
    assert re.sub(r"(For|Model).*", "", name).lower() not in words
    write(name)
    load("mine")
    run()
    _, info = getattr(transformers, name).from_pretrained(
        "models/mine/merged", output_loading_info=True
    )
    assert not any(info.values())
    (job,) = jobs(load_models("mine"))
    moved = load_alignment(job, "mudsc").apply(job.weights())
    merged = load_file("models/mine/merged/model.safetensors")
    for key, tensor in merged.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (moved["a"][key] + moved["b"][key]) / 2)
    report = json.loads(Path("models/mine/transforms/pair/0/report.json").read_text())
    assert report["mudsc"]["change"] < 1e-9  # the same function, in float64
    agreement = "explained_variance" if name == "ElectraModel" else "agreement"
    assert scores("parent_0")[f"{agreement}_parent_0"] == pytest.approx(100, abs=1e-4)
    assert scores("merged") == scores("mudsc")
    assert scores("ensemble")["loss"] <= scores("parent_0")["loss"] + 0.05
    page = Path("reports/mine/report.html").read_text()
    assert "mudsc" in page
    assert "data:image/png" in page
    barriers = json.loads(Path("reports/mine/plots/barriers.json").read_text())
    assert {row["alignment"] for row in barriers} == {"identity", "mudsc"}
    assert not list(workspace.rglob("*.incomplete"))


def best(recipe: dict, held_out: int = 12) -> None:
    """The result is the best of the average, itself once more, and mudsc, on held-out examples."""
    recipe["merge"]["arms"]["again"] = recipe["merge"]["arms"]["average"]
    recipe["merge"]["candidates"] = ["average", "again", "mudsc"]
    recipe["merge"]["result"]["arm"] = "best"
    recipe["prepare"]["calibration"]["own"].update(examples=12, held_out=held_out)


MEASURES = {
    CONVNEXT: ["choice of the surest parent"],
    OPT: ["log-likelihood"],
    "ElectraModel": ["explained variance", "neighbours", "similarities"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == OPT else [pytest.mark.slow]) for n in MEASURES]
)
def test_the_best_of_several_arms_is_the_result_and_the_page_says_why(
    write, workspace, name
) -> None:
    """On examples that no merge has seen, by what the kind of model is used for."""
    write(name, best)
    run()
    choice = json.loads(Path("models/mine/choice.json").read_text())
    assert [measure for measure, _ in choice["measures"]] == MEASURES[name]
    assert {num for _, num in choice["measures"]} == {12}
    assert choice["reasons"]["again"] == "no different from average, which is simpler"
    assert choice["arm"] == choice["favoured"] != "again"
    merged, arm = (
        load_file(f"models/mine/{folder}/model.safetensors")
        for folder in ("merged", f"arms/pair/0/{choice['arm']}")
    )
    assert all(torch.equal(merged[key], arm[key]) for key in arm)
    seen, held_out = (
        load_file(f"data/mine/{part}/own.safetensors") for part in ("calibration", "held_out")
    )
    for key, tensor in seen.items():
        assert len(tensor) == len(held_out[key]) == 12
    page = Path("reports/mine/report.html").read_text()
    assert "Why this arm" in page
    assert f"The result is {choice['arm']}" in page
    assert scores("merged", "held_out") == scores(choice["arm"], "held_out")


def test_a_recipe_that_names_its_result_says_what_the_data_favour(write) -> None:
    write(CONVNEXT, best)
    change_params(lambda recipe: recipe["merge"]["result"].update(arm="again"))
    run(fetch, prepare, collect, align, merge, choose)
    choice = json.loads(Path("models/mine/choice.json").read_text())
    assert choice["arm"] == "again"
    assert choice["reason"] == f"the recipe names it; held-out data favour {choice['favoured']}"


def test_held_out_examples_are_beside_those_that_merges_see(write) -> None:
    """The calibration data are as many as asked for; too few altogether are refused."""
    write(CONVNEXT, lambda recipe: best(recipe, held_out=13))
    run(fetch)
    with pytest.raises(ValueError, match="examples is 12 and held_out 13, the source has 24"):
        run(prepare)


def test_alignment_is_not_chosen_on_held_out_examples(write) -> None:
    """A score of the merge reads what merges may see, whatever is held out."""
    write(CONVNEXT, best)
    run(fetch, prepare, collect)
    (job,) = jobs(load_models("mine"))
    score = merge_score(job, "merge")
    own = job.weights()
    before = score(own)
    Path("data/mine/held_out/own.safetensors").unlink()
    assert merge_score(job, "merge")(own) == before


def encoders() -> None:
    """Make sentence encoders of both members."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    for member in "ab":
        folder = Path("given") / member
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds.items())
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')


def test_a_merged_sentence_encoder_has_its_modules(write) -> None:
    write("ElectraModel")
    encoders()
    run(fetch, prepare, collect, align, merge, choose)
    merged = Path("models/mine/merged")
    assert (merged / "1_Pooling/config.json").read_text() == '{"pooling_mode_cls_token": true}'
    assert len(json.loads((merged / "modules.json").read_text())) == 3
    assert not (merged / "2_Normalize").exists()


def test_weights_beside_the_transformer_are_not_left_behind_in_silence(write) -> None:
    write("ElectraModel")
    encoders()
    run(fetch, prepare, collect, align)
    own = Path("models/mine/checkpoints/a/1_Pooling/model.safetensors")
    save_file({"linear.weight": torch.eye(2)}, own)
    with pytest.raises(ValueError, match="1_Pooling has weights of a sentence encoder's own"):
        run(merge)


def test_a_sentence_encoder_answers_as_it_pools() -> None:
    """The mean of its words without padding, or the first of them."""
    rows = torch.arange(10.0).reshape(5, 2)
    answer = Answers(rows, False, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1]))
    inputs = {"input_ids": torch.zeros(2, 3)}
    mean, first = (
        Unlabelled(inputs, None, [lambda _: answer], 2, by_first_token=way).parents[0]
        for way in (False, True)
    )
    assert torch.equal(mean, torch.stack([rows[:3].mean(0), rows[3:].mean(0)]).double())
    assert torch.equal(first, rows[[0, 3]].double())


def plant(source: Path, target: Path, seed: int) -> None:
    """Write a checkpoint that computes the same with all its units in another order."""
    model = transformers.AutoModelForImageClassification.from_pretrained(source)
    spec = alloy.find_symmetries(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    spec = with_kind(spec, "permutation")
    order = alloy.random_transforms(spec, torch.Generator().manual_seed(seed))
    model.load_state_dict(alloy.transport(model.state_dict(), spec, order))
    shutil.copytree(source, target)
    model.save_pretrained(target)


def test_units_in_another_order_are_found_again_in_every_seed(write, workspace, given) -> None:
    """Merged with itself in another order a model is itself; its plain average is not.

    Sets of two seeds run side by side and give a mean and a spread.
    """
    write(CONVNEXT)
    for seed, name in enumerate("ab"):
        plant(given / CONVNEXT / name, workspace / f"given/{name}_moved", seed)
    members = {0: ["a", "a_moved"], 1: ["b", "b_moved"]}
    checkpoints = {name: f"given/{name}" for pair in members.values() for name in pair}
    change_params(lambda r: r["sets"]["pair"].update(members=members))
    change_params(lambda r: r["fetch"].update(checkpoints=checkpoints))
    change_params(lambda r: r["evaluate"].update(curves=[]))
    run()
    assert scores("mudsc")["agreement"] == 100
    assert scores("mudsc")["agreement_spread"] == 0
    assert scores("mudsc")["loss"] < 1e-9
    assert scores("average")["loss"] > 1e-6
    assert "agreement_spread" not in scores("merged")  # one seed's own
    assert "2 seeds, mean ± standard deviation" in Path("reports/mine/table.md").read_text()
    for seed, name in enumerate("ab"):
        arm = load_file(f"models/mine/arms/pair/{seed}/mudsc/model.safetensors")
        parent = load_file(f"given/{name}/model.safetensors")
        for key, tensor in parent.items():
            torch.testing.assert_close(arm[key], tensor)


def test_labels_give_accuracies_of_all_tasks(write, workspace) -> None:
    """A benchmark gives joint, per-task and average accuracy; a self-merge keeps them all."""
    model = tiny_models.model(CONVNEXT, 0, num_channels=1, num_labels=32)
    for name in "ab":
        model.save_pretrained(workspace / "given" / name)
    write_labelled(write)
    for name in "ab":
        model.save_pretrained(workspace / "given" / name)
    run()
    found = scores("merged", "test")
    assert {"joint_accuracy", "task_0_accuracy", "task_1_accuracy", "average_accuracy"} <= {*found}
    assert found == scores("parent_0", "test") == scores("parent_1", "test")
    assert found["average_accuracy"] == pytest.approx(
        (found["task_0_accuracy"] + found["task_1_accuracy"]) / 2, abs=1e-4
    )
    assert scores("merged", "validation")["loss"] > 0
    assert scores("ensemble_probabilities", "test") == pytest.approx(found, abs=1e-4)
    page = Path("reports/mine/report.html").read_text()
    assert "ensemble of probabilities" in page
    assert "ensemble, each class by its parent" in page


def write_labelled(write) -> None:
    def change(recipe: dict) -> None:
        sizes = {"validation": 40, "test": 60}
        recipe["prepare"]["calibration"]["own"] = {"writer": "mnist", "examples": 32}
        recipe["prepare"]["benchmarks"] = {"digits": {"writer": "mnist", "options": sizes}}
        recipe["sets"]["pair"]["benchmark"] = "digits"
        recipe["evaluate"]["curves"] = []

    write(CONVNEXT, change)


def test_an_alignment_may_be_chosen_by_its_merge_with_labels_or_without(write, workspace) -> None:
    """A weight share is given, or searched by similarity, by the merge's answers or by labels.

    The choice is the best of all candidates, among them to align nothing, and the report has every
    score.
    """

    def change(recipe: dict) -> None:
        shares = {"weight_share": "search"}
        recipe["align"]["alignments"] |= {
            "given": {"preset": "dual", "settings": {"weight_share": 0.3}},
            "searched": {"preset": "dual", "settings": shares},
            "by_merge": {"preset": "dual", "settings": shares, "score": "merge"},
            "by_labels": {"preset": "dual", "settings": shares, "score": "labels"},
            "blind": {"preset": "dual", "settings": shares, "score": "blind"},
        }

    def labelled(recipe: dict) -> None:
        sizes = {"validation": 40, "test": 60}
        recipe["prepare"]["calibration"]["own"] = {"writer": "mnist", "examples": 32}
        recipe["prepare"]["benchmarks"] = {"digits": {"writer": "mnist", "options": sizes}}
        recipe["sets"]["pair"]["benchmark"] = "digits"
        recipe["evaluate"]["curves"] = []
        change(recipe)

    write(CONVNEXT, labelled)
    for seed, name in enumerate("ab"):
        model = tiny_models.model(CONVNEXT, seed, num_channels=1, num_labels=32)
        model.save_pretrained(workspace / "given" / name)
    run(fetch, prepare, collect, align)
    (job,) = jobs(load_models("mine"))
    report = json.loads(Path("models/mine/transforms/pair/0/report.json").read_text())
    assert "was chosen among" in report["searched"]["warnings"][-1]
    by_score = {"by_merge": "merge", "by_labels": "labels", "blind": "blind"}
    for name, score in by_score.items():
        chosen, _, listed = report[name]["warnings"][-1].partition(" was chosen by score: ")
        scores_of = dict(entry.rsplit(" ", 1) for entry in listed.split(", "))
        best = max(map(float, scores_of.values()))
        assert float(scores_of[chosen]) == best
        assert "no alignment" in scores_of
        found = merge_score(job, score)(load_alignment(job, name).apply(job.weights()))
        assert found == pytest.approx(best, rel=1e-3)
    aligned = load_alignment(job, "searched").apply(job.weights())
    before = {score: merge_score(job, score)(aligned) for score in ("merge", "blind")}
    assert job.benchmark is not None
    classes = load_file(job.benchmark / "classes.safetensors")
    save_file(
        classes | {"class_tasks": 1 - classes["class_tasks"]},
        job.benchmark / "classes.safetensors",
    )
    after = {score: merge_score(job, score)(aligned) for score in ("merge", "blind")}
    assert after["blind"] == before["blind"]  # whoever is said to have learned what
    assert after["merge"] != before["merge"]


def test_the_surest_parent_answers() -> None:
    """Row by row the parent with the largest probability counts, at any scale of the logits."""
    sure, unsure = (
        torch.tensor([[4.0, 0, 0], [0.1, 0, 0]]),
        torch.tensor([[9.0, 9, 9], [0, 0.5, 0]]),
    )
    assert surest([sure, unsure]).tolist() == [sure[0].tolist(), unsure[1].tolist()]
    assert torch.equal(surest([unsure, sure]), surest([sure, unsure]))


def test_without_labels_a_merge_should_choose_what_its_surest_parent_does(write) -> None:
    """A model merged with itself agrees with itself, a merge of strangers only in part."""
    write(CONVNEXT, lambda recipe: recipe["evaluate"].update(curves=[]))
    run(fetch, prepare)
    (job,) = jobs(load_models("mine"))
    weights = job.weights()
    assert 0 <= merge_score(job, "merge")(weights) < 100
    shutil.rmtree("models/mine/checkpoints/b")
    shutil.copytree("models/mine/checkpoints/a", "models/mine/checkpoints/b")
    (job,) = jobs(load_models("mine"))
    assert merge_score(job, "merge")({"a": weights["a"], "b": weights["a"]}) == 100


def test_padding_does_not_count_and_is_not_computed() -> None:
    """Texts of any order and padding score alike; the model sees no column of padding alone."""
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        num_labels=4,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    lengths = torch.randint(1, 7, (30,))
    mask = (torch.arange(9) < lengths[:, None]).long()
    labels = torch.randint(0, 4, (30,))
    texts = {"input_ids": torch.randint(1, 20, (30, 9)) * mask, "attention_mask": mask}
    examples = {**texts, "labels": labels, "tasks": labels % 2}
    classes = {"class_tasks": torch.tensor([0, 1, 0, 1])}
    seen = []

    def candidate(inputs):
        seen.append(inputs["attention_mask"])
        return as_candidate(model)(inputs)

    found = Labelled(examples, classes, 8).score([candidate])
    assert all(mask[:, -1].any() for mask in seen)
    assert sum(mask.numel() for mask in seen) < 0.6 * mask.numel()
    order = torch.randperm(30)
    other = Labelled({name: t[order] for name, t in examples.items()}, classes, 30)
    left = Labelled(
        {n: t.flip(1) if t.dim() > 1 else t for n, t in examples.items()}, classes, 30
    )  # padded on the left: as it is
    assert left.inputs["attention_mask"].equal(mask.flip(1))
    for name, score in other.score([as_candidate(model)]).items():
        assert score.value == pytest.approx(found[name].value, rel=1e-4)
    expected = model(**texts).logits.argmax(1) == labels
    assert found["joint_accuracy"].value == pytest.approx(100 * expected.double().mean().item())


def test_parents_of_another_width_are_followed(write) -> None:
    """For sets without the arm's alignment there is `elsewhere`; least squares follows both.

    Each parent runs in its own module. Layers without counterparts are refused.
    """

    def change(recipe: dict) -> None:
        recipe["align"]["alignments"] |= {"ot_fusion": {"preset": "ot_fusion"}}
        for name in ("identity", "mudsc"):
            recipe["align"]["alignments"][name]["sets"] = []
        arm = {"method": "linear", "alignment": "mudsc", "elsewhere": ["identity", "ot_fusion"]}
        fit = {"residual": True}
        recipe["merge"]["arms"] = {
            "mudsc": arm,
            "followed": {**arm, "repair": {"permuted_least_squares": fit}},
            "nowhere": {"method": "linear", "alignment": "identity"},
        }
        recipe["evaluate"]["curves"] = []

    write(CONVNEXT, change)
    tiny_models.save(tiny_models.model(CONVNEXT, 1, hidden_sizes=[12, 16]), Path("given/b"))
    run()
    assert scores("followed")["loss"] < 0.5 * scores("mudsc")["loss"]
    account = json.loads(Path("models/mine/arms/pair/0/followed/alloy_merge.json").read_text())
    assert account["alignment"]["preset"] == "ot_fusion"
    assert not Path("models/mine/arms/pair/0/nowhere").exists()
    change_params(lambda r: r["merge"]["arms"]["followed"]["repair"].update(repair=True))
    with pytest.raises(ValueError, match=r"merge\.arms\.followed: repair looks at the aligned"):
        run(merge)
    (job,) = jobs(load_models("mine"))
    zipped = replace(load_alignment(job, "ot_fusion"), reference="b")  # whose units are mapped
    with pytest.raises(ValueError, match="follows parents in the reference's units"):
        merge.unaligned(job, job.recipe.arms("pair")["followed"], zipped)


def test_a_repair_improves_the_measure_it_is_made_for(write) -> None:
    """Least squares and temperature near the parents' mean answers; temperature keeps choices."""

    def change(recipe: dict) -> None:
        arm = recipe["merge"]["arms"]["mudsc"]
        for name, switches in {
            "fitted": {"permuted_least_squares": {}},
            "sure": {"permuted_least_squares": {"targets": "confidence"}},
            "streams": {"permuted_least_squares": {"residual": True}},
            "repaired": {"repair": True, "batch_norm": True},
            "tempered": {"temperature": True},
        }.items():
            recipe["merge"]["arms"][name] = {**arm, "repair": switches}
        recipe["evaluate"]["curves"] = []

    write(CONVNEXT, change)
    run()
    assert scores("fitted")["loss"] < 0.5 * scores("mudsc")["loss"]
    assert scores("sure")["loss"] != scores("fitted")["loss"]
    assert scores("streams")["loss"] < 0.5 * scores("mudsc")["loss"]
    assert scores("streams")["loss"] != scores("fitted")["loss"]
    assert scores("repaired")["loss"] != scores("mudsc")["loss"]
    assert scores("tempered")["loss"] < scores("mudsc")["loss"]
    assert scores("tempered")["agreement"] == scores("mudsc")["agreement"]
    account = json.loads(Path("models/mine/arms/pair/0/tempered/alloy_merge.json").read_text())
    assert account["repairs"]["temperature"] > 0


def test_a_partial_zip_is_a_model_for_each_member(write) -> None:
    """Up to the layer that is named the members share all weights; behind it each keeps its own."""

    def change(recipe: dict) -> None:
        recipe["collect"]["joint"] = True
        settings = {"until": "model.decoder.layers.0"}
        recipe["align"]["alignments"]["zip"] = {"preset": "zipit", "settings": settings}
        recipe["merge"]["arms"]["zip"] = {"alignment": "zip", "method": "linear"}
        recipe["merge"]["result"]["arm"] = "zip"
        recipe["evaluate"]["curves"] = []

    write(OPT, change)
    run()
    folder = Path("models/mine/arms/pair/0/zip")
    a, b = (load_file(folder / name / "model.safetensors") for name in "ab")
    same = {name for name in a if torch.equal(a[name], b[name])}
    assert any("layers.0." in name for name in same)
    assert not any("layers.1." in name for name in same)
    assert transformers.AutoModelForCausalLM.from_pretrained("models/mine/merged/b")
    assert scores("zip")["loss"] > 0
    with pytest.raises(ParamsError, match=r"holds no model but \['a', 'b'\]"):
        register.main(load("mine"))


def test_members_that_share_some_layers_have_norms_of_their_own_inputs(write) -> None:
    """Batch norms of a partial zip are estimated in each member; no other repair is made."""

    def change(recipe: dict) -> None:
        recipe["collect"]["joint"] = True
        settings = {"until": "resnet.encoder.stages.0"}
        recipe["align"]["alignments"] = {"zip": {"preset": "zipit", "settings": settings}}
        arm = {"alignment": "zip", "method": "linear", "repair": {"batch_norm": True}}
        recipe["merge"]["arms"] = {"zip": arm}
        recipe["merge"]["result"]["arm"] = "zip"
        recipe["evaluate"]["curves"] = []

    write(CONVNEXT, change)
    sizes = {"embedding_size": 6, "hidden_sizes": [6, 10], "depths": [1, 1], "num_labels": 5}
    config = transformers.ResNetConfig(layer_type="basic", **sizes)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.ResNetForImageClassification(config).save_pretrained(f"given/{name}")
    run(fetch, prepare, collect, align, merge)
    (job,) = jobs(load_models("mine"))
    folder, seen = Path("models/mine/arms/pair/0/zip"), job.seen()
    members = {name: load_file(folder / name / "model.safetensors") for name in "ab"}
    for weights in members.values():
        again = repair.reestimate_norms(job.skeleton, weights, seen)
        assert all(torch.allclose(again[n], t, atol=1e-5) for n, t in weights.items())
        assert not all(torch.equal(t, job.weights()["a"][n]) for n, t in weights.items())
    for name, tensor in members["a"].items():
        if "running" in name:
            shared = torch.equal(tensor, members["b"][name])
            assert shared == ("stages.1" not in name), name
    change_params(lambda r: r["merge"]["arms"]["zip"]["repair"].update(temperature=True))
    with pytest.raises(ValueError, match="repairs but batch_norm need one merged model"):
        run(merge)


@pytest.mark.slow
def test_the_result_is_registered_with_what_it_was_measured_on(write, mlflow_workspace) -> None:
    """A version has the parents' hashes, and each set's data under the name that gates use."""
    write(CONVNEXT, lambda recipe: recipe["evaluate"].update(curves=[]))
    run()
    register.main(load("mine"))
    version = tracking.aliased("mine", "challenger")
    assert version is not None
    found = tracking.finished_run(version.run_id)
    data = json.loads(Path("data/mine/manifest.json").read_text())["files"]
    lineage = tracking.lineage(version.run_id)
    assert lineage["data"]["pair/calibration.safetensors"] == data["calibration/own.safetensors"]
    assert "a" in lineage["parents"]
    gates = Gates(
        split="calibration",
        model="merged",
        benchmarks={"pair": "agreement"},
        minimal_gain=0.0,
        maximal_regression=1.0,
    )
    result = promotion.read_result("1", gates, found.metrics, lineage["data"])
    assert result.scores["pair"].value == scores("merged")["agreement"]


def text_examples(**changes: object) -> dict[str, torch.Tensor]:
    given = ModelsCalibration(**{**OWN["texts"], **changes})
    return prepare.calibration("here", given, Path("given/a"), 0)


def test_texts_are_cut_into_pieces_of_the_models_own_tokens(write, workspace) -> None:
    """Pieces have special tokens and are padded; without a padding token only whole ones count."""
    write(OPT)
    padded = text_examples(examples=80)
    assert padded["input_ids"].shape == (80, 16)
    ends = padded["attention_mask"].sum(1) - 1
    assert (padded["input_ids"][:, 0] == 2).all()
    assert (padded["input_ids"][torch.arange(80), ends] == 3).all()
    assert not padded["attention_mask"].all()
    bare = tiny_models.tokenizer()
    bare.pad_token = None
    bare.save_pretrained("given/a")
    whole = text_examples(examples=50)
    assert [*whole] == ["input_ids"]
    assert not (whole["input_ids"] == 0).any()
    with pytest.raises(ValueError, match="no text has 500 tokens"):
        text_examples(tokens=500)


def test_data_sets_on_disk_give_texts_pictures_and_inputs(write, workspace) -> None:
    """Texts or pictures of a column are processed; columns named as inputs pass as they are."""
    write(OPT)
    texts = ["a b c d e f g", "h i j", "k l m n o p"] * 3
    datasets.Dataset.from_dict({"text": texts, "n": range(9)}).save_to_disk("data_text")
    datasets.Dataset.from_dict({"text": texts}).to_parquet("data.parquet")
    for path in ("data_text", "data.parquet"):
        given = ModelsCalibration(dataset=path, column="text", examples=9, tokens=12)
        assert prepare.calibration("here", given, Path("given/a"), 0)["input_ids"].shape == (
            9,
            12,
        )
    ids = torch.randint(5, 20, (6, 7))
    datasets.Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk("data_ids")
    given = ModelsCalibration(dataset="data_ids", examples=6)
    found = prepare.calibration("here", given, Path("given/a"), 0)["input_ids"]
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, ids.tolist()))
    write(CONVNEXT)
    shown = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(5)]
    datasets.Dataset.from_dict({"image": shown}).save_to_disk("data_image")
    given = ModelsCalibration(dataset="data_image", column="image", examples=5)
    pixels = prepare.calibration("here", given, Path("given/a"), 0)["pixel_values"]
    assert pixels.shape == (5, 3, 32, 32)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk("splits")
    given = ModelsCalibration(dataset="splits", examples=2)
    with pytest.raises(ValueError, match="has splits; name one, such as splits/train"):
        prepare.calibration("here", given, Path("given/a"), 0)
    given = ModelsCalibration(dataset="data_text", column="txt", examples=9, tokens=12)
    with pytest.raises(ParamsError, match=r"column: 'txt': did you mean 'text'"):
        prepare.calibration("here", given, Path("given/a"), 0)


def test_the_recipe_of_the_documentation_is_one(write, workspace) -> None:
    """The recipe that a newcomer copies is accepted, to the key."""
    write(CONVNEXT)
    text = (Path(__file__).parents[3] / "docs/bring_your_own.md").read_text()
    recipe, *_ = re.findall(r"```yaml\n(kind: models.*?)```", text, flags=re.DOTALL)
    Path("params/mine.yaml").write_text(recipe)
    load("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["sets"]["pair"].update(calibration="ow"), "did you mean 'own'"),
        (lambda r: r["sets"]["pair"]["members"].update({0: ["a", "c"]}), "members.0: 'c'"),
        (lambda r: r["sets"]["pair"]["members"].update({0: ["a"]}), "two or more"),
        (lambda r: r["sets"]["pair"]["members"].update({0: ["a", "a"]}), "named twice"),
        (lambda r: r["merge"]["arms"]["mudsc"].update(alignment="mudsk"), "did you mean 'mudsc'"),
        (lambda r: r["merge"]["arms"]["mudsc"].update(elsewhere="mudsk"), "elsewhere: 'mudsk'"),
        (
            lambda r: r["merge"]["arms"]["mudsc"].update(elsewhere=["identity", "mudsk"]),
            "elsewhere: 'mudsk'",
        ),
        (lambda r: r["merge"]["result"].update(seed=3), r"result\.seed: 3"),
        (lambda r: r["merge"]["result"].update(arm="avrage"), "did you mean 'average'"),
        (lambda r: r["merge"]["arms"].update(ensemble=r["merge"]["arms"]["mudsc"]), "'ensemble'"),
        (lambda r: r["merge"]["arms"]["mudsc"].update(coefficients=[1.0]), "one for each of the 2"),
        (
            lambda r: r["merge"]["arms"]["mudsc"].update(coefficients={"*": [0.2, 0.3, 0.5]}),
            "one for each of the 2",
        ),
        (
            lambda r: r["merge"]["arms"]["mudsc"].update(
                coefficients={"*": [0.5, 0.5]}, repair={"repair": True}
            ),
            "one coefficient a member, not patterns",
        ),
        (
            lambda r: r["merge"]["arms"]["mudsc"].update(
                coefficients=[0.5, 0.5],
                repair={"permuted_least_squares": {"targets": "confidence"}},
            ),
            "drop one",
        ),
        (
            lambda r: r["merge"]["arms"]["mudsc"].update(
                repair={"permuted_least_squares": {"residual": True, "inputs": "parents"}}
            ),
            "take inputs: merged",
        ),
        (
            lambda r: r["align"]["alignments"]["mudsc"].update(score="labels"),
            "mudsc.score: labels: set 'pair' has no benchmark",
        ),
        (lambda r: r["align"]["alignments"]["mudsc"].update(score="label"), "'blind' or 'labels'"),
        (
            lambda r: r["align"]["alignments"]["mudsc"].update(settings={"score": "merge"}),
            "beside settings",
        ),
        (lambda r: r["merge"]["arms"]["mudsc"].update(allow=["x"]), "allow: only for members that"),
        (lambda r: r["merge"]["arms"]["mudsc"].update(tokenizer="union"), "tokenizer: only for"),
        (lambda r: r["evaluate"].update(curves=["x"]), r"evaluate\.curves: 'x'"),
        (lambda r: r["prepare"]["calibration"]["own"].update(texts="x"), "give one of images"),
        (lambda r: r["prepare"]["calibration"]["own"].update(tokens=8), "'tokens' is of texts"),
        (lambda r: r["prepare"]["calibration"].update(b=OWN["images"]), "no set has"),
        (lambda r: r.update(finetune={}), r"finetune\.seed: this is missing"),
    ],
)  # fmt: skip
def test_a_recipe_whose_sections_do_not_fit_is_refused_before_the_first_stage(
    write, change, message
) -> None:
    write(CONVNEXT, change)
    with pytest.raises(ParamsError, match=message):
        load("mine")


def _empty(workspace: Path) -> None:
    for file in (workspace / "photos").iterdir():
        file.rename(file.with_suffix(".txt"))


def _broken_picture(workspace: Path) -> None:
    (workspace / "photos/3.png").write_bytes(b"no picture")


def _no_processor(workspace: Path) -> None:
    for name in "ab":
        (workspace / "given" / name / "preprocessor_config.json").unlink()


def _other_processor(workspace: Path) -> None:
    ConvNextImageProcessor(size={"shortest_edge": 48}).save_pretrained(workspace / "given/b")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_empty, r"photos is empty: it has 24 entries, none of them \*\.bmp"),
        (_broken_picture, r"photos/3\.png is no picture"),
        (_no_processor, r"has no image processor \(preprocessor_config\.json\)"),
        (_other_processor, r"image processor of .*a and .*b differ: .*\bis\b.*\band\b"),
        (lambda _: shutil.rmtree("photos"), "photos is not there"),
        (
            lambda _: change_params(
                lambda r: r["prepare"]["calibration"]["own"].update(examples=99)
            ),
            r"own\.examples is 99, the source has 24",
        ),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(write, workspace, spoil, message) -> None:
    """Nothing is written: the message says what was found and what would be right."""
    write(CONVNEXT)
    spoil(workspace)
    fetch.main(load("mine"))
    with pytest.raises(ValueError, match=message):
        prepare.main(load("mine"))
    assert not Path("data/mine").exists()


def test_tokenizers_that_differ_are_refused_with_the_first_difference(write, workspace) -> None:
    write(OPT)
    shuffled = random.Random(0).sample(tiny_models.LETTERS, 26)
    tiny_models.tokenizer("".join(shuffled)).save_pretrained("given/b")
    fetch.main(load("mine"))
    with pytest.raises(ValueError, match=r"tokenizer of .*a and .*b differ: token '\w' is number"):
        prepare.main(load("mine"))
    tiny_models.tokenizer(tiny_models.LETTERS[:-1]).save_pretrained("given/b")
    fetch.main(load("mine"))
    with pytest.raises(ValueError, match="vocabularies of 31 and 30 tokens"):
        prepare.main(load("mine"))


def spoil_weights(member: str) -> None:
    path = Path("given") / member / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("classifier.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def test_models_that_cannot_be_merged_are_refused_and_the_old_result_stands(
    write, workspace
) -> None:
    """NaN weights, other classes or symmetries, and unknown settings are refused."""
    write(CONVNEXT)
    run(fetch, prepare, collect, align, merge, choose)
    stands = Path("models/mine/merged/model.safetensors").read_bytes()
    settings = {"weight_shar": 0.5}
    change_params(lambda r: r["align"]["alignments"]["mudsc"].update(settings=settings))
    with pytest.raises(ValueError, match=r"set 'pair': align\.alignments\.mudsc: .*weight_share"):
        align.main(load("mine"))
    change_params(lambda r: r["align"]["alignments"]["mudsc"].update(settings={}))
    change_params(lambda r: r["merge"]["arms"]["mudsc"].update(options={"densty": 1}))
    with pytest.raises(ValueError, match=r"merge\.arms\.mudsc: set 'pair': .*densty"):
        load("mine")
    change_params(lambda r: r["merge"]["arms"]["mudsc"].update(options={}, method="regmean"))
    change_params(lambda r: r["collect"].update(grams=False))
    with pytest.raises(ValueError, match=r"set collect\.grams to true"):
        load("mine")
    change_params(lambda r: r["collect"].update(grams=True))
    tiny_models.save(tiny_models.model(CONVNEXT, 1, depths=[1, 1]), Path("given/b"))
    run(fetch, prepare)
    with pytest.raises(ValueError, match=r"'a' and 'b'"):
        run(collect, align)
    tiny_models.save(tiny_models.model("RegNetForImageClassification", 1), Path("given/b"))
    fetch.main(load("mine"))
    with pytest.raises(ValueError, match="a is a ConvNextForImageClassification, b a RegNet"):
        collect.main(load("mine"))
    assert Path("models/mine/merged/model.safetensors").read_bytes() == stands


def test_nan_is_refused_where_it_is_seen_first(write, workspace) -> None:
    """Weights or inputs that are not finite never reach a result."""
    write(CONVNEXT)
    spoil_weights("b")
    run(fetch, prepare, collect)
    with pytest.raises(ValueError, match=r"not finite|NaN|Inf"):
        align.main(load("mine"))
    rows = {"input_ids": [[1.0, 2.0], [3.0, float("nan")]]}
    datasets.Dataset.from_dict(rows).save_to_disk("broken")
    write(OPT)
    given = ModelsCalibration(dataset="broken", examples=2)
    with pytest.raises(ValueError, match=r"input_ids has NaN or Inf in examples \[[01]\]"):
        prepare.calibration("here", given, Path("given/a"), 0)


def test_too_little_and_constant_data_are_warned_of_in_the_report(write, workspace) -> None:
    """Fewer tokens than units, and units that never vary, are named; nothing is silently zero."""

    def change(recipe: dict) -> None:
        recipe["prepare"]["calibration"]["own"]["examples"] = 4
        recipe["evaluate"]["curves"] = []

    write("RegNetForImageClassification", change)
    for name in "ab":
        path = Path("given") / name / "model.safetensors"
        weights = load_file(path)
        key = next(n for n in weights if "stages.0.layers.0.layer.0.normalization.weight" in n)
        weights[key][3] = 0  # a unit that says the same whatever it sees
        save_file(weights, path, metadata={"format": "pt"})
    run()
    page = Path("reports/mine/report.html").read_text()
    assert "constant units" in page
    assert "few samples" in page
