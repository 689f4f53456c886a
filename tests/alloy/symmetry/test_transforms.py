"""Laws of transforms: a group that acts on weights, on a spec written by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.errors import SymmetryError
from alloy.symmetry.draws import random_transforms
from alloy.symmetry.spec import (
    Axis,
    Leaf,
    Product,
    Space,
    Sum,
    SymmetrySpec,
    differences,
    leaves,
    require_equal,
    unit_view,
    with_kind,
)
from alloy.symmetry.transforms import (
    Transform,
    compose,
    identity,
    invert,
    rotary_matrix,
    transforms_from_tensors,
    transforms_to_tensors,
    transport,
)


def make_spec(kind="permutation", pair_stride=0):
    """Grouped-query attention by hand: kv heads, query heads in each, widths; an expert axis."""
    kv, per, width, stream = (
        Leaf(3, "kv"),
        Leaf(2, "per"),
        Leaf(4, "width"),
        Leaf(5, "stream"),
    )
    dual_width, dual_stream = Leaf(4, "width", -1), Leaf(5, "stream", -1)
    layout = {
        "q.weight": (Product((kv, per, dual_width)), dual_stream),
        "kv.weight": (Sum((Product((kv, width)), Product((kv, Leaf(4))))), dual_stream),
        "o.weight": (stream, Product((kv, per, dual_width))),
        "up.weight": (Leaf(2, "expert"), dual_stream, Leaf(3, "inner")),
        "down.weight": (Leaf(2, "expert"), Leaf(3, "inner", -1), stream),
        "merge.weight": (stream, Sum((dual_stream, dual_stream))),
    }
    depends = {"per": ("kv",), "width": ("kv",), "inner": ("expert",)}
    sizes = {"kv": 3, "per": 2, "width": 4, "stream": 5, "expert": 2, "inner": 3}
    spaces = {}
    for name, size in sizes.items():
        axes = tuple(
            Axis(weight, dim, path, leaf.variance)
            for weight, terms in layout.items()
            for dim, term in enumerate(terms)
            for path, leaf in leaves(term)
            if leaf.space == name
        )
        own = kind if name in ("width", "stream", "inner") else "permutation"
        if pair_stride and name in ("stream", "inner"):  # of odd size
            own = "general linear"
        stride = pair_stride if name == "width" else 0
        spaces[name] = Space(name, size, own, own, depends.get(name, ()), axes, stride)
    return SymmetrySpec(spaces=spaces, layout=layout)


def make_weights(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn([t.size for t in terms], generator=generator, dtype=torch.float64)
        for name, terms in spec.layout.items()
    }


def assert_close(first, second):
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-9)


KINDS = [
    ("permutation", 0),
    ("signed permutation", 0),
    ("orthogonal", 0),
    ("orthogonal fixing ones", 0),
    ("general linear", 0),
    ("rotary", 2),
    ("rotary", 1),
    ("orthogonal rotary", 2),
]


@pytest.mark.parametrize(("kind", "pair_stride"), KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_transport_is_a_group_action(kind, pair_stride, seed):
    """Inverse undoes, composition is doing one after the other, the identity changes nothing."""
    spec = make_spec(kind, pair_stride)
    weights = make_weights(spec)
    generator = torch.Generator().manual_seed(seed)
    first, second = random_transforms(spec, generator), random_transforms(spec, generator)
    moved = transport(weights, spec, first)
    assert_close(transport(moved, spec, invert(first)), weights)
    assert_close(transport(moved, spec, second), transport(weights, spec, compose(first, second)))
    assert_close(transport(weights, spec, identity(spec)), weights)
    assert any(not torch.equal(moved[name], weights[name]) for name in weights)


def test_result_unit_i_is_source_unit_p_i_within_the_result_head():
    """result[h, d] = source[heads[h], width[h, d]]."""
    layout = {"w": (Product((Leaf(2, "heads"), Leaf(3, "width"))),)}
    spaces = {
        "heads": Space("heads", 2, "permutation", "permutation", (), (Axis("w", 0, ("*0",)),)),
        "width": Space(
            "width", 3, "permutation", "permutation", ("heads",), (Axis("w", 0, ("*1",)),)
        ),
    }
    spec = SymmetrySpec(spaces=spaces, layout=layout)
    heads, width = torch.tensor([1, 0]), torch.tensor([[2, 0, 1], [0, 1, 2]])
    moved = transport(
        {"w": torch.arange(6)},
        spec,
        {
            "heads": Transform(permutation=heads),
            "width": Transform(permutation=width, depends_on=("heads",)),
        },
    )
    assert moved["w"].tolist() == [5, 3, 4, 0, 1, 2]


def test_unit_view_has_the_batch_and_the_units_first_and_writes_through():
    """The view of every axis is [*batch, units, ...], and shares memory with the weight."""
    spec = make_spec()
    weights = make_weights(spec)
    for name in weights:
        for space, axis in spec.axes_of(name):
            view = unit_view(weights[name], spec, space, axis)
            expected = (*spec.batch_shape(space), spec.spaces[space].size)
            assert tuple(view.shape[: len(expected)]) == expected
            assert view.data_ptr() >= weights[name].data_ptr()
    view = unit_view(
        weights["q.weight"], spec, "width", Axis("q.weight", 0, ("*2",))
    )  # [kv, width, per, stream]
    assert torch.equal(view, weights["q.weight"].reshape(3, 2, 4, 5).permute(0, 2, 1, 3))
    inner = unit_view(weights["up.weight"], spec, "inner", Axis("up.weight", 2))
    assert torch.equal(inner, weights["up.weight"].permute(0, 2, 1))


@pytest.mark.parametrize(("kind", "pair_stride"), [("signed permutation", 0), ("rotary", 1)])
def test_spec_and_transforms_survive_their_files(kind, pair_stride):
    """from_json(to_json(spec)) == spec; transforms come back from flat tensors."""
    spec = make_spec(kind, pair_stride)
    assert SymmetrySpec.from_json(spec.to_json()) == spec
    transforms = random_transforms(spec, torch.Generator().manual_seed(0))
    back = transforms_from_tensors(transforms_to_tensors(transforms), spec)
    weights = make_weights(spec)
    assert_close(transport(weights, spec, transforms), transport(weights, spec, back))


def test_specs_that_differ_name_the_first_difference():
    spec = make_spec()
    require_equal(spec, make_spec())
    with pytest.raises(SymmetryError, match=r"space 'width' has kind 'permutation' in the first"):
        require_equal(spec, make_spec("signed permutation"))
    assert not list(differences(spec, with_kind(make_spec("general linear"), "permutation")))


@pytest.mark.parametrize("pair_stride", [1, 2])
@pytest.mark.parametrize("kind", ["rotary", "orthogonal rotary"])
def test_rotary_transforms_are_those_that_commute_with_every_turn_of_the_pairs(kind, pair_stride):
    """A random element commutes with random phases; the orthogonal kind alone keeps lengths."""
    spec = make_spec(kind, pair_stride)
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(2, generator=generator, dtype=torch.float64)
    turn = rotary_matrix(angles.cos(), angles.sin(), pair_stride)
    matrix = random_transforms(spec, generator)["width"].matrix
    torch.testing.assert_close(matrix @ turn, turn @ matrix)
    keeps_lengths = torch.allclose(matrix @ matrix.mT, torch.eye(4, dtype=matrix.dtype))
    assert keeps_lengths == (kind == "orthogonal rotary")
    other = rotary_matrix(angles.cos(), angles.sin(), 3 - pair_stride)
    assert not torch.allclose(matrix @ other, other @ matrix)


def test_a_limit_without_rotations_fixes_rotary_spaces():
    """Units of rotary pairs never change places; rotations survive the orthogonal limit."""
    spec = make_spec("rotary", 2)
    assert with_kind(spec, "general linear") == spec
    assert with_kind(spec, "orthogonal").spaces["width"].kind == "orthogonal rotary"
    moved_only = with_kind(spec, "permutation")
    assert "width" not in moved_only.spaces
    assert [p.axis for p in moved_only.pinned] == list(spec.spaces["width"].axes)
    weights = make_weights(spec)
    moved = transport(
        weights, moved_only, random_transforms(moved_only, torch.Generator().manual_seed(0))
    )
    assert not torch.equal(moved["q.weight"], weights["q.weight"])
    with pytest.raises(SymmetryError, match="'rotary' is no limit; choose one of"):
        with_kind(spec, "rotary")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"permutation": torch.tensor([1, 0, 2, 3])}, "frequencies of their own"),
        ({"matrix": torch.eye(4)[[2, 1, 0, 3]]}, "no rotation and scale of the pairs of units 2"),
        ({"matrix": torch.diag(torch.tensor([1.0, 2, 3, 2]))}, "no rotation and scale"),
        ({"signs": torch.tensor([1, -1, 1, 1])}, "is signed; its kind is rotary"),
    ],
)
def test_what_is_no_rotation_of_pairs_is_refused(change, message):
    spec = make_spec("rotary", 2)
    change = {key: tensor.expand(3, *tensor.shape) for key, tensor in change.items()}
    with pytest.raises(SymmetryError, match=message):
        transport(make_weights(spec), spec, {"width": Transform(depends_on=("kv",), **change)})


@pytest.mark.parametrize(
    ("weights", "transforms", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "o.weight"}, {}, "'o.weight' .* missing"),
        (lambda w: {**w, "x": torch.zeros(1)}, {}, "'x' is not in the spec"),
        (lambda w: {**w, "o.weight": torch.zeros(5, 5)}, {}, r"shape \(5, 5\).*\(5, 24\)"),
        (dict, {"nowhere": Transform(permutation=torch.arange(3))}, "no such space"),
        (dict, {"kv": Transform(permutation=torch.arange(4))}, r"\(4,\).*\(3,\)"),
        (dict, {"kv": Transform(permutation=torch.tensor([0, 0, 1]))}, "no bijection"),
        (dict, {"kv": Transform(signs=torch.tensor([1, -1, 1]))}, "is signed; its kind is permu"),
        (dict, {"kv": Transform(matrix=torch.eye(3))}, "is a matrix; its kind is permutation"),
        (dict, {"kv": Transform()}, "needs a permutation"),
    ],
)
def test_what_does_not_fit_is_refused(weights, transforms, message):
    spec = make_spec()
    with pytest.raises(SymmetryError, match=message):
        transport(weights(make_weights(spec)), spec, transforms)
