"""Laws of sensitivities: exact for linear models, and what least squares makes of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from alloy.errors import MergeError
from alloy.merging import merge
from alloy.refit import (
    Lesson,
    LinearLayer,
    Sensitivity,
    Teacher,
    fit_layers,
    layers_in_order,
    sensitivities,
)


class Two(nn.Module):
    """x -> B (A x); an answer may read some of the units in between."""

    def __init__(self, seed: int, size: int = 4, answers: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Linear(size, size, dtype=torch.float64)
        self.b = nn.Linear(size, answers, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return self.b(self.a(x))


def _data(seed, num=64, tokens=5, size=4, batches=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, num, tokens, size, generator=generator, dtype=torch.float64)
    return [{"x": part} for part in x]


def test_of_a_linear_model_they_are_what_an_error_does_to_the_answers():
    """The answers' squared change, relative to their spread, is the mean of s eᵀ H e."""
    module, data = Two(0).eval(), _data(1, num=2000)
    layers = {"a": LinearLayer(module.a)}
    answers = lambda m, batch: [m(**batch)]  # noqa: E731
    measured = sensitivities(module, layers, data, answers, damping=0.0)["a"]
    y = torch.cat([module(**b) for b in data]).flatten(0, 1)
    spread = (y - y.mean(0)).square().sum() / sum(len(b["x"]) for b in data)
    error = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    change = (module.b.weight @ error).square().sum() * 5 / spread  # at each of five tokens
    samples = torch.cat([calls[0] for calls in measured.samples])
    predicted = samples.sum(1).mean() * (error @ measured.units_GOO[0] @ error)
    torch.testing.assert_close(predicted, change, rtol=0.03, atol=0)
    expected = module.b.weight.T @ module.b.weight
    torch.testing.assert_close(
        measured.units_GOO[0], expected * 4 / expected.trace(), rtol=0.1, atol=0.05
    )


def test_parameters_and_their_gradients_stay():
    module, data = Two(0).eval(), _data(1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    sensitivities(module, {"a": LinearLayer(module.a)}, data, lambda m, b: [m(**b)])
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_operations_in_place_behind_a_layer_change_nothing():
    """ReLU in place writes into what the layer computed: the gradient is still that of the layer's
    outputs.
    """
    apart, in_place = (
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=where), nn.Linear(5, 3)).double().eval()
        for where in (False, True)
    )
    in_place.load_state_dict(apart.state_dict())
    found = [
        sensitivities(
            module,
            {"0": LinearLayer(module[0])},
            _data(1),
            lambda m, batch: [m(batch["x"])],
            generator=torch.Generator().manual_seed(0),
        )["0"]
        for module in (apart, in_place)
    ]
    for one, other in zip(*(f.samples for f in found), strict=True):
        torch.testing.assert_close(one[0], other[0])
    torch.testing.assert_close(found[0].units_GOO, found[1].units_GOO)


