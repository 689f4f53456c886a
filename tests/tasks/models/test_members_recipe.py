"""The recipes `skills` and `speech` as they ship, on tiny models of the architectures they name."""

from pathlib import Path

import pytest
import torch
import yaml

from alloy.checkpoint import load_weights
from tasks.models import evaluate, stream
from tasks.models.shared.kept import kept
from tasks.recipe.load import load_models
from tasks.recipe.section import ParamsError
from tests import multimodal

PARAMS = Path(__file__).parents[3] / "params"
NUM_LAYERS = 24  # that the arm by_layers speaks of
OTHERS = [name for name in multimodal.ARCHITECTURES if name not in ("InternVL", "Qwen2Audio")]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()


def recipe(name: str, **changed):
    sections = yaml.safe_load((PARAMS / f"{name}.yaml").read_text()) | changed
    Path("params/recipes.yaml").write_text(yaml.safe_dump({"recipes": [name]}))
    Path(f"params/{name}.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    return load_models(name)


def checkpoints(loaded, architecture: str, num_layers: int = NUM_LAYERS) -> None:
    """What fetch would have brought."""
    first, second, start = loaded.fetch.checkpoints
    folder = loaded.workspace.checkpoints
    multimodal.saved(multimodal.whole(architecture, 1, num_layers), folder / first)
    for seed, name in ((2, second), (3, start)):
        multimodal.saved(multimodal.language_model(architecture, seed, num_layers), folder / name)
    for name in (first, second):
        (folder / name / "chat_template.jinja").write_text(f"{{# {name} #}}")
        (folder / name / "generation_config.json").write_text(f'{{"max_length": {len(name)}}}')
    (folder / first / "preprocessor_config.json").write_text('{"crop_size": 16}')


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("skills", "InternVL"),  # the one that the file names
        *(pytest.param("skills", other, marks=pytest.mark.slow) for other in OTHERS),
        ("speech", "Qwen2Audio"),
    ],
)
def test_the_recipes_run_as_they_ship(name, architecture):
    """Every arm is the first member but for its language model's body, and has the named files."""
    loaded = recipe(name)
    checkpoints(loaded, architecture)
    stream.main(loaded)
    arms = loaded.workspace.arms / name / "0"
    first = load_weights(loaded.workspace.checkpoints / next(iter(loaded.fetch.checkpoints)))
    for arm, params in loaded.merge.arms.items():
        merged = load_weights(arms / arm)
        assert merged.keys() == first.keys()
        same = {n for n in first if torch.equal(first[n], merged[n])}
        body = {n for n in first if ".layers." in n and ".mlp." in n and "tower" not in n}
        body = {n for n in body if "vision" not in n and "audio" not in n}
        assert len(body) == 3 * NUM_LAYERS
        changed = {
            n for n in body if arm != "by_layers" or int(n.split("layers.")[1][:2].strip(".")) > 7
        }
        assert same.isdisjoint(changed)
        assert all(n in same for n in first if "embed" in n or "head" in n or "projector" in n)
        template = (arms / arm / "chat_template.jinja").read_text()
        assert template == f"{{# {params.chat_template} #}}"
        settings = (arms / arm / "generation_config.json").read_text()
        assert settings == f'{{"max_length": {len(params.generation_config)}}}'
        assert (arms / arm / "preprocessor_config.json").is_file()


def test_the_law_of_speech_combine():
    """W_speech + (W_instruct - W_base) in the body."""
    loaded = recipe("speech")
    checkpoints(loaded, "Qwen2Audio", num_layers=2)
    stream.main(loaded)
    of = {n: load_weights(loaded.workspace.checkpoints / n) for n in loaded.fetch.checkpoints}
    merged = load_weights(loaded.workspace.arms / "speech/0/instructed")
    tail = "model.layers.1.mlp.up_proj.weight"
    expected = of["speech"][f"language_model.{tail}"] + of["instruct"][tail] - of["start"][tail]
    torch.testing.assert_close(merged[f"language_model.{tail}"], expected)


