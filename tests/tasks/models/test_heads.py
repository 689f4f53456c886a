"""Members whose labels differ share one merged trunk, and each keeps a head of its own."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file

from alloy.alignment import PRESETS
from tasks.evaluation.outputs import Answers
from tasks.models import align, choose, collect, evaluate, finetune, merge, prepare
from tasks.models.checks import check
from tasks.models.measures.heads import LabelledHeads
from tasks.models.shared.alignment import load_alignment
from tasks.models.shared.jobs import jobs
from tasks.recipe.load import load, load_models
from tasks.recipe.section import ParamsError
from tasks.registry import register, tracking
from tasks.sources import fetch
from tests import tiny_models
from tests.tasks.models.test_finetune import PLAN

NAME = "ConvNextForImageClassification"
WORDS = {"a": ["apple", "pear", "plum", "fig", "lime"], "b": ["Cat", "dog", "owl"]}
HEAD = {"classifier.weight", "classifier.bias"}
FEW = ("mudsc", "ot_fusion")  # of one unit to one, and of many to many


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classifiers, of 5 fruits and of 3 animals, and pictures of each."""
    folder = tmp_path_factory.mktemp("heads")
    drawn = random.Random(0)
    for seed, (name, words) in enumerate(WORDS.items()):
        model = tiny_models.model(NAME, seed, num_labels=len(words))
        model.config.id2label = dict(enumerate(words))
        model.config.label2id = {word: i for i, word in enumerate(words)}
        tiny_models.save(model, folder / "given" / name)
        for number, word in enumerate(words):
            (folder / f"{name}_pictures" / word).mkdir(parents=True)
            for i in range(5):
                colour = (50 * number, drawn.randrange(60), 200 - 40 * number)
                image = Image.new("RGB", (32, 32), colour)
                image.save(folder / f"{name}_pictures" / word / f"{i}.png")
    return folder


