"""Members merged as they are: from folders, streamed, to a merged model and its distances."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ViTConfig, ViTModel

import alloy
from alloy.checkpoint import save_statistics
from alloy.errors import CheckpointError
from tasks.command import home
from tasks.evaluation.loading import class_name, model_class
from tasks.models import choose, evaluate, merge, stream
from tasks.recipe.load import load, load_models
from tasks.recipe.section import ParamsError
from tasks.registry import register, tracking
from tasks.sources import fetch
from tests.tasks.reports.pages import Page

RECIPE = {
    "kind": "models",
    "fetch": {"model_type": "vit", "checkpoints": {"a": "given/a", "b": "given/b"}},
    "members": ["a", "b"],
    "merge": {
        "result": "weighted",
        "arms": {"weighted": {"method": "linear", "coefficients": [0.25, 0.75]}},
    },
    "evaluate": {"tssd_keep": 0.2},
    "register": {"name": "mine", "model": "merged"},
}
ARM = Path("models/mine/arms/mine/0/weighted/model.safetensors")
MERGED = Path("models/mine/merged/model.safetensors")


def _vit(seed: int) -> ViTModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config).eval()


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        _vit(seed).save_pretrained(tmp_path / "given" / name)
    (tmp_path / "params").mkdir()
    (tmp_path / "params/recipes.yaml").write_text("recipes: [mine]\n")
    (tmp_path / "params/mine.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return tmp_path


def change_params(change: Callable[[dict], object]) -> None:
    path = Path("params/mine.yaml")
    recipe = yaml.safe_load(path.read_text())
    change(recipe)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def change_arm(**changes: object) -> None:
    change_params(lambda r: r["merge"]["arms"]["weighted"].update(changes))


def run(*stages) -> None:
    for stage in stages:
        stage.main(load("mine"))


def test_two_checkpoints_become_one_that_transformers_loads(workspace, capsys) -> None:
    run(fetch, merge, choose, evaluate)
    merged, info = AutoModel.from_pretrained("models/mine/merged", output_loading_info=True)
    assert not any(info.values())
    a, b = (load_file(f"given/{name}/model.safetensors") for name in "ab")
    for name, tensor in load_file(MERGED).items():
        torch.testing.assert_close(tensor, 0.25 * a[name] + 0.75 * b[name])
    assert isinstance(merged, ViTModel)
    metrics = json.loads((workspace / "reports/mine/metrics.json").read_text())
    # On the straight line from a to b, the merged model lies three times nearer to b.
    far, near = (metrics[f"{name} - weighted"]["l2"] for name in "ab")
    assert f"{far:.4f}" in capsys.readouterr().out
    assert far == pytest.approx(3 * near, rel=1e-3)
    assert (workspace / "reports/mine/plots/distances.png").is_file()
    page = Page((workspace / "reports/mine/report.html").read_text())
    assert "weighted: method linear, coefficients [0.25, 0.75]" in page.text
    assert "given/a at revision" in page.text
    assert "../../models/mine/merged" in page.loaded
    assert not list((workspace / "models").rglob("*.incomplete"))
    assert not (workspace / ".alloy/merge").exists() or not any(Path(".alloy/merge").iterdir())


def test_kept_tensors_stay_the_first_members(workspace) -> None:
    """Tensors that match `kept` are the first member's to the bit; others are merged."""
    change_params(lambda r: r.update(kept=["embeddings.*"]))
    run(fetch, merge)
    a, merged = load_file("given/a/model.safetensors"), load_file(ARM)
    same = {name for name in a if torch.equal(a[name], merged[name])}
    kept = {name for name in a if name.startswith("embeddings.")}
    assert kept
    assert kept <= same
    assert len(same) < len(a)


