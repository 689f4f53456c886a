"""Yardsticks of the models of a set: labels if there are any, otherwise each other.

With labels: joint, per-task and average accuracy, and cross-entropy. Without: a loss that needs no
labels, and how far a model agrees with the parents. That loss is

    language models         cross-entropy of the next word, or of 15 % of the words that were masked
    other models of logits  Kullback-Leibler divergence of parents' mean softmax and model's
    all others              squared distance to the parents' mean output, over its variance

and agreement is the share of rows with a parent's first choice. For outputs that are no logits it
is the share of a parent's variance that the model's output explains (100: the same; it may be
negative), and whether both find the same examples alike (`alloy.measures.encoders`): the loss and
the variance can favour a model that search would not.

Arms are compared with each other by
    labels                  the right class among those of all tasks
    language models         the log-likelihood of the words
    other models of logits  the first choice of the surest parent
    all others              explained variance, nearest neighbours and pairwise similarities
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from alloy.measures.encoders import neighbour_agreement, similarity_agreement
from tasks.evaluation import accuracy
from tasks.evaluation.loading import load_tokenizer, model_class
from tasks.evaluation.outputs import Answers, answers, by_length, trimmed
from tasks.evaluation.score import MeanScore, Score
from tasks.models.shared.jobs import Job, batches
from tasks.storage import read_json
from tasks.workers import in_order

MASKED_SHARE = 0.15  # of the words, as in BERT's training
IGNORED = -100
WORDS = "words"  # beside the inputs while they are sorted: the word due at each place
ALIKE = {"neighbours": neighbour_agreement, "similarities": similarity_agreement}
FEWEST = 3  # examples whose answers have neighbours
MOST_BYTES = 2**28  # of a parent's answers, kept for its score and the ensemble's
TINY = 1e-30  # keeps logarithms of 0 and divisions by no variance finite, in float32 too

Inputs = Mapping[str, Tensor]
Candidate = Callable[[Inputs], Answers]


class Yardstick(Protocol):
    """Scores of a model, or of several whose answers are put together."""

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]: ...

    def by_example(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """Return each example's value by measure, more for better: arms are compared by these.

        An arm is one candidate, or one for each head (`tasks.models.measures.heads`).
        """
        ...


def as_candidate(model: nn.Module) -> Candidate:
    """The model as it is, but its convolutions in the memory layout in which they run fastest."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # 1.5 to 1.8 times, small ResNets on a CPU
            module.to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    return lambda inputs: answers(model, inputs)


