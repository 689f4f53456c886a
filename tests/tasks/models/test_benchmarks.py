"""Benchmarks of the user's, on members and arms: text, labels, pairs, harnesses, commands."""

import json
import math
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tasks.evaluation.loading import load_any
from tasks.models import choose, evaluate, merge, stream
from tasks.models.benchmarks import scores
from tasks.models.benchmarks.measure import Measure, inputs_of
from tasks.models.benchmarks.objective import BenchmarkObjective, layer_groups
from tasks.models.checks import check
from tasks.models.shared.jobs import jobs
from tasks.recipe.benchmarks import MeasuredParams
from tasks.recipe.gates import check_gates
from tasks.recipe.load import load, load_models
from tasks.recipe.section import ParamsError
from tasks.registry.promotion import decide, load_gates, read_result
from tasks.registry.register import find_data, flatten
from tasks.search import command as search
from tasks.sources import fetch
from tests import tiny_models, two_towers

TINY = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
RECIPE = {
    "kind": "models",
    "fetch": {"checkpoints": {"a": "given/a", "b": "given/b"}},
    "members": ["a", "b"],
    "merge": {"result": "average", "arms": {"average": {"method": "linear"}}},
    "evaluate": {"tssd_keep": 0.2, "batch_size": 4},
    "register": {"name": "mine", "model": "merged"},
}
TEXT = {"measure": "perplexity", "texts": "letters", "tokens": 8, "examples": 6}


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=tiny_models.SIZE, max_position_embeddings=64, **TINY)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params/recipes.yaml").write_text("recipes: [mine]\n")
    tiny_models.letters(tmp_path / "letters", num=4)
    return tmp_path


@pytest.fixture
def llamas(workspace: Path) -> Path:
    for seed, name in enumerate("ab"):
        llama(seed).save_pretrained(workspace / "given" / name)
        tokenizer = tiny_models.tokenizer()
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(workspace / "given" / name)
    return workspace


def write(change: Callable[[dict], object] = lambda recipe: None, **measured: object) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe["evaluate"].update(measured)
    change(recipe)
    Path("params/mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def params(**benchmarks: dict) -> MeasuredParams:
    return MeasuredParams.model_validate({"benchmarks": benchmarks})


def measured(folder: Path | str, **benchmarks: dict) -> dict[str, scores.Score]:
    measure = Measure("here", params(**benchmarks), 3)
    (found,) = measure.model("a", Path(folder)).values()
    return found


def test_every_model_is_measured_and_its_scores_reach_the_gates(llamas: Path) -> None:
    """Perplexity is exp of the mean loss; metrics.json, the table and gates have the scores."""
    script = llamas / "size.py"
    script.write_text(
        "import json, sys\nprint('noise')\n"
        "n = len(open(sys.argv[1] + '/config.json').read())\n"
        "print(json.dumps({'size': n, 'size_standard_error': 0.5}))\n"
    )
    own = {"measure": "command", "command": f"{sys.executable} size.py {{model}}"}
    write(benchmarks={"words": TEXT, "own": own})
    recipe = load_models("mine")
    check(recipe)
    for stage in (fetch, merge, choose, evaluate):
        stage.main(recipe)
    metrics = json.loads(Path("reports/mine/metrics.json").read_text())
    test = metrics["test"]
    assert {*test} == {"a", "b", "average", "merged"}
    assert test["merged"] == test["average"]
    assert test["average"]["own"]["size_standard_error"] == 0.5
    model, words = load_any(Path("given/a")), test["a"]["words"]
    measure = Measure("here", params(words=TEXT), 4)
    own, examples = recipe.evaluate.benchmarks["words"], measure.examples["words"]
    inputs = inputs_of("here", own, examples, Path("given/a"))
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, 1:].bool()
    nll = torch.nn.functional.cross_entropy(logits[mask], inputs["input_ids"][:, 1:][mask])
    assert words["log_likelihood"] == pytest.approx(-nll.item(), rel=1e-4)
    assert words["perplexity"] == pytest.approx(math.exp(nll.item()), rel=1e-4)
    assert 0 < words["log_likelihood_standard_error"] < 1
    assert set(test["b"]["words"]) >= {"agreement", "agreement_a"}
    assert "words" in Path("reports/mine/table.md").read_text()
    gates = {
        "split": "test", "model": "merged", "benchmarks": {"words": "log_likelihood"},
        "minimal_gain": 0.0, "maximal_regression": 2.0,
    }  # fmt: skip
    Path("params/promote.yaml").write_text(yaml.safe_dump({"gates": {"mine": gates}}))
    check_gates(recipe)
    numbers = {n: v for n, v in flatten(metrics) if isinstance(v, int | float)}
    result = read_result("1", load_gates("mine"), numbers, find_data(recipe))
    assert decide(load_gates("mine"), result, result).promote


