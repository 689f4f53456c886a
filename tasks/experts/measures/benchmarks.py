"""Benchmarks of the experts of a modality transformer: inputs, loss, metric with standard error.

`prepare` writes each benchmark's splits; fine-tuning and evaluation use them through `BENCHMARKS`:

    benchmark = BENCHMARKS["vqa"]
    train = load_split("modality", "vqa", "train")              # tensors by name, N examples each
    batch = benchmark.sample(train, 32, generator)              # for one training step
    loss = benchmark.loss(benchmark.logits(model, batch), batch)
    scores = benchmark.score(benchmark.outputs(model, test), test)
    scores[benchmark.metric]                      # Score(value=61.3, error=1.1), per cent

`logits` is differentiable and what distillation compares: [n, classes], for segmentation [n, C, L,
L], for retrieval the scaled similarities of every image to every text of the batch [n, n].
`outputs` is the same for a whole split, in batches, without gradients, with all similarities, not
scaled; `outputs_of` several models are their ensemble's, which averages probabilities, and for
retrieval similarities. Only the benchmarks of `FINETUNED` have a training split; those of
`TRAINING_FREE` need no head beyond the pre-trained ones.

Shapes: N examples, n of a batch, T tokens, C classes, L labels a side, B resamples.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.devices import beside
from alloy.modality.modeling import ModalityModel
from alloy.modality.objectives import contrastive_loss
from alloy.processes import ALONE, Processes
from tasks.evaluation.score import Score, mean_score
from tasks.experts.measures.benchmark import (
    Benchmark,
    Examples,
    Split,
    batches,
    joint_states,
    num_examples,
    text_of,
)
from tasks.experts.measures.sets import SETS

NUM_RESAMPLES = 200
NUM_RETRIEVED = 3


@dataclass(frozen=True)
class VisualQuestions(Benchmark):
    """Open questions about an image: "what is left-of cat", "where is cat"."""

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        return model.answer_logits(joint_states(model, batch))


@dataclass(frozen=True)
class Statements(Benchmark):
    """A short text that is true of an image or not; the pre-trained statement head answers."""

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        return model.statement_logits(joint_states(model, batch))


@dataclass(frozen=True)
class MaskedWords(Benchmark):
    """A caption with one concept masked; `labels` is its token."""

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        states = joint_states(model, batch)
        hidden = states[torch.arange(len(states), device=states.device), batch["masked_token"]]
        return model.masked_word_logits(hidden)


@dataclass(frozen=True)
class PairReasoning(Benchmark):
    """A statement about two images, "there is cat in both": is it true? Pixels [N, 2, 3, S, S]."""

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        text = text_of(batch)
        left, right = (
            model.encode_joint(images, *text) for images in batch["pixel_values"].unbind(1)
        )
        return model.pair_logits(left, right)


@dataclass(frozen=True)
class Retrieval(Benchmark):
    """Find an image's caption among all captions, and a caption's image among all images.

    The metric is recall at 1, the mean of both directions. `draw` keeps a `group` together.
    """

    def draw(self, data: Examples, num: int, generator: torch.Generator) -> Tensor:
        num_groups = num_examples(data) // self.group
        chosen = torch.randperm(num_groups, generator=generator)[: max(1, num // self.group)]
        return (chosen[:, None] * self.group + torch.arange(self.group)).flatten()

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        image, text = _embeddings(model, batch)
        return model.logit_scale.exp() * image @ text.T

    def loss(self, logits: Tensor, batch: Split) -> Tensor:
        """Symmetric cross-entropy within the batch."""
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def training_loss(
        self, model: ModalityModel, batch: Split, processes: Processes = ALONE
    ) -> Tensor:
        """Symmetric cross-entropy within the batch of all processes."""
        if processes.size == 1:
            return super().training_loss(model, batch)
        return contrastive_loss(*_embeddings(model, batch), model.logit_scale, processes)

    @torch.no_grad()
    def outputs(
        self,
        model: ModalityModel,
        data: Examples,
        batch_size: int = 250,
        processes: Processes = ALONE,
    ) -> Tensor:
        def embed(batch: Split) -> list[Tensor]:
            return [e.float().cpu() for e in _embeddings(model, beside(model, batch))]

        parts = processes.in_turns(embed, batches(data, batch_size))
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        return image @ text.T

    def averaged(self, outputs: Sequence[Tensor]) -> Tensor:
        """An ensemble's outputs: the models' mean similarities."""
        return torch.stack(list(outputs)).mean(dim=0)

    def guess(self, data: Examples) -> float:
        return 100 / num_examples(data)

    def values(self, outputs: Tensor, data: Examples) -> Tensor:
        text, image = _recalls(outputs, 1)
        return (text + image) / 2

    def score(self, outputs: Tensor, data: Examples) -> dict[str, Score]:
        """Recalls; an image's right caption must beat all others strictly, so ties do not count."""
        scores = {}
        for k in (1, 5):
            text, image = _recalls(outputs, k)
            scores[f"recall_at_{k}"] = mean_score((text + image) / 2)
            scores[f"text_recall_at_{k}"] = mean_score(text)
            scores[f"image_recall_at_{k}"] = mean_score(image)
        return scores

    def first_answers(self, outputs: Tensor, num: int) -> Tensor:
        """The best images for each of the first captions, [num, NUM_RETRIEVED]."""
        return outputs[:, :num].topk(NUM_RETRIEVED, dim=0).indices.T