def _write_adapter(name: str, seed: int) -> None:
    """A LoRA of rank 2 on every matrix of the first layer of `given/a`."""
    folder = Path("given") / name
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "given/a"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for weight, value in load_file("given/a/model.safetensors").items():
        if value.ndim == 2 and ".0." in weight:
            key = f"base_model.model.{weight.removesuffix('.weight')}"
            parts[f"{key}.lora_A.weight"] = torch.randn(2, value.shape[1], generator=generator)
            parts[f"{key}.lora_B.weight"] = torch.randn(value.shape[0], 2, generator=generator)
    save_file(parts, folder / "adapter_model.safetensors")


def test_adapters_are_members_with_their_base(workspace) -> None:
    """`adapter:` is fetched alone; merging two of one base adds half of each product to it."""
    _write_adapter("one", 1)
    _write_adapter("two", 2)
    adapters = {name: {"adapter": f"given/{name}", "base": "a"} for name in ("one", "two")}
    change_params(
        lambda r: r.update(
            fetch={"model_type": "vit", "checkpoints": {"a": "given/a", **adapters}},
            members=["one", "two"],
        )
    )
    change_arm(coefficients=[0.5, 0.5])
    run(fetch, merge, choose, evaluate)
    base, merged = load_file("given/a/model.safetensors"), load_file(MERGED)
    expected = dict(base)
    for name in adapters:
        assert not (workspace / f"models/mine/checkpoints/{name}/model.safetensors").exists()
        parts = load_file(f"given/{name}/adapter_model.safetensors")
        for key in [key for key in parts if key.endswith("lora_A.weight")]:
            weight = key.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
            product = parts[key.replace("lora_A", "lora_B")] @ parts[key]
            expected[weight] = expected[weight] + product / 2
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    metrics = json.loads((workspace / "reports/mine/metrics.json").read_text())
    assert metrics["one - weighted"]["l2"] == pytest.approx(metrics["two - weighted"]["l2"])


def test_another_base_is_fetched_anew(workspace) -> None:
    """What an adapter goes on is part of what was fetched, so that DVC sees it change."""
    _write_adapter("one", 1)
    checkpoints = {"a": "given/a", "b": "given/b", "one": {"adapter": "given/one", "base": "a"}}
    change_params(lambda r: r["fetch"].update(checkpoints=checkpoints))
    manifest = workspace / "models/mine/checkpoints/one/manifest.json"
    run(fetch)
    assert json.loads(manifest.read_text())["adapter_on"] == "a"
    checkpoints["one"]["base"] = "b"
    change_params(lambda r: r["fetch"].update(checkpoints=checkpoints))
    run(fetch)
    assert json.loads(manifest.read_text())["adapter_on"] == "b"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": "given/one"}, r"an adapter is \{adapter: SOURCE, base: NAME\}"),
        ({"source": "given/one", "base": "a"}, r"an adapter is \{adapter: SOURCE, base: NAME\}"),
        ({"adapter": "given/one", "base": "aa"}, "checkpoints.one.base: 'aa': did you mean 'a'"),
        ({"adapter": "given/one", "base": "one"}, "choose one of .'a', 'b'."),
        ("given/one", "it is an adapter's: write"),
        (
            {"adapter": "given/b", "base": "a"},
            "adapter_config.json is missing: this is not an adap",
        ),
    ],
)
def test_what_is_no_adapter_on_a_base_is_refused(workspace, given, message: str) -> None:
    _write_adapter("one", 1)
    checkpoints = {"a": "given/a", "b": "given/b", "one": given}
    change_params(lambda r: r["fetch"].update(checkpoints=checkpoints))
    with pytest.raises(ValueError, match=message):
        run(fetch)


def test_an_adapter_that_cannot_be_folded_is_refused_when_it_is_fetched(workspace) -> None:
    _write_adapter("one", 1)
    Path("given/one/adapter_config.json").write_text('{"peft_type": "LOHA"}')
    checkpoints = {"a": "given/a", "b": "given/b", "one": {"adapter": "given/one", "base": "a"}}
    change_params(lambda r: r["fetch"].update(checkpoints=checkpoints))
    with pytest.raises(ValueError, match=r"given/one: .*peft_type is 'LOHA'"):
        run(fetch)


