"""Scores with standard errors of what models answer on a benchmark.

Shapes: N examples, T tokens, C classes, E of an embedding, M captions of all pictures.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from alloy.devices import beside
from tasks.evaluation.score import Score, mean_score

RESAMPLES = 200  # of the examples, for the standard error of F1
TOP = 5
CAUSAL = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


class NextTokens(NamedTuple):
    """A language model's predictions of a text's next tokens: likelihoods and first choices."""

    losses_N: Tensor  # summed over an example's tokens, in nats
    counts_N: Tensor  # tokens that were to be said
    words_NT: Tensor  # the tokens
    choices_NT: Tensor  # -1 where none is due


def is_causal(model: PreTrainedModel) -> bool:
    """True for a class of transformers that says the next token of a text."""
    name = type(model).__name__
    names = {n for mapping in CAUSAL for v in mapping.values() for n in _listed(v)}
    return name in names and not model.config.is_encoder_decoder


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _batches(inputs: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    num = len(next(iter(inputs.values())))
    for start in range(0, num, size):
        yield {name: tensor[start : start + size] for name, tensor in inputs.items()}


@torch.no_grad()
def next_tokens(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int) -> NextTokens:
    """The negative log-likelihood of each text, and the model's first choice at each place."""
    parts = []
    for batch in _batches(inputs, batch_size):
        logits = model(**beside(model, batch)).logits[:, :-1].float().cpu()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        due, words = mask[:, 1:] & mask[:, :-1], batch["input_ids"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), words, reduction="none")
        choices = logits.argmax(-1).masked_fill(~due, -1)
        parts.append((losses.double().masked_fill(~due, 0).sum(1), due.sum(1), words, choices))
    return NextTokens(*(torch.cat(each) for each in zip(*parts, strict=True)))


def perplexity(seen: NextTokens) -> dict[str, Score]:
    """The log-likelihood of a token in nats, and the perplexity.

    Errors are those of a ratio of sums over texts, whose tokens are no independent draws.
    """
    loss = _ratio(seen.losses_N, seen.counts_N)
    value = torch.tensor(loss.value).exp().item()
    return {
        "log_likelihood": Score(-loss.value, loss.error),
        "perplexity": Score(value, value * loss.error),
    }


def agreement(seen: NextTokens, others: Mapping[str, NextTokens]) -> dict[str, Score]:
    """The share of next tokens that are another model's first choice, too, in per cent.

    Only of models that read the texts as the same tokens.
    """
    scores, hits = {}, []
    for name, other in others.items():
        if seen.words_NT.shape != other.words_NT.shape or not seen.words_NT.equal(other.words_NT):
            continue
        hits.append(((seen.choices_NT == other.choices_NT) & (seen.choices_NT >= 0)).sum(1))
        share = _ratio(hits[-1].double(), seen.counts_N)
        scores[f"agreement_{name}"] = Score(100 * share.value, 100 * share.error)
    if hits:
        mean = _ratio(torch.stack(hits).double().mean(0), seen.counts_N)
        scores["agreement"] = Score(100 * mean.value, 100 * mean.error)
    return scores


def _ratio(sums_N: Tensor, counts_N: Tensor) -> Score:
    """The mean over all tokens, and its standard error over examples (of a ratio estimator)."""
    num, total = len(sums_N), counts_N.sum().double()
    mean = sums_N.sum() / total
    apart = sums_N - mean * counts_N
    error = (apart.square().sum() * num / max(1, num - 1)).sqrt() / total
    return Score(mean.item(), error.item())


@torch.no_grad()
def class_logits(model: nn.Module, inputs: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """A classifier's logits of all examples [N, C]."""
    parts = [model(**beside(model, batch)).logits for batch in _batches(inputs, batch_size)]
    return torch.cat([part.float().cpu() for part in parts])


def classification(logits_NC: Tensor, labels_N: Tensor) -> dict[str, Score]:
    """Accuracy, top-5 accuracy where there are more classes, and macro F1, in per cent."""
    choices = logits_NC.argmax(1)
    scores = {"accuracy": mean_score(choices == labels_N)}
    if logits_NC.shape[1] > TOP:
        best = logits_NC.topk(TOP, dim=1).indices
        scores["top_5_accuracy"] = mean_score((best == labels_N[:, None]).any(1))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(labels_N), (RESAMPLES, len(labels_N)), generator=generator)
    drawn = torch.stack([_macro_f1(choices[row], labels_N[row]) for row in rows])
    scores["f1"] = Score(_macro_f1(choices, labels_N).item(), drawn.std(correction=0).item())
    return scores


def _macro_f1(choices_N: Tensor, labels_N: Tensor) -> Tensor:
    """The mean of the F1 scores of all classes that occur, in per cent."""
    num = int(max(choices_N.max(), labels_N.max())) + 1
    hits = torch.bincount(labels_N[choices_N == labels_N], minlength=num)
    both = torch.bincount(choices_N, minlength=num) + torch.bincount(labels_N, minlength=num)
    return 100 * (2 * hits[both > 0] / both[both > 0]).double().mean()


def has_two_towers(model: nn.Module) -> bool:
    """True for a model that embeds pictures and texts in one space (CLIP, SigLIP, ...)."""
    return all(hasattr(model, f"get_{kind}_features") for kind in ("image", "text"))


@torch.no_grad()
def embeddings(model: Any, kind: str, inputs: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """Unit-length embeddings of pictures (`image`) or texts (`text`) [N, E]."""
    embed, parts = getattr(model, f"get_{kind}_features"), []
    for batch in _batches(inputs, batch_size):
        features = embed(**beside(model, batch))
        tensor = features if isinstance(features, Tensor) else features.pooler_output
        tensor = tensor[:, 0] if tensor.ndim == 3 else tensor  # FLAVA's: of all its tokens
        parts.append(F.normalize(tensor.float().cpu(), dim=1))
    return torch.cat(parts)


def retrieval(images_NE: Tensor, texts_ME: Tensor, owners_M: Tensor) -> dict[str, Score]:
    """Recall of pictures by their captions, of captions by their picture, and the mean at 1.

    Args:
        owners_M: the picture that each caption belongs to.
    """
    similarity_MN = texts_ME @ images_NE.T
    scores: dict[str, Score] = {}
    for k in (1, TOP):
        if k < len(images_NE):
            best = similarity_MN.topk(k, dim=1).indices
            hits = (best == owners_M[:, None]).any(1).double()
            scores[f"image_recall_at_{k}"] = mean_score(_by_picture(hits, owners_M))
        if k < len(texts_ME):
            best = owners_M[similarity_MN.T.topk(k, dim=1).indices]
            own = torch.arange(len(images_NE))[:, None]
            scores[f"text_recall_at_{k}"] = mean_score((best == own).any(1))
    pair = [scores["image_recall_at_1"], scores["text_recall_at_1"]]
    mean, error = (sum(values) / 2 for values in zip(*pair, strict=True))
    return {**scores, "recall_at_1": Score(mean, error)}  # both are of the same pictures


def _by_picture(hits_M: Tensor, owners_M: Tensor) -> Tensor:
    """The mean over each picture's captions: its captions are no independent draws."""
    counts = owners_M.bincount().double()
    return torch.zeros(len(counts), dtype=torch.float64).index_add(0, owners_M, hits_M) / counts
