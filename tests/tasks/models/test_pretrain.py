"""Laws of the multitask parents: who starts alike, what each one sees, what is released."""

import sys
from pathlib import Path

import grimp
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tasks.data import classification
from tasks.data.classification import DATASETS, Dataset, Split
from tasks.models import pretrain as stage
from tasks.recipe.load import load_file as load_params
from tasks.recipe.pretraining import MultitaskPretrainParams
from tasks.recipe.section import ParamsError
from tasks.storage import read_json, write_json
from tests.flows.test_graph import code_of

REPOSITORY = Path(__file__).parents[3]
TRAINING = {
    "num_steps": 3,
    "learning_rate": 0.01,
    "final_share": 0.0,
    "warmup_steps": 1,
    "weight_decay": 0.05,
    "gradient_clip": 1.0,
    "log_every": 1,
    "save_every": 2,
}
CONFIG = {"image_size": 4, "patch_size": 2, "num_channels": 1, "hidden_size": 8}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
FAMILY = {
    "dataset": "toy",
    "architecture": "vit",
    "config": CONFIG,
    "shift_pixels": 1,
    "recolour": False,
    "batch_size": 6,
    "training": TRAINING,
    "parents": {
        "a": {"task": 0, "start": 0},
        "b": {"task": 1, "start": 0},
        "c": {"task": 1, "start": 1},
    },
}
PRETRAIN = {"seeds": [0, 1], "families": {"toy_vit": FAMILY}}


