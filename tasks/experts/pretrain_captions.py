"""Pre-train on images with captions, as arXiv:2304.14933 does; texts and images alone on request.

    python -m tasks.experts.pretrain_captions paper              # params/pretrain_paper.yaml
    python -m tasks.experts.pretrain_captions paper specific     # one arm, and what it goes on from

Each arm starts from the common start or goes on where another ended, weights and moments, on the
same batches. Data are prepared once, below `data/pretrain_<name>/`. An interrupted run goes on from
its last step checkpoint; with ALLOY_PROCESSES=N the arms are shared by N processes.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alloy.devices import beside, chosen_device
from alloy.errors import nearest
from alloy.modality import ModalityConfig, ModalityModel, copy_to_experts
from alloy.modality.masking import Masking, masking_of
from alloy.modality.pretraining import caption_losses, image_losses, text_losses
from alloy.processes import ALONE, Processes
from tasks.data.sets.description import TOKENIZER, look_of
from tasks.data.sets.loader import Loader
from tasks.data.sets.prepare import prepare_set
from tasks.data.sets.splits import StoredSplit, open_split
from tasks.data.sets.transforms import Augmentation
from tasks.experts.start import copy_processor, start_model, tokenizer_of
from tasks.recipe.load import load_file
from tasks.recipe.pretraining import CaptionArm, CaptionPretrainParams
from tasks.recipe.section import ParamsError
from tasks.registry import tracking
from tasks.reports import cards
from tasks.storage import read_json, sha256, write_folder, write_json
from tasks.training.loop import (
    Progress,
    State,
    check_precision,
    check_shares,
    load_state,
    parts_of,
    step_generator,
    step_numbers,
    train,
)
from tasks.workers import together
from tasks.workers.together import agree, join
from tasks.workspace import DATA, STATE

FACTS = "pretraining.json"
KINDS = ("captions", "texts", "images")
_APART = 7919
"""Between the seeds of the objectives' batches, and of the words that are hidden in them."""


def data_folder(name: str) -> Path:
    return DATA / f"pretrain_{name}"


def prepare(name: str, params: CaptionPretrainParams) -> Path:
    """Write the training rows of every set, unless they are there as these params want them.

    Raises:
        DataError: what is missing or wrong, with file and id.
    """
    folder, tokenizer = data_folder(name), Path(params.tokenizer)
    wanted = {
        "raw": params.raw,
        "tokenizer": str(tokenizer),
        **{k: {n: e.model_dump() for n, e in getattr(params, k).items()} for k in KINDS},
    }
    manifest = folder / "manifest.json"
    if manifest.is_file() and read_json(manifest)["params"] == wanted:
        return folder
    look = look_of(Path(params.start)) if params.start is not None else look_of(tokenizer)
    with write_folder(folder) as partial:
        for kind in KINDS:
            (partial / kind).mkdir()
            tokenizer_of(tokenizer).save_pretrained(partial / kind / TOKENIZER)
            for set_name, entry in getattr(params, kind).items():
                target = partial / kind / set_name
                target.mkdir()
                done = prepare_set(target, set_name, entry, params.raw, look, splits=("train",))
                print(f"prepare: {done.line()}", flush=True)
        files = sorted(path for path in partial.rglob("*.arrow"))
        digests = {path.relative_to(partial).as_posix(): sha256(path) for path in files}
        write_json(partial / "manifest.json", {"params": wanted, "files": digests})
    return folder


def rows_of(name: str, params: CaptionPretrainParams, kind: str) -> StoredSplit | None:
    """All training rows of one kind, set after set."""
    names = list(getattr(params, kind))
    if not names:
        return None
    splits = [open_split(data_folder(name) / kind / set_name, "train") for set_name in names]
    augmentation = None
    if params.augmentation is not None:
        augmentation = Augmentation(**params.augmentation.model_dump())
    about = splits[0].description
    if kind == "images":  # whatever the sets hold beside their images
        about = replace(about, kind="images")
    return replace(
        splits[0],
        description=about,
        more=tuple(split.path for split in splits[1:]),
        augmentation=augmentation,
    )


def loaders(
    name: str, params: CaptionPretrainParams, arm: CaptionArm, processes: Processes
) -> dict[str, Loader]:
    """A loader for each objective that has a weight: this process's share of every step."""
    made = {}
    for number, kind in enumerate(KINDS):
        if not getattr(arm, kind):
            continue
        data = rows_of(name, params, kind)
        assert data is not None
        made[kind] = Loader(
            data,
            partial(_places, params, len(data), params.seed + _APART * number, processes),
            num_steps=params.training.num_steps,
            seed=params.seed + number,
            num_workers=params.workers,
        )
    return made


