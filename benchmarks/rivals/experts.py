"""The modality experts: v, l and vl of one parent without a common seed, and few scenes.

The loss is the squared error of the pre-trained heads' answers (embeddings of images and texts,
hidden words, statements), each relative to its variance. All start from the folded parent.

Learned matching moves v and vl in the symmetries that the gauge has: streams turn behind two
adapters. The stream of l cannot, because a norm writes into it, so where "dual" moves l as well, it
moves its heads, neurons and units within heads alone. The start is `inner_alignment`, the
counterpart of `mudsc` for experts of one trunk.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import functional_call

from alloy.modality import (
    ModalityConfig,
    ModalityModel,
    ModalityOutput,
    agnostic_config,
    shared_weights,
    split_experts,
)
from alloy.modality.experts import MODALITIES, join
from alloy.modality.passes import HIDDEN, Answers
from alloy.modality.stream_search import inner_alignment
from alloy.modality.streams import ANCHOR, in_gauge, stream_of, towers
from benchmarks.gauge import merges
from benchmarks.gauge.merges import Start
from benchmarks.gauge.params import study
from benchmarks.rivals.methods import Matching, Merge, Moves, Weights, augmented, timed
from tasks.data.scenes.words import TOKEN
from tasks.experts.shared.streams import hide_words

PARENT = "specific_unseeded"
AUGMENTED, BATCH = 512, 32  # scenes with their shifted copies
METRICS = {"retrieval": "R@1", "masked_words": "masked words", "statements": "statements"}

# What else reads or writes a stream; the text embeddings write that of l.
_WRITERS = {
    "image_embeddings.cls_token": -1,
    "image_embeddings.positions": -1,
    "image_embeddings.patches.weight": 0,
    "image_embeddings.patches.bias": 0,
}
_READERS = {
    "v": ("image_projection.weight", "segment_head.weight"),
    "vl": ("pooler.weight", "masked_word_head.transform.weight"),
}


class Experts:
    """The parent, the scenes, and what the parent answers to them."""

    def __init__(self, draw: int, num: int) -> None:
        self.model = in_gauge(merges.load_parent(PARENT))
        self.batches = scenes(draw, num)
        weights, config = self.model.state_dict(), self.model.config
        self.members = list(split_experts(weights, config).values())
        self.shared = shared_weights(weights, config)
        self.student = ModalityModel(agnostic_config(with_adapters(config))).eval()
        with torch.no_grad():
            self.wanted = [answers(self.model(**inputs(b)), b) for b in self.batches]
        pairs = zip(*self.wanted, strict=True)
        self.variances = [torch.cat(rows).var(0, correction=0).sum() for rows in pairs]

    def score(self, weights: Weights) -> dict[str, float]:
        """Retrieval, masked words and statements on validation data, in per cent."""
        return self._scores(self._merged(weights))

    def parents(self) -> dict[str, float]:
        """The scores of the parent, unmerged."""
        return self._scores(self.model)

    def merge(
        self, source: tuple[ModalityModel | Start, float], method: Callable[..., ModalityModel]
    ) -> Merge:
        """Merge what was made before, whose seconds count."""
        made, before = source
        merged, seconds = timed(lambda: method(made).state_dict())
        return merged, before + seconds

    @cached_property
    def folded(self) -> tuple[ModalityModel, float]:
        return self.model, 0.0

    @cached_property
    def aligned(self) -> tuple[ModalityModel, float]:
        return timed(lambda: in_gauge(self.model, inner_alignment(self.model, self.batches)))

    @cached_property
    def measured(self) -> tuple[Start, float]:
        return timed(lambda: self.start_from(self.model))

    @cached_property
    def in_gauge(self) -> tuple[Start, float]:
        start, before = self.measured
        (moved, _), seconds = timed(lambda: merges.search(start))
        return moved, before + seconds

    def start_from(self, model: ModalityModel, kind: Answers | None = "heads") -> Start:
        """Measure sensitivities and Grams; without a kind of answers all count alike."""
        return merges.start_from(model, self.batches, kind)

    def least_squares(self, model: ModalityModel) -> ModalityModel:
        """Sequential least squares for the answers."""
        return merges.sequential(self.start_from(model))

    def closed_form(self, model: ModalityModel) -> ModalityModel:
        """RegMean: all units and tokens alike."""
        return merges.closed_form(self.start_from(model, None))

    def loss(self, weights: Weights, generator: torch.Generator) -> Tensor:
        """Squared error to the parent's answers, each relative to its variance."""
        i = int(torch.randint(len(self.batches), (), generator=generator))
        batch = self.batches[i]
        output = functional_call(self.student, weights, (), inputs(batch))
        errors = [
            (found - wanted).square().sum(-1).mean() / variance
            for found, wanted, variance in zip(
                answers(output, batch), self.wanted[i], self.variances, strict=True
            )
        ]
        return torch.stack(errors).sum()

    def matching(self, *, both: bool) -> Matching:
        """v and vl, or all three, from where the inner alignment has brought them."""
        start = in_gauge(self.model, inner_alignment(self.model, self.batches))
        moves = moves_of(start, both=both)
        return Matching(list(moves.values()), lambda: placed(start, moves))

    def refitted(self, merged: Weights, members: list[Weights], shared: Weights) -> Weights:
        """Sequential least squares for the answers."""
        del merged
        return self.least_squares(parted(self.model.config, members, shared)).state_dict()

    def _merged(self, weights: Weights) -> ModalityModel:
        config = agnostic_config(self.model.config)
        config.joint_adapters = "image_adapter.weight" in weights
        model = ModalityModel(config).eval()
        model.load_state_dict(weights)
        return model

    def _scores(self, model: ModalityModel) -> dict[str, float]:
        scores = merges.scores(model)
        return {shown: scores[name] for name, shown in METRICS.items()}