@dataclass(frozen=True)
class Segmentation(Benchmark):
    """A label a square of the image, `labels` [N, L, L]; the metric is the classes' mean IoU."""

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        return model.segment_logits(model.image_states(batch["pixel_values"]))

    def guess(self, data: Examples) -> float:
        labels = data["labels"].long()
        background = F.one_hot(torch.zeros_like(labels), int(labels.max()) + 1).movedim(-1, 1)
        return self.score(background, data)[self.metric].value

    def values(self, outputs: Tensor, data: Examples) -> Tensor:
        """The share of each image's squares that are right; a mean IoU has no value by image."""
        return (outputs.argmax(dim=1) == data["labels"]).double().mean((1, 2))

    def score(self, outputs: Tensor, data: Examples) -> dict[str, Score]:
        labels, num_classes = data["labels"].long(), outputs.shape[1]
        predicted = outputs.argmax(dim=1)
        wanted, given = (F.one_hot(x.flatten(1), num_classes).double() for x in (labels, predicted))
        overlap = (wanted * given).sum(1)  # squares by image and class, [N, C]
        union = wanted.sum(1) + given.sum(1) - overlap
        return {
            "mean_iou": Score(
                100 * _mean_iou(overlap.sum(0), union.sum(0)).item(),
                100 * _bootstrap_error(overlap, union),
            ),
            "accuracy": mean_score((predicted == labels).double().mean((1, 2))),
        }


def _embeddings(model: ModalityModel, batch: Split) -> tuple[Tensor, Tensor]:
    return model.encode_image(batch["pixel_values"]), model.encode_text(*text_of(batch))


def _recalls(outputs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return 1 where an image finds its caption among the first k, and the same for captions."""
    right = outputs.diagonal()
    captions_ahead = (outputs >= right[:, None]).sum(1) - 1
    images_ahead = (outputs >= right[None, :]).sum(0) - 1
    return (captions_ahead < k).double(), (images_ahead < k).double()


def _mean_iou(overlap: Tensor, union: Tensor) -> Tensor:
    """The mean over the classes (last dim) that occur in labels or predictions."""
    present = union > 0
    return (overlap / union.clamp(min=1)).sum(-1) / present.sum(-1)


def _bootstrap_error(overlap_NC: Tensor, union_NC: Tensor) -> float:
    """Standard deviation of the mean IoU over resamples of the images."""
    num = len(overlap_NC)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(num, (NUM_RESAMPLES, num), generator=generator)
    times_BN = F.one_hot(drawn, num).sum(1).double()
    return _mean_iou(times_BN @ overlap_NC, times_BN @ union_NC).std().item()


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        VisualQuestions("vqa", "VQA", "accuracy", ("position", "relation", "where")),
        Retrieval("retrieval", "Retrieval", "recall_at_1"),
        Retrieval("retrieval_hard", "Hard retrieval", "recall_at_1", group=4),
        PairReasoning("pair_reasoning", "Pairs", "accuracy", ("both", "one", "first")),
        Segmentation("segmentation", "Segmentation", "mean_iou"),
        MaskedWords("masked_words", "Masked words", "accuracy"),
        Statements("statements", "Statements", "accuracy", ("presence", "position")),
        *SETS.values(),
    )
}
FINETUNED_ON_SCENES = ("vqa", "retrieval", "retrieval_hard", "pair_reasoning", "segmentation")
FREE_ON_SCENES = ("retrieval", "retrieval_hard", "masked_words", "statements")
FINETUNED = (*FINETUNED_ON_SCENES, *SETS)
TRAINING_FREE = (*FREE_ON_SCENES, "coco", "flickr30k")
METRIC_TITLES = {
    "accuracy": "accuracy",
    "recall_at_1": "R@1",
    "mean_iou": "mIoU",
    "vqa_accuracy": "VQA accuracy",
}


def training_free(prepared: Collection[str]) -> list[str]:
    """The benchmarks among those prepared that need no head beyond the pre-trained ones."""
    return [name for name in TRAINING_FREE if name in prepared]
