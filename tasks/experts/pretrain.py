"""Pre-train the four checkpoints that the modality recipe starts from; they are released with it.

    python -m tasks.experts.pretrain                        # all; or the names of some
    python -m tasks.experts.pretrain seed specific

The *seed* is a modality-agnostic model after the first part of the schedule. From it two runs go on
with the same data, rates and optimizer moments to the schedule's end: *agnostic* as it is (so it is
one uninterrupted run, the baseline), and *specific*, whose experts start as copies of the seed's
blocks. *specific_unseeded* runs the whole schedule with experts that were initialised apart. All
runs take equally many steps on the same batches and decay the same parameters. They run side by
side, one thread each, or queue for the GPUs; with ALLOY_PROCESSES=N one after the other, each
shared by N processes. An interrupted run goes on from its last step checkpoint.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alloy.devices import beside, chosen_device, device_pool
from alloy.errors import nearest
from alloy.modality import (
    FRESH_HEADS,
    ModalityConfig,
    ModalityModel,
    agnostic_config,
    copy_to_experts,
)
from alloy.modality.configuration import Sharing
from alloy.modality.objectives import pretraining_losses
from alloy.processes import ALONE, Processes
from tasks.data.scenes.bank import load_bank
from tasks.data.scenes.description import SceneCorpus
from tasks.data.sets.description import Description
from tasks.recipe.load import load_experts, load_file
from tasks.recipe.pretraining import PretrainParams, TransformerParams
from tasks.recipe.section import ParamsError
from tasks.registry import tracking
from tasks.reports import cards, markdown
from tasks.storage import read_json, sha256, write_folder, write_json
from tasks.training.loop import (
    PROGRESS,
    Progress,
    State,
    check_precision,
    check_shares,
    load_state,
    parts_of,
    step_generator,
    train,
)
from tasks.workers import Report, side_by_side, together
from tasks.workers.memory import LESS, within_memory
from tasks.workers.together import agree, join

RELEASED = Path("released/modality")
WORK = Path(".alloy/pretrain")  # step checkpoints
FACTS = "pretraining.json"
SHARING: Mapping[str, Sharing] = {
    "seed": "all",
    "agnostic": "all",
    "specific": "none",
    "specific_unseeded": "none",
}
FROM_SEED = ("agnostic", "specific")
CHAINS = (("seed", *FROM_SEED), ("specific_unseeded",))  # each one after the other


def model_config(
    params: TransformerParams,
    about: Description,
    tokenizer: PreTrainedTokenizerBase,
    sharing: Sharing,
) -> ModalityConfig:
    """The model for these data: their sizes, words, answers and classes."""
    return ModalityConfig(
        sharing=sharing,
        **params.model_dump(),
        image_size=about.image_size,
        vocab_size=len(tokenizer),
        max_position_embeddings=about.text_length,
        pad_token_id=tokenizer.pad_token_id,
        num_answers=len(about.answers),
        num_segment_classes=len(about.classes),
        segment_cells=about.segment_cells,
        attn_implementation="eager",  # faster than sdpa on a CPU for sequences this short
    )


def config_for(params: TransformerParams, corpus: SceneCorpus, sharing: Sharing) -> ModalityConfig:
    """The model for a corpus."""
    about = corpus.description(params.patch_size)
    return model_config(params, about, corpus.tokenizer(), sharing)


def initial_state(arm: str, config: ModalityConfig, seed: int, seed_folder: Path) -> State:
    """The start of a run: fresh weights, or the seed's weights and moments, copied to experts."""
    if arm not in FROM_SEED:
        return State(fresh_weights(config, seed), {})
    return with_experts(load_state(seed_folder), config)


def with_experts(state: State, config: ModalityConfig) -> State:
    """An agnostic run's weights and moments, copied to every expert; the run goes on from there."""
    return State(
        copy_to_experts(state.weights, config),
        {
            f"{moment}/{name}": tensor
            for moment, tensors in _by_moment(state.moments).items()
            for name, tensor in copy_to_experts(tensors, config).items()
        },
        Progress(next_step=state.progress.next_step),
    )


def fresh_weights(config: ModalityConfig, seed: int) -> dict[str, Tensor]:
    """Random weights; the heads that only fine-tuning trains are the same in every run."""
    torch.manual_seed(seed)
    weights = dict(ModalityModel(config).state_dict())
    torch.manual_seed(seed)
    agnostic = ModalityModel(agnostic_config(config)).state_dict()
    return weights | {n: t for n, t in agnostic.items() if n.startswith(FRESH_HEADS)}