def test_a_model_agrees_with_itself_and_errors_shrink_with_examples() -> None:
    """Agreement of equal models is 100 per cent; four times the texts halve the error."""
    model = llama(0)
    ids = torch.randint(5, 20, (40, 9), generator=torch.Generator().manual_seed(0))
    few = scores.next_tokens(model, {"input_ids": ids[:10]}, 4)
    many = scores.next_tokens(model, {"input_ids": ids}, 7)
    assert scores.agreement(many, {"twin": many})["agreement"] == (100.0, 0.0)
    errors = [scores.perplexity(seen)["log_likelihood"].error for seen in (few, many)]
    assert 1.3 < errors[0] / errors[1] < 3.0


def test_scores_of_classes_are_what_they_say() -> None:
    """Accuracy, top 5 and F1 of choices that are known, and their errors."""
    labels = torch.arange(6).repeat(20)
    logits = torch.nn.functional.one_hot(labels, 7).float()
    exact = scores.classification(logits, labels)
    assert {name: score.value for name, score in exact.items()} == {
        "accuracy": 100.0, "top_5_accuracy": 100.0, "f1": 100.0,
    }  # fmt: skip
    logits[:30] = -logits[:30]
    half = scores.classification(logits, labels)
    assert half["accuracy"].value == pytest.approx(75.0)
    assert half["accuracy"].error == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 120))
    assert 1 < half["f1"].error < 8


def test_recall_counts_both_ways_with_several_captions() -> None:
    """The picture of each caption, and one of the captions of each picture."""
    images = torch.eye(4)
    texts = torch.eye(4).repeat_interleave(2, 0)
    owners = torch.arange(4).repeat_interleave(2)
    found = scores.retrieval(images, texts, owners)
    assert found["recall_at_1"].value == 100.0
    swapped = scores.retrieval(images, texts.roll(2, 0), owners)
    assert swapped["image_recall_at_1"].value == swapped["text_recall_at_1"].value == 0.0


def pictures(folder: Path, classes: list[str], num: int = 4) -> None:
    """Pictures of one colour for each class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            Image.new("RGB", (8, 8), (40 * number, 90, 10 * i)).save(folder / name / f"{i}.png")


def vit(folder: Path, names: list[str]) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, **TINY)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def test_towers_that_answer_of_every_token_are_measured_by_the_first():
    """FLAVA's losses compare pictures and texts by their class tokens."""
    model, inputs = two_towers.model("flava"), two_towers.examples("flava", 5)
    with torch.no_grad():
        whole = model(**inputs)
    for kind, name in (("image", "pixel_values"), ("text", "input_ids")):
        found = scores.embeddings(model, kind, {name: inputs[name]}, batch_size=2)
        states = getattr(whole, f"{kind}_embeddings")
        first = getattr(model, f"{kind}_projection")(states[:, 0]).detach()
        torch.testing.assert_close(found, F.normalize(first, dim=1))