def test_a_pattern_that_keeps_nothing_is_refused(workspace) -> None:
    change_params(lambda r: r.update(kept=["embedings.*"]))
    run(fetch)
    with pytest.raises(ValueError, match=r"embedings"):
        run(merge)
    assert not ARM.parent.exists()


def test_every_set_and_seed_has_every_arm(workspace, capsys) -> None:
    """Two sets of two seeds and two arms make eight models, each of its own members.

    Of each a line says that it begins, and one that it is done.
    """
    for seed, name in enumerate("cd", start=2):
        _vit(seed).save_pretrained(workspace / "given" / name)

    def change(recipe: dict) -> None:
        recipe["fetch"]["checkpoints"] |= {"c": "given/c", "d": "given/d"}
        del recipe["members"]
        recipe["sets"] = {
            "first": {"members": {0: ["a", "b"], 1: ["c", "d"]}},
            "second": {"members": {0: ["a", "c"], 1: ["b", "d"]}},
        }
        recipe["merge"]["arms"]["average"] = {"method": "linear"}
        recipe["merge"]["result"] = {"set": "second", "seed": 1, "arm": "average"}

    change_params(change)
    run(fetch, merge, choose)
    found = sorted(Path("models/mine/arms").glob("*/*/*/model.safetensors"))
    assert len(found) == 8
    lines = capsys.readouterr().out.splitlines()
    for done, job in enumerate(("first/0", "first/1", "second/0", "second/1"), 1):
        begun = lines.index(f"merge: {job} begins")
        said = rf"merge: {job} is done after [\d.]+ s, {done} of 4"
        [ended] = [i for i, line in enumerate(lines) if re.fullmatch(said, line)]
        assert all(line.startswith(f"merge: {job}: ") for line in lines[begun + 1 : ended])
        assert ended == begun + 3
    b, d = (load_file(f"given/{name}/model.safetensors") for name in "bd")
    for name, tensor in load_file(MERGED).items():
        torch.testing.assert_close(tensor, (b[name] + d[name]) / 2)


def test_regmean_reads_the_grams_that_collect_measured(workspace) -> None:
    """collect's Grams, saved by member, stream through the recipe: the merge is that in memory."""
    models = {name: _vit(seed) for seed, name in enumerate("ab")}
    generator = torch.Generator().manual_seed(0)
    batches = [{"pixel_values": torch.randn(20, 3, 8, 8, generator=generator)} for _ in range(3)]
    spec = alloy.find_symmetries(models["a"], batches[0])
    grams = alloy.collect(models, batches, spec, grams=True).grams
    for name, of_model in grams.items():
        weights = models[name].state_dict()
        save_statistics(
            of_model, f"{name}.safetensors", weights=weights, checkpoint=f"given/{name}"
        )
    files = {name: f"{name}.safetensors" for name in "ab"}
    change_arm(method="regmean", statistics=files, coefficients=None)
    run(fetch, merge, choose)
    expected = alloy.merge(
        "regmean",
        [models[name].state_dict() for name in "ab"],
        statistics=[grams[name] for name in "ab"],
    )
    assert len(grams["a"]) == 13
    merged = AutoModel.from_pretrained("models/mine/merged").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor)
    account = json.loads(Path("models/mine/merged/alloy_merge.json").read_text())
    assert account["settings"]["statistics"] == files


def test_a_merge_without_alignment_is_registered_too(workspace, mlflow_workspace) -> None:
    """The merged checkpoint is a version in MLflow, with the hashes of its parents."""
    run(fetch, merge, choose, evaluate, register)
    version = tracking.aliased("mine", "challenger")
    assert version is not None
    finished = tracking.finished_run(version.run_id)
    parents = tracking.lineage(version.run_id)["parents"]
    assert parents["a"]["digest"] != parents["b"]["digest"]
    assert finished.metrics["a - weighted/l2"] > 0
    assert any(name.endswith("model.safetensors") for name in tracking.model_files("mine", "1"))


