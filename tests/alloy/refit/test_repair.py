"""A repair leaves alone what is whole, and restores what was broken on purpose."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    ResNetConfig,
    ResNetForImageClassification,
)

import alloy
from alloy.errors import RepairError
from alloy.refit.repair import (
    fit_layers,
    inverse_temperature,
    match_variance,
    reestimate_norms,
    scale_outputs,
)


def _bert(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=3, max_position_embeddings=8, num_labels=3)
    return BertForSequenceClassification(config).eval()


def _gpt2(seed):
    torch.manual_seed(seed)
    return GPT2Model(
        GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=3, n_positions=8)
    ).eval()


def _resnet(seed):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return model


def _text(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (24, 8), generator=generator)
    lengths = torch.randint(3, 9, (24, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(8) < lengths).long()}


def _images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(24, 3, 32, 32, generator=generator)}


def _split(inputs, sizes):
    parts = {name: tensor.split(sizes) for name, tensor in inputs.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]


CASES = {"bert": (_bert, _text), "gpt2": (_gpt2, _text), "resnet": (_resnet, _images)}


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _outputs(model, weights, inputs):
    with torch.no_grad():
        output = functional_call(model, weights, (), inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def _mean(first, second):
    return {n: (t + second[n]) / 2 if t.is_floating_point() else t for n, t in first.items()}


@pytest.fixture(params=CASES)
def case(request):
    build, data = CASES[request.param]
    model, inputs = build(0), data()
    batches = _split(inputs, [8, 16])
    return model, build(1), inputs, batches


@pytest.mark.parametrize("inputs_of", ["merged", "parents"])
def test_a_model_merged_with_itself_keeps_every_weight(case, inputs_of):
    model, _, inputs, batches = case
    weights = reestimate_norms(model, _weights(model), batches)
    twins = {"a": weights, "b": weights}
    spec = alloy.find_symmetries(model, {n: t[:2] for n, t in inputs.items()})
    for repaired in (
        fit_layers(model, weights, twins, batches, inputs=inputs_of),
        match_variance(model, weights, twins, batches, spec),
        reestimate_norms(model, weights, batches),
    ):
        assert repaired.keys() == weights.keys()
        for name, tensor in repaired.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5)


def test_parents_that_are_the_merge_ask_for_no_pass(case):
    """One that differs anywhere does."""
    model, other, _, batches = case
    weights, passes = _weights(model), []
    counting = copy.deepcopy(model)
    counting.register_forward_hook(lambda *_: passes.append(1))
    fitted = fit_layers(counting, weights, {"a": weights, "b": dict(weights)}, batches)
    assert not passes
    assert all(torch.equal(fitted[name], tensor) for name, tensor in weights.items())
    fit_layers(counting, weights, {"a": weights, "b": _weights(other)}, batches)
    assert passes


def test_batch_norms_are_those_of_all_data_in_one_pass_or_in_many(monkeypatch):
    """Small data run as one batch; a pass for each norm over batches of any split gives the
    same.
    """
    build, data = CASES["resnet"]
    model, inputs = build(0), data()
    splits = [[24], [8, 16], [1, 5, 18]]
    found = [reestimate_norms(model, _weights(model), _split(inputs, split)) for split in splits]
    monkeypatch.setattr("alloy.refit.repair._SMALL", 0)
    found += [reestimate_norms(model, _weights(model), _split(inputs, split)) for split in splits]
    moved = [name for name, tensor in _weights(model).items() if not tensor.equal(found[0][name])]
    assert {name.rpartition(".")[2] for name in moved} == {"running_mean", "running_var"}
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_least_squares_brings_a_damaged_layer_back(case):
    """With a ridge near 0 the least-squares layers are the parent's where its inputs say what they
    do.
    """
    model, _, inputs, batches = case
    whole = reestimate_norms(model, _weights(model), batches)
    damaged = {
        n: t + 0.3 * t.std() * torch.randn_like(t)
        if t.ndim > 1 and not {"wte", "wpe"} & set(n.split(".")) and "embed" not in n
        else t
        for n, t in whole.items()
    }
    damaged = reestimate_norms(model, damaged, batches)
    fitted = fit_layers(model, damaged, {"parent": whole}, batches, ridge=1e-6)
    expected = _outputs(model, whole, inputs)
    before, after = (
        float((_outputs(model, w, inputs) - expected).norm() / expected.norm())
        for w in (damaged, fitted)
    )
    assert after < 0.15 * before, (before, after)


def test_least_squares_do_not_depend_on_the_split(case):
    model, other, inputs, batches = case
    parents = {"a": _weights(model), "b": _weights(other)}
    merged = reestimate_norms(model, _mean(*parents.values()), batches)
    one = fit_layers(model, merged, parents, batches)
    two = fit_layers(model, merged, parents, _split(inputs, [1, 5, 18]))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-3)


def test_one_layer_is_the_ridge_regression_on_the_weighted_targets():
    """Against an explicit least-squares problem whose last rows are the ridge; inputs of large
    mean.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3)).eval()
    merged, a, b = (
        {f"0.{n}": t for n, t in nn.Linear(5, 3).state_dict().items()} for _ in range(3)
    )
    x, share = torch.randn(30, 5) + 3, torch.rand(30)
    fitted = fit_layers(
        model,
        merged,
        {"a": a, "b": b},
        _split({"input": x}, [11, 19]),
        example_weights=torch.stack([share, 1 - share]),
        ridge=0.5,
    )
    y = share[:, None] * (x @ a["0.weight"].T + a["0.bias"])
    y = y + (1 - share)[:, None] * (x @ b["0.weight"].T + b["0.bias"])
    penalty = (0.5 * 30 * x.var(0, correction=0).mean()).sqrt()
    rows = torch.cat([torch.cat([x, torch.ones(30, 1)], 1), penalty * torch.eye(5, 6)])
    solution = torch.linalg.lstsq(rows, torch.cat([y, penalty * merged["0.weight"].T])).solution
    torch.testing.assert_close(fitted["0.weight"], solution[:5].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fitted["0.bias"], solution[5], rtol=1e-4, atol=1e-4)


