"""Rotary embeddings are found by their algebra; what only resembles one leaves its units pinned."""

import pytest
import torch
from torch import nn

import alloy

HEADS, WIDTH, LENGTH = 2, 8, 5
PAIRS = WIDTH // 2


def angles():
    return torch.arange(LENGTH)[:, None] * 0.7 ** torch.arange(PAIRS)  # [S, pairs]


def halves(x, tables=lambda f: torch.cat([f, f], -1)):
    """Llama, GPT-NeoX: the partner of unit i is i + width / 2."""
    phase = tables(angles())
    turned = torch.cat([-x[..., PAIRS:], x[..., :PAIRS]], -1)
    return x * phase.cos() + turned * phase.sin()


def neighbours(x, tables=lambda f: f.repeat_interleave(2, -1)):
    """GPT-J: the partner of unit 2 i is 2 i + 1."""
    phase = tables(angles())
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * phase.cos() + turned * phase.sin()


def chunks(x, sign=1):
    """GPT-OSS: tables of half the width."""
    a, b = x.chunk(2, -1)
    c, s = angles().cos(), angles().sin() * sign
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def complex_product(x):
    """The original Llama: pairs are complex numbers."""
    phases = torch.polar(torch.ones(LENGTH, PAIRS), angles())
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], PAIRS, 2).contiguous())
    return torch.view_as_real(z * phases).flatten(-2)


def regrouped(x):
    """DeepSeek: neighbours go in, halves come out."""
    x = x.view(*x.shape[:-1], PAIRS, 2).transpose(-1, -2).reshape(x.shape)
    return halves(x)


def even_odd(x):
    a, b = x[..., ::2], x[..., 1::2]
    c, s = angles().cos(), angles().sin()
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def sections(f):
    """Qwen2-VL: coordinates take the positions of different axes; both halves the same ones."""
    both = torch.stack([torch.cat([f, f], -1), 2 * torch.cat([f, f], -1)])
    parts = both.split([1, 3, 1, 3], -1)
    return torch.cat([part[i % 2] for i, part in enumerate(parts)], -1)


def in_place(x):
    y = x.clone()
    y[..., :PAIRS] = x[..., :PAIRS] * angles().cos() - x[..., PAIRS:] * angles().sin()
    y[..., PAIRS:] = x[..., PAIRS:] * angles().cos() + x[..., :PAIRS] * angles().sin()
    return y


