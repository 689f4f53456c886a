"""The recipe `towers` as it ships, on a tiny SigLIP; other models by their members alone."""

import random
import warnings
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, SiglipConfig, SiglipModel

import alloy
from alloy.errors import MergeError
from alloy.gauge import STARTS
from tasks.evaluation.loading import load_any
from tasks.models import choose, evaluate, merge, prepare
from tasks.models.checks import check
from tasks.models.shared.jobs import jobs
from tasks.recipe.load import load_models
from tasks.recipe.section import ParamsError
from tasks.recipe.trunk import GAUGE_STARTS
from tasks.storage import read_json
from tests import tiny_models, two_towers

PARAMS = Path(__file__).parents[3] / "params"
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 20}


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    return tmp_path


def sections(**changed):
    shipped = yaml.safe_load((PARAMS / "towers.yaml").read_text())
    pairs = {"dataset": "pairs", "column": "image", "captions": "caption", "examples": 12}
    shipped["prepare"]["calibration"]["pairs"] = pairs
    shipped["evaluate"]["benchmarks"]["retrieval"] |= {"dataset": "pairs"}
    shipped["merge"]["arms"]["gauge"]["trunk"]["gauge"]["steps"] = 2
    shipped["merge"]["arms"]["distilled"]["trunk"]["distil"]["steps"] = 3
    return {**shipped, **changed}