class Remembered:
    """A candidate that answers each batch once, while its answers take at most MOST_BYTES."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.forget()

    def __call__(self, inputs: Inputs) -> Answers:
        if (known := self.known.get(id(inputs))) is not None:
            return known[1]
        answer = self.candidate(inputs)
        self.room -= answer.rows.nbytes
        if self.room >= 0:
            self.known[id(inputs)] = inputs, answer  # the batch is kept, so its id stays its own
        return answer

    def forget(self) -> None:
        """Give the memory back."""
        self.known: dict[int, tuple[Inputs, Answers]] = {}
        self.room = MOST_BYTES


def yardsticks(job: Job, parents: Sequence[Candidate], batch_size: int) -> dict[str, Yardstick]:
    """The yardsticks of a set by split: `validation` and `test`, `held_out` or `calibration`."""
    if (folder := job.benchmark) is not None:
        classes = load_file(folder / "classes.safetensors")
        return {
            split: Labelled(load_file(folder / f"{split}.safetensors"), classes, batch_size)
            for split in ("validation", "test")
        }
    if job.held_out is not None:
        return {"held_out": unlabelled(job, job.held_out, parents, batch_size)}
    return {"calibration": unlabelled(job, job.calibration, parents, batch_size)}


def unlabelled(job: Job, file: Path, parents: Sequence[Candidate], batch_size: int) -> "Unlabelled":
    """The yardstick of a set on examples without labels."""
    reference = next(iter(job.folders.values()))
    inputs, words = _language(reference, load_file(file))
    first = _reads_first_token(reference)
    return Unlabelled(inputs, words, parents, batch_size, by_first_token=first)


class Labelled:
    """Accuracy and cross-entropy on examples of all tasks (`tasks.evaluation.accuracy`)."""

    def __init__(self, examples: Inputs, classes: Inputs, batch_size: int) -> None:
        truth = ("labels", "tasks")
        examples = by_length(examples)
        self.inputs = {name: tensor for name, tensor in examples.items() if name not in truth}
        self.labels, self.tasks = (examples[name] for name in truth)
        self.classes = classes
        self.batches = [trimmed(batch) for batch in batches(self.inputs, batch_size)]

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]:
        """Score one model, or an ensemble (`accuracy.ensemble`)."""
        each = [self.logits(candidate) for candidate in candidates]
        return self.scores_of(each[0] if len(each) == 1 else accuracy.ensemble(each, self.classes))

    def scores_of(self, logits: Tensor) -> dict[str, Score]:
        """Score logits of all classes [N, C]."""
        shares = accuracy.accuracies(logits, self.labels, self.tasks, self.classes)
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        scores = {f"{name.replace(' ', '_')}_accuracy": score for name, score in shares.items()}
        scores["loss"] = mean_over(losses)
        for task in self.tasks.unique().tolist():
            scores[f"task_{task}_loss"] = mean_over(losses[self.tasks == task])
        return scores

    def by_example(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        (candidate,) = candidates
        hits = self.logits(candidate).argmax(dim=1) == self.labels
        return {"joint accuracy": 100 * hits.double()}

    def logits(self, candidate: Candidate, classes: Inputs | None = None) -> Tensor:
        """A candidate's logits of all classes, or of those that its head has [N, C]."""
        parts = []
        for batch, answer in zip(self.batches, in_order(candidate, self.batches), strict=True):
            num = len(next(iter(batch.values())))
            if len(answer.rows) != num:
                raise ValueError(
                    "a benchmark with labels needs one answer an example; the models give "
                    f"{len(answer.rows)} for {num}: use models with logits, or no benchmark"
                )
            parts.append(accuracy.logits(answer.rows, classes or self.classes))
        return torch.cat(parts)