def test_an_arm_is_made_of_slices_gradients_and_options_by_member():
    """Layers of the first member and of both; the density rises with depth, by member."""
    arm = {
        "method": "ties",
        "base": "start",
        "chat_template": "speech",
        "slices": [{"speech": [0, 1]}, {"speech": [1, 2], "instruct": [1, 2]}],
        "coefficients": [{"from": 0, "to": 1}, 0.5],
        "options": {"density": {"speech": {"from": 0.2, "to": 1}, "instruct": 0.5}},
    }
    sections = {"result": "sliced", "arms": {"sliced": arm}}
    loaded = recipe("speech", merge=sections)
    checkpoints(loaded, "Qwen2Audio", num_layers=2)
    plan = stream.plan_of(evaluate.jobs(loaded)[0], loaded.merge.arms["sliced"], Path("out"))
    of = {t.name: t for t in plan.tensors}
    assert of["language_model.model.layers.0.mlp.up_proj.weight"].how == "copy"
    merged = of["language_model.model.layers.1.mlp.up_proj.weight"]
    assert merged.how == "ties"
    assert merged.coefficients == pytest.approx((2 / 3, 1 / 3))
    assert merged.options == {"density": (1.0, 0.5)}


def test_distances_are_measured_under_the_first_members_names(capsys):
    loaded = recipe("speech")
    checkpoints(loaded, "Qwen2Audio", num_layers=2)
    stream.main(loaded)
    pairs = dict(evaluate.stored_distances(evaluate.jobs(loaded)[0]))
    assert pairs.keys() == {
        "speech - instruct", "speech - instructed", "speech - half", "instruct - instructed",
        "instruct - half",
    }  # fmt: skip
    assert "not compared: 'audio_tower.conv1.bias'" in capsys.readouterr().out


def test_groups_are_known_under_stored_names_and_the_models_own():
    loaded = recipe("skills", kept=["embeddings", "head", "*.norm.weight"])
    checkpoints(loaded, "LlavaNext", num_layers=2)
    job = evaluate.jobs(loaded)[0]
    ends = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert kept(job, load_weights(job.folders["vlm"])) == ends | {
        "language_model.model.norm.weight"
    }
    own = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    names = multimodal.whole("LlavaNext").state_dict()
    assert kept(job, names) == own | {"model.language_model.norm.weight"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"names": {"llm": {"a.": "b."}, "lllm": {"a.": "b."}}},
            "names: 'lllm': did you mean 'llm'",
        ),
        ({"names": ["llm"]}, "names"),
        ({"members": None}, "null"),
    ],
)
def test_refused(changed, message):
    with pytest.raises(ParamsError, match=message):
        recipe("skills", **changed)


def test_an_arm_takes_files_of_its_members_alone():
    sections = yaml.safe_load((PARAMS / "skills.yaml").read_text())
    sections["merge"]["arms"]["ties"]["processor"] = "vml"
    with pytest.raises(ParamsError, match=r"arms.ties.processor: 'vml': did you mean 'vlm'"):
        recipe("skills", merge=sections["merge"])
    sections["merge"]["arms"]["ties"].update(processor="vlm", slices=[{"vml": [0, 1]}])
    with pytest.raises(ParamsError, match=r"arms.ties.slices\[0\]: 'vml': did you mean 'vlm'"):
        recipe("skills", merge=sections["merge"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slices": [{"vlm": [2, 0]}]}, r"slices\[0\]\['vlm'\]: \[2, 0\]: give the first layer"),
        ({"slices": [{"vlm": [0, 1]}, {"vlm": [1, 1]}]}, r"slices\[1\]\['vlm'\]: \[1, 1\]"),
        ({"slices": [{"vlm": [-1, 1]}]}, r"slices\[0\]\['vlm'\]: \[-1, 1\]"),
        ({"slices": [{"vlm": [0, 2], "llm": [0, 1]}]}, r"as many layers of every source"),
        ({"slices": [{}]}, r"slices\[0\]: give as many layers of every source, not none"),
        ({"stack": "model.layers"}, "stack says which layers slices are taken of"),
    ],
)
def test_slices_that_no_source_has_are_refused_with_the_recipe(given, message):
    sections = yaml.safe_load((PARAMS / "skills.yaml").read_text())
    sections["merge"]["arms"]["ties"].update(given)
    with pytest.raises(ParamsError, match=message):
        recipe("skills", merge=sections["merge"])