def recipe(given):
    Path("params/recipes.yaml").write_text("recipes: [towers]\n")
    Path("params/towers.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return load_models("towers")


def siglip(folder: Path, **of_text: int) -> None:
    """What fetch would have brought, and pairs."""
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": tiny_models.SIZE, "max_position_embeddings": 8, **of_text}
    config = SiglipConfig(
        text_config={**text, "projection_size": 12},
        vision_config={**SIZES, "image_size": 8, "patch_size": 4},
    )
    model = SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    size = {"height": 8, "width": 8}
    CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
    draw = random.Random(0)
    colours = [tuple(draw.randrange(256) for _ in "rgb") for _ in range(16)]
    table = datasets.Dataset.from_dict(
        {
            "image": [Image.new("RGB", (9, 9), colour) for colour in colours],
            "caption": [" ".join(draw.choices("abcdefgh", k=5)) for _ in colours],
        }
    )
    table.save_to_disk("pairs")


@pytest.mark.slow
def test_the_recipe_runs_as_it_ships(workspace):
    """Every arm is a SigLIP of one trunk; the result is measured by retrieval."""
    loaded = recipe(sections())
    siglip(loaded.workspace.checkpoints / "siglip")
    for stage in (prepare, merge, choose, evaluate):
        stage.main(loaded)
    scores = read_json(loaded.workspace.metrics)
    for arm in loaded.merge.arms:
        folder = loaded.workspace.arms / "towers" / "0" / arm
        model = load_any(folder)
        assert isinstance(model, SiglipModel)
        towers = model.vision_model.encoder, model.text_model.encoder
        first, second = (tower.layers[1].mlp.fc2.weight for tower in towers)
        assert first is second
        found = read_json(folder / "alloy_merge.json")
        counted = sum(p.numel() for p in model.parameters())
        assert found["parameters"]["after"] == counted < found["parameters"]["before"]
        assert arm in scores["test"]
        assert "recall_at_1" in scores["test"][arm]["retrieval"]
    assert isinstance(alloy.load_shared(loaded.workspace.merged), SiglipModel)


def member(part, **more):
    return {"checkpoint": "siglip", "part": part, **more}


MEMBERS = {"image": member("vision_model.encoder.layers"), "text": member("text_model.x")}
WRONG = {
    "one member": ({"members": {"image": MEMBERS["image"]}}, "two members or more"),
    "another checkpoint": (
        {"members": {**MEMBERS, "text": {"checkpoint": "siglib", "part": "x"}}},
        "did you mean 'siglip'",
    ),
    "an adapter": (
        {"fetch": {"checkpoints": {"siglip": "a", "lora": {"adapter": "b", "base": "siglip"}}}},
        "lora: members are parts of whole checkpoints",
    ),
    "no part": (
        {"members": {**MEMBERS, "text": {"checkpoint": "siglip"}}},
        "part: this is missing",
    ),
    "alignment": (
        {"align": {"alignments": {"a": {"preset": "identity"}}}},
        "such a recipe cannot have a section align",
    ),
    "a method of whole models": (
        {"merge": {"result": "ties", "arms": {"ties": {"method": "ties"}}}},
        "merge.arms.ties.method: 'ties': choose one of",
    ),
    "settings of whole models": (
        {"merge": {"result": "a", "arms": {"a": {"method": "average", "base": "siglip"}}}},
        "arms of parts have `method` and `trunk`",
    ),
    **{
        f"layers {layers}": (
            {"members": {**MEMBERS, "text": {**member("text_model.x"), "layers": layers}}},
            "members.text.layers|parts.text.layers",
        )
        for layers in ([-1], [1, 1], [True, False], [])
    },
    **{
        f"a gauge with {setting}": (
            {
                "merge": {
                    "result": "a",
                    "arms": {"a": {"method": "average", "trunk": {"gauge": setting}}},
                }
            },
            "number that is not negative",
        )
        for setting in ({"steps": -1}, {"ridge": "much"}, {"tolerance": float("nan")})
    },
    **{
        f"{word!r} for a gauge": (
            {
                "merge": {
                    "result": "a",
                    "arms": {"a": {"method": "average", "trunk": {"gauge": word}}},
                }
            },
            "trunk.gauge",
        )
        for word in ("yes", "true", 1)
    },
    **{
        f"overlap of {part} {more}": (
            {"members": {"image": member("a.layers", **more), "text": member(part, **more)}},
            "members.text.part: .* overlap in 'siglip'",
        )
        for part, more in (("a.layers", {}), ("a.layers", {"layers": [1]}), ("a.layers.1", {}))
    },
    "a start of no gauge": (
        {
            "merge": {
                "result": "a",
                "arms": {"a": {"method": "average", "trunk": {"gauge": {"starts": ["identiy"]}}}},
            }
        },
        "trunk.gauge.starts: 'identiy': did you mean 'identity'",
    ),
    **{
        f"starts {starts} for a gauge": (
            {
                "merge": {
                    "result": "a",
                    "arms": {"a": {"method": "average", "trunk": {"gauge": {"starts": starts}}}},
                }
            },
            r"trunk.gauge: .*starts: .*a list of starts, such as \[identity\]",
        )
        for starts in ("identity", [], 1)
    },
    "half a step of a gauge": (
        {
            "merge": {
                "result": "a",
                "arms": {"a": {"method": "average", "trunk": {"gauge": {"steps": 1.5}}}},
            }
        },
        "steps: 1.5: a whole number that is not negative",
    ),
    "a setting of no gauge": (
        {
            "merge": {
                "result": "a",
                "arms": {"a": {"method": "average", "trunk": {"gauge": {"step": 3}}}},
            }
        },
        "did you mean 'steps'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sections_are_refused(case):
    changed, message = WRONG[case]
    with pytest.raises(ParamsError, match=message):
        recipe(sections(**changed))


def test_starts_are_those_of_the_search():
    assert GAUGE_STARTS == STARTS


def test_blocks_of_one_list_may_be_two_members():
    """Neighbouring layers of one tower do not overlap."""
    halves = {f"m{i}": member("vision_model.encoder.layers", layers=[i]) for i in (0, 1)}
    assert recipe(sections(members=halves)).is_trunk


def test_data_are_needed_where_anything_is_fitted():
    given = sections()
    del given["prepare"]
    with pytest.raises(ParamsError, match="of parts needs calibration data: give prepare"):
        recipe(given)


TOWERS = dict(zip(("image", "text"), map(member, two_towers.TOWERS["siglip"]), strict=True))
EARLY = {
    "no such part": (MEMBERS, {}, {}, "members: .* has no part 'text_model.x': "),
    "a part in a part": (
        {
            "image": member("vision_model.encoder.layers.0"),
            "text": member("vision_model.encoder", layers=[0]),
        },
        {}, {}, "overlap|leave it out",
    ),
    "another width": (TOWERS, {"hidden_size": 8, "projection_size": 12}, {}, "a trunk has one wid"),
    "other heads": (TOWERS, {"num_attention_heads": 3}, {}, "number of heads is 2 in image and 3"),
    "other depths": (TOWERS, {"num_hidden_layers": 3}, {}, "say which goes with which"),
    "kept what is not there": (TOWERS, {}, {"kept": ["*norm9*"]}, "kept: no weight of the tr"),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY)
def test_parts_are_refused_before_the_first_stage(case, workspace):
    """The config of a checkpoint that is not fetched yet says enough."""
    members, of_text, changed, message = EARLY[case]
    siglip(workspace / "source", **of_text)
    fetch = {"checkpoints": {"siglip": "source"}}
    with pytest.raises(ParamsError, match=rf"params/towers\.yaml: .*({message})"):
        check(recipe(sections(members=members, fetch=fetch, **changed)))


@pytest.mark.parametrize(
    ("file", "what"),
    [("preprocessor_config.json", "image processor"), ("tokenizer_config.json", "tokenizer")],
)
def test_a_missing_processor_is_refused_before_the_first_stage(file, what, workspace):
    siglip(workspace / "source")
    loaded = recipe(sections(fetch={"checkpoints": {"siglip": "source"}}))
    check(loaded)
    (workspace / "source" / file).unlink()
    with pytest.raises(ParamsError, match=f"siglip: it has no {what} .*prepare.calibration.pairs"):
        check(loaded)
    given = sections(fetch={"checkpoints": {"siglip": "source"}})
    given["prepare"]["calibration"]["pairs"] = {"dataset": "inputs", "examples": 4}
    with pytest.raises(ParamsError, match=f"no {what} .*evaluate.benchmarks.retrieval takes"):
        check(recipe(given))


def test_what_prepare_finds_is_said_before_it_writes():
    """A part that the fetched model lacks, and data without one of the modalities."""
    loaded = recipe(sections(members=MEMBERS))
    siglip(loaded.workspace.checkpoints / "siglip")
    with pytest.raises(MergeError, match=r"members: member 'text': .* no part 'text_model.x'"):
        prepare.main(loaded)
    given = sections()
    given["prepare"]["calibration"]["pairs"] = {"images": "pictures", "examples": 2}
    Path("pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9), (i, 40, 80)).save(f"pictures/{i}.png")
    loaded = recipe(given)
    with pytest.raises(MergeError, match=r"calibration.pairs: SiglipModel does not run on .'pixel"):
        prepare.main(loaded)
    assert not loaded.workspace.data.exists()


REFUSED = {
    "no such part": (MEMBERS, {}, "has no part 'text_model.x'"),
    "texts alone": (
        {**MEMBERS, "text": member("text_model.encoder.layers")},
        {"input_ids": torch.ones(4, 8, dtype=torch.long)},
        "does not run on",
    ),
    "one text for all": (
        {**MEMBERS, "text": member("text_model.encoder.layers")},
        {
            "pixel_values": torch.randn(4, 3, 8, 8),
            "input_ids": torch.ones(4, 8, dtype=torch.long),
        },
        r"params/towers\.yaml: merge\.arms\.regmean: answer \d is the same for all data",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_refuses_leaves_no_merge(case):
    members, inputs, message = REFUSED[case]
    loaded = recipe(sections(members=members))
    siglip(loaded.workspace.checkpoints / "siglip")
    (job,) = jobs(loaded)
    job.calibration.parent.mkdir(parents=True)
    save_file(inputs or {"pixel_values": torch.randn(4, 3, 8, 8)}, job.calibration)
    with pytest.raises(MergeError, match=message):
        merge.main(loaded)
    assert not loaded.workspace.arms.exists()


def test_a_missing_processor_is_refused():
    loaded = recipe(sections())
    folder = loaded.workspace.checkpoints / "siglip"
    siglip(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor"):
        prepare.main(loaded)


RUN = ("siglip", "clip", "flava", "whisper")
REASONS = {
    "blip": "have no weight of one name",
    "chinese_clip": "have no weight of one name",
    "clap": "has shape|have no weight of one name",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", two_towers.TOWERS)
def test_other_models_run_by_their_members_or_are_refused(kind):
    """A checkpoint and the names of two parts are all that a recipe needs."""
    arms = {
        "turned": {"method": "sequential", "trunk": {"gauge": {"steps": 2, "max_rounds": 1}}},
        "distilled": {"method": "average", "trunk": {"distil": {"steps": 2}}},
    }
    first, second = two_towers.TOWERS[kind]
    given = sections(
        members={"one": member(first), "two": member(second)},
        merge={"result": "turned", "arms": arms},
    )
    del given["evaluate"]["benchmarks"]
    if kind == "vilt":  # whose modalities share one stack already
        with pytest.raises(ParamsError, match="overlap"):
            recipe(given)
        return
    loaded = recipe(given)
    two_towers.model(kind).save_pretrained(loaded.workspace.checkpoints / "siglip")
    (job,) = jobs(loaded)
    job.calibration.parent.mkdir(parents=True)
    save_file(two_towers.examples(kind, 8), job.calibration)
    if kind not in RUN:
        with pytest.raises(MergeError, match=REASONS[kind]):
            merge.main(loaded)
        return
    for stage in (merge, choose, evaluate):
        stage.main(loaded)
    assert type(load_any(loaded.workspace.merged)).__name__ == two_towers.CLASSES[kind]


@pytest.mark.slow
def test_a_trunk_is_served_with_its_sharing():
    """A server restores what the file has once; plain from_pretrained would draw it anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of types
        from tasks.registry.serving import Transformer

    loaded = recipe(sections(merge={"result": "a", "arms": {"a": {"method": "average"}}}))
    siglip(loaded.workspace.checkpoints / "siglip")
    prepare.main(loaded)
    merge.main(loaded)
    folder = loaded.folder("a")
    served, ours = Transformer(folder, "SiglipModel").model, load_any(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(served.parameters(), ours.parameters(), strict=True)
    )
