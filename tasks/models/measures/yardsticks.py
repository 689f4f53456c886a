"""Yardsticks of the models of a set: labels if there are any, otherwise each other.

With labels: joint, per-task and average accuracy, and cross-entropy. Without: a loss that needs no
labels, and how far a model agrees with the parents. That loss is

    language models         cross-entropy of the next word, or of 15 % of the words that were masked
    other models of logits  Kullback-Leibler divergence of parents' mean softmax and model's
    all others              squared distance to the parents' mean output, over its variance

and agreement is the share of rows with a parent's first choice, or for outputs that are no logits
the share of a parent's variance that the model's output explains (100: the same; it may be
negative).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from tasks.evaluation import accuracy
from tasks.evaluation.loading import load_tokenizer, model_class
from tasks.evaluation.outputs import Answers, answers, by_length, trimmed
from tasks.evaluation.score import Score
from tasks.models.shared.jobs import Job, batches

MASKED_SHARE = 0.15  # of the words, as in BERT's training
IGNORED = -100
TINY = 1e-30  # keeps logarithms of 0 and divisions by no variance finite, in float32 too

Inputs = Mapping[str, Tensor]
Candidate = Callable[[Inputs], Answers]


class Yardstick(Protocol):
    """Scores of a model, or of several whose answers are put together."""

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]: ...


def as_candidate(model: nn.Module) -> Candidate:
    """The model as it is, but its convolutions in the memory layout in which they run fastest."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # 1.5 to 1.8 times, small ResNets on a CPU
            module.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    return lambda inputs: answers(model, inputs)


def yardsticks(job: Job, parents: Sequence[Candidate], batch_size: int) -> dict[str, Yardstick]:
    """The yardsticks of a set by split: `validation` and `test`, or `calibration`."""
    if (folder := job.benchmark) is not None:
        classes = load_file(folder / "classes.safetensors")
        return {
            split: Labelled(load_file(folder / f"{split}.safetensors"), classes, batch_size)
            for split in ("validation", "test")
        }
    inputs, words = _language(next(iter(job.folders.values())), load_file(job.calibration))
    return {"calibration": Unlabelled(inputs, words, parents, batch_size)}


class Labelled:
    """Accuracy and cross-entropy on examples of all tasks (`tasks.evaluation.accuracy`)."""

    def __init__(self, examples: Inputs, classes: Inputs, batch_size: int) -> None:
        truth = ("labels", "tasks")
        examples = by_length(examples)
        self.inputs = {name: tensor for name, tensor in examples.items() if name not in truth}
        self.labels, self.tasks = (examples[name] for name in truth)
        self.classes, self.batch_size = classes, batch_size

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]:
        """Score one model, or an ensemble (`accuracy.ensemble`)."""
        each = [self._logits(candidate) for candidate in candidates]
        logits = each[0] if len(each) == 1 else accuracy.ensemble(each, self.classes)
        shares = accuracy.accuracies(logits, self.labels, self.tasks, self.classes)
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        scores = {f"{name.replace(' ', '_')}_accuracy": score for name, score in shares.items()}
        scores["loss"] = _mean(losses)
        for task in self.tasks.unique().tolist():
            scores[f"task_{task}_loss"] = _mean(losses[self.tasks == task])
        return scores

    def _logits(self, candidate: Candidate) -> Tensor:
        parts = []
        for batch in batches(self.inputs, self.batch_size):
            answer = candidate(trimmed(batch))
            num = len(next(iter(batch.values())))
            if len(answer.rows) != num:
                raise ValueError(
                    "a benchmark with labels needs one answer an example; the models give "
                    f"{len(answer.rows)} for {num}: use models with logits, or no benchmark"
                )
            parts.append(accuracy.logits(answer.rows, self.classes))
        return torch.cat(parts)


class _Seen(NamedTuple):
    """The parents' answers to one batch: their mean, and each one's choices or rows."""

    mean: Tensor | None  # probabilities of logits, or the outputs; None where words are the targets
    own: list[Tensor]  # first choices [R] of logits, or the outputs [R, C]