@pytest.fixture
def write(given: Path, workspace: Path) -> Callable[..., None]:
    shutil.copytree(given, workspace, dirs_exist_ok=True)
    Path("params").mkdir()
    Path("params/recipes.yaml").write_text("recipes: [mine]\n")

    def write(change: Callable[[dict], object] = lambda recipe: None) -> None:
        own = {"images": "a_pictures", "examples": 24}
        recipe = tiny_models.recipe(own, {0: ["a", "b"]})
        del recipe["sets"]
        recipe |= {"members": ["a", "b"], "heads": ["head"]}
        recipe["merge"]["result"] = "mudsc"
        recipe["evaluate"] = {"batch_size": 24, "tssd_keep": 0.2}
        recipe["register"] = {"name": "mine", "model": "merged", "head": "b"}
        change(recipe)
        Path("params/mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    return write


def run(*stages) -> None:
    for stage in stages:
        stage.main(load("mine"))


def measured(name: str) -> dict:
    return {
        "measure": "labels", "images": f"{name}_pictures", "head": name
    }  # fmt: skip


def learning(recipe: dict, presets: Sequence[str] = FEW) -> None:
    """An arm for each preset, two whose layers are fitted to the parents', and a training."""
    fit = {"permuted_least_squares": {"residual": True}}
    recipe["collect"]["joint"] = True
    recipe["align"]["alignments"] = {name: {"preset": name} for name in presets}
    recipe["merge"]["arms"] = {
        **{name: {"alignment": name, "method": "linear"} for name in presets},
        "fitted": {"alignment": "mudsc", "method": "linear", "repair": fit},
        "followed": {"alignment": "ot_fusion", "method": "linear", "repair": fit},
    }
    recipe["evaluate"]["benchmarks"] = {"fruits": measured("a"), "animals": measured("b")}
    recipe["evaluate"]["models"] = ["a", "b", "mudsc"]
    labelled = {"measure": "labels", "images": "a_pictures"}
    recipe["finetune"] = {**PLAN, "heads": {"a": labelled}}
    recipe["register"]["model"] = "finetuned"


@pytest.mark.slow
def test_heads_of_other_labels_stay_each_members_over_any_trunk(write, mlflow_workspace) -> None:
    """One trunk, and a checkpoint for each head with its labels; each is measured by itself.

    Then the trunk and both heads learn together, one from labels and one from its parent.
    """
    write(learning)
    run(fetch, prepare, collect, align, merge, choose, finetune, evaluate)
    (job,) = jobs(load_models("mine"))
    moved = load_alignment(job, "mudsc").apply(job.weights())
    for folder in [*(f"arms/mine/0/{arm}" for arm in (*FEW, "fitted", "followed")), "finetuned"]:
        a, b = (load_file(f"models/mine/{folder}/{name}/model.safetensors") for name in "ab")
        assert {name for name in a if not torch.equal(a[name], b[name])} == HEAD
        for name, words in WORDS.items():
            model, info = transformers.AutoModelForImageClassification.from_pretrained(
                f"models/mine/{folder}/{name}", output_loading_info=True
            )
            assert not any(info.values())
            assert [*model.config.id2label.values()] == words
    merged, fitted = (
        load_file(f"models/mine/{folder}/b/model.safetensors")
        for folder in ("merged", "arms/mine/0/fitted")
    )
    for name, tensor in merged.items():
        both = (moved["a"][name] + moved["b"][name]) / 2 if name not in HEAD else moved["b"][name]
        torch.testing.assert_close(tensor, both)
    assert torch.equal(merged["classifier.weight"], fitted["classifier.weight"])
    seen = load_file("data/mine/calibration/own.safetensors")["pixel_values"]
    mean = sum(trunk(moved[name], seen) for name in "ab") / 2
    near, far = ((trunk(w, seen) - mean).square().sum() for w in (fitted, merged))
    assert near < 0.5 * far  # least squares follow what the parents' trunks compute
    scores = json.loads(Path("reports/mine/metrics.json").read_text())
    own = scores["calibration"]
    for name in "ab":
        assert own["ensemble"]["mine"][f"head_{name}_agreement"] == 100
        assert own["finetuned"]["mine"][f"head_{name}_loss"] > 0
    assert own["mudsc"]["mine"]["agreement"] == pytest.approx(
        sum(own["mudsc"]["mine"][f"head_{name}_agreement"] for name in "ab") / 2, abs=1e-4
    )
    assert "parent_0" not in own
    assert {*scores["test"]["a"]} == {"fruits"}
    assert {*scores["test"]["merged"]} == {*scores["test"]["finetuned"]} == {"fruits", "animals"}
    before, after = held_out_losses()
    assert after < before
    page = Path("reports/mine/report.html").read_text()
    assert "animals: test data, the head of b" in page
    assert (
        "with the heads of a over the same trunk"
        in Path("models/mine/finetuned/b/README.md").read_text()
    )
    assert json.loads(Path("models/mine/finetuned/finetuning.json").read_text())["best_step"] > 0


@torch.no_grad()
def trunk(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The features that a head reads."""
    model = tiny_models.model(NAME, 0, num_labels=len(weights["classifier.bias"]))
    model.load_state_dict(weights)
    return model.convnext(pixels).pooler_output


def held_out_losses() -> list[float]:
    """The held-out loss of all heads before and after the training."""
    (training,) = finetune.plan(load_models("mine")).values()
    parents, values = training.parents(), []
    for source in (training.source, Path("models/mine/finetuned")):
        losses = []
        for head, (_, held_out) in training.lessons.items():
            model = finetune.load_any(source / head)
            with torch.no_grad():
                own = held_out.losses(model, parents[head], held_out.examples, training.params)
            losses += [loss.item() for loss in own.values()]
        values.append(sum(losses) / len(losses))
    return values


@pytest.mark.slow
def test_a_head_is_registered_and_another_run_ends_with_the_same_bits(
    write, mlflow_workspace
) -> None:
    """Under every preset; the named head is registered; a killed training of all heads goes on."""
    write(lambda recipe: learning(recipe, [*PRESETS]))
    recipe = load_models("mine")
    run(fetch, prepare, collect, align, merge, choose, finetune, evaluate, register)
    whole = load_file("models/mine/finetuned/b/model.safetensors")
    assert tracking.aliased("mine", "challenger") is not None
    (training,) = finetune.plan(recipe).values()

    def stop(kind: str, *values: object) -> None:
        if kind == "curves" and values[1] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(training, stop)
    finetune.finetune(training, lambda *_: None)
    for key, tensor in load_file(training.work / "done/b/model.safetensors").items():
        assert torch.equal(tensor, whole[key])


@pytest.mark.slow
def test_the_best_arm_is_chosen_by_what_each_head_says(write) -> None:
    def change(recipe: dict) -> None:
        recipe["prepare"]["calibration"]["own"].update(examples=12, held_out=12)
        recipe["merge"] |= {"candidates": ["average", "mudsc"], "result": "best"}

    write(change)
    run(fetch, prepare, collect, align, merge, choose)
    choice = json.loads(Path("models/mine/choice.json").read_text())
    assert [measure for measure, _ in choice["measures"]] == [
        "choice of the surest parent (head a)",
        "choice of the surest parent (head b)",
    ]


def answering(rows: Sequence[Sequence[float]]):
    """A candidate with these logits for the examples in their order."""
    tensor = torch.tensor(rows)

    def candidate(inputs) -> Answers:
        own = tensor[inputs["x"]]
        return Answers(own, True, torch.arange(len(own)), torch.zeros(len(own)).long())

    return candidate


def test_labels_tell_of_each_head_and_of_all_heads_together() -> None:
    """Per task a head is asked about its own examples; jointly the surest class of all counts.

    Logits of one head may be larger than another's: probabilities are compared.
    """
    examples = {
        "x": torch.arange(4),
        "labels": torch.tensor([0, 1, 2, 4]),
        "tasks": torch.tensor([0, 0, 1, 1]),
    }
    classes = {"class_tasks": torch.tensor([0, 0, 1, 1, 1])}
    first = answering([[90.0, 80.0], [78.0, 79.0], [50.0, 50.0], [50.0, 51.0]])
    second = answering([[0.0, 0.0, 0.0], [0.0, 9.0, 0.0], [3.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    yardstick = LabelledHeads(["a", "b"], examples, classes, 3)
    found = yardstick.score([first, second])
    assert found["task_0_accuracy"].value == found["task_1_accuracy"].value == 100
    assert found["average_accuracy"].value == 100
    assert found["joint_accuracy"].value == 50  # a is surer of example 3, b of example 1
    by_example = yardstick.by_example([first, second])
    assert by_example["joint accuracy"].tolist() == [100, 0, 100, 0]
    own = torch.nn.functional.cross_entropy(
        torch.tensor([[90.0, 80.0], [78.0, 79.0]]), torch.tensor([0, 1])
    )
    assert found["task_0_loss"].value == pytest.approx(own.item())
    with pytest.raises(ValueError, match=r"head 'b' and task 1: outputs of shape .* 3 classes"):
        yardstick.score([first, first])
    with pytest.raises(ValueError, match="need a benchmark of as many tasks, one each; it has 2"):
        LabelledHeads(["a", "b", "c"], examples, classes, 3)


def named(change: Callable[[dict], object], **heads: dict) -> Callable[[dict], None]:
    """A change of a recipe that has a training, with labels of these heads."""

    def changed(recipe: dict) -> None:
        recipe["finetune"] = {**PLAN, "heads": heads}
        change(recipe)

    return changed


def streamed(recipe: dict) -> None:
    for key in ("prepare", "collect", "align"):
        del recipe[key]
    recipe["merge"] |= {"arms": {"average": {"method": "linear"}}, "result": "average"}


LABELLED = {"measure": "labels", "images": "a_pictures"}
MUTE = {"distillation": {"weight": 0.0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["register"].pop("head"), r"register\.head is missing: .* meant: a, b"),
        (lambda r: r["register"].update(head="bb"), r"register\.head: 'bb': did you mean 'b'"),
        (lambda r: r.update(ship={"target": "s3://x/y", "model": "merged"}), r"ship\.head is miss"),
        (lambda r: r.pop("heads"), r"register\.head: 'b': set 'mine' has no heads"),
        (lambda r: r.update(kept=["head"]), "'head' is in kept as well"),
        (lambda r: r["evaluate"].update(curves=["mudsc"]), r"evaluate\.curves: .* no one head"),
        (lambda r: r["align"]["alignments"]["mudsc"].update(score="merge"), "one merge to score"),
        (
            lambda r: r["merge"]["arms"]["mudsc"].update(repair={"temperature": True}),
            r"mudsc\.repair\.temperature: scales one head",
        ),
        (
            lambda r: r["evaluate"].update(benchmarks={"x": {**LABELLED}}),
            r"benchmarks\.x\.head is missing",
        ),
        (
            lambda r: r["evaluate"].update(harness={"lm_eval": {"tasks": ["arc"]}}),
            "a harness measures one model",
        ),
        (named(lambda r: r["finetune"].update(data=LABELLED)), "data: whose labels are these"),
        (named(lambda r: None, c=LABELLED), r"finetune\.heads: 'c'"),
        (named(lambda r: r["finetune"].update(MUTE), a=LABELLED), "'b' would learn nothing"),
        (named(lambda r: None, a={**LABELLED, "head": "a"}), "write `heads: {a: ...}`"),
        (named(lambda r: (r.pop("heads"), r["register"].pop("head")), a=LABELLED),
         r"finetune\.heads: 'a': the result's set has no heads"),
        (streamed, "over a trunk of aligned units"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_heads_is_refused_at_once(write, change, message) -> None:
    write(change)
    with pytest.raises(ParamsError, match=message):
        load("mine")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            ["clasifier.*"],
            r"no tensor of 'a' is named 'clasifier\.\*'; .* nearest are \['class",
        ),
        (["projector"], "no tensor of 'a' is named 'projector'; give `head`, or patterns"),
    ],
)
def test_heads_that_no_member_has_are_refused_before_anything_is_collected(
    write, heads, message
) -> None:
    write(lambda recipe: recipe.update(heads=heads))
    run(fetch, prepare)
    with pytest.raises(ValueError, match=message):
        run(collect)
    assert not Path("models/mine/statistics").exists()


def relabel(name: str, words: Sequence[str]) -> None:
    file = Path(f"given/{name}/config.json")
    config = json.loads(file.read_text())
    config["id2label"] = {str(i): word for i, word in enumerate(words)}
    config["label2id"] = {word: i for i, word in enumerate(words)}
    file.write_text(json.dumps(config))


def test_heads_of_other_meanings_are_not_averaged_in_silence(write) -> None:
    """Other labels, or the same in another order, are refused; another spelling is the same."""
    write(lambda recipe: (recipe.pop("heads"), recipe["register"].pop("head")))
    with pytest.raises(ParamsError, match=r"'a' has 5 labels and 'b' 3.*heads: .head."):
        check(load_models("mine"))
    for words, why in (
        (["dog", "cat", "owl"], r"number the same labels differently \('dog' is 0 and 1"),
        (["cat", "dog", "fox"], "label 2 is 'fox' of 'a' and 'owl' of 'b'"),
    ):
        relabel("a", words)
        with pytest.raises(ParamsError, match=why):
            check(load_models("mine"))
    for words in (["cat", "dog", "owl"], ["LABEL_0", "LABEL_1", "LABEL_2"]):
        relabel("a", words)  # the same words, or none that say anything
        check(load_models("mine"))
    run(fetch)
    (job,) = jobs(load_models("mine"))
    relabel("a", WORDS["a"])
    shutil.copy("given/a/config.json", job.folders["a"] / "config.json")
    with pytest.raises(ValueError, match="'a' has 5 labels and 'b' 3"):
        collect.main(load_models("mine"))