def test_folders_of_pictures_and_columns_of_a_table_are_labels(workspace: Path) -> None:
    """Equal pictures by folder and by parquet column give equal scores, whatever the classes'
    order; a class that the model lacks is refused by name."""
    names = ["owl", "ant", "bee", "cat", "dog", "elk"]
    vit(workspace / "given/a", names)
    pictures(workspace / "photos", names)
    files = sorted((workspace / "photos").glob("*/*.png"))
    rows = {"picture": [str(f) for f in files], "kind": [f.parent.name for f in files]}
    table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    table.to_parquet(str(workspace / "table.parquet"))
    folders = measured("given/a", pets={"measure": "labels", "images": "photos"})
    column = {"measure": "labels", "dataset": "table.parquet", "column": "picture"}
    columns = measured("given/a", pets={**column, "labels": "kind"})
    assert columns.keys() == folders.keys()
    for name, score in columns.items():  # F1's error is of examples drawn in another order
        assert score.value == folders[name].value
        assert score.error == pytest.approx(folders[name].error, rel=0.1)
    assert set(folders) == {"accuracy", "top_5_accuracy", "f1"}
    pictures(workspace / "others", ["owl", "antt"])
    with pytest.raises(ValueError, match=r"class 'antt': the config of a has 6 .*'ant'"):
        measured("given/a", pets={"measure": "labels", "images": "others"})
    with pytest.raises(ValueError, match="embed pictures and texts in one space"):
        measured("given/a", z={"measure": "zero_shot", "images": "photos", "prompt": "a {}"})
    with pytest.raises(ValueError, match=r"ViTForImageClassification.*the next token of a text"):
        measured("given/a", words=TEXT)


