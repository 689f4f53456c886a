"""AdaMerging descends on entropy; RegMean++ measures what the merged model feeds each block."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification

from alloy.errors import MergeError
from alloy.merging import merge
from alloy.statistics.moments import Gram


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


def family():
    """A base and two experts near it, as state dicts, and batches of token ids with padding for
    each.
    """
    module = bert(0)
    base = {k: v.detach().clone() for k, v in module.state_dict().items()}
    experts = [
        {k: v + 0.5 * (other[k] - v) if v.is_floating_point() else v for k, v in base.items()}
        for other in (bert(1).state_dict(), bert(2).state_dict())
    ]
    batches = []
    for seed in (3, 4):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 50, (8, 10), generator=generator)
        mask = (torch.arange(10) < torch.randint(4, 11, (8, 1), generator=generator)).long()
        batches.append([{"input_ids": ids, "attention_mask": mask}])
    return module, base, experts, batches


def entropy(module, weights, batches):
    with torch.no_grad():
        logits = [functional_call(module, dict(weights), kwargs=b[0]).logits for b in batches]
    return float(
        torch.stack(
            [torch.distributions.Categorical(logits=x).entropy().mean() for x in logits]
        ).sum()
    )


@pytest.fixture(scope="module")
def adaptive():
    module, base, experts, batches = family()

    def forward(weights, batch, task):
        assert task in (0, 1)
        return functional_call(module, dict(weights), kwargs=batch).logits

    def run(**options):
        return merge("adamerging", experts, base=base, forward=forward, batches=batches, **options)

    return module, base, experts, batches, run


def test_adamerging_lowers_the_entropy_and_more_with_coefficients_per_layer(adaptive):
    module, _, _, batches, run = adaptive
    reached = {
        per: entropy(module, run(per=per, num_steps=40, learning_rate=0.02), batches)
        for per in ("task", "layer")
    }
    before = entropy(module, run(num_steps=0), batches)
    assert reached["layer"] < reached["task"] < before - 0.01


def test_adamerging_without_steps_is_task_arithmetic(adaptive):
    _, base, experts, _, run = adaptive
    expected = merge("task_arithmetic", experts, base=base, coefficients=[0.3, 0.3])
    for name, tensor in run(num_steps=0).items():
        torch.testing.assert_close(tensor, expected[name])
    expected = merge("task_arithmetic", experts, base=base, coefficients=[0.5, 0.1])
    for name, tensor in run(num_steps=0, coefficients=[0.5, 0.1]).items():
        torch.testing.assert_close(tensor, expected[name])


def test_adamerging_moves_all_of_a_layer_by_one_coefficient_per_task(adaptive):
    """The merged task vector of a layer is a combination of the experts' with the same coefficients
    throughout.
    """
    _, base, experts, _, run = adaptive
    merged = run(per="layer", num_steps=5, learning_rate=0.05)
    layer = [k for k in base if k.startswith("bert.encoder.layer.0.")]
    assert len(layer) > 10
    flat = [torch.cat([(w[k] - base[k]).flatten() for k in layer]) for w in (*experts, merged)]
    found = torch.linalg.lstsq(torch.stack(flat[:2], 1), flat[2]).solution
    torch.testing.assert_close(torch.stack(flat[:2], 1) @ found, flat[2], atol=1e-4, rtol=1e-4)
    assert (found - 0.3).abs().max() > 0.05


def test_adamerging_refuses_starts_that_differ_within_what_it_learns_together(adaptive):
    *_, run = adaptive
    with pytest.raises(MergeError, match="they start differently"):
        run(per="task", coefficients={"bert.*": [0.3, 0.3], "*": [0.1, 0.1]})
    with pytest.raises(MergeError, match="read again"):
        merge("adamerging", adaptive[2], base=adaptive[1], forward=len, batches=[iter([1]), [1]])
    with pytest.raises(MergeError, match="1 iterables for 2 models"):
        merge("adamerging", adaptive[2], base=adaptive[1], forward=len, batches=[[1]])


EXACT = {"shrinkage": 0.0, "ridge": 0.0}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_regmean_plus_plus_measures_later_blocks_behind_merged_earlier_ones():
    """Two layers by hand: the second layer's Grams come from inputs that the merged first layer
    computes.
    """
    torch.manual_seed(0)
    models = [dict(Mlp().double().state_dict()) for _ in range(2)]
    inputs = [torch.randn(40, 4).double(), torch.randn(60, 4).double()]
    merged = merge(
        "regmean_plus_plus",
        models,
        module=Mlp().double(),
        batches=[[{"x": x}] for x in inputs],
        blocks=["first", "second"],
        **EXACT,
    )

    def regmean(name, xs):
        grams = [{name: Gram.zero(x.shape[1]).update(x)} for x in xs]
        return merge("regmean", [{name: m[name]} for m in models], statistics=grams, **EXACT)[name]

    torch.testing.assert_close(merged["first.weight"], regmean("first.weight", inputs))
    bias = sum(m["first.bias"] for m in models) / 2
    torch.testing.assert_close(merged["first.bias"], bias)
    hidden = [torch.relu(x @ merged["first.weight"].T + bias) for x in inputs]
    torch.testing.assert_close(merged["second.weight"], regmean("second.weight", hidden))


def test_regmean_plus_plus_measures_within_a_block_with_the_models_own_weights():
    """One block of two layers: what reaches the second comes from each model's own first layer."""
    torch.manual_seed(1)
    module = nn.ModuleDict({"block": Mlp().double()})
    module.forward = lambda x: module["block"](x)
    models = [{f"block.{k}": v for k, v in Mlp().double().state_dict().items()} for _ in range(2)]
    inputs = [torch.randn(40, 4).double(), torch.randn(60, 4).double()]
    merged = merge(
        "regmean_plus_plus",
        models,
        module=module,
        batches=[[{"x": x}] for x in inputs],
        blocks=["block"],
        **EXACT,
    )
    name = "block.second.weight"
    grams = []
    for model, x in zip(models, inputs, strict=True):
        hidden = torch.relu(x @ model["block.first.weight"].T + model["block.first.bias"])
        grams.append({name: Gram.zero(6).update(hidden)})
    expected = merge("regmean", [{name: m[name]} for m in models], statistics=grams, **EXACT)
    torch.testing.assert_close(merged[name], expected[name])