def read_toy() -> dict[str, Split]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    images = torch.randn(40, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    return dict.fromkeys(("train", "validation", "test"), Split(images, labels))


@pytest.fixture
def params(workspace, monkeypatch) -> MultitaskPretrainParams:
    toy = Dataset(read_toy, tuple("wxyz"), (0, 1, 0, 1), ("numpy",))
    monkeypatch.setitem(DATASETS, "toy", toy)
    Path("params").mkdir()
    Path("params/pretrain_multitask.yaml").write_text(yaml.safe_dump(PRETRAIN))
    return load_params("pretrain_multitask", MultitaskPretrainParams)


def jobs(params) -> dict[str, stage.Job]:
    return {job.name: job for job in stage.jobs(params, "toy_vit")}


def quiet(*_: object) -> None:
    pass


def train_all(params) -> None:
    stage.chain(list(jobs(params).values()), stage.MADE / "toy_vit", stage.WORK, quiet)


def same(left, right) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_models_of_equal_seed_and_start_begin_alike(params):
    """b begins where a does, c and other seeds elsewhere."""
    start = {name: stage.build(job, None).state_dict() for name, job in jobs(params).items()}
    assert same(start["toy_vit_a0"], start["toy_vit_b0"])
    for other in ("toy_vit_c0", "toy_vit_a1", "toy_vit_c1"):
        assert not same(start["toy_vit_a0"], start[other]), other


def test_a_parent_sees_its_own_classes_only(params):
    found = jobs(params)
    assert set(stage.own_task(read_toy()["train"], found["toy_vit_a0"]).labels.tolist()) == {0, 2}
    assert set(stage.own_task(read_toy()["train"], found["toy_vit_c0"]).labels.tolist()) == {1, 3}


def test_training_twice_gives_the_same_bits_and_a_whole_model(params):
    """The checkpoint loads as the model it names, in half precision, with its weights' digest."""
    job = jobs(params)["toy_vit_a0"]
    for run in ("one", "two"):
        stage.pretrain(job, Path(run), Path(f"work_{run}"), quiet)
    one = load_file(Path("one/toy_vit_a0/model.safetensors"))
    assert same(one, load_file(Path("two/toy_vit_a0/model.safetensors")))
    assert {tensor.dtype for tensor in one.values()} == {torch.float16}
    assert stage.is_made(job, Path("one"))
    started = stage.build(job, None).state_dict()
    assert not same(one, {name: tensor.half() for name, tensor in started.items()})


def test_only_what_changed_is_made_again(params):
    """Other params, or weights that are not those that were written, make a model stale."""
    job = jobs(params)["toy_vit_a0"]
    stage.pretrain(job, Path("made"), Path("work"), quiet)
    longer = FAMILY | {"training": TRAINING | {"num_steps": 4}}
    changed = MultitaskPretrainParams.model_validate(
        {"seeds": [0], "families": {"toy_vit": longer}}
    )
    assert stage.is_made(job, Path("made"))
    assert not stage.is_made(jobs(changed)["toy_vit_a0"], Path("made"))
    weights = Path("made/toy_vit_a0/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert not stage.is_made(job, Path("made"))


def test_a_release_is_whole_or_nothing(params, monkeypatch):
    """All models get cards; if one is missing, stale or too large, the old release stands."""
    with pytest.raises(ValueError, match=r"toy_vit_a0, toy_vit_b0, .*benchmarks\.rerun"):
        stage.release()
    train_all(params)
    stage.release()
    names = {path.name for path in stage.RELEASED.iterdir()}
    assert names == set(jobs(params))
    card = (stage.RELEASED / "toy_vit_c1" / "README.md").read_text()
    assert "task 1 of the data set" in card
    assert "toy: x, z" in card
    facts = stage.RELEASED / "toy_vit_c1" / stage.FACTS
    write_json(facts, read_json(facts) | {"mark": 1})
    monkeypatch.setattr(stage, "LIMIT_MB", 0.001)
    with pytest.raises(ValueError, match=r"at most 0.001 MB"):
        stage.release()
    assert read_json(facts)["mark"] == 1


def test_an_unknown_family_is_refused(params):
    with pytest.raises(ParamsError, match=r"'toy_bert' is no family: did you mean 'toy_vit'"):
        stage.train_family("toy_bert")


def test_shifted_images_move_whole_and_repeat_the_border():
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    moved = stage.shifted(image, torch.tensor([[1], [-1]]))
    assert moved[0, 0].tolist() == [[3, 3, 4], [6, 6, 7], [6, 6, 7]]
    assert torch.equal(stage.shifted(image, torch.zeros(2, 1, dtype=torch.int64)), image)


def test_the_pipeline_names_the_code_it_runs_and_writes_outside_of_released(monkeypatch):
    """Each family's stage reruns when its code changes; no stage at the top reads its output."""
    monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
    pipeline = REPOSITORY / "pretrain/multitask/study.yaml"
    found = yaml.safe_load(pipeline.read_text())["stages"]["train"]["do"]
    imports = grimp.build_graph("alloy", "tasks", cache_dir=None)
    files = {module.replace(".", "/") for module in code_of("tasks.models.pretrain", imports)}
    missing = {
        file
        for file in files
        if not any(f"{file}.py" == dep or f"{file}/".startswith(f"{dep}/") for dep in found["deps"])
    }
    assert not missing
    (output,) = [name for out in found["outs"] for name in out]
    top = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"].values()
    assert not [dep for part in top for dep in part["do"]["deps"] if output.startswith(dep)]
    assert not output.startswith("released")


def released_jobs() -> list[stage.Job]:
    text = (REPOSITORY / "params/pretrain_multitask.yaml").read_text()
    params = MultitaskPretrainParams.model_validate(yaml.safe_load(text))
    return [job for family in params.families for job in stage.jobs(params, family)]


def test_what_is_released_is_what_the_params_make():
    """The parents of the params are released, with the weights in their records, and no others."""
    folder = REPOSITORY / stage.RELEASED
    assert {job.name for job in released_jobs()} == {path.name for path in folder.iterdir()}
    stale = [job.name for job in released_jobs() if not stage.is_made(job, folder)]
    assert not stale, "params, packages or weights changed: train and release again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mnist_vit_a0", "mnist_resnet_c1", "drawings_vit_b0", "languages_bert_c2"]
)
def test_a_released_parent_is_as_accurate_as_its_card_says(name):
    """Loaded like any checkpoint, and well above chance in its own task."""
    (job,) = (job for job in released_jobs() if job.name == name)
    folder = REPOSITORY / stage.RELEASED / name
    model = stage.ARCHITECTURES[job.params.architecture][1].from_pretrained(folder).float().eval()
    split = stage.own_task(DATASETS[job.params.dataset].read()["validation"], job)
    inputs = stage.encode(split.examples, classification._tokenizer(split, folder))
    score = stage.score_of(model, inputs, split.labels, job)
    card = read_json(folder / stage.FACTS)["validation_accuracy"]
    assert score.value == pytest.approx(card["value"], abs=0.1)
    assert score.value > 85