class Attention(nn.Module):
    """Queries and keys of two heads; each takes a function of [B, H, S, width]."""

    def __init__(self, of_query, of_key):
        super().__init__()
        self.query, self.key, self.value, self.out = (
            nn.Linear(i, o) for i, o in [(3, HEADS * WIDTH)] * 3 + [(HEADS * WIDTH, 3)]
        )
        self.of_query, self.of_key = of_query, of_key

    def forward(self, x):
        q, k, v = (
            layer(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(self.of_query(q), self.of_key(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


def spec_of(of_query, of_key=None):
    torch.manual_seed(0)
    model = Attention(of_query, of_key or of_query).eval()
    inputs = {"x": torch.randn(2, LENGTH, 3)}
    spec = alloy.find_symmetries(model, inputs)
    alloy.validate(model, spec, inputs)
    return next((s for s in spec.spaces.values() if s.name.startswith("query.weight[0]*1")), None)


def normed(x):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


FOUND = {
    "halves": (halves, None, "rotary", 4),
    "neighbours": (neighbours, None, "rotary", 1),
    "tables of half the width": (chunks, None, "rotary", 4),
    "the other direction": (lambda x: chunks(x, -1), None, "rotary", 4),
    "queries forward, keys back": (chunks, lambda x: chunks(x, -1), "rotary", 4),
    "complex": (complex_product, None, "rotary", 1),
    "regrouped": (regrouped, None, "rotary", 1),
    "even and odd": (even_odd, None, "rotary", 1),
    "repeated table": (lambda x: halves(x, lambda f: f.repeat(1, 2)), None, "rotary", 4),
    "stacked table": (
        lambda x: neighbours(x, lambda f: torch.stack([f, f], -1).flatten(-2)),
        None,
        "rotary",
        1,
    ),
    "sections": (lambda x: halves(x, sections), None, "rotary", 4),
    "twice": (lambda x: halves(halves(x)), None, "rotary", 4),
    "queries alone": (halves, lambda x: x, "rotary", 4),
    "half precision between": (lambda x: halves(x.double()).float(), None, "rotary", 4),
    "norm without a gain": (lambda x: halves(normed(x)), None, "orthogonal rotary", 4),
    "norm after": (lambda x: normed(neighbours(x)), None, "orthogonal rotary", 1),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_rotary_embedding_is_found_however_it_is_written(name):
    """A space of pairs per head; random elements of the whole group leave the outputs unchanged."""
    of_query, of_key, kind, stride = FOUND[name]
    space = spec_of(of_query, of_key)
    assert (space.kind, space.size, space.pair_stride) == (kind, WIDTH, stride)
    assert len(space.depends_on) == 1


class Cached(Attention):
    """Tables are finished buffers."""

    def __init__(self, table, *, persistent):
        super().__init__(self.turn, self.turn)
        self.register_buffer("cos", table.cos(), persistent=persistent)
        self.register_buffer("sin", table.sin(), persistent=persistent)

    def turn(self, x):
        turned = torch.cat([-x[..., PAIRS:], x[..., :PAIRS]], -1)
        return x * self.cos[:LENGTH] + turned * self.sin[:LENGTH]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_finished_table_in_a_buffer_is_known_by_its_numbers(persistent):
    """Equal halves, a rotary space; halves that differ anywhere, or are not known, none."""
    inputs = {"x": torch.randn(2, LENGTH, 3)}
    equal = torch.cat([angles(), angles()], -1)
    other = equal.clone()
    other[-1, 0] += 0.1
    found = []
    for table in (equal, other):
        model = Cached(table, persistent=persistent).eval()
        spec = alloy.find_symmetries(model, inputs)
        alloy.validate(model, spec, inputs)
        found.append([s.kind for s in spec.spaces.values() if s.pair_stride])
    assert found == [["rotary"], []]
    spec = alloy.find_symmetries(model.to("meta"), inputs)
    assert not any(s.pair_stride for s in spec.spaces.values())


PINNED = {
    "halves of different frequencies": (
        lambda x: halves(x, lambda f: torch.cat([f, 2 * f], -1)),
        None,
    ),
    "neighbours' tables on halves": (
        lambda x: halves(x, lambda f: f.repeat_interleave(2, -1)),
        None,
    ),
    "a reflection": (
        lambda x: x * angles().repeat(1, 2) + x.roll(PAIRS, -1) * angles().repeat(1, 2).sin(),
        None,
    ),
    "no turn": (lambda x: x * angles().repeat(1, 2), None),
    "queries by halves, keys by neighbours": (halves, neighbours),
    "regrouped queries, plain keys": (regrouped, neighbours),
    "regrouped and not, added": (lambda x: x + regrouped(x), None),
    "regrouped twice": (lambda x: even_odd(even_odd(x)), None),
    "a nonlinearity": (lambda x: halves(x.relu()), None),
    "in place": (in_place, None),
    "rounded on the way": (lambda x: halves((8 * x).int().float()), None),
    "rounded inside": (
        lambda x: (
            x * angles().cos().repeat(1, 2)
            + torch.cat([-x[..., PAIRS:], x[..., :PAIRS]], -1).mul(8).int().float()
            * angles().sin().repeat(1, 2)
        ),
        None,
    ),
    "a gain": (lambda x: halves(x * torch.arange(1.0, WIDTH + 1)), None),
    "part of it read": (lambda x: halves(x) * x[..., :1].exp(), None),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_only_resembles_a_rotary_embedding_moves_nothing(name):
    """No pair is turned, and whatever else is claimed is true (random transforms)."""
    space = spec_of(*PINNED[name])
    assert space is None or space.kind == "permutation"
