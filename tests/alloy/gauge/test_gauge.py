"""Laws of the gauge search: what may not change, what must fall, what is undone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from alloy.errors import GaugeError
from alloy.gauge import descent, merge_layers, search_gauge
from alloy.modality import ModalityConfig
from alloy.modality.streams import Tower
from alloy.statistics import linear_systems
from alloy.statistics.moments import Gram
from alloy.symmetry import (
    compose,
    find_symmetries,
    fold_norms,
    identity,
    invert,
    random_transforms,
    transport,
    unfold_norms,
    with_kind,
)

HIDDEN, HEADS, BLOCKS = 12, 3, 2


def tower(seed: int) -> Tower:
    """A pre-norm transformer with LayerNorms, weights large enough that blocks matter."""
    torch.manual_seed(seed)
    config = ModalityConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_joint_layers=0,
        num_attention_heads=HEADS,
        intermediate_size=20,
        layer_scale=None,
    )
    model = Tower(config, 0).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def spec():
    inputs = {"x_BSD": torch.randn(2, 4, HIDDEN, dtype=torch.float64)}
    return find_symmetries(tower(0), inputs)


def folded(model, spec):
    weights, folded_spec = fold_norms(dict(model.state_dict()), spec)
    return weights, folded_spec


def inputs(seed: int, rank: int = HIDDEN):
    """Tokens of a given rank, so that models may read different subspaces."""
    torch.manual_seed(seed)
    x = torch.randn(40, 6, rank, dtype=torch.float64)
    return x @ torch.randn(rank, HIDDEN, dtype=torch.float64)


@torch.no_grad()
def grams(weights, x, *, constant: bool = True) -> dict[str, Gram]:
    model = tower(0)
    model.load_state_dict(weights)
    found = {}

    def see(name, x_BSD):
        x_ND = x_BSD.flatten(0, 1)
        if constant:
            x_ND = torch.cat([x_ND, torch.ones(len(x_ND), 1, dtype=x_ND.dtype)], 1)
        found[f"{name}.weight"] = Gram.zero(x_ND.shape[1]).update(x_ND)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("blocks"):
            layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
    model(x)
    return found


def output(weights, x):
    model = tower(0)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(x)


@pytest.fixture(scope="module")
def three(spec):
    """Three unrelated models on data of their own, and the folded spec."""
    data = [inputs(seed, rank) for seed, rank in ((1, 3), (2, 4), (3, 5))]
    models = [folded(tower(seed), spec)[0] for seed in (4, 5, 6)]
    _, folded_spec = folded(tower(4), spec)
    return models, folded_spec, [grams(w, x) for w, x in zip(models, data, strict=True)], data


def moved(weights, spec, transforms, x):
    there = transport(weights, spec, transforms)
    return there, grams(there, x)


SHORT = {"steps": 12, "max_rounds": 1}
SHORTEST = {"steps": 3, "max_rounds": 1, "starts": ["opposed axes"]}


def test_the_canonical_form_and_any_gauge_are_undone(spec):
    """Fold, centre and turn; turn back and unfold: the weights as they were, but for the means of
    writers.

    No norm lets those means through, so the function is what it was; folding gives the canonical
    form again.
    """
    weights = dict(tower(3).state_dict())
    canonical, folded_spec = folded(tower(3), spec)
    turns = random_transforms(
        with_kind(folded_spec, "orthogonal"), torch.Generator().manual_seed(1)
    )
    moved = transport(canonical, folded_spec, turns)
    there = transport(moved, folded_spec, invert(turns))
    back = unfold_norms(there, spec, weights)
    x = inputs(2)
    torch.testing.assert_close(output(back, x), output(weights, x))
    writers = {axis.parameter for fold in spec.folds for axis in fold.centred}
    assert writers >= {"writer.weight", "blocks.0.attention.proj.weight", "blocks.1.ffn.fc2.bias"}
    for name, tensor in weights.items():
        lost = tensor - back[name]
        if name in writers:
            assert tensor.mean(0).abs().max() > 1e-3
            lost = lost - lost.mean(0, keepdim=True)
        torch.testing.assert_close(lost, torch.zeros_like(lost), atol=1e-9, rtol=0)
    again, _ = fold_norms(back, spec)
    for name, tensor in canonical.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-9, rtol=0)


def test_a_planted_symmetry_of_a_copy_is_undone(spec):
    """A model and its copy under a random element of the whole group merge into the model again."""
    weights, folded_spec = folded(tower(7), spec)
    x = inputs(8)
    drawn = random_transforms(
        with_kind(folded_spec, "orthogonal"), torch.Generator().manual_seed(9)
    )
    copy, copy_grams = moved(weights, folded_spec, drawn, x)
    torch.testing.assert_close(output(copy, x), output(weights, x))
    models, measured = [weights, copy], [grams(weights, x), copy_grams]
    gauge = search_gauge(models, folded_spec, measured, **SHORT)
    assert gauge.error_before > 1
    assert gauge.error_after < 1e-20 * gauge.error_before
    merged = merge_layers(models, folded_spec, measured, gauge.transforms)
    torch.testing.assert_close(output({**weights, **merged}, x), output(weights, x))


def test_j_falls_functions_stay_and_iterates_are_orthogonal(three):
    models, spec, measured, data = three
    gauge = search_gauge(models, spec, measured, **SHORT)
    assert gauge.error_after < 0.7 * gauge.error_before
    assert list(gauge.history) == sorted(gauge.history, reverse=True)
    turned = 0
    for weights, transforms, x in zip(models, gauge.transforms, data, strict=True):
        there = transport(weights, spec, transforms)
        torch.testing.assert_close(output(there, x), output(weights, x))
        for transform in transforms.values():
            if transform.matrix is not None:
                eye = torch.eye(transform.size, dtype=torch.float64)
                product = transform.matrix @ transform.matrix.mT
                assert (product - eye).abs().max() < 1e-10
                turned += 1
    assert turned >= 2 * (1 + 2 * BLOCKS)  # of two models: the stream, and two widths a block
    for name, transform in gauge.transforms[0].items():
        assert torch.equal(transform.as_matrix(), identity(spec)[name].as_matrix())
    (stream,) = gauge.streams
    assert stream.width == HIDDEN
    assert stream.pooled_after <= min(HIDDEN - 1, sum(stream.own))


def test_j_is_that_of_the_merged_weights_and_no_joint_transform_changes_it(three):
    """J reported is J computed by hand from W*; turning all models together leaves it."""
    models, spec, measured, data = three
    still = [identity(spec)] * 3
    gauge = search_gauge(models, spec, measured, ridge=1e-9, starts=["identity"], max_rounds=0)
    merged = merge_layers(models, spec, measured, still, ridge=1e-9)
    by_hand = 0.0
    for name in measured[0]:
        bias = name.replace("weight", "bias")
        for weights, own in zip(models, measured, strict=True):
            off = torch.cat(
                [merged[name] - weights[name], (merged[bias] - weights[bias])[:, None]], 1
            )
            by_hand += float((off @ own[name].mean_DD * off).sum()) / 3
    assert gauge.error_before == pytest.approx(by_hand, rel=1e-5)

    together = random_transforms(with_kind(spec, "orthogonal"), torch.Generator().manual_seed(2))
    all_moved = [moved(w, spec, together, x) for w, x in zip(models, data, strict=True)]
    again = search_gauge(
        [w for w, _ in all_moved],
        spec,
        [g for _, g in all_moved],
        ridge=1e-9,
        starts=["identity"],
        max_rounds=0,
    )
    assert again.error_before == pytest.approx(gauge.error_before, rel=1e-6)


def test_equal_models_keep_the_identity(spec):
    weights, folded_spec = folded(tower(7), spec)
    measured = grams(weights, inputs(8))
    gauge = search_gauge([weights] * 3, folded_spec, [measured] * 3, **SHORT)
    assert gauge.start == "identity"
    assert gauge.error_before == pytest.approx(0, abs=1e-20)
    for transforms in gauge.transforms:
        for name, transform in transforms.items():
            unmoved = identity(folded_spec)[name].as_matrix()
            torch.testing.assert_close(transform.as_matrix(), unmoved, atol=1e-9, rtol=0)


@pytest.mark.parametrize("start", ["identity", "shared axes", "opposed axes"])
def test_no_start_ends_above_the_identity(three, start):
    models, spec, measured, _ = three
    gauge = search_gauge(models, spec, measured, starts=[start], steps=2, max_rounds=1)
    assert gauge.error_after <= gauge.error_before


def test_fixed_spaces_and_models_of_some_layers(three):
    """A fixed stream stays; an expert that has the last block only is moved there alone."""
    models, spec, measured, data = three
    part = [
        measured[0],
        measured[1],
        {name: gram for name, gram in measured[2].items() if name.startswith("blocks.1.")},
    ]
    stream = spec.layout["writer.weight"][0].space
    gauge = search_gauge(models, spec, part, fixed=[stream], **SHORT)
    assert gauge.error_after < gauge.error_before
    for transforms, weights, x in zip(gauge.transforms, models, data, strict=True):
        eye = torch.eye(HIDDEN, dtype=torch.float64)
        assert torch.equal(transforms[stream].as_matrix(), eye)
        torch.testing.assert_close(
            output(transport(weights, spec, transforms), x), output(weights, x)
        )
    unmoved = identity(spec)
    for name, transform in gauge.transforms[2].items():
        if name.startswith("blocks.0."):
            assert torch.equal(transform.as_matrix(), unmoved[name].as_matrix())


def test_equal_seeds_give_equal_bits(three):
    models, spec, measured, _ = three

    def run(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return search_gauge(
            models[:2], spec, measured[:2], generator=generator, steps=4, max_rounds=1
        )

    first, second = run(1), run(1)
    assert first.error_after == second.error_after
    for name, transform in first.transforms[1].items():
        assert torch.equal(transform.as_matrix(), second.transforms[1][name].as_matrix())


def test_layers_that_are_computed_twice_give_the_same_bits(three, monkeypatch):
    models, spec, measured, _ = three
    kept = search_gauge(models, spec, measured, **SHORTEST)
    monkeypatch.setattr(descent, "GRAPH_BYTES", 0)
    again = search_gauge(models, spec, measured, **SHORTEST)
    assert again.history == kept.history
    for name, transform in kept.transforms[1].items():
        assert torch.equal(transform.as_matrix(), again.transforms[1][name].as_matrix())


def test_float32_steps_turn_as_far_as_float64s(three, monkeypatch):
    """Where float64 is slow, with float64's orthogonality; large forms of rows are not needed."""
    models, spec, measured, _ = three
    wide = search_gauge(models, spec, measured, ridge=1e-2, **SHORTEST)
    for module in (descent, linear_systems):
        monkeypatch.setattr(module, "is_slow_in_float64", lambda _: True)
    monkeypatch.setattr(descent, "FORM_ENTRIES", 0)
    narrow = search_gauge(models, spec, measured, ridge=1e-2, **SHORTEST)
    assert narrow.error_after == pytest.approx(wide.error_after, rel=0.02)
    for name, transform in narrow.transforms[1].items():
        matrix = transform.as_matrix()
        eye = torch.eye(matrix.shape[-1], dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.mT, eye.expand_as(matrix), msg=name)
    refined = merge_layers(models, spec, measured, wide.transforms)
    monkeypatch.undo()
    exact = merge_layers(models, spec, measured, wide.transforms)
    for name, weight in exact.items():
        torch.testing.assert_close(refined[name], weight, rtol=1e-8, atol=1e-10)