@torch.no_grad()
def test_each_unit_comes_from_the_model_whose_answers_read_it():
    """Two models answer from different units of one layer; both answers survive the merge,
    exactly.
    """
    models, data = [Two(0).eval(), Two(1).eval()], [_data(2), _data(3)]
    for model, kept in zip(models, ([0, 1], [2, 3]), strict=True):
        unread = [i for i in range(4) if i not in kept]
        model.b.weight[:, unread] = 0
    lessons, plain = [], []
    for model, batches in zip(models, data, strict=True):
        measured = sensitivities(
            model, {"a": LinearLayer(model.a)}, batches, lambda m, b: [m(**b)], damping=1e-9
        )
        lessons.append(Lesson([Teacher(model, {"a": "a"})], batches, sensitivities=measured))
        plain.append(Lesson([Teacher(model, {"a": "a"})], batches))

    def errors(given):
        student = Two(4).eval()
        fit_layers(student, given, ridge=0.0, residual=False)
        found = []
        for model, batches in zip(models, data, strict=True):
            student.b.load_state_dict(model.b.state_dict())
            found += [float(F.mse_loss(student(**b), model(**b))) for b in batches]
        return found

    assert max(errors(lessons)) < 1e-9
    assert min(errors(plain)) > 0.1


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_where_all_count_alike_they_change_nothing(bias):
    """Conjugate gradients and Cholesky's factor solve the same equations, of every layer in
    turn.
    """
    torch.manual_seed(0)

    def net():
        return nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2, bias=bias),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2, bias=bias),
        ).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x)

    teacher, student, again = Net().eval(), Net().eval(), Net().eval()
    again.load_state_dict(student.state_dict())
    data = [{"x": torch.randn(8, 4, 6, 6, dtype=torch.float64)} for _ in range(2)]
    lesson = Lesson([Teacher(teacher)], data)
    layers = {n: la for group in layers_in_order(teacher, lesson) for n, la in group.items()}
    samples = {}
    shapes = {"net.0": (8, 16), "net.2": (8, 9)}
    for name, layer in layers.items():
        groups, outputs, _ = layer.matrix()[0].shape
        ones = [[torch.ones(shapes[name], dtype=torch.float64)] for _ in data]
        eye = torch.eye(outputs, dtype=torch.float64).repeat(groups, 1, 1)
        samples[name] = Sensitivity(ones, eye)
    fit_layers(student, [lesson], ridge=1e-3)
    fit_layers(again, [Lesson([Teacher(teacher)], data, sensitivities=samples)], ridge=1e-3)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def _vit(seed):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=5,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


@torch.no_grad()
def test_a_merge_for_the_answers_answers_more_as_the_models_did():
    """Two classifiers of one architecture: logits on each one's own data are nearer than
    without.
    """
    models = [_vit(0), _vit(1)]
    generator = torch.Generator().manual_seed(3)
    data = [
        [{"pixel_values": torch.randn(32, 3, 16, 16, generator=generator)} for _ in range(2)]
        for _ in models
    ]
    weights = [dict(m.state_dict()) for m in models]

    def distance(**settings):
        found = merge("sequential", weights, module=models[0], batches=data, **settings)
        student = _vit(0)
        student.load_state_dict(found)
        return sum(
            float(F.mse_loss(student(**b).logits, m(**b).logits))
            for m, own in zip(models, data, strict=True)
            for b in own
        )

    by_answers = distance(answers=lambda module, batch: [module(**batch).logits])
    assert by_answers < 0.8 * distance()


def test_what_has_no_sensitivity_is_refused():
    module, data = Two(0).eval(), _data(1)
    layers = {"a": LinearLayer(module.a)}
    for answers, message in (
        (lambda m, b: [m(**b) * 0 + 1], "answer 0 is the same for all data"),
        (lambda m, b: [m(**b) * float("nan")], "answer 0 is not of finite numbers"),
        (lambda m, b: [m(**b) > 0], "answer 0 is not of finite numbers"),
        (lambda m, b: [], "there are no answers"),
    ):
        with pytest.raises(MergeError, match=message):
            sensitivities(module, layers, data, answers)
    with pytest.raises(MergeError, match=r"never reaches \['a'\]"):
        sensitivities(module, layers, data, lambda m, b: [m.b(b["x"])])
    measured = sensitivities(module, layers, data, lambda m, b: [m(**b)])
    student = Two(1).eval()
    with pytest.raises(MergeError, match="the sensitivities lack b"):
        fit_layers(student, [Lesson([Teacher(module)], data, sensitivities=measured)])
    teacher = Teacher(module, {"a": "a"})
    with pytest.raises(MergeError, match="are of 2 batches, not of these"):
        fit_layers(student, [Lesson([teacher], [*data, *data], sensitivities=measured)])
    with pytest.raises(MergeError, match="this lesson has 2"):
        fit_layers(student, [Lesson([Teacher(module)] * 2, data, sensitivities=measured)])
    one, other = (Lesson([Teacher(module)], data, sensitivities=f) for f in (measured, None))
    with pytest.raises(MergeError, match="of all lessons, or of none"):
        fit_layers(student, [one, other])
