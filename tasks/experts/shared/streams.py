"""Modality recipes: the experts in the gauge in which merging them costs least (`alloy.gauge`)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alloy.errors import CheckpointError
from alloy.gauge import Gauge
from alloy.modality import ModalityModel
from alloy.modality.objectives import mask_words
from alloy.modality.passes import HIDDEN, Answers
from alloy.modality.sensitivity import Sensitivities, affine_grams, sensitivities_of
from alloy.modality.stream_search import find_gauge, inner_alignment
from alloy.modality.streams import in_gauge
from tasks.evaluation.loading import load_tokenizer
from tasks.experts.shared.statistics import CALIBRATION, batches
from tasks.recipe.experts import ArmParams, ExpertsRecipe, GaugeParams


def calibration(recipe: ExpertsRecipe, arm: ArmParams) -> list[dict[str, Tensor]]:
    """The calibration data that collect reads, in its batches, as an arm sees them.

    A share of the texts get hidden words, which the masked-word head must not forget to cope with:
    behind the mask token of the checkpoint's tokenizer.
    """
    params, file = recipe.collect, recipe.workspace.data / CALIBRATION
    generator = torch.Generator().manual_seed(0)
    mask = mask_token(recipe.workspace.checkpoints / arm.checkpoint) if arm.masked_share else 0
    return [
        hide_words(batch, arm.masked_share, mask, generator, arm.mask_probability)
        for batch in batches(file, params.calibration_examples, params.batch_size)
    ]


def hide_words(
    batch: dict[str, Tensor],
    share: float,
    mask: int,
    generator: torch.Generator,
    probability: float,
) -> dict[str, Tensor]:
    """The batch with hidden words in a random share of its texts, and a mask that says where.

    Each word of those texts is hidden with this probability.
    """
    ids = batch["input_ids"]
    hidden, _ = mask_words(ids, batch["attention_mask"], mask, probability, generator)
    chosen = torch.randperm(len(ids), generator=generator)[: round(share * len(ids))]
    if share == 0:
        return batch
    made = ids.index_copy(0, chosen, hidden[chosen])
    return {**batch, "input_ids": made, HIDDEN: made == mask}


def mask_token(checkpoint: Path) -> int:
    """The id of the mask token of a checkpoint's tokenizer.

    Raises:
        CheckpointError: no tokenizer, or one without a mask token.
    """
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None or tokenizer.mask_token_id is None:
        lacks = "no tokenizer" if tokenizer is None else "a tokenizer without a mask token"
        raise CheckpointError(
            f"{checkpoint} has {lacks}: masked_share hides words behind it; write 0, or add it"
        )
    return tokenizer.mask_token_id


def answer_sensitivities(
    model: ModalityModel, data: list[dict[str, Tensor]], answers: Answers | None
) -> Sensitivities | None:
    """Measure how much the answers depend on the model's layers; None: all count alike."""
    return None if answers is None else sensitivities_of(model, data, answers)


def move(
    source: ModalityModel,
    params: GaugeParams,
    data: list[dict[str, Tensor]],
    answers: Answers | None,
) -> tuple[ModalityModel, dict[str, Any]]:
    """Move a model's experts to the best gauge, its function unchanged; report the search."""
    folded = in_gauge(source)
    transforms, gauge = find_gauge(
        folded,
        affine_grams(folded, data, answer_sensitivities(folded, data, answers)),
        turn_streams=params.streams,
        initial={"inner alignment": inner_alignment(folded, data)},
        steps=params.steps,
        max_rounds=params.max_rounds,
    )
    return in_gauge(folded, transforms), describe(gauge)


def describe(gauge: Gauge) -> dict[str, Any]:
    """The label-free diagnostics of a search (docs/gauge.md says how to read them)."""
    return {
        "error_before": gauge.error_before,
        "error_after": gauge.error_after,
        "start": gauge.start,
        "errors_of_starts": dict(gauge.errors),
        "streams": [use._asdict() for use in gauge.streams],
    }
