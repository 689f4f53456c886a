"""The arms of the study: parents as they are, and merged."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from alloy.modality import ModalityModel, agnostic_config, shared_weights, split_experts
from alloy.modality.sensitivity import affine_grams, without_constant
from alloy.modality.sequential import merge_sequentially
from benchmarks.study.params import Arm, study
from benchmarks.study.train import WORK, digest_of, parents_of
from tasks.data.scenes.words import TOKEN
from tasks.experts.merge import merge_experts
from tasks.experts.shared.loading import load_model
from tasks.experts.shared.statistics import CALIBRATION, batches
from tasks.experts.shared.streams import answer_sensitivities, hide_words, move
from tasks.storage import read_json, sha256, write_folder, write_json
from tasks.workspace import Workspace

FACTS = "study.json"


def arm_folder(seed: int, name: str) -> Path:
    """The folder of one arm's model: made unless it is there already."""
    folder = WORK / str(seed) / "arms" / name
    digest = identity(seed, study().arms[name])
    path = folder / FACTS
    if not path.is_file() or read_json(path)["identity"] != digest:
        model = merged(seed, study().arms[name])
        with write_folder(folder) as partial:
            model.cpu().save_pretrained(partial)
            write_json(partial / FACTS, {"identity": digest})
    return folder


def identity(seed: int, arm: Arm) -> str:
    """A digest of all that determines an arm's model, the code apart."""
    params, own = study(), arm.model_dump(exclude={"finetune"})
    parts: list[Any] = [seed, own, digest_of(seed, arm.parent)]
    if arm.method is not None:
        parts += [params.calibration.model_dump(), params.search.model_dump()]
        parts.append(sha256(Workspace(params.recipe).data / CALIBRATION))
    text = json.dumps([*parts, torch.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def merged(seed: int, arm: Arm) -> ModalityModel:
    """The model of one arm."""
    folder = parents_of(seed) / arm.parent
    source = load_model(folder).cpu()
    if arm.method is None:
        return source
    params = arm.params(study().calibration, study().search)
    if params.method == "sequential":
        data = calibration(params.masked_share)
        if params.gauge is not None:
            source, _ = move(source, params.gauge, data, params.answers)
        sensitivities = answer_sensitivities(source, data, params.answers)
        return merge_sequentially(source, data, sensitivities, **params.options)
    weights = source.state_dict()
    base = None if params.base is None else load_file(folder / "seed.safetensors")
    grams = None
    if params.method == "regmean":
        grams = without_constant(affine_grams(source, calibration(0.0)))
    experts = split_experts(weights, source.config)
    merged_experts = merge_experts(experts, params, base=base, grams=grams)
    model = ModalityModel(agnostic_config(source.config))
    model.load_state_dict({**shared_weights(weights, source.config), **merged_experts})
    return model.eval()


@cache
def calibration(masked_share: float) -> list[dict[str, Tensor]]:
    """The recipe's calibration data, some of the captions with hidden words."""
    params = study()
    file = Workspace(params.recipe).data / CALIBRATION
    chosen = params.calibration
    probability = params.pretrain(0).mask_probability
    generator = torch.Generator().manual_seed(0)
    return [
        hide_words(batch, masked_share, TOKEN["[MASK]"], generator, probability)
        for batch in batches(file, chosen.examples, chosen.batch_size, show=False)
    ]
