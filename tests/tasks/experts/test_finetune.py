"""Laws of fine-tuning: alike for all arms, resumable to the bit, refused before writing."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alloy.modality import ModalityConfig, ModalityModel
from tasks.experts.finetune import (
    Job,
    batches_of,
    finetune,
    fitted_model,
    identity,
    losses,
    main,
    plan,
)
from tasks.experts.shared.loading import load_model
from tasks.recipe.experts import ExpertsRecipe, FinetuneParams
from tasks.recipe.load import load, load_experts, parse
from tasks.recipe.section import ParamsError
from tasks.recipe.training import FinetunePlan
from tasks.registry import tracking
from tasks.storage import read_json
from tasks.training.stage import open_run
from tests.recipes import experts

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_joint_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "embedding_size": 8, "layer_scale": None, "image_size": 8}
SIZES |= {"patch_size": 4, "vocab_size": 20, "max_position_embeddings": 5, "num_answers": 6}
SIZES |= {"num_segment_classes": 4, "segment_cells": 2, "initializer_range": 0.2}

FINETUNE = {
    "arms": ["naive", "agnostic"],
    "joint": True,
    "batch_sizes": {
        "vqa": 4,
        "retrieval": 4,
        "retrieval_hard": 4,
        "pair_reasoning": 4,
        "segmentation": 2,
    },
    "seed": 3,
    "task_weight": 1.0,
    "distillation": {"weight": 0.0},
    "training": {
        "num_steps": 6,
        "learning_rate": 0.01,
        "matrix_learning_rate": 0.01,
        "head_learning_rate": 0.02,
        "final_share": 0.0,
        "warmup_steps": 1,
        "weight_decay": 0.01,
        "gradient_clip": 1.0,
        "log_every": 2,
        "save_every": 2,
    },
    "stopping": {"validate_every": 3, "validation_examples": 8, "patience": 5},
}
MERGE = {
    "result": "regmean",
    "arms": {
        "regmean": {"checkpoint": "specific", "method": "regmean"},
        "naive": {"checkpoint": "unseeded", "method": "interpolation"},
    },
}


def params(**changes) -> FinetuneParams:
    return FinetuneParams.model_validate({**FINETUNE, **changes})


def plan_of(finetune: FinetuneParams) -> dict[str, Job]:
    return plan(load_experts("toy").model_copy(update={"finetune": finetune}))


def write_split(folder: Path, split: str, num: int, generator: torch.Generator) -> None:
    """Random examples of every benchmark."""

    def draw(high: int, *shape: int, dtype=torch.int64) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=dtype)

    image, text = {"pixel_values": draw(256, num, 3, 8, 8, dtype=torch.uint8)}, draw(20, num, 5)
    words = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    pair = {"pixel_values": draw(256, num, 2, 3, 8, 8, dtype=torch.uint8)}
    benchmarks = {
        "vqa": {**image, **words, "labels": draw(6, num), "kinds": draw(3, num)},
        "retrieval": {**image, **words},
        "retrieval_hard": {**image, **words},
        "pair_reasoning": {**pair, **words, "labels": draw(2, num), "kinds": draw(3, num)},
        "segmentation": {**image, "labels": draw(4, num, 4, 4, dtype=torch.uint8)},
    }
    for name, tensors in benchmarks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / f"{split}.safetensors")


def write_model(folder: Path, seed: int, sharing: str = "all") -> None:
    torch.manual_seed(seed)
    config = ModalityConfig(sharing=sharing, **SIZES)
    ModalityModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def recipe(workspace, write_recipe):
    """The recipe `toy` with data, parents, a merged model and an arm; its name."""
    generator = torch.Generator().manual_seed(0)
    write_split(Path("data/toy"), "train", 24, generator)
    write_split(Path("data/toy"), "validation", 12, generator)
    models = Path("models/toy")
    write_model(models / "merged", 1)
    write_model(models / "arms/naive", 2)
    write_model(models / "checkpoints/agnostic", 3)
    write_model(models / "checkpoints/specific", 4, "none")
    write_model(models / "checkpoints/unseeded", 5, "none")
    return write_recipe(finetune=FINETUNE, merge=MERGE)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(left: Path, right: Path) -> bool:
    return (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


def quiet(*_: object) -> None:
    pass


def test_every_model_is_trained_and_published(recipe, mlflow_workspace, capsys):
    """merged becomes finetuned, arms finetuned_arms/<arm>; all load, their curves are in MLflow."""
    main(load(recipe))
    models = Path("models/toy")
    for source, target in (
        ("merged", "finetuned"),
        ("arms/naive", "finetuned_arms/naive"),
        ("checkpoints/agnostic", "finetuned_arms/agnostic"),
    ):
        assert load_model(models / target).config.sharing == "all"
        assert (models / target / "tokenizer.json").exists()
        assert not equal(models / source, models / target)
    assert sorted(p.name for p in (models / "finetuned_arms").iterdir()) == ["agnostic", "naive"]
    client = tracking.connect()
    experiment = client.get_experiment_by_name("toy")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["finetune agnostic", "finetune merged", "finetune naive"]
    curve = client.get_metric_history(runs["finetune merged"].info.run_id, "loss/vqa")
    assert sorted(point.step for point in curve) == [2, 4, 6]
    assert "validation/segmentation" in runs["finetune naive"].data.metrics
    assert "finetune: naive: step 6/6" in capsys.readouterr().out
    assert not list(Path(".alloy/finetune").iterdir())


def test_an_interrupted_training_ends_with_the_same_bits(recipe):
    """A job that dies between steps goes on from its step checkpoint to the same model."""
    (job,) = [j for name, j in plan_of(params()).items() if name == "merged"]
    finetune(job._replace(work=Path("straight")), quiet)

    def die_late(kind, *values):
        if kind == "curves" and values[-1] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(job._replace(work=Path("broken")), die_late)
    lines = []
    finetune(job._replace(work=Path("broken")), lambda *values: lines.append(values))
    assert ("say", "going on at step 4 from broken/steps") in lines
    assert equal(Path("straight/done"), Path("broken/done"))


def test_what_was_finished_before_an_interruption_is_not_trained_again(recipe):
    """A finished job is kept as long as its params, data and source are the same."""
    job = plan_of(params())["naive"]
    finetune(job, quiet)
    lines = []
    finetune(job, lambda *values: lines.append(values))
    assert lines == [("say", "was fine-tuned before the interruption")]
    write_model(job.source, 9)
    finetune(job, lambda *values: lines.append(values))
    assert len(lines) > 1


def test_an_interrupted_training_goes_on_in_its_mlflow_run(recipe, mlflow_workspace):
    """The same training finds its run again; one of another source opens a new one."""
    job = plan_of(params())["naive"]
    ids = []
    for _ in range(2):
        with open_run("naive", job, identity(job)) as log:
            ids.append(log.run_id)
    write_model(job.source, 9)
    with open_run("naive", job, identity(job)) as log:
        ids.append(log.run_id)
    assert ids[0] == ids[1] != ids[2]


def test_all_arms_see_the_same_batches(recipe):
    """The batches depend on the step and the seed, not on the model or on what was drawn before."""
    data = {"vqa": load_file("data/toy/vqa/train.safetensors")}
    model, same = load_model(Path("models/toy/merged")), load_model(Path("models/toy/merged"))

    def loss(model: ModalityModel, step: int, **changes: object) -> torch.Tensor:
        (of_step,) = losses(
            model, None, batches_of(data, params(**changes)), params(**changes), step
        )
        return of_step["vqa"]

    loss(model, 0)
    first = loss(model, 1)
    assert torch.equal(first, loss(same, 1))
    assert not torch.equal(first, loss(same, 2))
    assert not torch.equal(first, loss(same, 1, seed=4))


@pytest.mark.slow
def test_training_learns_the_benchmarks(recipe):
    """On data it can memorise every loss falls."""
    longer = {**FINETUNE["training"], "num_steps": 150, "log_every": 15}
    patient = {**FINETUNE["stopping"], "validate_every": 50}
    job = plan_of(params(training=longer, stopping=patient))["merged"]
    curves = {}

    def report(kind, *values):
        if kind == "curves":
            for name, value in values[0].items():
                curves.setdefault(name, []).append(value)

    finetune(job._replace(benchmarks=("vqa", "retrieval", "segmentation")), report)
    for name in ("vqa", "retrieval", "segmentation"):
        assert curves[f"loss/{name}"][-1] < 0.8 * curves[f"loss/{name}"][0]


def test_recomputing_layers_changes_no_bit(recipe):
    """checkpoint_layers saves memory alone."""
    recomputing = {**FINETUNE["training"], "checkpoint_layers": True}
    finetune(plan_of(params())["merged"]._replace(work=Path("kept")), quiet)
    job = plan_of(params(training=recomputing))["merged"]
    finetune(job._replace(work=Path("recomputed")), quiet)
    assert equal(Path("kept/done"), Path("recomputed/done"))


def test_distillation_needs_no_labels(recipe):
    """With task_weight 0 other labels give the same model, and it comes closer to its parent."""
    job = plan_of(params(task_weight=0.0, distillation={"weight": 1.0}))["merged"]
    job = job._replace(benchmarks=("vqa", "pair_reasoning"))
    finetune(job._replace(work=Path("one")), quiet)
    for name in job.benchmarks:
        file = Path(f"data/toy/{name}/train.safetensors")
        tensors = load_file(file)
        save_file({**tensors, "labels": tensors["labels"].flip(0)}, file)
    finetune(job._replace(work=Path("other")), quiet)
    stopped = [load_file(Path(f) / "done/model.safetensors") for f in ("one", "other")]
    assert all(torch.equal(stopped[0][name], stopped[1][name]) for name in stopped[0])

    data = {"vqa": load_file("data/toy/vqa/train.safetensors")}
    batches = batches_of(data, job.params)
    teacher = load_model(Path("models/toy/checkpoints/specific"))
    before, after = (
        next(losses(load_model(folder), teacher, batches, job.params, step=0))["vqa_distillation"]
        for folder in (job.source, Path("one/done"))
    )
    assert after < before


def test_each_arm_learns_from_its_own_parent(recipe):
    """A merge's teacher is its checkpoint; a checkpoint has none, nor has anything undistilled."""
    parents = {
        name: job.teacher for name, job in plan_of(params(distillation={"weight": 1})).items()
    }
    checkpoints = Path("models/toy/checkpoints")
    assert parents == {
        "merged": checkpoints / "specific",
        "naive": checkpoints / "unseeded",
        "agnostic": None,
    }
    assert not any(job.teacher for job in plan_of(params()).values())


