"""Measure models on the benchmarks of a recipe's `evaluate`, one model in memory at a time.

The models are the members and arms of the result's set and seed, under their own names.
"""

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alloy.errors import nearest
from tasks.data.inputs import ExamplesError, images, texts
from tasks.evaluation.loading import load_any, load_config, load_tokenizer
from tasks.evaluation.score import Score
from tasks.models.benchmarks import scores
from tasks.models.benchmarks.command import run_command
from tasks.models.benchmarks.examples import Examples, Label, read
from tasks.models.benchmarks.harness import Answer, run_harness
from tasks.models.benchmarks.whole import whole
from tasks.models.shared.finetuned import finetuned_of
from tasks.models.shared.heads import folders_of
from tasks.models.shared.jobs import Job
from tasks.recipe.benchmarks import MeasuredParams, ModelsExamples
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError

Scores = dict[str, Score]


@dataclass
class Measured:
    """Scores by model and benchmark, and the digests of the data by benchmark and split."""

    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


class Measure:
    """The benchmarks of an `evaluate` section, their examples read once.

    Args:
        only: the benchmarks that are measured; without it: all.
        members: the models whose next tokens others may agree with.
    """

    def __init__(
        self,
        where: str,
        params: MeasuredParams,
        batch_size: int,
        *,
        members: Sequence[str] = (),
        only: Sequence[str] | None = None,
    ) -> None:
        self.where, self.params, self.batch_size = where, params, batch_size
        self.only, self.members = only, members
        self.examples: dict[str, Examples] = {}
        self.members_said: dict[str, dict[str, scores.NextTokens]] = {}
        self.data: dict[str, str] = {}
        for name, own in self._own().items():
            if own.measure != "command":
                self.examples[name] = read(f"{where}.benchmarks.{name}", own)
                self.data[f"{name}/{own.split}"] = self.examples[name].digest()

    def _own(self) -> dict[str, ModelsExamples]:
        return {n: b for n, b in self.params.benchmarks.items() if self._is_asked(n)}

    def _is_asked(self, name: str) -> bool:
        return self.only is None or name in self.only

    def model(self, name: str, folder: Path, head: str | None = None) -> dict[str, Scores]:
        """The scores of one model by benchmark; of one with a member's head, those of that head.

        Raises:
            ParamsError: a model that cannot be measured so.
            ExamplesError: examples that it cannot read.
            HarnessError: a harness or a command that failed.
        """
        found: dict[str, Scores] = {}
        with tempfile.TemporaryDirectory() as temporary:
            folder = whole(folder, Path(temporary) / "model")
            model: PreTrainedModel | None = None
            for key, own in self._own().items():
                if own.head != head:
                    continue
                if own.measure == "command":
                    answer = run_command(f"{self.where}.benchmarks.{key}", str(own.command), folder)
                    found[key] = self._taken(key, own.split, answer)
                    continue
                model = load_any(folder) if model is None else model
                found[key] = MEASURES[own.measure](self, name, key, model, folder)
            del model
            gc.collect()
            for key, split, answer in self._harnesses(folder):
                found[key] = self._taken(key, split, answer)
        return found

    def _harnesses(self, folder: Path) -> Iterator[tuple[str, str, Answer]]:
        """Tasks of harnesses, the split that each is of, and what came out."""
        harness = self.params.harness
        if harness is None:
            return
        for kind in ("lm_eval", "mteb"):
            section = getattr(harness, kind)
            tasks = [task for task in section.tasks if self._is_asked(task)] if section else []
            if tasks:
                chosen = section.model_copy(update={"tasks": tasks})
                for task, answer in run_harness(kind, chosen, folder, self.batch_size).items():
                    yield task, section.split, answer

    def _taken(self, name: str, split: str, answer: Answer) -> Scores:
        before = self.data.setdefault(f"{name}/{split}", answer.digest)
        if before != answer.digest:
            raise ExamplesError(f"{self.where}: {name}: its data changed from one model to another")
        return answer.scores

    def perplexity(self, name: str, key: str, model: PreTrainedModel, folder: Path) -> Scores:
        where, own = f"{self.where}.benchmarks.{key}", self.params.benchmarks[key]
        if not scores.is_causal(model):
            raise ParamsError(
                f"{where}: {name} is a {type(model).__name__}: perplexity is of models that say "
                "the next token of a text; take another measure"
            )
        inputs = inputs_of(where, own, self.examples[key], folder)
        said = scores.next_tokens(model, inputs, self.batch_size)
        if name in self.members:
            self.members_said.setdefault(key, {})[name] = said
        others = {n: s for n, s in self.members_said.get(key, {}).items() if n != name}
        return {**scores.perplexity(said), **scores.agreement(said, others)}

    def labels(self, name: str, key: str, model: PreTrainedModel, folder: Path) -> Scores:
        where, own = f"{self.where}.benchmarks.{key}", self.params.benchmarks[key]
        refuse_no_classes(where, name, model)
        inputs = inputs_of(where, own, self.examples[key], folder)
        logits = scores.class_logits(model, inputs, self.batch_size)
        numbers = class_numbers(where, name, self.examples[key].labels or [], model.config.id2label)
        return scores.classification(logits, torch.tensor(numbers))

    def zero_shot(self, name: str, key: str, model: PreTrainedModel, folder: Path) -> Scores:
        where, own = f"{self.where}.benchmarks.{key}", self.params.benchmarks[key]
        examples, prompt = self.examples[key], str(own.prompt)
        names = examples.names
        spoken = [prompt.replace("{}", name.replace("_", " ")) for name in names]
        pictures, of_names = self._embedded(where, name, model, folder, examples, spoken)
        labels = torch.tensor([names.index(str(label)) for label in examples.labels or ()])
        return scores.classification(pictures @ of_names.T, labels)

    def retrieval(self, name: str, key: str, model: PreTrainedModel, folder: Path) -> Scores:
        where, examples = f"{self.where}.benchmarks.{key}", self.examples[key]
        captions = examples.captions or []
        spoken = [text for texts in captions for text in texts]
        owners = [number for number, texts in enumerate(captions) for _ in texts]
        pictures, texts = self._embedded(where, name, model, folder, examples, spoken)
        return scores.retrieval(pictures, texts, torch.tensor(owners))

    def _embedded(
        self,
        where: str,
        name: str,
        model: PreTrainedModel,
        folder: Path,
        examples: Examples,
        spoken: Sequence[str],
    ) -> tuple[Tensor, Tensor]:
        if not scores.has_two_towers(model):
            raise ParamsError(
                f"{where}: {name} is a {type(model).__name__}: it has no towers that embed "
                "pictures and texts in one space, as CLIP has"
            )
        pictures = images(where, len(examples.items), examples.pictures(_mode(folder)), folder)
        embedded = scores.embeddings(model, "image", pictures, self.batch_size)
        tokenizer = _tokenizer(where, folder)
        longest = model.config.text_config.max_position_embeddings
        # SigLIP has seen texts padded to its full length alone.
        padding = "max_length" if "siglip" in model.config.model_type else True
        encoded = tokenizer(
            list(spoken), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        )
        taken = {n: t for n, t in encoded.items() if n in ("input_ids", "attention_mask")}
        return embedded, scores.embeddings(model, "text", taken, self.batch_size)


