"""Models of other widths: followed in the reference's units, refused where nothing can be
followed.
"""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import alloy
from alloy.errors import MergeError, RepairError
from alloy.refit import Lesson, LinearLayer, fittable_layers
from alloy.refit.calls import CallRecorder
from alloy.refit.repair import fit_layers
from alloy.refit.tracing import stream_layers, trace_layers
from alloy.refit.units import units_between


def _vit(seed, width=16, *, layers=2, labels=5, patch=4):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width, num_attention_heads=4, intermediate_size=2 * width, patch_size=patch,
        num_hidden_layers=layers, image_size=16, num_labels=labels, initializer_range=0.3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def _resnet(seed, width=6):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=width, hidden_sizes=[width, 2 * width], depths=[1, 1], layer_type="basic",
        num_labels=3,
    )  # fmt: skip
    return ResNetForImageClassification(config).eval()


def _gpt2(seed, width=12):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=20, n_embd=width, n_layer=2, n_head=3, n_positions=8, initializer_range=0.3
    )
    return GPT2Model(config).eval()


def _images(num=40):
    pixels = torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": part} for part in pixels.split([num // 4, num - num // 4])]


def _texts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (24, 8), generator=generator)
    mask = (torch.arange(8) < torch.randint(3, 9, (24, 1), generator=generator)).long()
    return [{"input_ids": ids, "attention_mask": mask}]


def _spec(model, batches):
    return alloy.find_symmetries(model, {n: t[:2] for n, t in batches[0].items()})


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


CASES = {"vit": (_vit, _images), "resnet": (_resnet, _images), "gpt2": (_gpt2, _texts)}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_model_has_its_own_units(name, residual):
    """Between a model and itself every map leaves what it computes."""
    build, data = CASES[name]
    model, batches = build(0), data()
    found = units_between(model, model, batches, _spec(model, batches), residual=residual)
    assert len(found) >= 4
    layers = {layer: model.get_submodule(layer) for layer in found}
    calls = CallRecorder(layers).run(model, lambda: model(**batches[0])).calls
    for layer, units in found.items():
        output, dim = calls[layer][0].output, LinearLayer(layers[layer]).dim
        torch.testing.assert_close(units.bring(output, dim), output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_units_in_another_order_are_put_back(name):
    """A copy whose units are permuted is brought back, activation by activation: least squares
    changes nothing.
    """
    build, data = CASES[name]
    model, batches = build(0), data()
    spec = alloy.symmetry.with_kind(_spec(model, batches), "permutation")
    order = alloy.random_transforms(spec, torch.Generator().manual_seed(0))
    other = build(1)
    other.load_state_dict(alloy.transport(model.state_dict(), spec, order))
    weights = _state(model)
    parents = {"a": weights, "b": other}
    repaired = fit_layers(model, weights, parents, batches, residual=True, spec=spec)
    for key, tensor in weights.items():
        if "running" not in key and "normalization" not in key:
            torch.testing.assert_close(repaired[key], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("widths", [(16, 24), (24, 16)])
def test_a_model_of_another_width_is_followed(widths):
    """Its answers are met far better than by the reference that one starts from, in either
    direction.
    """
    reference, other = (_vit(seed, width) for seed, width in enumerate(widths))
    batches = _images(160)
    weights = _state(reference)
    found = fit_layers(
        reference, weights, {"a": weights, "b": other}, batches,
        coefficients={"a": 0.0, "b": 1.0}, residual=True, spec=_spec(reference, batches),
    )  # fmt: skip
    merged = _vit(0, widths[0])
    merged.load_state_dict(found)

    @torch.no_grad()
    def distance(model):
        return sum(float(F.mse_loss(model(**b).logits, other(**b).logits)) for b in batches)

    assert distance(merged) < 0.5 * distance(reference)


@torch.no_grad()
def test_rotations_keep_what_fits_and_vary_as_the_reference_does():
    """Orthonormal rows up to the scale, equal for all layers that write a space; logits are not
    moved.
    """
    reference, other, batches = _vit(0, 16), _vit(1, 24), _images()
    found = units_between(reference, other, batches, _spec(reference, batches), residual=True)
    assert set(fittable_layers(reference)) - set(found) == {"classifier"}
    (streams,) = stream_layers([trace_layers(reference, Lesson([], batches))])
    first, *rest = (found[name].matrix for name in sorted(streams))
    assert len(rest) == 3
    assert all(torch.equal(first, matrix) for matrix in rest)
    for units in found.values():
        gram = units.matrix @ units.matrix.T
        torch.testing.assert_close(gram / gram[0, 0], torch.eye(len(gram)).double())


def test_what_cannot_be_followed_is_refused():
    reference, batches = _vit(0), _images()
    spec, weights = _spec(reference, batches), _state(reference)

    def fit(other, **changes):
        parents = {"a": weights, "b": other}
        arguments = {"residual": True, "spec": spec, **changes}
        fit_layers(reference, weights, arguments.pop("parents", parents), batches, **arguments)

    with pytest.raises(
        MergeError, match=r"parent 'b': the reference has no layer.*different depths"
    ):
        fit(_vit(1, 24, layers=3))
    with pytest.raises(MergeError, match="classifier writes 5 outputs in the reference and 7"):
        fit(_vit(1, 24, labels=7))
    with pytest.raises(MergeError, match="no counterparts"):
        fit(_vit(1, 24, patch=8))
    wide = _vit(1, 24)
    for changes in ({"spec": None}, {"inputs": "parents"}, {"parents": {"b": wide}}):
        with pytest.raises(RepairError, match=r"\['b'\] run in their own units: give `spec`"):
            fit(wide, **changes)
