"""Alignment recovers what was planted, leaves alone what fits, and never changes the function."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import alloy
from alloy.alignment.grams import transport_grams
from alloy.alignment.matching import operators, permute
from alloy.alignment.moves import flat_order
from alloy.alignment.report import describe
from alloy.alignment.search import Search, align
from alloy.alignment.similarity import OfUnits, Similarity
from alloy.errors import AlignmentError
from alloy.statistics.moments import CrossMoments
from alloy.symmetry import identity, random_transforms, transport
from alloy.symmetry.parts import restrict
from alloy.symmetry.spec import with_kind

SIZE = 12  # hidden = intermediate = positions = vocabulary: nothing fits by the luck of its shape


def _bert(seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=SIZE,
            hidden_size=SIZE,
            intermediate_size=SIZE,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=SIZE,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


@pytest.fixture(scope="module")
def model():
    return _bert(0)


@pytest.fixture(scope="module")
def inputs():
    return {"input_ids": torch.randint(SIZE, (8, SIZE), generator=torch.Generator().manual_seed(3))}


@pytest.fixture(scope="module")
def spec(model, inputs):
    return alloy.find_symmetries(model, inputs)


def _permutations(spec, seed):
    return random_transforms(with_kind(spec, "permutation"), torch.Generator().manual_seed(seed))


def _statistics(reference, other, spec, inputs):
    """Cross-moments of all units of two models over the same tokens."""
    models = {"reference": reference, "other": other}
    return alloy.collect(models, [inputs], spec).between("reference", "other")


@pytest.mark.parametrize("space", ["weight", "activation", "dual"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_permutation_of_every_space_is_undone_exactly(model, inputs, spec, space, seed):
    planted = transport(model.state_dict(), spec, _permutations(spec, seed))
    other = _bert(0)
    other.load_state_dict(planted)
    statistics = None if space == "weight" else _statistics(model, other, spec, inputs)
    found = align(model.state_dict(), planted, spec, statistics, space=space)
    recovered = transport(planted, spec, found)
    for name, tensor in model.state_dict().items():
        if name.endswith("key.bias"):
            continue  # no activation depends on it: its order follows the query's
        torch.testing.assert_close(recovered[name], tensor, rtol=0, atol=0, msg=name)


def test_a_model_aligned_with_itself_stays_as_it_is(model, inputs, spec):
    statistics = _statistics(model, model, spec, inputs)
    for transform in align(model.state_dict(), model.state_dict(), spec, statistics).values():
        order = torch.arange(transform.size).expand_as(transform.permutation)
        assert torch.equal(transform.permutation, order)


def test_the_aligned_model_computes_what_the_other_model_computed(model, inputs, spec):
    other = _bert(1)
    statistics = _statistics(model, other, spec, inputs)
    before = other(**inputs).logits
    found = align(model.state_dict(), other.state_dict(), spec, statistics)
    assert any(
        not torch.equal(t.permutation, identity(spec)[n].permutation) for n, t in found.items()
    )
    other.load_state_dict(transport(other.state_dict(), spec, found))
    torch.testing.assert_close(other(**inputs).logits, before, rtol=1e-4, atol=1e-4)


def test_the_similarity_never_falls_and_is_what_it_says(model, inputs, spec):
    """J after every sweep is at least J before it, and what a transcription of J gives for the
    result.
    """
    other = _bert(1).state_dict()
    statistics = _statistics(model, _bert(1), spec, inputs)
    similarity = Similarity.to(model.state_dict(), spec, statistics, 0.5)
    search = Search(similarity, other, operators(spec, "permute"))
    found = search.run(None, 100)
    assert search.values == sorted(search.values)
    assert search.values[-1] > search.values[0]
    for transforms, value in ((identity(spec), search.values[0]), (found, search.values[-1])):
        moved = transport(other, spec, transforms)
        j = 0.0
        for name, ours in model.state_dict().items():
            if name in similarity.reference:
                theirs = moved[name]
                j += 0.5 * float((ours * theirs).sum() / (ours.norm() * theirs.norm()))
        for space, moments in statistics.items():
            correlation = torch.stack([m.correlation_DE() for m in moments]).mean(0)
            order = flat_order(space, spec, transforms)
            matched = correlation[torch.arange(len(order)), order]
            j += 0.5 * len(spec.spaces[space].axes) * float(matched.mean())
        assert value == pytest.approx(j, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", ["tensor", "unit"])
@pytest.mark.parametrize("method", ["permute", "signed"])
def test_what_a_search_remembers_changes_nothing(model, inputs, spec, share, scale, method):
    """Warm prices, kept products and settled spaces save time: without them all is the same."""
    statistics = _statistics(model, _bert(1), spec, inputs)
    similarity = Similarity.to(model.state_dict(), spec, statistics, share, scale=scale)
    warm, cold = (
        Search(similarity, _bert(1).state_dict(), operators(spec, method), warm=warm)
        for warm in (True, False)
    )
    ours, theirs = (s.run(torch.Generator().manual_seed(3), 100, 2) for s in (warm, cold))
    for name, transform in ours.items():
        assert torch.equal(transform.permutation, theirs[name].permutation)
        for signs in (transform.signs, theirs[name].signs):
            assert signs is None or torch.equal(signs, transform.signs)
    assert warm.values == pytest.approx(cold.values, rel=1e-5)


def test_a_search_without_memory_keeps_none(model, spec):
    similarity = Similarity.to(model.state_dict(), spec, {}, 1.0)
    search = Search(similarity, _bert(1).state_dict(), operators(spec, "permute"), warm=False)
    search.run(None, 100)
    assert not search.warm.prices
    assert not search.warm.products


def test_equal_seeds_give_equal_transforms(model, spec):
    other = _bert(1).state_dict()
    one, again = (
        align(
            model.state_dict(),
            other,
            spec,
            space="weight",
            generator=torch.Generator().manual_seed(7),
        )
        for _ in range(2)
    )
    assert all(torch.equal(one[name].permutation, again[name].permutation) for name in one)


def test_a_flat_order_moves_units_as_transport_does(model, spec):
    """The units of a space that depends on heads, flattened, follow heads and units within."""
    transforms = _permutations(spec, 5)
    weights = model.state_dict()
    moved = transport(weights, spec, transforms)
    value = "bert.encoder.layer.0.attention.self.value.bias"
    (space,) = [s for s, axis in spec.axes_of(value) if not spec.dependents(s)]
    assert torch.equal(moved[value], weights[value][flat_order(space, spec, transforms)])


def test_grams_follow_the_layers_they_belong_to(model, inputs, spec):
    """Transported Grams equal the Grams that the transported model collects."""

    def collect(of):
        return alloy.collect({"one": of}, [inputs], spec, grams=True).grams["one"]

    transforms = random_transforms(with_kind(spec, "orthogonal"), torch.Generator().manual_seed(6))
    other = _bert(0)
    other.load_state_dict(transport(model.state_dict(), spec, transforms))
    found = transport_grams(collect(model), spec, transforms)
    for name, gram in collect(other).items():
        torch.testing.assert_close(found[name].sum_DD, gram.sum_DD, rtol=1e-4, atol=1e-3)


def test_restriction_to_some_weights_leaves_the_shared_stream_alone(model, spec):
    names = [name for name in spec.layout if "layer.0." in name]
    inner = restrict(spec, names)
    sizes = sorted(space.size for space in inner.spaces.values())
    assert sizes == [3, 4, 4, SIZE]  # heads, query-key and value units within them, MLP units
    with pytest.raises(ValueError, match="no weights"):
        restrict(spec, ["nonsense"])


def test_the_report_says_what_moved_and_what_it_gained(model, inputs, spec):
    planted = transport(model.state_dict(), spec, _permutations(spec, 2))
    found = align(model.state_dict(), planted, spec, space="weight")
    for row in describe(model.state_dict(), planted, spec, found):
        assert row.weight_after == pytest.approx(1.0)
        assert row.weight_before < 0.9
        assert row.num_moved > 0


def test_a_tie_keeps_the_identity():
    solved = permute(OfUnits(torch.ones(5, 5, dtype=torch.float64)))
    assert torch.equal(solved.permutation, torch.arange(5))
    assert solved.value == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "weights"}, "choose weight, activation or dual"),
        ({"space": "weight", "weight_share": 0.3}, "has no effect"),
        ({"space": "activation"}, "needs activation statistics"),
        ({"space": "weight", "method": "zap"}, "matching method 'zap' is unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, spec, settings, message):
    with pytest.raises(AlignmentError, match=message):
        align(model.state_dict(), model.state_dict(), spec, **settings)


def test_broken_models_are_refused_by_name(model, spec):
    weights = dict(model.state_dict())
    name = "bert.encoder.layer.1.output.dense.weight"
    with pytest.raises(AlignmentError, match=f"no weight '{name}'"):
        align(weights, {n: t for n, t in weights.items() if n != name}, spec, space="weight")
    with pytest.raises(AlignmentError, match="NaN"):
        align(weights, weights | {name: weights[name] * torch.nan}, spec, space="weight")
    with pytest.raises(AlignmentError, match="shape"):
        align(weights, weights | {name: weights[name][:-1]}, spec, space="weight")


def test_broken_statistics_are_refused(model, spec):
    space = next(name for name, s in spec.spaces.items() if not s.depends_on)
    size = spec.spaces[space].size
    for moments, message in (
        (CrossMoments.zero(size + 1, size + 1), "the space has"),
        (
            CrossMoments.zero(size, size).update(
                torch.full((2, size), torch.nan), torch.ones(2, size)
            ),
            "NaN",
        ),
    ):
        with pytest.raises(AlignmentError, match=message):
            align(model.state_dict(), model.state_dict(), spec, {space: [moments]})