def test_regmean_plus_plus_merges_a_transformer_and_leaves_padding_out():
    module, _, experts, batches = family()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    blocks = ["bert.encoder.layer.0", "bert.encoder.layer.1"]

    def run(models, data):
        return merge("regmean_plus_plus", models, module=module, batches=data, blocks=blocks)

    merged = run(experts, batches)
    same = run([experts[0]] * 2, batches)
    for name, tensor in same.items():
        torch.testing.assert_close(tensor, experts[0][name], atol=1e-5, rtol=1e-5)
    other = [
        [
            {**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 7)}
            for b in task
        ]
        for task in batches
    ]
    for name, tensor in run(experts, other).items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-5, rtol=1e-5)
    mean = merge("linear", experts)
    assert (
        merged["bert.encoder.layer.1.output.dense.weight"]
        - mean["bert.encoder.layer.1.output.dense.weight"]
    ).abs().max() > 1e-3
    assert torch.equal(merged["classifier.weight"], mean["classifier.weight"])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_regmean_plus_plus_refuses_blocks_it_cannot_merge():
    module, _, experts, batches = family()
    with pytest.raises(MergeError, match=r"'bert.encoder.layer.7' has no linear layer"):
        merge(
            "regmean_plus_plus",
            experts,
            module=module,
            batches=batches,
            blocks=["bert.encoder.layer.7"],
        )
    partial = [{k: v for k, v in e.items() if "classifier" not in k} for e in experts]
    with pytest.raises(MergeError, match=r"the models lack: .*classifier.weight"):
        merge(
            "regmean_plus_plus",
            partial,
            module=module,
            batches=batches,
            blocks=["bert.encoder.layer.0"],
        )