def _places(
    params: CaptionPretrainParams, num_rows: int, seed: int, processes: Processes, step: int
) -> list[Tensor]:
    """The rows of each part of a step: drawn without replacement within one where there are
    enough."""
    generator = step_numbers(seed, step)
    if num_rows <= 100 * params.batch_size:
        turns = -(-params.batch_size // num_rows)
        drawn = torch.cat([torch.randperm(num_rows, generator=generator) for _ in range(turns)])
    else:
        drawn = torch.randint(num_rows, (2 * params.batch_size,), generator=generator).unique()
        drawn = drawn[torch.randperm(len(drawn), generator=generator)]
    places = {"places": drawn[: params.batch_size]}
    return [
        processes.share(part)["places"]
        for part in parts_of(places, params.training.accumulation_steps)
    ]


def losses(
    model: ModalityModel,
    batches: Mapping[str, Loader],
    masking: Masking,
    params: CaptionPretrainParams,
    arm: CaptionArm,
    step: int,
    processes: Processes = ALONE,
) -> Iterator[dict[str, Tensor]]:
    """The weighted losses of each part of a step."""
    step_generator(params.seed, step, processes)
    generator = step_numbers(params.seed + 1, step)
    taken = {kind: loader.at(step) for kind, loader in batches.items()}
    for number in range(params.training.accumulation_steps):
        by_name: dict[str, Tensor] = {}
        for kind, parts in taken.items():
            batch, weight = beside(model, parts[number]), getattr(arm, kind)
            if kind == "captions":
                own = caption_losses(model, batch, masking, generator, processes)
            elif kind == "texts":
                own = text_losses(model, batch, masking, generator, processes)
            else:
                own = image_losses(model, batch, params.masked_patches, generator, processes)
            by_name |= {name: weight * loss for name, loss in own.items()}
        yield by_name


def settings_of(params: CaptionPretrainParams) -> dict[str, Any]:
    """Settings of the model: the params', and what the data and the words say."""
    first = next(iter(params.captions.values()))
    tokenizer = tokenizer_of(Path(params.tokenizer))
    return {
        "image_size": first.image_size,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": max(
            entry.text_length for entry in (params.captions | params.texts).values()
        ),
        "num_answers": 0,
        "num_segment_classes": 0,
        "masked_patches": bool(params.images),
        **params.model,
    }


def initial_state(name: str, params: CaptionPretrainParams, arm: CaptionArm) -> State:
    """The start's weights, or those and the moments of the arm before, copied to experts."""
    if arm.after is None:
        start = None if params.start is None else Path(params.start)
        model = start_model(start, arm.sharing, settings_of(params), seed=params.seed)
        weights = dict(model.state_dict())
        if arm.random:  # the blocks alone lie apart: all else is the start's in every arm
            torch.manual_seed(params.seed)
            fresh = ModalityModel(model.config).state_dict()
            weights |= {name: t for name, t in fresh.items() if name.startswith("blocks.")}
        return State(weights, {})
    before = load_state(work_folder(name) / arm.after)
    config = model_config(params, arm)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in before.moments.items():
        moment, parameter = key.split("/", 1)
        moments.setdefault(moment, {})[parameter] = tensor
    copied = {
        f"{moment}/{parameter}": tensor
        for moment, tensors in moments.items()
        for parameter, tensor in copy_to_experts(tensors, config).items()
    }
    step = Progress(next_step=before.progress.next_step)
    return State(copy_to_experts(before.weights, config), copied, step)


def model_config(params: CaptionPretrainParams, arm: CaptionArm) -> ModalityConfig:
    start = None if params.start is None else Path(params.start)
    return start_model(start, arm.sharing, settings_of(params), seed=params.seed).config


def work_folder(name: str) -> Path:
    return STATE / f"pretrain_{name}"


def identity(name: str, params: CaptionPretrainParams, arm: str) -> str:
    """A digest of all that determines an arm's weights, the code apart."""
    chain: list[Any] = []
    at: str | None = arm
    while at is not None:
        chain.append(params.arms[at].model_dump())
        at = params.arms[at].after
    common = params.model_dump(exclude={"arms", "workers", "target"})
    data = read_json(data_folder(name) / "manifest.json")
    start = None if params.start is None else sha256(Path(params.start) / "model.safetensors")
    parts = [chain, common, data, start, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pretrain(
    name: str,
    params: CaptionPretrainParams,
    arm_name: str,
    report: Callable[..., None],
    processes: Processes = ALONE,
) -> tuple[ModalityModel, Progress]:
    """Train one arm; reports ("say", line) and ("curves", values, step)."""
    arm = params.arms[arm_name]
    model = ModalityModel(model_config(params, arm)).to(chosen_device())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(parameter_name, p) for p in arm.frozen))
    masking = masking_of(tokenizer_of(Path(params.tokenizer)), params.masked_words)
    batches = loaders(name, params, arm, processes)
    progress = train(
        model,
        lambda step: losses(model, batches, masking, params, arm, step, processes),
        params.training,
        folder=work_folder(name) / arm_name,
        identity=identity(name, params, arm_name),
        curves=lambda values, step: report("curves", dict(values), step),
        say=lambda line: report("say", line),
        start=initial_state(name, params, arm),
        stop_step=arm.stop_step,
        processes=processes,
    )
    return model, progress