def test_one_model_for_each_benchmark(recipe, mlflow_workspace, write_recipe):
    """joint: false trains each benchmark alone, into a folder of its own."""
    write_recipe(
        finetune={
            **FINETUNE,
            "joint": False,
            "arms": [],
            "batch_sizes": {"vqa": 4, "retrieval": 4},
        },
        merge=MERGE,
    )
    main(load(recipe))
    finetuned = Path("models/toy/finetuned")
    assert sorted(path.name for path in finetuned.iterdir()) == ["retrieval", "vqa"]
    head = weights(Path("models/toy/merged"))["answer_head.out.weight"]
    assert torch.equal(head, weights(finetuned / "retrieval")["answer_head.out.weight"])
    assert not torch.equal(head, weights(finetuned / "vqa")["answer_head.out.weight"])


def test_a_training_may_leave_out_other_updates_than_pre_training_did(recipe):
    """The last block's chance is the params', earlier ones' in proportion; no weight changes."""
    changed = {"training": {**FINETUNE["training"], "drop_path": 0.3}}
    job, plain = plan_of(params(**changed))["merged"], plan_of(params())["merged"]
    model, before = fitted_model(job.source, job), fitted_model(plain.source, plain)
    last = len(model.blocks) - 1
    chances = [block.drop_path.probability for block in model.blocks]
    assert chances == pytest.approx([0.3 * i / last for i in range(last + 1)])
    assert model.config.drop_path == 0.3
    assert before.config.drop_path == 0
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in before.state_dict().items())
    assert identity(job) != identity(plain)