def test_fitted_batch_norms_hold_the_moments_of_their_inputs():
    model, batches = _resnet(0), _split(_images(), [8, 16])
    parents = {"a": _weights(model), "b": _weights(_resnet(1))}
    fitted = fit_layers(model, _mean(*parents.values()), parents, batches)
    again = reestimate_norms(model, fitted, batches)
    for name, tensor in fitted.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-3, atol=1e-4)


def test_padding_has_no_say_in_least_squares():
    model, other = _bert(0), _bert(1)
    parents = {"a": _weights(model), "b": _weights(other)}
    merged = _mean(*parents.values())
    inputs = _text()
    noise = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)
    one = fit_layers(model, merged, parents, [inputs])
    two = fit_layers(model, merged, parents, [{**inputs, "input_ids": noise}])
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-4)


def test_the_only_parent_that_counts_is_followed(case):
    """Example weights of 1 for one parent give its function back; a batch's are its own."""
    model, other, _, batches = case
    parents = {"a": _weights(model), "b": _weights(other)}
    merged = reestimate_norms(model, _mean(*parents.values()), batches)
    ones = torch.stack([torch.zeros(24), torch.ones(24)])
    routed = fit_layers(model, merged, parents, batches, example_weights=ones)
    named = fit_layers(model, merged, parents, batches, coefficients={"a": 0, "b": 1})
    for name, tensor in routed.items():
        torch.testing.assert_close(tensor, named[name])
    shifted = fit_layers(model, merged, parents, batches, example_weights=ones.flip(0))
    assert any(not torch.equal(shifted[name], routed[name]) for name in routed)