def release(
    name: str,
    params: CaptionPretrainParams,
    arm: str,
    model: ModalityModel,
    progress: Progress,
) -> Path:
    """Write the checkpoint with its tokenizer, image processor, card and how it was made."""
    target = Path(params.target) / arm
    with write_folder(target) as partial_folder:
        model.cpu().save_pretrained(partial_folder)
        tokenizer_of(Path(params.tokenizer)).save_pretrained(partial_folder)
        copy_processor(None if params.start is None else Path(params.start), partial_folder)
        facts = {
            "arm": arm,
            "identity": identity(name, params, arm),
            "command": f"python -m tasks.experts.pretrain_captions {name} {arm}",
            "last_step": progress.next_step,
            "losses": progress.losses,
            "parameters": sum(p.numel() for p in model.parameters()),
            "params": params.model_dump(),
        }
        write_json(partial_folder / FACTS, facts)
        card = cards.Card(
            title=f"{name}/{arm}",
            description=f"A modality transformer (arXiv:2304.14933), sharing "
            f"{params.arms[arm].sharing}, {facts['parameters']:,} parameters, pre-trained on "
            f"{', '.join(params.captions)}.",
            architecture=cards.MODALITY,
            command=facts["command"],
            licences=dict.fromkeys(params.captions),
            settings={"steps": progress.next_step, "examples a step": params.batch_size},
        )
        (partial_folder / "README.md").write_text(cards.render(card))
    return target


def chain_of(params: CaptionPretrainParams, arms: Sequence[str]) -> list[str]:
    """The arms, and those that they go on from, in the params' order."""
    needed: set[str] = set()
    for arm in arms:
        if arm not in params.arms:
            raise ParamsError(f"{arm!r} is no arm: {nearest(arm, list(params.arms))}")
        at: str | None = arm
        while at is not None:
            needed.add(at)
            at = params.arms[at].after
    return [arm for arm in params.arms if arm in needed]


def run(name: str, arms: Sequence[str] = ()) -> None:
    """Pre-train and release arms, but for those that are there already."""
    params = load_file(f"pretrain_{name}", CaptionPretrainParams)
    chosen = chain_of(params, arms or list(params.arms))
    where = f"params/pretrain_{name}.yaml"
    processes = join("pretrain")
    check_precision(f"{where}: training", params.training)
    check_shares(f"{where}: batch_size", params.batch_size, params.training, processes.size)
    if processes.is_first:
        prepare(name, params)
    processes.objects(None)
    agree(processes, {"params": params.model_dump_json()})
    for arm in chosen:
        facts = Path(params.target) / arm / FACTS
        made = facts.exists() and read_json(facts)["identity"] == identity(name, params, arm)
        has_state = (work_folder(name) / arm).exists()
        is_needed = any(params.arms[a].after == arm for a in chosen)
        if processes.from_first(made and (has_state or not is_needed)):
            if processes.is_first:
                print(f"{arm}: {facts.parent} is what these params give: nothing to do")
            continue
        with ExitStack() as stack:
            log = None
            if processes.is_first:
                run_of_arm = tracking.run(f"pretrain_{name}", arm, {"stage": "pretrain"})
                log = stack.enter_context(run_of_arm)
            report = partial(_report, arm, log)
            model, progress = pretrain(name, params, arm, report, processes)
            if processes.is_first:
                folder = release(name, params, arm, model, progress)
                report("made", sha256(folder / "model.safetensors"))
                print(f"{arm}: wrote {folder}", flush=True)


def _report(arm: str, log: tracking.Log | None, kind: str, *values: Any) -> None:
    if log is None:
        return
    if kind == "say":
        print(f"{arm}: {values[0]}", flush=True)
    elif kind == "made":
        log.tags({tracking.MADE: values[0]})
    else:
        log.metrics(*values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tasks.experts.pretrain_captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="of params/pretrain_<name>.yaml")
    parser.add_argument("arms", nargs="*", metavar="ARM", help="by default all")
    given = parser.parse_args()
    try:
        if together.is_asked_for():
            sys.exit(together.launch("tasks.experts.pretrain_captions", [given.name, *given.arms]))
        with together.speaking_in_turn():
            run(given.name, given.arms)
    except (ValueError, OSError, tracking.TrackingError) as error:
        sys.exit(f"tasks.experts.pretrain_captions: {error}")