def test_merging_again_replaces_the_arms_whole(workspace) -> None:
    run(fetch, merge)
    before = load_file(ARM)
    change_arm(coefficients=[1.0, 0.0])
    run(merge)
    after = load_file(ARM)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    Path("models/mine/checkpoints/b/model.safetensors").unlink()
    with pytest.raises(ValueError, match="b"):
        run(merge)
    still = load_file(ARM)
    assert all(torch.equal(after[name], still[name]) for name in after)


def test_an_interrupted_merge_goes_on_with_the_arms_that_are_done(
    workspace, monkeypatch, capsys
) -> None:
    """A finished arm is taken over if it is the very same merge, and made anew if it is not."""
    change_params(lambda r: r["merge"]["arms"].update(average={"method": "linear"}))
    run(fetch)
    begin = stream.run_plan

    def interrupt(plan, **options):
        if "average" in options["title"]:
            raise KeyboardInterrupt
        return begin(plan, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "run_plan", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(merge)
    assert not Path("models/mine/arms").exists()
    run(merge)
    assert "weighted: was finished before the interruption" in capsys.readouterr().out
    right = load_file(ARM)
    shutil.rmtree("models/mine/arms")
    run(merge)
    again = load_file(ARM)
    assert all(torch.equal(right[name], again[name]) for name in right)


def test_another_result_is_a_copy_of_an_arm(workspace) -> None:
    """`merge.result` chooses among the arms; the stage reads nothing else."""
    change_params(lambda r: r["merge"]["arms"].update(average={"method": "linear"}))
    run(fetch, merge, choose)
    weighted = MERGED.read_bytes()
    assert weighted == ARM.read_bytes()
    change_params(lambda r: r["merge"].update(result="average"))
    shutil.rmtree("models/mine/checkpoints")
    run(choose)
    assert MERGED.read_bytes() == (ARM.parents[1] / "average/model.safetensors").read_bytes()
    assert MERGED.read_bytes() != weighted


def test_stages_that_the_recipe_does_not_need_are_not_there(workspace) -> None:
    recipe = load_models("mine")
    assert not recipe.is_calibrated
    assert (recipe.prepare, recipe.collect, recipe.align) == (None, None, None)
    assert home("merge", recipe.kind) == "tasks.models.merge"
    assert home("fetch", recipe.kind) == "tasks.sources.fetch"


def arm(**changes: object) -> Callable[[dict], object]:
    return lambda r: r["merge"]["arms"]["weighted"].update(changes)


SECTIONS = [
    (lambda r: r.update(kind="weights"), "kind 'weights': "),
    (lambda r: r.update(collct={}), "unknown key 'collct': did you mean 'collect'"),
    (lambda r: r.update(collect=None), "collect: null: leave out a section"),
    (lambda r: r.update(align={"alignments": {"a": {"preset": "identity"}}}), "needs all three"),
    (lambda r: r.update(members=["a", "c"]), r"members\.0: 'c'"),
    (lambda r: r.update(members=["a"]), "two or more"),
    (lambda r: r.update(members="ab"), r"members.*valid list"),
    (lambda r: r.update(sets={"s": {"members": {0: ["a", "b"]}}}), "not both"),
    (lambda r: (r.pop("members"), r.update(kept=["x"])), "names say more about `members`"),
    (lambda r: r.pop("members"), "sets: this is missing"),
    (lambda r: r["register"].update(model="finetuned"), "write `model: merged`"),
    (lambda r: r.update(ship={"target": None, "model": "merged"}), r"ship\.target"),
]
ARMS = [
    (lambda r: r["merge"].update(metod="x"), "unknown key 'metod'"),
    (lambda r: r["merge"].update(result="wighted"), "did you mean 'weighted'"),
    (arm(method="lineer"), "did you mean 'linear'"),
    (arm(options={"densty": 1}), "densty"),
    (arm(coefficients=[1.0]), "one for each of the 2"),
    (arm(method="ties"), "base"),
    (arm(base="c"), r"base: 'c'"),
    (arm(alignment="x"), "alignment: 'x'"),
    (arm(repair={"batch_norm": True}), "repair needs calibration data"),
    (arm(method="regmean", coefficients=None), "statistics"),
    (
        arm(method="regmean", coefficients=None, statistics={"a": "a.safetensors"}),
        "one file for each member",
    ),
    (arm(chat_template="c"), r"chat_template: 'c': choose one of \['a', 'b'\]"),
    (arm(allow="hidden_act"), "allow.*valid list"),
]


@pytest.mark.parametrize(("change", "message"), SECTIONS + ARMS)
def test_a_recipe_that_makes_no_sense_is_refused_before_the_first_stage(
    workspace, change, message
) -> None:
    change_params(change)
    with pytest.raises(ParamsError, match=message):
        load("mine")


def test_the_recipe_of_the_documentation_is_one(workspace) -> None:
    """A newcomer copies a recipe that is accepted, to the key."""
    text = (Path(__file__).parents[3] / "docs/how_to/checkpoints.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(kind: models.*?)```", text, flags=re.DOTALL)
    Path("params/mine.yaml").write_text(recipe)
    assert load_models("mine").sets["mine"].kept == ["classifier.*"]


def test_what_may_differ_and_what_is_left_out_is_said_in_the_arm(workspace) -> None:
    """`allow`, `drop` and `chat_template` are those of `alloy.merge_checkpoints`."""
    config = json.loads(Path("given/b/config.json").read_text())
    Path("given/b/config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    for name in "ab":
        Path(f"given/{name}/chat_template.jinja").write_text(f"{{{{ messages }}}} {name}")
    run(fetch)
    change_arm(allow=["hidden_act"], chat_template="b", drop=["pooler.*"])
    run(merge)
    assert json.loads((ARM.parent / "config.json").read_text())["hidden_act"] == "gelu"
    assert (ARM.parent / "chat_template.jinja").read_text().endswith(" b")
    assert not any(name.startswith("pooler.") for name in load_file(ARM))


def test_a_merge_that_cannot_be_done_writes_nothing(workspace) -> None:
    """Known only from the checkpoints: other architectures, and no arm is there afterwards."""
    config = json.loads(Path("given/b/config.json").read_text())
    Path("given/b/config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    run(fetch)
    with pytest.raises(ValueError, match="hidden_act"):
        run(merge)
    assert not Path("models/mine/arms").exists()


LIGHT = """
import sys
from pathlib import Path
from tasks.recipe.load import load
from tasks.recipe.plan import check_contents

check_contents(load("mine"))
before = {"torch", "transformers", "optuna"} & {*sys.modules}
import tasks.models.evaluate, tasks.models.merge
after = {"transformers", "optuna", "mlflow"} & {*sys.modules}
from tasks.evaluation.loading import class_name
named = class_name(Path("given/a"))
print(before, after, named, "transformers.models.vit.modeling_vit" in sys.modules)
"""


@pytest.mark.slow
def test_checks_and_stages_of_a_streamed_merge_import_no_models(workspace: Path) -> None:
    """Checks load no torch, the stages no transformers, and the name of a class not its module."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ALLOY_DEVICE": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set() set() ViTModel False\n", done.stderr


@pytest.mark.parametrize("names", [None, [], ["ViTNope"], ["pipeline"], ["models"]])
def test_a_config_that_names_no_class_is_refused(workspace: Path, names: object) -> None:
    """The name alone is looked up as strictly as the class itself."""
    config = Path("given/a/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": names}))
    for ask in (class_name, model_class):
        with pytest.raises(CheckpointError, match="must name a class of transformers"):
            ask(config.parent)