def test_variance_repair_gives_units_the_parents_mean_moments():
    """In the last layer that writes units: the layers before have been repaired when it is."""
    model, other, inputs = _bert(0), _bert(1), _text()
    parents = {"a": _weights(model), "b": _weights(other)}
    spec = alloy.find_symmetries(model, inputs)
    repaired = match_variance(
        model, _mean(*parents.values()), parents, [inputs], spec, coefficients={"a": 0.3, "b": 0.7}
    )

    def moments(weights, layer):
        seen = []
        handle = model.get_submodule(layer).register_forward_hook(lambda *a: seen.append(a[2]))
        _outputs(model, weights, inputs)
        handle.remove()
        kept = seen[0][inputs["attention_mask"].bool()] if seen[0].ndim == 3 else seen[0]
        return kept.mean(0), kept.std(0, correction=0)

    for layer in ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.output.dense"):
        (mean, deviation), (a, s), (b, t) = (
            moments(w, layer) for w in (repaired, parents["a"], parents["b"])
        )
        torch.testing.assert_close(mean, 0.3 * a + 0.7 * b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(deviation, 0.3 * s + 0.7 * t, rtol=1e-3, atol=1e-4)
    assert torch.equal(repaired["classifier.weight"], _mean(*parents.values())["classifier.weight"])


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [7, 17]])
def test_batch_norms_hold_the_moments_of_their_inputs(sizes):
    model, inputs = _resnet(0), _images()
    weights = reestimate_norms(model, _weights(model), _split(inputs, sizes))
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, a, y, name=name: seen.update({name: a[0].clone()})
            )
    _outputs(model, weights, inputs)
    assert len(seen) == 6
    for name, x in seen.items():
        found = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        torch.testing.assert_close(found[0], x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_the_skeleton_keeps_its_own_weights(case):
    model, other, _, batches = case
    before = _weights(model)
    parents = {"a": _weights(model), "b": _weights(other)}
    fit_layers(model, _mean(*parents.values()), parents, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_temperature_finds_the_factor_that_was_taken_away():
    logits = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 3
    assert inverse_temperature(logits, logits.softmax(1)) == pytest.approx(1, abs=1e-6)
    assert inverse_temperature(logits / 4, logits.softmax(1)) == pytest.approx(4, abs=1e-4)
    labels = logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert inverse_temperature(logits / 4, labels) == pytest.approx(4, rel=0.15)
    factor = inverse_temperature(logits / 4, labels)
    losses = [
        float(nn.functional.cross_entropy(f * factor * logits / 4, labels)) for f in (0.97, 1, 1.03)
    ]
    assert losses[1] < min(losses[0], losses[2])


def test_scaling_a_layer_scales_what_it_computes():
    model, inputs = _bert(0), _text()
    weights = _weights(model)
    scaled = scale_outputs(weights, "classifier", 2.5)
    torch.testing.assert_close(
        _outputs(model, scaled, inputs), 2.5 * _outputs(model, weights, inputs)
    )
    with pytest.raises(RepairError, match=r"no weight 'nothing\.weight'"):
        scale_outputs(weights, "nothing", 2.0)


def test_what_cannot_be_repaired_is_refused():
    model, inputs = _bert(0), _text()
    weights = _weights(model)
    parents = {"a": weights, "b": _weights(_bert(1))}
    for changes, message in [
        ({"batches": []}, "no batches"),
        ({"parents": {}}, "no parents"),
        ({"ridge": 0.0}, "take one > 0"),
        ({"coefficients": {"a": 1.0}}, "sum to 1"),
        ({"coefficients": {"a": 0.5, "b": 0.4}}, "sum to 1"),
        ({"example_weights": torch.ones(2, 3)}, r"need \(2, 24\)"),
        ({"parents": {"a": {"x": torch.ones(2)}}}, "must be aligned"),
    ]:
        arguments = {"parents": parents, "batches": [inputs], **changes}
        with pytest.raises(RepairError, match=message):
            fit_layers(model, weights, **arguments)
    with pytest.raises(RepairError, match="no batches"):
        reestimate_norms(model, weights, [])
    with pytest.raises(RepairError, match="NaN or Inf"):
        inverse_temperature(torch.full((2, 2), torch.nan), torch.tensor([0, 1]))
    with pytest.raises(RepairError, match="give labels"):
        inverse_temperature(torch.ones(2, 2), torch.ones(3, 2))