def scenes(draw: int, num: int) -> list[Weights]:
    """Draw scenes; half of all captions, their copies' as well, get hidden words."""
    settings = study().calibration
    plain = settings.model_copy(update={"examples": num, "masked_share": 0.0})
    drawn = merges.calibration(draw, plain)
    generator = torch.Generator().manual_seed(draw)
    examples = {name: torch.cat([batch[name] for batch in drawn]) for name in drawn[0]}
    examples = augmented(examples, AUGMENTED, generator)
    return [
        hide_words(
            {name: tensor[i:j] for name, tensor in examples.items()},
            settings.masked_share,
            TOKEN["[MASK]"],
            generator,
            study().pretraining.mask_probability,
        )
        for i, j in pairwise(range(0, AUGMENTED + 1, BATCH))
    ]


def inputs(batch: Weights) -> Weights:
    """What the model reads of a batch."""
    return {name: tensor for name, tensor in batch.items() if name != HIDDEN}


def answers(output: ModalityOutput, batch: Weights) -> tuple[Tensor, ...]:
    """Answers of the pre-trained heads [N, R]; of words those alone that are hidden."""
    images_BE, texts_BE = output.image_embeddings, output.text_embeddings
    words_BTV, statements_B2 = output.masked_word_logits, output.statement_logits
    assert images_BE is not None
    assert texts_BE is not None
    assert words_BTV is not None
    assert statements_B2 is not None
    logits = (words_BTV[batch[HIDDEN]], statements_B2)
    return images_BE, texts_BE, *(rows - rows.mean(-1, keepdim=True) for rows in logits)


def with_adapters(config: ModalityConfig) -> ModalityConfig:
    """The same model with two adapters in front of the joint blocks."""
    result = copy.deepcopy(config)
    result.joint_adapters = True
    return result


def parted(config: ModalityConfig, members: list[Weights], shared: Weights) -> ModalityModel:
    """The model with these experts, and with adapters."""
    config = with_adapters(config)
    model = ModalityModel(config).eval()
    model.load_state_dict(join(dict(zip(MODALITIES, members, strict=True)), shared, config))
    return model


def moves_of(model: ModalityModel, *, both: bool) -> dict[str, Moves]:
    """What may move of a folded model by modality; of l, if it does, all but its stream."""
    moves = {}
    for modality, tower in towers(model).items():
        if modality != ANCHOR:
            moves[modality] = Moves(tower.spec)
        elif both:
            moves[modality] = Moves(tower.spec, held=[stream_of(tower.spec)])
    return moves


def placed(model: ModalityModel, moves: Mapping[str, Moves]) -> tuple[list[Weights], Weights]:
    """The experts and what they share where the moves bring them: the function stays."""
    weights, config = model.state_dict(), model.config
    experts = split_experts(weights, config)
    members = [moves[m].of(own) if m in moves else own for m, own in experts.items()]
    shared = shared_weights(weights, config)
    turns = {m: moves[m].matrix(stream_of(moves[m].spec)) for m in ("v", "vl")}
    for name, dim in _WRITERS.items():
        shared[name] = torch.tensordot(turns["v"], shared[name].movedim(dim, 0), 1).movedim(0, dim)
    texts, *images = shared["type_embeddings.weight"]
    shared["type_embeddings.weight"] = torch.stack([texts, *(turns["v"] @ row for row in images)])
    for modality, names in _READERS.items():
        for name in names:
            shared[name] = shared[name] @ turns[modality].T
    shared["image_adapter.weight"] = turns["vl"] @ turns["v"].T
    shared["text_adapter.weight"] = turns["vl"]
    return members, shared


MERGES: Mapping[str, Callable[[Experts], Merge]] = {
    "average": lambda p: p.merge(p.folded, merges.average_of_experts),
    "aligned": lambda p: p.merge(p.aligned, merges.average_of_experts),
    "aligned + least squares": lambda p: p.merge(p.aligned, p.least_squares),
    "closed form": lambda p: p.merge(p.folded, p.closed_form),
    "least squares": lambda p: p.merge(p.measured, merges.sequential),
    "gauge + closed form": lambda p: p.merge(p.in_gauge, merges.closed_form),
    "gauge + least squares": lambda p: p.merge(p.in_gauge, merges.sequential),
}
"""Our merges."""