def test_without_a_constant_biases_are_not_merged(three):
    models, spec, _, data = three
    bare = [grams(w, x, constant=False) for w, x in zip(models, data, strict=True)]
    merged = merge_layers(models, spec, bare, [identity(spec)] * 3)
    assert merged.keys() == bare[0].keys()


def test_the_search_begins_at_transforms_that_are_given(spec):
    """Given the very transforms that hide a copy, inverted, nothing is left to search; held streams
    stay.
    """
    weights, folded_spec = folded(tower(7), spec)
    x = inputs(8)
    drawn = random_transforms(
        with_kind(folded_spec, "orthogonal"), torch.Generator().manual_seed(9)
    )
    copy, copy_grams = moved(weights, folded_spec, drawn, x)
    both = [weights, copy], folded_spec, [grams(weights, x), copy_grams]
    back = {"undone": [{}, invert(drawn)]}
    found = search_gauge(*both, starts=["identity"], initial=back, steps=1, max_rounds=0)
    assert found.start == "undone"
    assert found.errors["undone"] < 1e-20 * found.errors["identity"]
    stream = folded_spec.layout["writer.weight"][0].space
    held = search_gauge(*both, initial=back, held=[(1, stream)], steps=1, max_rounds=0)
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    assert torch.equal(held.transforms[1][stream].as_matrix(), eye)
    assert min(held.errors.values()) > 1e-3 * found.errors["identity"]


