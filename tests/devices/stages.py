"""All stages of both families of recipes on tiny models, in this folder and in this process."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from alloy.modality import ModalityConfig, ModalityModel
from tasks.data.scenes import words
from tasks.experts import align, choose, collect, evaluate, finetune, merge
from tasks.models import align as align_models
from tasks.models import choose as choose_models
from tasks.models import collect as collect_models
from tasks.models import evaluate as evaluate_models
from tasks.models import merge as merge_models
from tasks.models import prepare as prepare_models
from tasks.recipe.load import load
from tasks.sources import fetch
from tasks.storage import write_json
from tests import recipes, tiny_models

CONFIG = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_joint_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "vocab_size": 12,
    "max_position_embeddings": 6,
    "embedding_size": 8,
    "num_answers": 4,
    "num_segment_classes": 4,
    "segment_cells": 2,
}
SEQUENTIAL = {"checkpoint": "specific", "method": "sequential", "masked_share": 0.5}
GAUGE = {"streams": True, "steps": 3, "max_rounds": 1}
EXPERT_ARMS = {
    "interpolation": {"checkpoint": "specific", "method": "interpolation"},
    "arithmetic": {"checkpoint": "specific", "method": "modality_arithmetic", "base": "seed"},
    "regmean": {"checkpoint": "specific", "method": "regmean"},
    "aligned": {"checkpoint": "specific", "method": "regmean", "align": True},
    "regmean_in_gauge": {
        "checkpoint": "specific",
        "method": "regmean",
        "gauge": {**GAUGE, "steps": 1},
    },
    "sequential": {**SEQUENTIAL, "answers": "heads"},
    "sequential_plain": SEQUENTIAL,
    "in_gauge": {**SEQUENTIAL, "answers": "states", "gauge": GAUGE},
}
FINETUNE = {
    **recipes.FINETUNE,
    "batch_sizes": {
        "vqa": 4,
        "retrieval": 4,
        "retrieval_hard": 4,
        "pair_reasoning": 4,
        "segmentation": 2,
    },
    "distillation": {"weight": 0.5},
}
EXPERTS = recipes.experts(
    fetch={"checkpoints": {name: f"given/{name}" for name in ("specific", "seed")}},
    collect={"checkpoints": ["specific"], "calibration_examples": 10, "batch_size": 4},
    merge={"result": "sequential", "arms": EXPERT_ARMS},
    finetune=FINETUNE,
    evaluate={
        "batch_size": 8,
        "checkpoints": {"specific": "the parent"},
        "ensembles": {"both": ["specific", "seed"]},
        "naive": "interpolation",
        "baseline": "specific",
        "tssd_keep": 0.2,
    },
)


def examples(num: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Random examples of every benchmark, and calibration data."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, high, (num, *shape), generator=generator, dtype=dtype)

    image = {"pixel_values": draw(256, 3, 8, 8, dtype=torch.uint8)}
    mask = (torch.arange(6) < 2 + draw(5, 1)).long()
    words = {"input_ids": 1 + draw(11, 6), "attention_mask": mask}
    pair = {"pixel_values": draw(256, 2, 3, 8, 8, dtype=torch.uint8)}
    both = {**image, **words}
    return {
        "calibration": both,
        "vqa": {**both, "labels": draw(4), "kinds": draw(3)},
        "retrieval": both,
        "retrieval_hard": both,
        "pair_reasoning": {**pair, **words, "labels": draw(2), "kinds": draw(3)},
        "segmentation": {**image, "labels": draw(4, 4, 4, dtype=torch.uint8)},
        "masked_words": {**both, "labels": draw(12), "masked_token": draw(2)},
        "statements": {**both, "labels": draw(2), "kinds": draw(2)},
    }


def write_experts(arms: Iterable[str] = EXPERT_ARMS) -> None:
    """A recipe `experts` with some arms, checkpoints and data, as prepare leaves it."""
    merge = {**EXPERTS["merge"], "arms": {name: EXPERT_ARMS[name] for name in arms}}
    recipes.write(Path(), experts={**EXPERTS, "merge": merge})
    for seed, (name, sharing) in enumerate({"specific": "none", "seed": "all"}.items()):
        torch.manual_seed(seed)
        model = ModalityModel(ModalityConfig(sharing=sharing, **CONFIG)).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        folder = Path("models/experts/checkpoints") / name
        model.save_pretrained(folder)
        words.tokenizer().save_pretrained(folder)  # hidden words are its mask token's id
        manifest = {"source": "up", "revision": "r", "digest": "d", "files": {}, "left_out": []}
        write_json(folder / "manifest.json", manifest)
    for seed, split in enumerate(("train", "validation", "test")):
        for name, tensors in examples(16, seed).items():
            folder = Path("data/experts") / name
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_own(tensors), folder / f"{split}.safetensors")
    save_file(_own(examples(16, 9)["calibration"]), Path("data/experts/calibration.safetensors"))
    write_json(Path("data/experts/manifest.json"), {"files": {}, "packages": {}})


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def run_experts(*, compared: bool = False) -> None:
    """Every stage behind prepare; fine-tuning without its processes and its tracking.

    `compared`: up to merge, and without the arms whose searches amplify rounding.
    """
    recipe = load("experts")
    if compared:
        arms = recipe.merge.arms
        for name in [name for name, arm in arms.items() if arm.gauge]:
            del arms[name]
    for stage in (collect, align, merge, choose):
        stage.main(recipe)
    if compared:
        return
    jobs = finetune.plan(recipe)
    for job in jobs.values():
        finetune.finetune(job, lambda *_: None)
    finetune.publish(recipe.workspace, jobs)
    evaluate.main(recipe)


LEAST_SQUARES = {"targets": "mean", "residual": True, "ridge": 0.01}
ALIGNMENTS = {
    "identity": {"preset": "identity"},
    "git_rebasin": {"preset": "git_rebasin"},
    "activation_matching": {"preset": "activation_matching"},
    "mudsc": {"preset": "mudsc", "settings": {"weight_share": 0.5}},
    "searched": {"preset": "dual", "settings": {"weight_share": "search"}, "score": "merge"},
    "zipit": {"preset": "zipit"},
    "ot_fusion": {"preset": "ot_fusion"},
    "orthogonal": {"preset": "orthogonal", "settings": {"fold": False}},
}
MODEL_ARMS = {
    name: {"alignment": name, "method": "linear", "repair": {"batch_norm": True}}
    for name in ALIGNMENTS
} | {
    "regmean": {"alignment": "mudsc", "method": "regmean"},
    "repaired": {
        "alignment": "mudsc",
        "method": "linear",
        "repair": {"repair": True, "temperature": True},
    },
    "least_squares": {
        "alignment": "searched",
        "method": "linear",
        "repair": {"permuted_least_squares": LEAST_SQUARES, "batch_norm": True},
    },
    "ours": {
        "alignment": "searched",
        "method": "linear",
        "repair": {
            "permuted_least_squares": {**LEAST_SQUARES, "targets": "confidence"},
            "batch_norm": True,
        },
    },
    "unaligned": {
        "alignment": "ot_fusion",
        "method": "linear",
        "repair": {"permuted_least_squares": LEAST_SQUARES},
    },
}
WITHOUT = {"OPTForCausalLM": ("repaired", "ours")}  # no output layer, no one answer an example


def write_models(name: str) -> None:
    """A recipe `models` of two checkpoints of an architecture, with what they are calibrated on."""
    for seed, member in enumerate("ab"):
        tiny_models.save(tiny_models.model(name, seed), Path("given") / member)
    if tiny_models.ARCHITECTURES[name][0] == "images":
        tiny_models.pictures(Path("photos"), 12)
        calibration: dict = {"images": "photos", "examples": 12}
    else:
        tiny_models.letters(Path("letters"), 12)
        calibration = {"texts": "letters", "examples": 12, "tokens": 8}
    recipe = tiny_models.recipe(calibration, {0: ["a", "b"]})
    recipe["collect"] = {"batch_size": 8, "joint": True, "grams": True}
    recipe["align"]["alignments"] = ALIGNMENTS
    recipe["merge"]["arms"] = {
        arm: found for arm, found in MODEL_ARMS.items() if arm not in WITHOUT.get(name, ())
    }
    Path("params").mkdir()
    Path("params/recipes.yaml").write_text("recipes: [models]\n")
    Path("params/models.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def run_models() -> None:
    """Every stage from fetch to evaluate."""
    recipe = load("models")
    stages = (fetch, prepare_models, collect_models, align_models, merge_models, choose_models)
    for stage in (*stages, evaluate_models):
        stage.main(recipe)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors that stages wrote below a folder, by file and name."""
    return {
        f"{file.relative_to(folder)}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