def test_towers_for_pictures_and_texts_are_measured_without_a_head(workspace: Path) -> None:
    """Zero-shot classes and retrieval of a CLIP: scores of both, the same in any batch size."""
    torch.manual_seed(0)
    text = {**TINY, "vocab_size": tiny_models.SIZE, "max_position_embeddings": 16,
            "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    config = CLIPConfig(
        text_config=text, vision_config={**TINY, "image_size": 8, "patch_size": 4}, projection_dim=6
    )
    folder = workspace / "given/a"
    CLIPModel(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    size = {"height": 8, "width": 8}
    CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
    pictures(workspace / "photos", ["a", "b", "c"])
    zero = {"measure": "zero_shot", "images": "photos", "prompt": "x {} y"}
    found = measured(folder, z=zero)
    assert set(found) == {"accuracy", "f1"}
    files = sorted(str(f) for f in (workspace / "photos").glob("*/*.png"))
    captions = [[random.Random(i).choice("abc"), "d e"] for i in range(len(files))]
    table = datasets.Dataset.from_dict({"p": files, "c": captions})
    table.cast_column("p", datasets.Image()).save_to_disk(str(workspace / "pairs"))
    pairs = {"measure": "retrieval", "dataset": "pairs", "column": "p", "captions": "c"}
    assert set(measured(folder, r=pairs)) == {
        "image_recall_at_1", "image_recall_at_5", "text_recall_at_1", "text_recall_at_5",
        "recall_at_1",
    }  # fmt: skip


def test_a_table_of_the_hub_is_read(workspace: Path, hub, monkeypatch) -> None:
    """`hf://datasets/org/name/file` is the file's rows, and a wrong name is said to be one."""
    rows = {"words": ["a b c", "d e"] * 4, "kind": [0, 1] * 4}
    datasets.Dataset.from_dict(rows).to_parquet(str(workspace / "t.parquet"))
    hub.publish("datasets/org/d", {"x/t.parquet": (workspace / "t.parquet").read_bytes()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workspace / "cache"))
    from tasks.data.hub import on_disk
    from tasks.models.benchmarks.examples import read

    own = {"measure": "labels", "dataset": "hf://datasets/org/d/x/t.parquet", "column": "words",
           "labels": "kind", "tokens": 8}  # fmt: skip
    examples = read("here", params(x=own).benchmarks["x"])
    assert sorted(examples.items) == sorted(rows["words"])
    assert {*(examples.labels or ())} == {0, 1}
    with pytest.raises(ValueError, match="the hub has no such file"):
        on_disk("here", "hf://datasets/org/d/x/u.parquet")


SEARCH = {
    "on": {"held": "log_likelihood"},
    "over": {"coefficients.0": "0..1", "coefficients.1": "0..1"},
    "groups": 2,
    "trials": 3,
}


def tuned(recipe: dict, **changes: object) -> None:
    """An arm beside the average whose coefficients are searched, for each half of the layers."""
    recipe["merge"]["arms"]["tuned"] = {"method": "linear", "search": {**SEARCH, **changes}}
    recipe["merge"]["result"] = "tuned"


@pytest.mark.slow
def test_an_arms_settings_are_searched_by_groups_of_layers(llamas: Path, monkeypatch) -> None:
    """One line of a recipe: the best trial on validation data is the arm; a search that was
    interrupted goes on to the same trials."""
    write(tuned, benchmarks={"held": {**TEXT, "split": "validation"}})
    recipe = load_models("mine")
    check(recipe)
    fetch.main(recipe)
    folder = search.run_own("mine", "tuned", Path("best.json"))
    trials = json.loads((folder / "trials.json").read_text())
    depths = ["depth 0", "depth 1", "rest"]
    assert {*trials[0]["settings"]} == {f"coefficients.{i}[{d}]" for i in (0, 1) for d in depths}
    assert trials[0]["settings"]["coefficients.0[rest]"] == 1.0  # the arm's own come first
    best = json.loads(Path("best.json").read_text())
    assert [*best["coefficients"]] == ["model.layers.0.*", "model.layers.1.*", "*"]
    score = max(sum(t["scores"].values()) for t in trials)

    def fails(*_: object) -> None:
        raise AssertionError("a finished search is not done again")

    monkeypatch.setattr(BenchmarkObjective, "scores", fails)
    assert search.run_own("mine", "tuned") == folder
    arm = recipe.merge.arms["tuned"].model_copy(
        update={"coefficients": best["coefficients"], "search": None}
    )
    stream.write(jobs(recipe)[0], arm, Path("made"))
    own = {**TEXT, "split": "validation"}
    assert measured("made", held=own)["log_likelihood"].value == pytest.approx(score)


@pytest.mark.slow
def test_stage_merge_searches_first(llamas: Path) -> None:
    """In a process of its own; what it found is what is merged, registered and measured."""
    write(tuned, benchmarks={"held": {**TEXT, "split": "validation"}, "words": TEXT})
    recipe = load_models("mine")
    for stage in (fetch, merge, choose, evaluate):
        stage.main(recipe)
    metrics = json.loads(Path("reports/mine/metrics.json").read_text())
    held = {name: own["held"]["log_likelihood"] for name, own in metrics["validation"].items()}
    assert held["merged"] == held["tuned"] >= held["average"]


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"on": {"hold": "log_likelihood"}}, "validation", "did you mean 'held'"),
        ({}, "test", "is test data, on which nothing may be chosen"),
        ({"on": {"held": "perplexity"}}, "validation", "less of it is better"),
        ({"on": {"held": "accuracy"}}, "validation", "on.held: 'accuracy'"),
        ({"over": {"coefficients.2": "0..1"}}, "validation", "search.over: coefficients.2"),
        ({"over": {"options.density": "0..1"}}, "validation", "search.over: options.density"),
        ({"over": {"coefficients.0": "1..0"}}, "validation", "LOW must be less than HIGH"),
        ({"groups": 0}, "validation", "one group of layers or more"),
        ({"trials": 0}, "validation", "greater than 0"),
        ({"over": {}}, "validation", "at least 1"),
    ],
)
def test_a_search_of_nothing_is_refused(workspace, changes, split, message) -> None:
    write(lambda r: tuned(r, **changes), benchmarks={"held": {**TEXT, "split": split}})
    with pytest.raises(ParamsError, match=message):
        check(load_models("mine"))