def test_refusals(three):
    models, spec, measured, _ = three
    with pytest.raises(GaugeError, match=r"starts \['random'\] are unknown"):
        search_gauge(models, spec, measured, starts=["random"])
    with pytest.raises(GaugeError, match="there is no start"):
        search_gauge(models, spec, measured, starts=[])
    for name, found, message in (
        ("identity", [{}] * 3, "is the name of a start"),
        ("mine", [{}], "'mine' moves 1 models; there are 3"),
        ("mine", [{"nowhere": {}}] * 3, r"'mine' moves \['nowhere'\]"),
    ):
        with pytest.raises(GaugeError, match=message):
            search_gauge(models, spec, measured, initial={name: found})
    with pytest.raises(GaugeError, match=r"fixed spaces \['nowhere'\] are not in the spec"):
        search_gauge(models, spec, measured, fixed=["nowhere"])
    with pytest.raises(GaugeError, match="reference 3 is none of 3 models"):
        search_gauge(models, spec, measured, reference=3)
    with pytest.raises(GaugeError, match="no layer has a Gram in two models"):
        search_gauge(models, spec, [measured[0], {}, {}])
    name = "blocks.0.ffn.fc1.weight"
    for gram, message in (
        (Gram.zero(5).update(torch.ones(2, 5)), r"is of 5 inputs; the layer has 12"),
        (Gram.zero(HIDDEN), "is of no tokens"),
        (replace(measured[0][name], sum_DD=measured[0][name].sum_DD * float("nan")), "not finite"),
    ):
        with pytest.raises(GaugeError, match=message):
            search_gauge(models[:2], spec, [{**measured[0], name: gram}, measured[1]])
    with pytest.raises(GaugeError, match=r"grams\[0\] has 'nowhere.weight', which the spec lacks"):
        search_gauge(models[:2], spec, [{"nowhere.weight": measured[0][name]}, measured[1]])


@pytest.mark.slow
def test_composing_with_a_further_transform_keeps_the_optimum_within_reach(three):
    """The search from models that were moved ends where the search from the models does, or
    near.
    """
    models, spec, measured, data = three
    drawn = random_transforms(with_kind(spec, "orthogonal"), torch.Generator().manual_seed(3))
    there, there_grams = moved(models[1], spec, drawn, data[1])
    settings = {"steps": 40, "max_rounds": 4, "starts": ["shared axes", "opposed axes"]}
    here = search_gauge(models[:2], spec, measured[:2], **settings)
    far = search_gauge([models[0], there], spec, [measured[0], there_grams], **settings)
    assert far.error_before > here.error_after
    assert far.error_after < 1.5 * here.error_after
    assert compose(drawn, far.transforms[1]).keys() == here.transforms[1].keys()