MEASURES: Mapping[str, Callable[[Measure, str, str, PreTrainedModel, Path], Scores]] = {
    "perplexity": Measure.perplexity,
    "labels": Measure.labels,
    "zero_shot": Measure.zero_shot,
    "retrieval": Measure.retrieval,
}


def refuse_no_classes(where: str, name: str, model: PreTrainedModel) -> None:
    """Raise ParamsError for a model that tells no classes apart."""
    kind = type(model).__name__
    if not kind.endswith(("Classification", "ClassificationWithTeacher")):
        raise ParamsError(
            f"{where}: {name} is a {kind}: classes are told apart by models with one logit "
            "for each, ...ForImageClassification or ...ForSequenceClassification; of models "
            "with a tower for pictures and one for texts take `measure: zero_shot`"
        )


def inputs_of(
    where: str, own: ModelsExamples, examples: Examples, folder: Path
) -> dict[str, Tensor]:
    """The examples as a checkpoint's model takes them: running text, texts or pictures."""
    if own.measure == "perplexity":
        most = own.examples or sys.maxsize
        inputs = texts(where, own.tokens, most, examples.items, folder)
        return {name: tensor[:most] for name, tensor in inputs.items() if name != "token_type_ids"}
    if examples.are_texts:
        return _one_piece(where, own, examples.items, folder)
    return images(where, len(examples.items), examples.pictures(_mode(folder)), folder)


