"""Benchmarks on prepared sets (`tasks.data.sets`): VQAv2, COCO, Flickr30k, NLVR2, ADE20k.

Outputs are small whatever the set's size: the answer of each question, similarities of images and
captions, counts of pixels by class. The models of an ensemble are averaged while a batch is there.

Shapes: N examples, n of a batch, I images, T captions, C classes, K candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.devices import beside
from alloy.modality import ModalityModel
from alloy.modality.objectives import contrastive_loss
from alloy.processes import ALONE, Processes
from tasks.data.sets.images import label_map
from tasks.data.sets.splits import StoredSplit
from tasks.evaluation.answers import accuracy
from tasks.evaluation.confusion import (
    counts,
    image_scores,
    predicted_labels,
    segmentation_scores,
)
from tasks.evaluation.recalls import FOLD, by_image, folds, hits, ranks
from tasks.evaluation.score import Score, mean_score
from tasks.experts.measures.benchmark import Benchmark, Examples, Split, joint_states, text_of


@dataclass(frozen=True)
class SetBenchmark(Benchmark):
    """A benchmark on a prepared set, whose outputs are reduced batch by batch.

    Subclasses say what of a model is averaged over an ensemble (`chances`) and what is kept of the
    mean (`reduced`); one model is an ensemble of one.
    """

    def chances(self, model: ModalityModel, batch: Split) -> Tensor:
        raise NotImplementedError

    def reduced(self, chances: Tensor, data: StoredSplit, numbers: range) -> Tensor:
        """The outputs of the examples with these numbers; of models' mean chances."""
        return chances

    def outputs(
        self,
        model: ModalityModel,
        data: Examples,
        batch_size: int = 250,
        processes: Processes = ALONE,
    ) -> Tensor:
        return self.outputs_of([model], data, batch_size, processes)

    @torch.no_grad()
    def outputs_of(
        self,
        models: Sequence[ModalityModel],
        data: Examples,
        batch_size: int = 250,
        processes: Processes = ALONE,
    ) -> Tensor:
        """Outputs of an ensemble, on the CPU; processes take the batches in turns."""
        assert isinstance(data, StoredSplit)

        def answer(numbers: range) -> Tensor:
            batch = data.take(numbers)
            parts = [self.chances(model, beside(model, batch)).float().cpu() for model in models]
            return self.reduced(torch.stack(parts).mean(0), data, numbers)

        starts = range(0, len(data), batch_size)
        some = [range(start, min(start + batch_size, len(data))) for start in starts]
        return torch.cat(processes.in_turns(answer, some))


@dataclass(frozen=True)
class OpenQuestions(SetBenchmark):
    """Questions with the answers of ten people each; outputs are numbers of answers [N]."""

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        return model.answer_logits(joint_states(model, batch))

    def loss(self, logits: Tensor, batch: Split) -> Tensor:
        """Binary cross-entropy with the soft targets, summed over the answers."""
        each = F.binary_cross_entropy_with_logits(logits, batch["targets"])
        return each * logits.shape[1]

    def chances(self, model: ModalityModel, batch: Split) -> Tensor:
        return self.logits(model, batch).sigmoid()

    def reduced(self, chances: Tensor, data: StoredSplit, numbers: range) -> Tensor:
        return chances.argmax(1)

    def values(self, outputs: Tensor, data: Examples) -> Tensor:
        """The official accuracy of each answer, [N]."""
        assert isinstance(data, StoredSplit)
        answers, given = data.description.answers, data.column("answers")
        return torch.tensor(
            [
                accuracy(answers[n], people)
                for n, people in zip(outputs.tolist(), given, strict=True)
            ],
            dtype=torch.float64,
        )

    def guess(self, data: Examples) -> float:
        """The accuracy of the commonest training answer to every question."""
        return self.score(torch.zeros(len(data), dtype=torch.long), data)[self.metric].value

    def score(self, outputs: Tensor, data: Examples) -> dict[str, Score]:
        return {"vqa_accuracy": mean_score(self.values(outputs, data))}

    def first_answers(self, outputs: Tensor, num: int) -> Tensor:
        return outputs[:num]