def _by_moment(moments: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in moments.items():
        moment, parameter = name.split("/", 1)
        grouped.setdefault(moment, {})[parameter] = tensor
    return grouped


def identity(arm: str, params: PretrainParams, corpus: SceneCorpus) -> str:
    """A digest of all that determines an arm's weights, the code apart."""
    parts = [arm, params.model_dump(), corpus.sha256, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pretrain(
    arm: str,
    params: PretrainParams,
    corpus: SceneCorpus,
    work: Path,
    report: Report,
    processes: Processes = ALONE,
) -> tuple[ModalityModel, Progress]:
    """Train one arm, reporting (arm, "say", line) and (arm, "curves", values, step).

    Its step checkpoints, and the seed's, are in `work`. Processes that share the training all call
    this, and end with the same model.
    """
    config = config_for(params.model, corpus, SHARING[arm])
    model = ModalityModel(config).to(chosen_device())
    progress = fit(
        model,
        params,
        corpus,
        folder=work / arm,
        identity=identity(arm, params, corpus),
        report=partial(report, arm),
        start=initial_state(arm, config, params.seed, work / "seed"),
        stop_step=params.seed_steps if arm == "seed" else None,
        processes=processes,
    )
    return model, progress


def fit(
    model: ModalityModel,
    params: PretrainParams,
    corpus: SceneCorpus,
    *,
    folder: Path,
    identity: str,
    report: Callable[..., None],
    start: State,
    stop_step: int | None = None,
    processes: Processes = ALONE,
) -> Progress:
    """Train a model from a start on a corpus, reporting ("say", line) and ("curves", values, step).

    Its step checkpoints are in `folder`.
    """
    mask_token_id = corpus.tokenizer().mask_token_id

    def losses_at(step: int) -> Iterator[dict[str, Tensor]]:
        of_step = step_generator(params.seed, step, processes)
        batch = corpus.batch(params.batch_size, step)
        for part in parts_of(batch, params.training.accumulation_steps):
            yield pretraining_losses(
                model,
                beside(model, part),
                mask_token_id=mask_token_id,
                mask_probability=params.mask_probability,
                generator=of_step,
                processes=processes,
            )

    return train(
        model,
        losses_at,
        params.training,
        folder=folder,
        identity=identity,
        curves=lambda values, step: report("curves", dict(values), step),
        say=lambda line: report("say", line),
        start=start,
        stop_step=stop_step,
        processes=processes,
    )


def release(
    arm: str,
    model: ModalityModel,
    progress: Progress,
    params: PretrainParams,
    corpus: SceneCorpus,
    target: Path,
) -> None:
    """Write the checkpoint, its tokenizer, how it was made, and its card."""
    with write_folder(target) as partial:
        model.cpu().save_pretrained(partial)
        corpus.tokenizer().save_pretrained(partial)
        facts = {
            "arm": arm,
            "identity": identity(arm, params, corpus),
            "command": f"python -m tasks.experts.pretrain {arm}",
            "first_step": params.seed_steps if arm in FROM_SEED else 0,
            "last_step": progress.next_step,
            "losses": progress.losses,
            "parameters": sum(p.numel() for p in model.parameters()),
            "model_sha256": sha256(partial / "model.safetensors"),
            "params": params.model_dump(),
            **corpus.facts,
        }
        facts["versions"] = {**facts["versions"], "torch": torch.__version__}
        write_json(partial / FACTS, facts)
        (partial / "README.md").write_text(card(facts, model.config, corpus))


DESCRIPTIONS = {
    "seed": "The common seed: modality-agnostic, the first part of the schedule.",
    "agnostic": "The baseline: the seed's run, continued modality-agnostic to the schedule's end.",
    "specific": "Vision, language and joint experts, copied from the seed and trained apart.",
    "specific_unseeded": "Vision, language and joint experts, initialised apart: no common seed.",
}


def card(facts: Mapping, config: ModalityConfig, corpus: SceneCorpus) -> str:
    """README.md of a released checkpoint: what it is, how it was made, what it was made from."""
    training, batch_size = facts["params"]["training"], facts["params"]["batch_size"]
    size = config.image_size
    losses = [[name, f"{value:.4f}"] for name, value in facts["losses"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return cards.render(
        cards.Card(
            title=f"modality/{facts['arm']}",
            description=f"{DESCRIPTIONS[facts['arm']]}\n"
            "A modality transformer (arXiv:2304.14933 in miniature) with "
            f"{facts['parameters']:,} parameters for scenes of {size}x{size} pixels and texts of "
            f"at most {config.max_position_embeddings} words. Not a model for the real world.",
            architecture=cards.MODALITY,
            command=facts["command"],
            settings={
                "params": "params/pretrain.yaml (a copy is in pretraining.json)",
                "steps": f"{facts['first_step']} to {facts['last_step']} of a schedule of "
                f"{training['num_steps']}, {batch_size} scenes a step",
                "objectives": "image-text contrast, masked words and statements",
                "data": corpus.summary,
                "SHA-256 of model.safetensors": facts["model_sha256"],
                "SHA-256 of the cells": facts["cells_sha256"],
                "versions": versions,
            },
            notes=markdown.table(["loss in the last batch", ""], losses) + "\n\n" + corpus.licences,
            folder=f"{RELEASED}/{facts['arm']}",
            tags=("model-merging", "multimodal"),
            licences=cards.own_licence(),
        )
    )


def load_corpus(params: PretrainParams) -> SceneCorpus:
    """The corpus of the recipe that the params name."""
    return SceneCorpus(load_bank(load_experts(params.recipe).prepare.composed), params.seed)


def run_chain(
    arms: Sequence[str], params: PretrainParams, report: Report, processes: Processes = ALONE
) -> None:
    """Pre-train and release the arms one after the other, but for those that are there already."""
    corpus = load_corpus(params)
    agree(processes, {"params": params.model_dump_json(), "cells": corpus.sha256})
    stale = [arm for arm in arms if not _is_made(RELEASED / arm / FACTS, arm, params, corpus)]
    if set(stale) & set(FROM_SEED) and "seed" not in stale and not _has_state(params, corpus):
        stale = ["seed", *stale]
    stale = processes.from_first(stale)
    report = report if processes.is_first else _say_nothing
    for arm in arms:
        if arm not in stale:
            report(arm, "say", f"{RELEASED / arm} is what these params give: nothing to do")
    for arm in stale:
        model, progress = pretrain(arm, params, corpus, WORK, report, processes)
        if not processes.is_first:
            continue
        release(arm, model, progress, params, corpus, RELEASED / arm)
        report(arm, "made", sha256(RELEASED / arm / "model.safetensors"))
        size = sum(path.stat().st_size for path in (RELEASED / arm).iterdir())
        report(arm, "say", f"wrote {RELEASED / arm}, {size / 1e6:.1f} MB")


def _say_nothing(*_: object) -> None:
    pass


def _is_made(facts: Path, arm: str, params: PretrainParams, corpus: SceneCorpus) -> bool:
    return facts.exists() and read_json(facts)["identity"] == identity(arm, params, corpus)


def _has_state(params: PretrainParams, corpus: SceneCorpus) -> bool:
    """True if the seed's optimizer moments, which are not released, are still here."""
    facts = WORK / "seed" / PROGRESS
    made = _is_made(facts, "seed", params, corpus)
    return made and read_json(facts)["next_step"] == params.seed_steps


def main(arms: Sequence[str]) -> None:
    for arm in arms:
        if arm not in SHARING:
            raise ParamsError(f"{arm!r} is no checkpoint: {nearest(arm, list(SHARING))}")
    params = load_file("pretrain", PretrainParams)
    processes = join("pretrain")
    check_precision("params/pretrain.yaml: training", params.training)
    where = "params/pretrain.yaml: batch_size"
    check_shares(where, params.batch_size, params.training, processes.size)
    if processes.is_first:
        load_corpus(params)  # built once, for all
    processes.objects(None)
    chains = [[arm for arm in chain if arm in arms] for chain in CHAINS]
    with ExitStack() as stack:
        logs: dict[str, tracking.Log] = {}

        def receive(_: str, arm: str, kind: str, *values) -> None:
            if kind == "say":
                print(f"{arm}: {values[0]}", flush=True)
                return
            if arm not in logs:
                run = tracking.run("pretraining", arm, {"stage": "pretrain"}, system_metrics=True)
                logs[arm] = stack.enter_context(run)
            if kind == "made":
                logs[arm].tags({tracking.MADE: values[0]})
                return
            logs[arm].metrics(*values)

        jobs = {" ".join(chain): (chain, params) for chain in chains if chain}
        stack.enter_context(
            within_memory("pretrain", {"params/pretrain.yaml: batch_size": params.batch_size}, LESS)
        )
        if processes.size > 1:
            for name, job in jobs.items():
                run_chain(*job, partial(receive, name), processes)
        else:
            side_by_side(run_chain, jobs, receive, devices=device_pool())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.experts.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(SHARING)}")
    return parser


if __name__ == "__main__":
    given = _parser().parse_args().arms
    try:
        if together.is_asked_for():
            sys.exit(together.launch("tasks.experts.pretrain", given))
        with together.speaking_in_turn():
            main(given or list(SHARING))
    except (ValueError, OSError, tracking.TrackingError) as error:
        sys.exit(f"tasks.experts.pretrain: {error}")