def test_layers_are_put_into_groups_of_equal_depth() -> None:
    """Stacks are cut alike; what is in no layer is the rest; too many groups are refused."""
    names = [f"{s}.{i}.w" for s, n in (("v.layers", 2), ("t.layers", 4)) for i in range(n)]
    groups = layer_groups([*names, "head.w"], 2)
    assert groups == {
        "depth 0": ["v.layers.0.*", "t.layers.0.*", "t.layers.1.*"],
        "depth 1": ["v.layers.1.*", "t.layers.2.*", "t.layers.3.*"],
        "rest": ["*"],
    }
    assert layer_groups(names, {"all": ["*"]}) == {"all": ["*"]}
    with pytest.raises(ParamsError, match="have 4 layers to put into groups"):
        layer_groups(names, 5)


BAD = [
    ({"measure": "perplexity", "tokens": 8}, "give one of texts, dataset; found none"),
    ({"measure": "perplexity", "texts": "letters"}, "needs 'tokens'"),
    ({**TEXT, "prompt": "a {}"}, "has no 'prompt'"),
    ({**TEXT, "texts": "nowhere"}, "nowhere is not there"),
    ({**TEXT, "mesure": 1}, "did you mean 'measure'"),
    ({"measure": "perplexitty"}, "perplexity"),
    ({"measure": "zero_shot", "images": "photos", "prompt": "a photo"}, "write one {}"),
    ({"measure": "labels", "images": "letters"}, "none of them"),
    ({"measure": "labels", "images": "loose"}, "is in no folder of a class"),
    ({"measure": "labels", "images": "one"}, "all pictures are of one class, 'x'"),
    ({"measure": "labels", "dataset": "t.parquet", "column": "word", "labels": "kind"},
     r"column: 'word': did you mean 'words'"),
    ({"measure": "labels", "dataset": "t.parquet", "column": "words"}, "needs 'labels'"),
    ({"measure": "labels", "dataset": "hf://d/x", "column": "a", "labels": "b"}, "is unknown"),
    ({"measure": "labels", "dataset": "bad.parquet", "column": "a", "labels": "b"},
     "is no parquet file"),
    ({"measure": "command", "command": "score.py"}, "write {model}"),
    ({"measure": "command", "command": "score.py {model} {data}"}, "{data} stands for nothing"),
    ({"measure": "command", "command": "no-such-program {model}"}, "no program 'no-such-program'"),
    ({"measure": "command", "command": "'open {model}"}, "No closing quotation"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "message"), BAD)
def test_a_benchmark_of_nothing_is_refused_before_the_first_stage(
    workspace: Path, own: dict, message: str
) -> None:
    Image.new("RGB", (8, 8)).save(workspace / "p.png")
    for place in ("loose/p.png", "one/x/p.png"):
        (workspace / place).parent.mkdir(parents=True)
        (workspace / place).write_bytes((workspace / "p.png").read_bytes())
    datasets.Dataset.from_dict({"words": ["a"], "kind": [1]}).to_parquet(
        str(workspace / "t.parquet")
    )
    (workspace / "bad.parquet").write_text("no table")
    write(benchmarks={"own": own})
    with pytest.raises(ParamsError, match=message):
        check(load_models("mine"))


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"models": ["a"]}, "nothing measures them"),
        ({"models": ["c"], "benchmarks": {"own": TEXT}}, "evaluate.models: 'c'"),
        ({"benchmarks": {"mine": TEXT}}, "is the name of a set"),
        ({"harness": {}}, "name one"),
        ({"harness": {"lm_eval": {"tasks": []}}}, "at least 1"),
        ({"harness": {"lmeval": {"tasks": ["x"]}}}, "did you mean 'lm_eval'"),
        ({"benchmarks": {"x": TEXT}, "harness": {"lm_eval": {"tasks": ["x"]}}},
         "is another benchmark's name"),
    ],
)  # fmt: skip
def test_names_that_are_not_clear_are_refused(workspace, measured: dict, message: str) -> None:
    write(**measured)
    with pytest.raises(ParamsError, match=message):
        load("mine")