@dataclass(frozen=True)
class ImagePairs(SetBenchmark):
    """A sentence about two photographs; outputs are scores [N, 2].

    Beside the accuracy stands NLVR2's consistency: the share of sentences that are judged rightly
    about all of their pairs of photographs.
    """

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        first, second = batch["pixel_values"].unbind(1)
        last_type = model.config.num_image_types - 1
        return model.pair_logits(
            model.encode_joint(first, *text_of(batch)),
            model.encode_joint(second, *text_of(batch), image_type=last_type),
        )

    def chances(self, model: ModalityModel, batch: Split) -> Tensor:
        return self.logits(model, batch).softmax(1)

    def values(self, outputs: Tensor, data: Examples) -> Tensor:
        assert isinstance(data, StoredSplit)
        return (outputs.argmax(1) == torch.tensor(data.column("label"))).double()

    def guess(self, data: Examples) -> float:
        assert isinstance(data, StoredSplit)
        true = sum(data.column("label")) / len(data)
        return 100 * max(true, 1 - true)

    def score(self, outputs: Tensor, data: Examples) -> dict[str, Score]:
        assert isinstance(data, StoredSplit)
        right = self.values(outputs, data)
        groups: dict[str, list[float]] = {}
        for name, value in zip(data.column("id"), right.tolist(), strict=True):
            groups.setdefault(sentence_of(name), []).append(value)
        consistent = torch.tensor([min(values) for values in groups.values()])
        return {"accuracy": mean_score(right), "consistency": mean_score(consistent)}


def sentence_of(identifier: str) -> str:
    """Return the part of NLVR2's identifier that names the sentence: all but the pair's number."""
    parts = identifier.split("-")
    return "-".join([*parts[:-2], parts[-1]])


@dataclass(frozen=True)
class CaptionRetrieval(SetBenchmark):
    """Images among captions and captions among images; outputs are similarities [1, I, T].

    Where the set's description says `rerank: K`, the matching head scores the K best candidates
    again: outputs are [3, I, T], the other two for images and for captions.
    """

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        image, text = _embeddings(model, batch)
        return model.logit_scale.exp() * image @ text.T

    def training_loss(
        self, model: ModalityModel, batch: Split, processes: Processes = ALONE
    ) -> Tensor:
        return contrastive_loss(*_embeddings(model, batch), model.logit_scale, processes)

    @torch.no_grad()
    def outputs_of(
        self,
        models: Sequence[ModalityModel],
        data: Examples,
        batch_size: int = 250,
        processes: Processes = ALONE,
    ) -> Tensor:
        assert isinstance(data, StoredSplit)
        captions, _ = captions_of(data)
        similar: Tensor | float = 0.0
        for model in models:
            image = _embedded_images(model, data, batch_size, processes)
            text = _embedded_texts(model, data, captions, batch_size, processes)
            similar = similar + image @ text.T / len(models)
        assert isinstance(similar, Tensor)
        if not data.description.rerank:
            return similar[None]
        again = reranked(models, data, captions, similar, batch_size, processes)
        return torch.stack([similar, *again])

    def guess(self, data: Examples) -> float:
        return 100 / len(data)

    def values(self, outputs: Tensor, data: Examples) -> Tensor:
        """Recall at 1 of each image, the mean of both directions, [I]."""
        assert isinstance(data, StoredSplit)
        return _both(outputs[0], outputs[0], captions_of(data)[1], 1)

    def score(self, outputs: Tensor, data: Examples) -> dict[str, Score]:
        assert isinstance(data, StoredSplit)
        image_of_T = captions_of(data)[1]
        scores = recall_scores(outputs[0], outputs[0], image_of_T)
        if len(outputs) > 1:
            again = recall_scores(outputs[1], outputs[2], image_of_T)
            scores |= {f"reranked_{name}": score for name, score in again.items()}
        return scores

    def first_answers(self, outputs: Tensor, num: int) -> Tensor:
        """The best images for the first captions of the first images, [num, 3]."""
        best = min(3, outputs.shape[1])
        return outputs[0][:, :num].topk(best, dim=0).indices.T


def captions_of(data: StoredSplit) -> tuple[list[str], Tensor]:
    """All captions of a split, and the image of each [T]."""
    by_row = data.column("captions")
    image_of = [image for image, captions in enumerate(by_row) for _ in captions]
    return [caption for captions in by_row for caption in captions], torch.tensor(image_of)