class Unlabelled:
    """A loss without labels, and agreement with the parents."""

    def __init__(
        self,
        inputs: Inputs,
        words: Tensor | None,
        parents: Sequence[Candidate],
        batch_size: int,
    ) -> None:
        self.inputs, self.words, self.batch_size = inputs, words, batch_size
        self.num_parents = len(parents)
        self.seen = [_see([p(b) for p in parents], words is None) for b in self._batches()]
        self.are_logits = bool(len(self.seen)) and self.seen[0].own[0].dim() == 1
        if not self.are_logits:
            means = [seen.mean for seen in self.seen if seen.mean is not None]
            self.variance = _variance(means)
            self.variances = [
                _variance([seen.own[i] for seen in self.seen]) for i in range(len(parents))
            ]

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]:
        """Score one model, or the mean answer of several."""
        rows: dict[str, list[Tensor]] = {}
        where: dict[str, list[Tensor]] = {}
        start = 0
        for batch, seen in zip(self._batches(), self.seen, strict=True):
            answer = _together([candidate(batch) for candidate in candidates])
            for name, (values, examples) in self._values(answer, seen, start).items():
                rows.setdefault(name, []).append(values)
                where.setdefault(name, []).append(examples + start)
            start += len(next(iter(batch.values())))
        return {name: _mean(_by_example(rows[name], where[name])) for name in rows}

    def _batches(self) -> Iterator[Inputs]:
        return batches(self.inputs, self.batch_size)

    def _values(self, answer: Answers, seen: _Seen, start: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Each metric's values, a row each, and the example of each row."""
        metrics = {"loss": self._loss(answer, seen, start)}
        for i, own in enumerate(seen.own):
            if self.are_logits:
                value = 100.0 * (answer.rows.argmax(1) == own)
            else:
                value = 100 * (1 - (answer.rows - own).square().sum(1) / self.variances[i])
            metrics[f"{self.agreement}_parent_{i}"] = value, answer.examples
        values = [value for name, (value, _) in metrics.items() if name != "loss"]
        return {**metrics, self.agreement: (torch.stack(values).mean(0), answer.examples)}

    @property
    def agreement(self) -> str:
        return "agreement" if self.are_logits else "explained_variance"

    def _loss(self, answer: Answers, seen: _Seen, start: int) -> tuple[Tensor, Tensor]:
        if self.words is not None:
            targets = self.words[start:][answer.examples, answer.places]
            kept = targets != IGNORED
            losses = F.cross_entropy(answer.rows[kept], targets[kept], reduction="none")
            return losses, answer.examples[kept]
        assert seen.mean is not None
        if not self.are_logits:
            return (answer.rows - seen.mean).square().sum(1) / self.variance, answer.examples
        log_p = answer.rows.log_softmax(1)
        divergence = (torch.xlogy(seen.mean, seen.mean) - seen.mean * log_p).sum(1)
        return divergence.clamp(min=0), answer.examples  # below 0 is rounding


def _see(parents: Sequence[Answers], keep_mean: bool) -> _Seen:
    if parents[0].are_logits:
        mean = torch.stack([p.rows.softmax(1) for p in parents]).mean(0) if keep_mean else None
        return _Seen(mean, [p.rows.argmax(1) for p in parents])
    return _Seen(torch.stack([p.rows for p in parents]).mean(0), [p.rows for p in parents])


def _together(answers: Sequence[Answers]) -> Answers:
    """The mean answer: of probabilities where there are logits."""
    if len(answers) == 1:
        return answers[0]
    rows = torch.stack(
        [answer.rows.softmax(1) if answer.are_logits else answer.rows for answer in answers]
    )
    mean = rows.mean(0)
    return answers[0]._replace(rows=mean.clamp(min=TINY).log() if answers[0].are_logits else mean)


def _variance(parts: Iterable[Tensor]) -> Tensor:
    """The mean squared distance of rows to their mean."""
    rows = torch.cat(list(parts))
    return (rows - rows.mean(0)).square().sum(1).mean().clamp(min=TINY)


def _by_example(rows: Sequence[Tensor], examples: Sequence[Tensor]) -> Tensor:
    """The mean of each example's rows; its rows are no independent draws."""
    values, which = torch.cat(list(rows)).double(), torch.cat(list(examples))
    _, place, counts = which.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=torch.float64).index_add(0, place, values) / counts


def _mean(values_N: Tensor) -> Score:
    """The mean over examples with its standard error."""
    values_N = values_N.double()
    if not len(values_N):
        return Score(float("nan"), float("nan"))
    spread = values_N.std().item() if len(values_N) > 1 else 0.0
    return Score(values_N.mean().item(), spread / len(values_N) ** 0.5)


def _language(checkpoint: Path, inputs: Inputs) -> tuple[Inputs, Tensor | None]:
    """The inputs of a language model and the word due at each place; no words for other models."""
    name = model_class(checkpoint).__name__
    ids = inputs.get("input_ids")
    if ids is None:
        return inputs, None
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    if name in _classes(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        words = torch.full_like(ids, IGNORED)
        words[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], IGNORED)
        return inputs, words
    tokenizer = load_tokenizer(checkpoint)
    if name not in _classes(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES) or tokenizer is None:
        return inputs, None
    if tokenizer.mask_token_id is None:
        return inputs, None
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < MASKED_SHARE
    hidden = drawn & mask & ~special
    words = ids.masked_fill(~hidden, IGNORED)
    return {**inputs, "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}, words


def _classes(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    return {n for names in mapping.values() for n in ([names] if isinstance(names, str) else names)}