def test_each_benchmark_learns_at_its_own_rates_for_its_own_steps():
    """A map gives each benchmark its numbers; one number dumps as it did, so runs stay known."""
    rates = {"learning_rate": {"vqa": 0.01, "retrieval": 0.002}, "head_learning_rate": 0.03}
    rates |= {"num_steps": {"vqa": 9, "retrieval": 4}, "warmup_steps": {"vqa": 2, "retrieval": 0}}
    section = {
        **FINETUNE,
        "joint": False,
        "arms": [],
        "batch_sizes": {"vqa": 4, "retrieval": 4},
        "training": {**FINETUNE["training"], **rates},
    }
    section["training"] |= {"drop_path": {"vqa": 0.15, "retrieval": 0.1}}
    toy = parse("toy", experts(finetune=section))
    assert isinstance(toy, ExpertsRecipe)
    jobs = plan(toy)
    chances = {name: job.params.training.drop_path for name, job in jobs.items()}
    assert chances == {"merged/vqa": 0.15, "merged/retrieval": 0.1}
    groups = ("other", "fresh heads")
    peaks = {
        name: [job.params.training.peak(group) for group in groups] for name, job in jobs.items()
    }
    assert peaks == {"merged/vqa": [0.01, 0.03], "merged/retrieval": [0.002, 0.03]}
    plans = {name: job.params.training for name, job in jobs.items()}
    steps = {name: (own.num_steps, own.warmup_steps) for name, own in plans.items()}
    assert steps == {"merged/vqa": (9, 2), "merged/retrieval": (4, 0)}
    assert plans["merged/vqa"].rate(0) == 0.5
    assert plans["merged/retrieval"].rate(0) == 1.0
    plain = FinetunePlan.model_validate(FINETUNE["training"])
    assert plain.model_dump() == params().of("vqa").training.model_dump()


