"""Measures cost what differs, and padding costs nothing."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tasks.models.evaluate import Measured
from tasks.models.measures import yardsticks
from tasks.models.measures.yardsticks import Remembered, Unlabelled, as_candidate

IDS = torch.randint(20, (24, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.randint(3, 10, (24, 1), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": IDS, "attention_mask": (torch.arange(9) < LENGTHS).long()}


def _bert(seed, kind=BertModel):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    return kind(BertConfig(**sizes, num_attention_heads=3)).eval()


class Counting:
    def __init__(self):
        self.calls = 0

    def score(self, candidates):
        self.calls += 1
        return {"loss": sum(float(c(INPUTS).rows.mean()) for c in candidates)}


def test_equal_weights_are_measured_once():
    counting = Counting()
    measured = Measured(counting)
    one, two = _bert(0), _bert(1)
    first = measured.score([one])
    assert measured.score([copy.deepcopy(one)]) == first
    assert counting.calls == 1
    assert measured.score([two]) != first
    assert measured.score([one, two]) != first
    assert counting.calls == 3
    one.pooler.dense.bias.data[0] += 1e-6
    measured.score([one])
    assert counting.calls == 4


def test_a_parent_answers_each_batch_once(monkeypatch):
    """For the yardstick, its own score and the ensemble's; no more than MOST_BYTES are kept."""
    calls = []
    one, other = as_candidate(_bert(0)), as_candidate(_bert(1))

    def parent(batch):
        calls.append(batch)
        return one(batch)

    for most, num_calls in ((2**28, 3), (0, 12)):
        monkeypatch.setattr(yardsticks, "MOST_BYTES", most)
        calls.clear()
        remembered = Remembered(parent)
        yardstick = Unlabelled(INPUTS, None, [remembered, other], 8)
        scores = yardstick.score([remembered]), yardstick.score([remembered, remembered])
        assert len(calls) == num_calls
        plain = Unlabelled(INPUTS, None, [one, other], 8)
        assert scores == (plain.score([parent]), plain.score([parent, parent]))


@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_the_order_of_texts_and_their_padding_change_no_score(kind):
    parents = [as_candidate(_bert(seed, kind)) for seed in (0, 1)]
    other = as_candidate(_bert(2, kind))
    given = Unlabelled(INPUTS, None, parents, 5).score([other])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    padded = {
        name: torch.cat([tensor, torch.zeros(24, 4, dtype=torch.int64)], 1)[order]
        for name, tensor in INPUTS.items()
    }
    again = Unlabelled(padded, None, parents, 24).score([other])
    assert given.keys() == again.keys()
    for name, score in given.items():
        assert again[name].value == pytest.approx(score.value, rel=1e-4, abs=1e-4), name


def test_padding_is_not_computed():
    seen = []
    one = as_candidate(_bert(0))

    def parent(batch):
        seen.append(batch["input_ids"].shape[1])
        return one(batch)

    Unlabelled(INPUTS, None, [parent], 6)
    assert seen == sorted(seen)
    assert seen[0] < 9
