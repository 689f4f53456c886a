"""A benchmark: inputs, loss, metric with its standard error, and the splits that it reads.

A split is either tensors by name, whole in memory (composed scenes), or rows on the disk
(`tasks.data.sets`). Shapes: N examples, n of a batch, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from alloy.devices import beside
from alloy.modality.modeling import ModalityModel
from alloy.processes import ALONE, Processes
from tasks.data.sets.splits import StoredSplit, open_split
from tasks.evaluation.accuracy import mean_probabilities
from tasks.evaluation.score import Score, mean_score
from tasks.workspace import Workspace

Split = Mapping[str, Tensor]
Examples = Any
"""Tensors by name, or a `StoredSplit`; each benchmark knows which of them it measures."""


def load_split(recipe: str, benchmark: str, split: str) -> Examples:
    """One split of a benchmark as `prepare` wrote it."""
    folder = Workspace(recipe).data / benchmark
    if (folder / f"{split}.arrow").exists():
        return open_split(folder, split)
    return load_file(folder / f"{split}.safetensors")


def num_examples(data: Examples) -> int:
    return len(data) if isinstance(data, StoredSplit) else len(data["pixel_values"])


def take(data: Split, index: Tensor | slice) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in data.items()}


def first_of(data: Examples, num: int) -> Examples:
    """The first examples of a split, or all if it has no more."""
    return replace(data, first=num) if isinstance(data, StoredSplit) else take(data, slice(num))


def batches(data: Examples, batch_size: int) -> Iterator[dict[str, Tensor]]:
    if isinstance(data, StoredSplit):
        yield from data.batches(batch_size)
        return
    for start in range(0, num_examples(data), batch_size):
        yield take(data, slice(start, start + batch_size))


def text_of(batch: Split) -> tuple[Tensor, Tensor]:
    """Ids and mask without the columns in which every text of the batch is padding."""
    longest = int(batch["attention_mask"].sum(1).max())
    return batch["input_ids"][:, :longest], batch["attention_mask"][:, :longest]


def joint_states(model: ModalityModel, batch: Split) -> Tensor:
    """States of image and text together."""
    return model.encode_joint(batch["pixel_values"], *text_of(batch))


@dataclass(frozen=True)
class Benchmark:
    """A data set, its loss and its metric; subclasses define the model's inputs."""

    name: str
    title: str
    metric: str
    kinds: tuple[str, ...] = ()  # the names of the kinds of examples that `data["kinds"]` numbers
    group: int = 1  # examples that belong together: hard negatives of each other

    def draw(self, data: Examples, num: int, generator: torch.Generator) -> Tensor:
        """Places of `num` random examples, with replacement between calls, without within one."""
        return torch.randperm(num_examples(data), generator=generator)[:num]

    def sample(self, data: Split, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The examples that `draw` names."""
        return take(data, self.draw(data, num, generator))

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        raise NotImplementedError

    def loss(self, logits: Tensor, batch: Split) -> Tensor:
        """Cross-entropy with the batch's labels."""
        return F.cross_entropy(logits, batch["labels"].long())

    def training_loss(
        self, model: ModalityModel, batch: Split, processes: Processes = ALONE
    ) -> Tensor:
        """The loss of a batch, or of this process's share of it its part of the loss."""
        return self.loss(self.logits(model, batch), batch) / processes.size

    @torch.no_grad()
    def outputs(
        self,
        model: ModalityModel,
        data: Examples,
        batch_size: int = 250,
        processes: Processes = ALONE,
    ) -> Tensor:
        """`logits` of every example of a split, on the CPU; processes take the batches in turns."""

        def answer(batch: Split) -> Tensor:
            return self.logits(model, beside(model, batch)).float().cpu()

        return torch.cat(processes.in_turns(answer, batches(data, batch_size)))

    def outputs_of(
        self,
        models: Sequence[ModalityModel],
        data: Examples,
        batch_size: int = 250,
        processes: Processes = ALONE,
    ) -> Tensor:
        """The outputs of an ensemble; of one model its own."""
        outputs = [self.outputs(model, data, batch_size, processes) for model in models]
        return self.averaged(outputs) if len(outputs) > 1 else outputs[0]

    def averaged(self, outputs: Sequence[Tensor]) -> Tensor:
        """An ensemble's outputs: the logarithms of the models' mean probabilities, [N, C, ...]."""
        return mean_probabilities(outputs)

    def values(self, outputs: Tensor, data: Examples) -> Tensor:
        """The share of each example that is right, [N]: the metric is its mean, in per cent."""
        return (outputs.argmax(dim=1) == data["labels"]).double()

    def guess(self, data: Examples) -> float:
        """The metric, in per cent, of saying the commonest answer to every example of a kind."""
        kinds = data.get("kinds", torch.zeros_like(data["labels"]))
        commonest = sum(data["labels"][kinds == kind].bincount().max() for kind in kinds.unique())
        return 100 * float(commonest) / num_examples(data)

    def score(self, outputs: Tensor, data: Examples) -> dict[str, Score]:
        """The metrics by name; `self.metric` is the one that tables show."""
        hits = outputs.argmax(dim=1) == data["labels"]
        scores = {"accuracy": mean_score(hits)}
        for kind, label in enumerate(self.kinds):
            scores[f"accuracy_{label}"] = mean_score(hits[data["kinds"] == kind])
        return scores

    def first_answers(self, outputs: Tensor, num: int) -> Tensor:
        """The answers to the first examples, for the report: their numbers [num]."""
        return outputs[:num].argmax(dim=1)