def recall_scores(to_text_IT: Tensor, to_image_IT: Tensor, image_of_T: Tensor) -> dict[str, Score]:
    """R@1, 5, 10 both ways, of all images and (`_1k`) as the mean over folds of 1,000."""
    scores = _recalls(to_text_IT, to_image_IT, image_of_T)
    parts = []
    for fold in folds(len(to_text_IT)):
        own = (image_of_T >= fold.start) & (image_of_T < fold.stop)
        some = to_text_IT[fold][:, own], to_image_IT[fold][:, own]
        parts.append(_recalls(*some, image_of_T[own] - fold.start))
    for name in parts[0] if parts else ():
        values = torch.tensor([part[name].value for part in parts])
        error = sum(part[name].error ** 2 for part in parts) ** 0.5 / len(parts)
        scores[f"{name}_{FOLD // 1000}k"] = Score(values.mean().item(), error)
    return scores


def _recalls(to_text_IT: Tensor, to_image_IT: Tensor, image_of_T: Tensor) -> dict[str, Score]:
    of_image, of_text = ranks(to_text_IT, image_of_T)
    if to_image_IT is not to_text_IT:
        of_text = ranks(to_image_IT, image_of_T)[1]
    scores = {}
    for k in (1, 5, 10):
        found_text, found_image = hits(of_image, k), hits(of_text, k)
        images = by_image(found_image, image_of_T, len(of_image))
        scores[f"recall_at_{k}"] = mean_score((found_text + images) / 2)
        scores[f"text_recall_at_{k}"] = mean_score(found_text)
        scores[f"image_recall_at_{k}"] = mean_score(images)
    return scores


def _both(to_text_IT: Tensor, to_image_IT: Tensor, image_of_T: Tensor, k: int) -> Tensor:
    of_image, of_text = ranks(to_text_IT, image_of_T)
    return (hits(of_image, k) + by_image(hits(of_text, k), image_of_T, len(to_image_IT))) / 2