def test_the_best_validated_weights_are_published(recipe):
    """What is written scores what its facts say, at the step they say."""
    job = plan_of(params())["merged"]
    scores = {}

    def report(kind, *values):
        if kind == "curves" and any(name.startswith("validation/") for name in values[0]):
            found = [v for name, v in values[0].items() if name.startswith("validation/")]
            scores[values[1]] = sum(found) / len(found)

    finetune(job, report)
    facts = read_json(job.work / "done/finetuning.json")
    assert facts["validation_score"] == max(scores.values()) == scores[facts["best_step"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["nave"]}, "params/toy.yaml: finetune.arms: 'nave': did you mean 'naive'?"),
        (
            {"batch_sizes": {"vqq": 4}},
            "params/toy.yaml: finetune.batch_sizes: 'vqq': did you mean 'vqa'?",
        ),
        (
            {"batch_sizes": {"statements": 4}},
            "params/toy.yaml: finetune.batch_sizes: 'statements': choose one of",
        ),
        (
            {"task_weight": 0.0},
            "params/toy.yaml: finetune: task_weight and distillation.weight are both 0",
        ),
        (
            {
                "joint": False,
                "batch_sizes": {"vqa": 4},
                "training": {**FINETUNE["training"], "learning_rate": {"vqq": 0.1}},
            },
            "params/toy.yaml: finetune: training.learning_rate: 'vqq': did you mean 'vqa'?",
        ),
        (
            {
                "joint": False,
                "batch_sizes": {"vqa": 4, "retrieval": 4},
                "training": {**FINETUNE["training"], "head_learning_rate": {"vqa": 0.1}},
            },
            "params/toy.yaml: finetune: training.head_learning_rate has no number for retrieval: "
            "give each benchmark of batch_sizes one",
        ),
        (
            {
                "joint": True,
                "batch_sizes": {"vqa": 4},
                "training": {**FINETUNE["training"], "learning_rate": {"vqa": 0.1}},
            },
            "params/toy.yaml: finetune: training.learning_rate is a number for each benchmark, "
            "and joint trains one model on all of them: write one number, or `joint: false`",
        ),
        (
            {
                "joint": False,
                "batch_sizes": {"vqa": 4, "retrieval": 4},
                "training": {**FINETUNE["training"], "num_steps": {"vqa": 9}},
            },
            "params/toy.yaml: finetune: training.num_steps has no number for retrieval: "
            "give each benchmark of batch_sizes one",
        ),
        (
            {"training": {**FINETUNE["training"], "accumulation_steps": 3}},
            "params/toy.yaml: finetune: batch_sizes.vqa 4 cannot be split into "
            "training.accumulation_steps 3 equal parts: make it a multiple of 3",
        ),
        (
            {
                "training": {**FINETUNE["training"], "accumulation_steps": 2},
                "batch_sizes": {"retrieval_hard": 4},
            },
            "params/toy.yaml: finetune: batch_sizes.retrieval_hard 4 cannot be split into "
            "training.accumulation_steps 2 equal parts of multiples of 4 examples: make it a "
            "multiple of 8",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes, message, recipe, write_recipe
):
    write_recipe(finetune={**FINETUNE, **changes}, merge=MERGE)
    before = sorted(Path("models").rglob("*"))
    with pytest.raises(ParamsError, match=re.escape(message)):
        main(load(recipe))
    assert sorted(Path("models").rglob("*")) == before
    assert not Path(".alloy/finetune").exists()
