"""Heads stay each model's own: they have no say in the alignment of the trunk, and follow it."""

import pytest
import torch
from torch import nn

import alloy
from alloy.alignment import PRESETS, Alignment
from alloy.errors import AlignmentError
from alloy.symmetry import random_transforms, transport
from alloy.symmetry.parts import without
from alloy.symmetry.spec import with_kind

WIDTH = 12
OWN = [f"{name}.{part}" for name in ("dense", "out") for part in ("weight", "bias")]
MAPPED = ("zipit", "mudsc_zip", "ot_fusion")  # many units to many: functions change


class Classifier(nn.Module):
    """A pre-norm stream of MLPs, a head of two layers whose hidden width is its own."""

    def __init__(self, num_labels, inner=WIDTH, width=WIDTH):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 10) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(10, width) for _ in range(2))
        self.dense, self.out = nn.Linear(width, inner), nn.Linear(inner, num_labels)

    def forward(self, x):
        x = self.embed(x)
        for i in range(2):
            x = x + self.down[i](torch.relu(self.up[i](self.norms[i](x))))
        return self.out(torch.relu(self.dense(self.norms[2](x))))


def _random(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


X = torch.randn(60, 5, generator=torch.Generator().manual_seed(9))


def _weights(models):
    return {name: {n: t.detach() for n, t in m.state_dict().items()} for name, m in models.items()}


@pytest.fixture(scope="module")
def case():
    """Heads of 4 and 7 labels, and hidden widths of their own."""
    models = {"a": _random(Classifier(4), 0), "b": _random(Classifier(7, inner=9), 1)}
    specs = {name: alloy.find_symmetries(model, {"x": X[:4]}) for name, model in models.items()}
    statistics = alloy.collect(models, [{"x": X}], specs, joint=True)
    return models, specs, statistics, _weights(models)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_aligns_trunks_whatever_heads_they_have(case, preset) -> None:
    """The trunk is merged, heads keep widths and, where the alignment is exact, functions."""
    models, specs, statistics, weights = case
    found = alloy.align_models(weights, specs, statistics, preset=preset, own=OWN)
    alignment = Alignment.from_tensors(found.to_tensors())
    assert alignment.shared == {*weights["a"]} - {*OWN}
    moved, merged = alignment.apply(weights), alignment.merge(weights)
    for name in ("a", "b"):
        assert {n: t.shape for n, t in merged[name].items()} == {
            n: t.shape for n, t in weights[name].items()
        }
    for name in alignment.shared:
        assert torch.equal(merged["a"][name], merged["b"][name])
    assert alignment.exact == (preset not in MAPPED)
    for name, model in models.items() if alignment.exact else ():
        before = model(X)
        after = torch.func.functional_call(model, dict(moved[name]), (X,))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    if preset not in ("identity", *MAPPED):
        assert not torch.equal(moved["b"]["dense.weight"], weights["b"]["dense.weight"])


@pytest.mark.parametrize("preset", [n for n in PRESETS if n != "identity"])
def test_a_planted_trunk_is_found_again_and_takes_its_head_along(case, preset) -> None:
    """The second trunk is the first in another order: merged, both heads read what they read."""
    models, specs, _, weights = case
    spec = with_kind(without(specs["a"], OWN), "permutation")
    trunk = {n: t for n, t in weights["a"].items() if n not in OWN}
    order = random_transforms(spec, torch.Generator().manual_seed(3))
    head = {n: weights["b"][n] for n in OWN}
    plain = {**trunk, **head}
    orders = {space: order[space] for space in specs["b"].spaces if space in order}
    planted = _random(Classifier(7, inner=9), 1)
    planted.load_state_dict(transport(plain, with_kind(specs["b"], "permutation"), orders))
    pair = {"a": models["a"], "b": planted}
    statistics = alloy.collect(pair, [{"x": X}], specs, joint=True)
    found = alloy.align_models(_weights(pair), specs, statistics, preset=preset, own=OWN)
    merged = found.merge(_weights(pair))
    for name, model in pair.items():
        after = torch.func.functional_call(model, dict(merged[name]), (X,))
        torch.testing.assert_close(after, model(X), rtol=1e-3, atol=1e-3)


def test_heads_have_no_say(case) -> None:
    """Other heads, however large, leave the transforms as they are."""
    _, specs, statistics, weights = case
    loud = {**weights, "b": {n: 99 * t if n in OWN else t for n, t in weights["b"].items()}}
    for preset in ("git_rebasin", "mudsc", "cycle_consistent"):
        ours, theirs = (
            alloy.align_models(w, specs, statistics, preset=preset, own=OWN)
            for w in (weights, loud)
        )
        assert ours.units == theirs.units


def test_the_trunk_may_have_another_width_as_well(case) -> None:
    """Optimal transport and zip bring a wider model to the reference, its head with it."""
    models = {"a": case[0]["a"], "b": _random(Classifier(7, inner=9, width=15), 2)}
    specs = {name: alloy.find_symmetries(model, {"x": X[:4]}) for name, model in models.items()}
    statistics = alloy.collect(models, [{"x": X}], specs, joint=True)
    for preset in ("ot_fusion", "zipit"):
        found = alloy.align_models(
            _weights(models), specs, statistics, preset=preset, own=OWN
        ).merge(_weights(models))
        assert found["b"]["dense.weight"].shape == (9, WIDTH)
        assert found["b"]["out.weight"].shape == (7, 9)


def test_weights_that_cannot_be_a_models_own_are_refused(case) -> None:
    _, specs, statistics, weights = case
    with pytest.raises(AlignmentError, match=r"own weights of 'a': the spec has no weights \['he"):
        alloy.align_models(weights, specs, statistics, own=["head.weight"])


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.relu(self.embed(x)))


def test_a_head_that_is_the_embedding_is_no_head_of_its_own() -> None:
    models = {name: _random(Tied(), seed) for seed, name in enumerate("ab")}
    spec = alloy.find_symmetries(models["a"], {"x": torch.arange(9)[None]})
    with pytest.raises(AlignmentError, match="are one weight: name both or neither"):
        alloy.align_models(_weights(models), spec, preset="git_rebasin", own=["head.weight"])