def reranked(
    models: Sequence[ModalityModel],
    data: StoredSplit,
    captions: Sequence[str],
    similar_IT: Tensor,
    batch_size: int,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:
    """Similarities in which the best candidates come first, in the matching head's order.

    Returns:
        For images (their K best captions) and for captions (their K best images), [I, T] each.
    """
    num = data.description.rerank
    ahead = 3.0  # more than any similarity and chance are apart
    result = []
    for dim in (1, 0):
        best = similar_IT.topk(min(num, similar_IT.shape[dim]), dim=dim).indices
        marked = torch.zeros_like(similar_IT, dtype=torch.bool).scatter_(dim, best, True)
        images, texts = marked.nonzero(as_tuple=True)
        pairs = list(zip(images.tolist(), texts.tolist(), strict=True))
        chances = _matched(models, data, captions, pairs, batch_size, processes)
        scores = similar_IT.clone()
        scores[images, texts] = ahead + torch.tensor(chances, dtype=scores.dtype)
        result.append(scores)
    return result[0], result[1]


def _matched(
    models: Sequence[ModalityModel],
    data: StoredSplit,
    captions: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    batch_size: int,
    processes: Processes,
) -> list[float]:
    """The chance that image and caption of each pair belong together."""

    def answer(some: Sequence[tuple[int, int]]) -> list[float]:
        pixels = data.take([image for image, _ in some])["pixel_values"]
        batch = {"pixel_values": pixels, **data.encode([captions[text] for _, text in some])}
        chances = [
            model.statement_logits(joint_states(model, beside(model, batch))).softmax(1)[:, 1]
            for model in models
        ]
        return torch.stack([c.float().cpu() for c in chances]).mean(0).tolist()

    parts = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    return [chance for part in processes.in_turns(answer, parts) for chance in part]


@dataclass(frozen=True)
class SceneParsing(SetBenchmark):
    """A class for every pixel; outputs are counts by class [N, 3, C] at the maps' own size."""

    def logits(self, model: ModalityModel, batch: Split) -> Tensor:
        return model.segment_logits(model.image_states(batch["pixel_values"]))

    def loss(self, logits: Tensor, batch: Split) -> Tensor:
        """Cross-entropy of the labelled pixels, by scores interpolated to the crop's size."""
        labels = batch["labels"]
        scores = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(scores.float(), labels, reduction="sum")
        return total / (labels >= 0).sum().clamp(min=1)

    def outputs_of(
        self,
        models: Sequence[ModalityModel],
        data: Examples,
        batch_size: int = 250,
        processes: Processes = ALONE,
    ) -> Tensor:
        return super().outputs_of(models, data, min(batch_size, 8), processes)  # maps are large

    def chances(self, model: ModalityModel, batch: Split) -> Tensor:
        return self.logits(model, batch).softmax(1)

    def reduced(self, chances: Tensor, data: StoredSplit, numbers: range) -> Tensor:
        num_classes, parts = len(data.description.classes), []
        for scores_Chw, number in zip(chances, numbers, strict=True):
            labels = torch.from_numpy(label_map(data.rows[number]["map"]).astype("int64")) - 1
            size = labels.shape[0], labels.shape[1]
            parts.append(counts(predicted_labels(scores_Chw, size), labels, num_classes))
        return torch.stack(parts)

    def values(self, outputs: Tensor, data: Examples) -> Tensor:
        return image_scores(outputs)

    def guess(self, data: Examples) -> float:
        """The mean IoU of saying the commonest class to every pixel."""
        assert isinstance(data, StoredSplit)
        labelled = torch.stack(
            [
                torch.from_numpy(label_map(row["map"]).astype("int64"))
                .flatten()
                .bincount(minlength=len(data.description.classes) + 1)[1:]
                for row in data.rows
            ]
        )
        commonest = labelled.sum(0).argmax()
        given = torch.zeros_like(labelled)
        given[:, commonest] = labelled.sum(1)
        right = torch.zeros_like(labelled)
        right[:, commonest] = labelled[:, commonest]
        numbers = torch.stack([right, given, labelled], dim=1)
        return segmentation_scores(numbers)["mean_iou"].value

    def score(self, outputs: Tensor, data: Examples) -> dict[str, Score]:
        return segmentation_scores(outputs)

    def first_answers(self, outputs: Tensor, num: int) -> Tensor:
        """The class that most pixels of the first images were given, [num]."""
        return outputs[:num, 1].argmax(1)


def _embeddings(model: ModalityModel, batch: Split) -> tuple[Tensor, Tensor]:
    return model.encode_image(batch["pixel_values"]), model.encode_text(*text_of(batch))


def _embedded_images(
    model: ModalityModel, data: StoredSplit, batch_size: int, processes: Processes
) -> Tensor:
    def embed(start: int) -> Tensor:
        batch = data.take(range(start, min(start + batch_size, len(data))))
        pixels = {"pixel_values": batch["pixel_values"]}
        return model.encode_image(beside(model, pixels)["pixel_values"]).float().cpu()

    return torch.cat(processes.in_turns(embed, range(0, len(data), batch_size)))


def _embedded_texts(
    model: ModalityModel,
    data: StoredSplit,
    captions: Sequence[str],
    batch_size: int,
    processes: Processes,
) -> Tensor:
    def embed(start: int) -> Tensor:
        batch = beside(model, data.encode(captions[start : start + batch_size]))
        return model.encode_text(*text_of(batch)).float().cpu()

    return torch.cat(processes.in_turns(embed, range(0, len(captions), batch_size)))


def evalai(outputs: Tensor, data: StoredSplit) -> list[Mapping[str, object]]:
    """Answers to test questions as EvalAI takes them: `question_id` and `answer` of each."""
    answers = data.description.answers
    return [
        {"question_id": int(name), "answer": answers[n]}
        for name, n in zip(data.column("id"), outputs.tolist(), strict=True)
    ]


SETS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        OpenQuestions("vqav2", "VQAv2", "vqa_accuracy"),
        CaptionRetrieval("coco", "COCO retrieval", "recall_at_1"),
        CaptionRetrieval("flickr30k", "Flickr30k retrieval", "recall_at_1"),
        ImagePairs("nlvr2", "NLVR2", "accuracy"),
        SceneParsing("ade20k", "ADE20k", "mean_iou"),
    )
}