def class_numbers(
    where: str, model: str, labels: Sequence[Label], id2label: Mapping[Any, str] | None
) -> list[int]:
    """The place of each example's class among a model's logits.

    Raises ExamplesError for a class that the model's config does not name.
    """
    id2label = id2label or {}
    known = {name: number for number, name in id2label.items()}
    numbers = []
    for label in labels:
        number = known.get(label) if isinstance(label, str) else label
        if number is None or number not in id2label:
            says = nearest(str(label), [str(name) for name in list(known)[:50]])
            raise ExamplesError(
                f"{where}: class {label!r}: the config of {model} has {len(known)} classes "
                f"(id2label): {says}"
            )
        numbers.append(int(number))
    return numbers


def _one_piece(
    where: str, own: ModelsExamples, items: Sequence[str], folder: Path
) -> dict[str, Tensor]:
    """Each text as one example, cut and padded to `tokens`."""
    tokenizer = _tokenizer(where, folder)
    if tokenizer.pad_token is None:
        raise ExamplesError(f"{where}: the tokenizer of {folder} cannot pad: give it a pad token")
    encoded = tokenizer(
        list(items), padding=True, truncation=True, max_length=own.tokens, return_tensors="pt"
    )
    return dict(encoded)


def _tokenizer(where: str, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ExamplesError(
            f"{where}: {folder} has no tokenizer; save the one it was trained with beside its "
            "weights"
        )
    return tokenizer


def _mode(folder: Path) -> str:
    return "L" if getattr(load_config(folder), "num_channels", 3) == 1 else "RGB"


def measure_all(recipe: ModelsRecipe) -> Measured:
    """The scores of the members and arms of the result's set and seed, members first."""
    job = Job(recipe, recipe.named.set, recipe.named.seed)
    arms = {name: recipe.folder(name) for name in recipe.arms(job.set)} | finetuned_of(recipe)
    folders = {**job.folders, **arms}
    measure = Measure(
        f"{recipe.where}: evaluate",
        recipe.evaluate,
        recipe.evaluate.batch_size,
        members=job.members,
    )
    found = {}
    trained = finetuned_of(recipe)
    heads = job.members if job.entry.heads else []
    for head in heads:
        if head not in [own.head for own in recipe.evaluate.benchmarks.values()]:
            print(f"evaluate: no benchmark has labels of the head of {head}")
    for name in sorted({*recipe.measured_models, *trained}, key=[*folders].index):
        of_head = {name: folders[name]} if name in heads else folders_of(job, folders[name])
        if len(of_head) > 1 and not heads:
            print(f"evaluate: {name}: one model for each member: its benchmarks are left out")
            continue
        found[name] = {}
        for head, folder in of_head.items():
            found[name] |= measure.model(name, folder, head if heads else None)
        shown = ", ".join(
            f"{key} {metric} {score.value:.4g}"
            for key, of_key in found[name].items()
            for metric, score in [*of_key.items()][:1]
        )
        print(f"evaluate: {name}: {shown}", flush=True)
    return Measured(found, measure.data)