@pytest.mark.parametrize(
    ("benchmark", "metric", "message"),
    [
        ("words", "perplexity", "less of it is better"),
        ("words", "acuracy", "choose one of"),
        ("wods", "log_likelihood", "did you mean 'words'"),
        ("sts", "main_score", "gives no standard errors"),
    ],
)
def test_gates_take_scores_that_say_something(workspace, benchmark, metric, message) -> None:
    write(benchmarks={"words": TEXT}, harness={"mteb": {"tasks": ["sts"]}})
    gates = {"split": "test", "model": "merged", "benchmarks": {benchmark: metric},
             "minimal_gain": 0.0, "maximal_regression": 2.0}  # fmt: skip
    Path("params/promote.yaml").write_text(yaml.safe_dump({"gates": {"mine": gates}}))
    with pytest.raises(ParamsError, match=message):
        check_gates(load("mine"))


@pytest.mark.parametrize(
    ("prints", "message"),
    [
        ("print('fine')", "its last line is an object of JSON"),
        ('print(\'{"a": "b"}\')', "not a number"),
        ("print('{\"a\": NaN}')", "not a number"),
        ("print('{}')", "an empty object"),
        ("raise SystemExit('no such model')", "ended with 1: no such model"),
    ],
)
def test_a_command_that_fails_is_told_with_its_last_words(workspace, prints, message) -> None:
    (workspace / "score.py").write_text(prints)
    own = {"measure": "command", "command": f"{sys.executable} score.py {{model}}"}
    with pytest.raises(ValueError, match=message):
        measured(workspace, own=own)


TASK = """
task: our_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choices.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `harness` is not installed")
def test_lm_eval_measures_with_a_task_file_of_ones_own(llamas: Path) -> None:
    """Offline, in a process of its own, with the harness's standard error, up to metrics.json."""
    drawn = random.Random(0)
    rows = [
        {"question": "a b", "choices": drawn.sample("cdefg", 3), "answer": drawn.randrange(3)}
        for _ in range(16)
    ]
    (llamas / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (llamas / "own").mkdir()
    (llamas / "own/task.yaml").write_text(TASK)
    section = {"tasks": ["our_choice"], "include_path": "own"}
    write(harness={"lm_eval": {**section, "tasks": ["our_choise"]}})
    with pytest.raises(ParamsError, match=r"lm_eval.tasks: 'our_choise': did you mean 'our_choice"):
        check(load_models("mine"))
    write(harness={"lm_eval": section}, models=["a", "average"])
    recipe = load_models("mine")
    for stage in (fetch, merge, choose, evaluate):
        stage.main(recipe)
    metrics = json.loads(Path("reports/mine/metrics.json").read_text())
    own = metrics["test"]["average"]["our_choice"]
    share = own["acc"]
    assert own["acc_standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 15), abs=1e-4)
    assert "our_choice/test" in metrics["data"]


MTEB = """
from datasets import Dataset
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata


class Ours(AbsTaskSTS):
    metadata = TaskMetadata(
        name="OurSTS", description="letters", reference=None, type="STS", category="t2t",
        modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
        main_score="cosine_spearman", dataset={"path": "none/none", "revision": "1"}, date=None,
        domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None,
        sample_creation=None, bibtex_citation="",
    )
    min_score, max_score = 0, 5

    def load_data(self, **_):
        rows = {"sentence1": ["a b", "c d", "e"], "sentence2": ["a c", "d c", "f g"],
                "score": [4.0, 5.0, 0.0]}
        self.dataset, self.data_loaded = {"test": Dataset.from_dict(rows)}, True
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mteb") is None, reason="the extra `harness` is not installed")
def test_mteb_measures_with_a_task_file_of_ones_own(workspace: Path) -> None:
    """Offline, in a process of its own; it gives no standard errors, and none is made up."""
    folder = workspace / "given/a"
    tiny_models.save(tiny_models.model("ElectraModel", 0), folder)
    (workspace / "own.py").write_text(MTEB)
    harness = {"mteb": {"tasks": ["OurSTS"], "include_path": "own.py"}}
    write(harness=harness)
    check(load_models("mine"))
    measure = Measure("here", MeasuredParams.model_validate({"harness": harness}), 3)
    found = measure.model("a", folder)["OurSTS"]
    assert -1 <= found["main_score"].value <= 1
    assert math.isnan(found["main_score"].error)
