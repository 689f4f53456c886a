"""Laws of the term algebra."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.symmetry.tracing.terms import (
    Node,
    TermError,
    cut,
    direct_sum,
    find,
    flatten_product,
    is_pinned,
    is_uniform,
    leaves,
    pin,
    product,
    regroup,
    show,
    split,
    unify,
)

factors = st.lists(st.sampled_from([2, 2, 3, 4, 5]), min_size=1, max_size=4)
quick = settings(max_examples=60, deadline=None)


@st.composite
def dims(draw, size=None):
    """A dim of some structure: split, cut or pinned at random."""
    sizes = draw(factors) if size is None else [size]
    node = Node(math.prod(sizes))
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.sampled_from(["split", "cut", "pin"])):
            case "split":
                divisors = [d for d in range(2, node.size) if node.size % d == 0]
                if divisors:
                    split(node, draw(st.sampled_from(divisors)))
            case "cut":
                start = draw(st.integers(0, node.size - 1))
                cut(node, start, draw(st.integers(start + 1, node.size)))
            case "pin":
                leaf = draw(st.sampled_from(list(leaves(node))))
                pin(leaf, "test")
    return node


def pair(draw):
    first = draw(dims())
    return first, draw(dims(size=find(first).size))


pairs = st.composite(pair)()


def free_sizes(node):
    return sorted(leaf.size for leaf in leaves(node) if leaf.reason is None and leaf.size > 1)


def orders(node):
    """What may be permuted: the sizes and marks of the leaves in place, the term's structure."""
    return show(node)


@quick
@given(pairs)
def test_unify_is_symmetric(two):
    """unify(a, b) and unify(b, a) give the same structure: shown on copies built alike."""
    a, b = two
    c, d = copy.deepcopy((a, b))
    unify(a, b)
    unify(d, c)
    assert sorted(leaf.size for leaf in leaves(a)) == sorted(leaf.size for leaf in leaves(c))
    assert free_sizes(a) == free_sizes(c)


@quick
@given(pairs)
def test_unify_is_idempotent_and_makes_equal(two):
    """After unify both sides show the same term, and unifying again changes nothing."""
    a, b = two
    unify(a, b)
    assert is_pinned(a) == is_pinned(b)
    if not is_pinned(a):
        assert {id(x) for x in leaves(a) if x.size > 1} == {id(x) for x in leaves(b) if x.size > 1}
    before = orders(a), orders(b)
    unify(a, b)
    unify(b, a)
    assert (orders(a), orders(b)) == before


@quick
@given(factors)
def test_regroup_after_flatten_is_the_identity(sizes):
    """Viewing dims as one and back gives the same dims."""
    nodes = [Node(n) for n in sizes]
    flat = regroup(nodes, [math.prod(sizes)])
    assert flat is not None
    back = regroup(flat, sizes)
    assert [id(find(n)) for n in back] == [id(n) for n in nodes]


@quick
@given(pairs)
def test_refinement_is_monotone(two):
    """Unifying never merges leaves into larger free ones, nor frees what was pinned."""
    a, b = two
    smallest = min(leaf.size for leaf in leaves(a))
    pinned = sum(leaf.size for leaf in leaves(a) if leaf.reason)
    unify(a, b)
    assert min(leaf.size for leaf in leaves(a)) <= smallest
    assert find(a).size == find(b).size
    if pinned:
        assert any(leaf.reason for leaf in leaves(a))


@quick
@given(pairs)
def test_pinning_is_absorbing(two):
    """What is pinned stays pinned, through any unification, and pins what it meets."""
    a, b = two
    pin(a, "because")
    unify(a, b)
    assert is_pinned(a)
    assert is_pinned(b)
    unify(b, Node(find(b).size))
    assert is_pinned(b)


def test_uniform_dims_constrain_nothing_and_sums_of_them_do():
    """A repeated value meets anything; two repeated values side by side keep their bound."""
    real = Node(6)
    unify(Node(6, uniform=True), real)
    assert find(real).form == "leaf"
    both = direct_sum([Node(2, uniform=True), Node(4, uniform=True)])
    assert not is_uniform(both)
    unify(both, real)
    assert show(real) == "(2+4)"
    heads = Node(6)
    unify(product([Node(3), Node(2, uniform=True)]), heads)
    assert show(heads) == "(3*2)"
    assert not is_uniform(heads)


def test_a_fused_matrix_splits_into_a_family_that_slices_take_apart():
    """cut, then view: three matrices with heads of their own, in one dim."""
    fused = Node(24)
    q, k, v = (cut(fused, i, i + 8) for i in (0, 8, 16))
    index, heads, width = regroup([fused], (3, 2, 4))
    assert show(index) == "(1+1+1)"
    assert find(heads).form == find(width).form == "family"
    assert [show(x) for x in (q, k, v)] == ["(2*4)"] * 3
    assert len({id(x) for x in leaves(fused) if x.size > 1}) == 6


def test_sizes_that_differ_are_an_error_of_a_rule():
    with pytest.raises(TermError, match="dims of 2 and 3 units"):
        unify(Node(2), Node(3))


def test_splits_that_do_not_agree_pin_the_dim():
    a, b = Node(24), Node(24)
    split(a, 4)
    split(b, 3)
    unify(a, b)
    assert is_pinned(a) or len(flatten_product([a])) > 2
    assert is_pinned(a) == is_pinned(b)
