"""Stages in one of two processes that share them, in this folder; test_processes.py starts it."""

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from alloy.processes import ALONE, Processes
from tasks.experts import align, choose, collect, evaluate, finetune, merge, pretrain
from tasks.models import align as align_models
from tasks.models import choose as choose_models
from tasks.models import collect as collect_models
from tasks.models import evaluate as evaluate_models
from tasks.models import merge as merge_models
from tasks.models import prepare as prepare_models
from tasks.recipe.experts import ExpertsRecipe, FinetuneParams
from tasks.recipe.load import load, load_file
from tasks.recipe.pretraining import PretrainParams
from tasks.sources import fetch
from tasks.workers.together import agree, join
from tests import recipes
from tests.devices import stages
from tests.tasks.experts.test_pretrain import PRETRAIN

SCALED = {
    **stages.FINETUNE,
    "batch_sizes": {"vqa": 8, "retrieval_hard": 16, "pair_reasoning": 8},
    "training": {
        **stages.FINETUNE["training"],
        "optimizer": "adamw",
        "accumulation_steps": 2,
        "checkpoint_layers": True,
    },
}
del SCALED["training"]["matrix_learning_rate"]
HALF = {**SCALED, "training": {**SCALED["training"], "precision": "bfloat16"}}
SETTINGS = {"scaled": SCALED, "half": HALF}
MODEL = {**PRETRAIN["model"], "patch_size": 12}


def write() -> None:
    """The recipe `experts` with two arms, its checkpoints and data, and a pre-training."""
    stages.write_experts()
    arms = {name: stages.EXPERT_ARMS[name] for name in ("interpolation", "aligned")}
    recipes.write(Path(), experts={**stages.EXPERTS, "merge": {"result": "aligned", "arms": arms}})
    params = {**PRETRAIN, "recipe": "experts", "model": MODEL}
    Path("params/pretrain.yaml").write_text(yaml.safe_dump(params))


def quiet(*_: object) -> None:
    pass


def collect_and_merge(recipe: ExpertsRecipe, processes: Processes = ALONE) -> None:
    collect.main(recipe)
    if processes.is_first:
        for stage in (align, merge, choose):
            stage.main(recipe)
    processes.objects(None)


def train(recipe: ExpertsRecipe, processes: Processes = ALONE) -> None:
    """Fine-tune the merged model in other settings; then as the recipe says, and publish that."""
    for name, params in SETTINGS.items():
        settled = FinetuneParams.model_validate(params)
        for job in finetune.plan(recipe.model_copy(update={"finetune": settled})).values():
            job = job._replace(work=Path("trained") / name)
            finetune.finetune(job, quiet, processes)
    jobs = finetune.plan(recipe)
    for job in jobs.values():
        finetune.finetune(job, quiet, processes)
    if processes.is_first:
        finetune.publish(recipe.workspace, jobs)
    processes.objects(None)


def pretrain_two(processes: Processes = ALONE) -> None:
    params = load_file("pretrain", PretrainParams)
    pretrain.run_chain(["seed", "specific"], params, quiet, processes)


WORK = Path("trained/interrupted")


def interrupted(processes: Processes) -> None:
    """A training that dies between steps goes on to the bits of one that did not."""
    recipe = load("experts")
    job = finetune.plan(recipe)["merged"]._replace(
        source=Path("models/experts/checkpoints/seed"), teacher=None, work=WORK
    )

    def die(kind: str, *values: object) -> None:
        if kind == "curves" and values[-1] == 4:
            Path("trained/died").touch()
            sys.exit(3)

    finetune.finetune(job, die if not Path("trained/died").exists() else quiet, processes)


def differing(processes: Processes) -> None:
    facts: Mapping[str, str] = {"torch": "2.13" if processes.is_first else "2.12"}
    agree(processes, facts)


def run_models(processes: Processes = ALONE) -> None:
    """A recipe of models up to its report; what cannot be shared the first process does alone."""
    recipe = load("models")
    for stage in (fetch, prepare_models, collect_models, align_models, merge_models, choose_models):
        if stage is collect_models or processes.is_first:
            stage.main(recipe)
        processes.objects(None)
    evaluate_models.main(recipe)


def main(parts: list[str]) -> None:
    processes = join("test")
    if "models" in parts:
        run_models(processes)
        return
    recipe = load("experts")
    if "interrupted" in parts:
        interrupted(processes)
    if "differing" in parts:
        differing(processes)
    if "all" in parts:
        collect_and_merge(recipe, processes)
        train(recipe, processes)
        evaluate.main(recipe)
        pretrain_two(processes)


if __name__ == "__main__":
    from tasks.workers.together import speaking_in_turn

    try:
        with speaking_in_turn():
            main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"test: {error}")