class Probabilities:
    """The yardstick of ensembles of models with labels that average their probabilities."""

    def __init__(self, labelled: Labelled) -> None:
        self.labelled = labelled

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]:
        """Score an ensemble (`accuracy.mean_probabilities`)."""
        each = [self.labelled.logits(candidate) for candidate in candidates]
        return self.labelled.scores_of(accuracy.mean_probabilities(each))

    def by_example(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        return self.labelled.by_example(candidates)


class _Seen(NamedTuple):
    """The parents' answers to one batch: their mean, and each one's choices or rows."""

    mean: Tensor | None  # probabilities of logits, or the outputs; None where words are the targets
    own: list[Tensor]  # first choices [R] of logits, or the outputs [R, C]
    surest: Tensor | None  # of logits the surest parent's first choice [R]


class Unlabelled:
    """A loss without labels, and agreement with the parents."""

    def __init__(
        self,
        inputs: Inputs,
        words: Tensor | None,
        parents: Sequence[Candidate],
        batch_size: int,
        *,
        by_first_token: bool = False,  # an example's answer is that of its first row, not the mean
    ) -> None:
        examples = by_length(inputs if words is None else {**inputs, WORDS: words})
        self.words = examples.pop(WORDS, None)
        self.batches = [trimmed(batch) for batch in batches(examples, batch_size)]
        self.by_first_token = by_first_token
        self.num_examples = len(next(iter(inputs.values())))
        self.seen: list[_Seen] = []
        of_parents: list[list[Tensor]] = [[] for _ in parents]  # an example's answer each
        for each in in_order(lambda batch: [p(batch) for p in parents], self.batches):
            self.seen.append(_see(each, words is None))
            if not each[0].are_logits:
                for own, answer in zip(of_parents, each, strict=True):
                    own.append(self._whole(answer))
        self.are_logits = bool(len(self.seen)) and self.seen[0].own[0].dim() == 1
        if not self.are_logits:
            means = [seen.mean for seen in self.seen if seen.mean is not None]
            self.variance = _variance(means)
            self.variances = [
                _variance([seen.own[i] for seen in self.seen]) for i in range(len(parents))
            ]
            self.parents = [torch.cat(own) for own in of_parents]

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]:
        """Score one model, or the mean answer of several."""
        return {name: mean_over(values) for name, values in self._measured(candidates).items()}

    def by_example(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        (candidate,) = candidates
        measured = self._measured([candidate])
        if self.words is not None:
            return {"log-likelihood": -measured["loss"]}
        if self.are_logits:
            return {"choice of the surest parent": self._surest_choices(candidate)}
        return {name.replace("_", " "): measured[name] for name in ("explained_variance", *ALIKE)}

    def _surest_choices(self, candidate: Candidate) -> Tensor:
        """The share of each example's rows that get the surest parent's first choice, per cent."""
        values, examples, start = [], [], 0
        answers = in_order(candidate, self.batches)
        for batch, answer, seen in zip(self.batches, answers, self.seen, strict=True):
            values.append(100.0 * (answer.rows.argmax(1) == seen.surest))
            examples.append(answer.examples + start)
            start += len(next(iter(batch.values())))
        return _by_example(values, examples)

    def _measured(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """Each metric's values, one for each example that has any."""
        rows: dict[str, list[Tensor]] = {}
        where: dict[str, list[Tensor]] = {}
        whole: list[Tensor] = []
        start = 0
        answers = in_order(lambda batch: _together([c(batch) for c in candidates]), self.batches)
        for batch, answer, seen in zip(self.batches, answers, self.seen, strict=True):
            if not self.are_logits:
                whole.append(self._whole(answer))
            for name, (values, examples) in self._values(answer, seen, start).items():
                rows.setdefault(name, []).append(values)
                where.setdefault(name, []).append(examples + start)
            start += len(next(iter(batch.values())))
        measured = {name: _by_example(rows[name], where[name]) for name in rows}
        if whole and self.num_examples >= FEWEST:
            ours = torch.cat(whole)
            for name, measure in ALIKE.items():
                values = [100 * measure(ours, parent) for parent in self.parents]
                measured[name] = torch.stack(values).mean(0)
        return measured

    def _whole(self, answer: Answers) -> Tensor:
        """Each example's answer: the mean of its rows, or the first, as its sentence encoder does.

        Float64 [N, C].
        """
        if self.by_first_token:
            return answer.rows[answer.places == 0].double()
        counts = answer.examples.bincount()
        total = torch.zeros(len(counts), answer.rows.shape[1], dtype=torch.float64)
        return total.index_add(0, answer.examples, answer.rows.double()) / counts[:, None]

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
        choices = surest([p.rows for p in parents]).argmax(1)
        mean = torch.stack([p.rows.softmax(1) for p in parents]).mean(0) if keep_mean else None
        return _Seen(mean, [p.rows.argmax(1) for p in parents], choices)
    return _Seen(torch.stack([p.rows for p in parents]).mean(0), [p.rows for p in parents], None)


def surest(logits: Sequence[Tensor]) -> Tensor:
    """Choose for each row [C] the parent whose largest probability exceeds the others'."""
    logits_PNC = torch.stack(list(logits))
    parent_N = logits_PNC.softmax(2).amax(2).argmax(0)
    return logits_PNC[parent_N, torch.arange(len(parent_N))]


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


def mean_over(values_N: Tensor) -> Score:
    """The mean over examples with its standard error."""
    values_N = values_N.double()
    if not len(values_N):
        return Score(float("nan"), float("nan"))
    spread = values_N.std().item() if len(values_N) > 1 else 0.0
    return MeanScore.of(values_N.mean().item(), spread / len(values_N) ** 0.5, values_N)


def _language(checkpoint: Path, inputs: Inputs) -> tuple[Inputs, Tensor | None]:
    """The inputs of a language model and the word due at each place; no words for other models."""
    from transformers.models.auto import modeling_auto  # slow to import

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


def _reads_first_token(checkpoint: Path) -> bool:
    """True where a sentence encoder's own pooling is its first token; all others have the mean."""
    file = checkpoint / "1_Pooling" / "config.json"
    return file.is_file() and bool(read_json(file).get("pooling_mode_cls_token"))


def _classes(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    return {n for names in mapping.values() for n in ([names] if isinstance(names, str) else names)}
