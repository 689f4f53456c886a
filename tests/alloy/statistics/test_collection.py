"""Collected statistics are those of all tokens, however the data are split, padded and read."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5Model, ViTConfig, ViTModel

import alloy
from alloy.alignment.moves import flat_order
from alloy.errors import CollectionError, MaskError
from alloy.statistics.collection import collect, planned_bytes
from alloy.statistics.points import Point, linear_images, observe, unit_points
from alloy.statistics.running import RunningSums
from alloy.statistics.sums import Statistics
from alloy.symmetry import random_transforms, transport
from alloy.symmetry.spec import with_kind


def _load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parent / path)
    module = sys.modules[Path(path).stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo, two_processes = _load("../symmetry/zoo.py"), _load("two_processes.py")
chain = two_processes.chain

SIZE = 12  # hidden = intermediate = positions = vocabulary


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
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
        if name.endswith("LayerNorm.weight"):
            parameter.data = parameter.data.abs() + 0.5
    return model


@pytest.mark.parametrize("units", ["read", pytest.param("written", marks=pytest.mark.slow)])
def test_models_at_once_and_pairs_of_many_give_the_same_bits(models, units):
    """In threads, and in one pass that serves several sets."""
    words = {"input_ids": torch.randint(1, SIZE, (6, SIZE))}
    batches = [{"input_ids": part} for part in words["input_ids"].split(2)]
    spec = alloy.find_symmetries(models["a"], words)
    options = {"joint": True, "grams": True, "units": units}
    pairs = [("a", "b"), ("c", "b")]
    all_three = collect(models, batches, spec, **options, pairs=pairs, threads=3)
    for pair in pairs:
        alone = collect(
            {name: models[name] for name in pair}, batches, spec, **options
        ).to_tensors()
        shared = all_three.only(*pair).to_tensors()
        assert shared.keys() == alone.keys()
        assert all(torch.equal(tensor, alone[name]) for name, tensor in shared.items())
    with pytest.raises(CollectionError, match="no statistics of 'd'"):
        all_three.only("d")


def test_models_that_draw_draw_alike_in_threads(models):
    """Threads share the generator, so such models run one after the other."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain(0)

        def forward(self, input):
            return self.chain(input + torch.randn_like(input))

    noisy = {"a": Noisy().eval(), "b": Noisy().eval()}
    batches = [{"input": part} for part in two_processes.data().split(8)]
    spec = alloy.find_symmetries(noisy["a"], batches[0])
    statistics = collect(noisy, batches, spec, threads=2)
    for places in statistics.places.values():
        for place in places:
            assert torch.equal(place.sums["a"], place.sums["b"])


class _Kept(RunningSums):
    """The sums of the last pass, to look at."""

    last: "_Kept"

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        _Kept.last = self


def _halved(monkeypatch) -> None:
    """Let the Grams of tiny layers be summed by halves, as those of wide ones are."""
    monkeypatch.setattr("alloy.statistics.moments.WIDE", 5)
    monkeypatch.setattr("alloy.statistics.moments.BLOCK", 3)


def test_grams_of_wide_layers_are_whole(models, ids, spec, monkeypatch):
    batches = _batches(ids, [4, 5])
    plain = collect(models, batches, spec, grams=True).grams
    _halved(monkeypatch)
    halved = collect(models, batches, spec, grams=True).grams
    assert halved.keys() == plain.keys()
    for name, own in plain.items():
        assert halved[name].keys() == own.keys()
        for weight, gram in own.items():
            ours = halved[name][weight]
            assert ours.count == gram.count
            torch.testing.assert_close(ours.sum_DD, gram.sum_DD, rtol=1e-12, atol=1e-12)
    shared = [
        halved["a"][f"bert.encoder.layer.0.attention.self.{n}.weight"] for n in ("query", "key")
    ]
    assert shared[0].sum_DD is shared[1].sum_DD  # one tensor is read by both


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("options", [{}, {"joint": True, "grams": True}, {"units": "written"}])
def test_memory_is_planned_before_a_model_runs(models, options, is_wide, monkeypatch):
    """To the byte where no two layers read one tensor, else an upper bound."""
    if is_wide:
        _halved(monkeypatch)
    shared = dict(list(models.items())[:2])
    plain = {name: chain(seed) for seed, name in enumerate("ab")}
    words = {"input_ids": torch.randint(1, SIZE, (3, SIZE))}
    for given, batch, is_exact in (
        (plain, {"input": two_processes.data()}, True),
        (shared, words, False),
    ):
        spec = alloy.find_symmetries(next(iter(given.values())), batch)
        planned = planned_bytes(given, spec, **options)
        with monkeypatch.context() as patch:
            patch.setattr("alloy.statistics.collection.RunningSums", _Kept)
            collect(given, [batch], spec, **options)
        taken = sum(total.nbytes for total in _Kept.last.totals.values())
        assert taken == planned if is_exact else taken <= planned <= 2 * taken


@pytest.fixture(scope="module")
def models():
    return {"a": _bert(0), "b": _bert(1), "c": _bert(2)}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(SIZE, (9, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def spec(models, ids):
    return alloy.find_symmetries(models["a"], {"input_ids": ids})


def _batches(ids, sizes, **more):
    parts = {"input_ids": ids, **more}
    return [
        dict(zip(parts, split, strict=True))
        for split in zip(*(tensor.split(sizes) for tensor in parts.values()), strict=True)
    ]


def _assert_same(one: Statistics, other: Statistics, tolerance: float = 1e-5) -> None:
    ours, theirs = one.to_tensors(), other.to_tensors()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        scale = tensor.double().abs().max().clamp(min=1)
        assert (tensor.double() - theirs[key]).abs().max() <= tolerance * scale, key


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [2, 3, 4]])
def test_statistics_do_not_depend_on_how_the_data_are_split(models, ids, spec, sizes):
    whole = collect(models, _batches(ids, [9]), spec, joint=True, grams=True)
    _assert_same(whole, collect(models, _batches(ids, sizes), spec, joint=True, grams=True))
    parts = [collect(models, [b], spec, joint=True, grams=True) for b in _batches(ids, sizes)]
    _assert_same(whole, sum(parts[1:], start=parts[0]))


@pytest.mark.parametrize("units", ["read", "written"])
def test_correlations_are_numpys_at_every_point(models, ids, spec, units):
    """Linear images, whose moments are derived, have the moments of what the layer computes."""
    modules = dict(models["a"].named_modules())
    images = [image.units for image in linear_images(spec, modules)] if units == "written" else []
    derived = {point.space for point in images}
    points = [p for p in unit_points(spec, modules) if p.space not in derived] + images
    assert len(derived) == (6 if images else 0)  # queries and keys, values, MLP units of two blocks
    statistics = collect(models, _batches(ids, [4, 5]), spec, units=units)
    seen = {name: {} for name in "ab"}
    for name, store in seen.items():
        keyed = {str(i): p.point for i, p in enumerate(points)}
        with torch.no_grad(), observe(models[name], keyed, store.__setitem__):
            models[name](input_ids=ids)
    for space, moments in statistics.between("a", "b").items():
        expected = []
        for i, p in enumerate(points):
            if p.space == space:
                x, y = (p.read(seen[name][str(i)]).flatten(0, 1).double() for name in "ab")
                expected.append(torch.corrcoef(torch.cat([x, y], 1).T)[: x.shape[1], x.shape[1] :])
        for moment in moments:
            found = moment.correlation_DE()
            assert min(float((found - e).abs().max()) for e in expected) < 1e-4


def test_moments_follow_from_a_stream_that_is_fixed():
    """A model without a head: nobody may reorder its outputs, yet its MLP units are linear in
    them.
    """
    models, images = {"a": _vit(8, 0), "b": _vit(8, 1)}, torch.randn(6, 3, 8, 8)
    spec = _vit_spec(8)
    assert {i.source.space for i in linear_images(spec, dict(models["a"].named_modules()))} == {""}
    found, read = (
        collect(models, [{"pixel_values": images}], spec, units=units).between("a", "b")
        for units in ("written", "read")
    )
    for space, moments in read.items():
        assert len(found[space]) == len(moments)
        if "query" in space:  # written in either case
            for ours, theirs in zip(found[space], moments, strict=True):
                torch.testing.assert_close(
                    ours.correlation_DE(), theirs.correlation_DE(), rtol=1e-4, atol=1e-4
                )


def test_each_tensor_counts_once_for_a_space(models, ids, spec):
    """Queries, keys and values read one tensor: it is one observation of the residual stream."""
    statistics = collect(models, _batches(ids, [9]), spec)
    residual = next(name for name in spec.spaces if name.startswith("bert.embeddings"))
    # attention and MLP of two blocks, then the head: its dense layer and the tied embeddings
    assert len(statistics.places[residual]) == 6


def test_padding_does_not_count_at_any_place(models, ids, spec):
    lengths = [7, 3, 1, 5, 7, 2, 6, 4, 7]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    padded = collect(models, _batches(ids, [4, 5], attention_mask=mask), spec, grams=True)
    alone = [
        {"input_ids": ids[i : i + 1, :length], "attention_mask": torch.ones(1, length).long()}
        for i, length in enumerate(lengths)
    ]
    _assert_same(collect(models, alone, spec, grams=True), padded)
    assert padded.places[next(iter(padded.places))][0].count == sum(lengths)


def test_each_side_of_an_encoder_decoder_has_its_own_mask():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=SIZE,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = T5Model(config).eval()
    source, target = torch.randint(1, SIZE, (3, 6)), torch.randint(1, SIZE, (3, 5))
    inputs = {"input_ids": source, "decoder_input_ids": target}
    spec = alloy.find_symmetries(model, inputs)
    lengths, target_lengths = torch.tensor([6, 2, 4]), torch.tensor([5, 3, 1])
    masks = {
        "attention_mask": (torch.arange(6) < lengths[:, None]).long(),
        "decoder_attention_mask": (torch.arange(5) < target_lengths[:, None]).long(),
    }
    alone = [
        {
            "input_ids": source[i : i + 1, : lengths[i]],
            "decoder_input_ids": target[i : i + 1, : target_lengths[i]],
        }
        for i in range(3)
    ]
    _assert_same(
        collect({"a": model}, [{**inputs, **masks}], spec, grams=True),
        collect({"a": model}, alone, spec, grams=True),
    )
    ambiguous = {"input_ids": source, "decoder_input_ids": source}
    with pytest.raises(MaskError, match="pad one of them further"):
        collect({"a": model}, [{**ambiguous, "attention_mask": masks["attention_mask"]}], spec)


PLANTED = ["gpt2", "vit", "llama", "resnet"]


def _check_planted(name):
    """The units of a permuted model correlate perfectly with the units that they were."""
    model, inputs = zoo.build(name)
    spec = alloy.find_symmetries(model, inputs)
    transforms = random_transforms(with_kind(spec, "permutation"), torch.Generator().manual_seed(1))
    moved, _ = zoo.build(name)
    moved.load_state_dict(transport(model.state_dict(), spec, transforms))
    for units in ("written", "read"):
        found = collect({"a": model, "b": moved}, [inputs], spec, units=units)
        assert found.places
        for space, moments in found.between("a", "b").items():
            order = flat_order(space, spec, transforms)
            for m in moments:
                centre = torch.outer(m.sum_D, m.sum_E) / m.count
                shared = (m.product_DE - centre)[order, torch.arange(len(order))] / m.count
                variance = m.square_E / m.count - (m.sum_E / m.count) ** 2
                rounding = 1e-9 * float(m.square_E.max()) / m.count  # all that a constant unit has
                bound = (
                    1e-3 * float(variance.max()) + rounding + 1e-30
                )  # some tiny models underflow
                torch.testing.assert_close(shared, variance, rtol=0, atol=bound)


@pytest.mark.parametrize("name", PLANTED)
def test_units_are_found_where_they_moved_in_any_architecture(name):
    _check_planted(name)


APART = {
    "groupvit": "its learned tokens are a space: the samples themselves come in another order",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the example inputs reach")  # FLAVA and Qwen2-VL read text alone
@pytest.mark.parametrize("name", sorted(set(zoo.CASES) - {*PLANTED, *APART}))
def test_units_are_found_where_they_moved_in_every_architecture(name):
    _check_planted(name)


def test_joint_moments_hold_every_pair_of_models(models, ids, spec):
    statistics = collect(models, _batches(ids, [4, 5]), spec, joint=True)
    for space, moments in statistics.between("a", "c").items():
        for joint, between in zip(statistics.joint(space), moments, strict=True):
            size = len(between.sum_D)
            assert joint.sizes == (size,) * 3
            found = joint.correlation_DD()[:size, 2 * size :]
            torch.testing.assert_close(found, between.correlation_DE(), rtol=1e-5, atol=1e-5)
            symmetric = joint.product_DD.T
            torch.testing.assert_close(joint.product_DD, symmetric, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                joint.product_DD.diagonal()[:size], between.square_D, rtol=1e-6, atol=1e-6
            )
            assert torch.linalg.eigvalsh(joint.covariance_DD()).min() > -1e-5
    backwards = statistics.between("c", "a")
    for space, moments in statistics.between("a", "c").items():
        assert torch.equal(moments[0].product_DE, backwards[space][0].product_DE.T)


@pytest.mark.parametrize(("name", "dim"), [("bert", 1), ("gpt2", 0)])
def test_grams_are_those_of_the_inputs_and_say_which_dim_they_meet(name, dim):
    model, inputs = zoo.build(name)
    spec = alloy.find_symmetries(model, inputs)
    grams = collect({"a": model}, [inputs], spec, grams=True).grams["a"]
    modules = dict(model.named_modules())
    for weight, gram in grams.items():
        module, seen = weight.removesuffix(".weight"), {}
        with torch.no_grad(), observe(model, {"x": Point(module, "input")}, seen.__setitem__):
            model(**inputs)
        x = seen["x"].flatten(0, -2).double()
        torch.testing.assert_close(gram.sum_DD, x.T @ x)
        assert gram.count == len(x)
        assert gram.dim == (1 if isinstance(modules[module], nn.Linear) else dim)
    assert {gram.dim for gram in grams.values()} == {1, dim}


def _vit(width: int, seed: int, intermediate: int | None = None) -> ViTModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=intermediate or 2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config).eval()


def test_models_of_different_widths_are_compared_unit_by_unit():
    """Also where only one of them has MLP units that are cheaper to derive than to observe."""
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    models = {"narrow": _vit(8, 0), "wide": _vit(12, 1)}
    thin = _vit(12, 1, intermediate=6)
    both = {"narrow": models["narrow"], "thin": thin}
    specs = {n: alloy.find_symmetries(m, {"pixel_values": images}) for n, m in both.items()}
    found = collect(both, [{"pixel_values": images}], specs).between("narrow", "thin")
    assert sorted(m.product_DE.shape for (m, *_) in found.values())[-1] == (16, 6)
    specs = {n: alloy.find_symmetries(m, {"pixel_values": images}) for n, m in models.items()}
    batches = [{"pixel_values": images}]
    statistics = collect(models, batches, specs, joint=True)
    for space, moments in statistics.between("narrow", "wide").items():
        sizes = [len(m.sum_D) * 3 // 2 for m in moments]
        assert sizes == [len(m.sum_E) for m in moments], space
        assert statistics.joint(space)[0].sizes == (len(moments[0].sum_D), len(moments[0].sum_E))


def test_statistics_survive_a_file(models, ids, spec, tmp_path):
    names = {"folder/a": models["a"], "folder/b": models["b"]}
    statistics = collect(names, [{"input_ids": ids}], spec, joint=True, grams=True)
    save_file(statistics.to_tensors(), tmp_path / "s.safetensors")
    back = Statistics.from_tensors(load_file(tmp_path / "s.safetensors"))
    assert back.names == statistics.names
    assert back.warnings == statistics.warnings
    _assert_same(statistics, back, tolerance=0)
    with pytest.raises(CollectionError, match="are no statistics"):
        Statistics.from_tensors({"weight": torch.ones(1)})


@pytest.mark.slow
def test_two_processes_sum_the_bits_of_one(tmp_path):
    """Sums, Grams and samples; five batches, the last one without a partner."""
    worker = Path(__file__).with_name("two_processes.py")
    other = subprocess.Popen([sys.executable, worker, "1", str(tmp_path)])
    two_processes.main(0, str(tmp_path))
    assert other.wait(timeout=900) == 0
    alone = two_processes.statistics()
    assert any(places[0].samples for places in alone["samples"].places.values())
    for name, one in alone.items():
        for rank in (0, 1):
            both = load_file(tmp_path / f"{name}{rank}.safetensors")
            assert both.keys() == one.to_tensors().keys()
            assert all(torch.equal(both[key], tensor) for key, tensor in one.to_tensors().items())
    for rank, weights in enumerate(([1.0, 2.0], [3.0, 4.0])):
        gathered = load_file(tmp_path / f"grad{rank}.safetensors")
        assert gathered["gathered"].tolist() == [[1.0, 2.0], [2.0, 2.0]]
        assert gathered["grad"].tolist() == [[3 * weight for weight in weights]]
        too_few, uneven = (tmp_path / f"{rank}.txt").read_text().split("\n")
        assert too_few.startswith("2 processes for 1 batches of calibration data: take smaller")
        assert uneven.startswith("3 examples cannot be shared evenly by 2 processes")


def test_a_large_mean_does_not_drown_the_variance():
    """The error of float32 products stays small because they are taken about a centre."""

    class Shifted(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.chain = chain(seed)
            self.chain[0].bias.data += 3000.0

        def forward(self, input):
            return self.chain(input)

    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    models = {"a": Shifted(0).eval(), "b": Shifted(1).eval()}
    spec = alloy.find_symmetries(models["a"], {"input": x[:2]})
    found = collect(models, [{"input": part} for part in x.split(50)], spec, units="read")
    exact = {name: model.double() for name, model in models.items()}
    expected = collect(exact, [{"input": x.double()}], spec, units="read")
    for space, moments in expected.between("a", "b").items():
        for ours, theirs in zip(found.between("a", "b")[space], moments, strict=True):
            difference = ours.correlation_DE() - theirs.correlation_DE()
            assert difference.abs().max() < 2e-3, space


def test_low_precision_forwards_are_summed_in_full_precision(models, ids, spec):
    pair = {name: models[name] for name in "ab"}
    full = collect(pair, [{"input_ids": ids}], spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = collect(pair, [{"input_ids": ids}], spec)
        again = collect(pair, [{"input_ids": part} for part in ids.split(4)], spec)
    _assert_same(low, again, tolerance=1e-3)  # bfloat16 products would differ by 1e-2
    for space, moments in full.between("a", "b").items():
        for ours, theirs in zip(low.between("a", "b")[space], moments, strict=True):
            assert (ours.correlation_DE() - theirs.correlation_DE()).abs().median() < 0.05


def test_models_draw_the_same_noise():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain(0)

        def forward(self, input):
            return self.chain(input + torch.rand_like(input))

    model, x = Noisy().eval(), torch.randn(20, 3)
    spec = alloy.find_symmetries(_Plain(model.chain).eval(), {"input": x[:2]})
    found = collect({"a": model, "b": model}, [{"input": x}], spec).between("a", "b")
    for moments in found.values():
        product = moments[0].product_DE
        torch.testing.assert_close(product, product.T, rtol=1e-5, atol=1e-5)


class _Plain(nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, input):
        return self.chain(input)


def test_doubts_are_named():
    x = torch.randn(5, 3)
    model = chain(0).eval()
    model[0].weight.data[4] = 0.0
    spec = alloy.find_symmetries(model, {"input": x})
    doubts = collect({"a": model}, [{"input": x}], spec).warnings
    assert {doubt.name for doubt in doubts} == {"constant units", "few samples"}
    assert any(
        "1 of 8 units of 'a'" in doubt.message and ": 4;" in doubt.message for doubt in doubts
    )
    assert any("5 tokens for 8 units" in doubt.message for doubt in doubts)


def test_a_space_that_nothing_multiplies_is_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

        def forward(self, input):
            return (input * self.gain.abs() + self.shift).square().sum(-1)

    model, x = Scaled().eval(), torch.randn(5, 1)
    spec = alloy.find_symmetries(model, {"input": x})
    assert len(spec.spaces) == 1
    doubts = collect({"a": model}, [{"input": x}], spec).warnings
    assert [d.name for d in doubts] == ["unobserved space"]
    assert "'gain[0]'" in doubts[0].message


def test_a_mask_of_no_tokens_is_named(models, ids, spec):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain(0)

        def forward(self, input, attention_mask):
            return self.chain(input.mean(1))

    model, x = Pooled().eval(), torch.randn(20, 4, 3)
    mask = torch.ones(20, 4)
    spec = alloy.find_symmetries(model, {"input": x, "attention_mask": mask})
    clean = collect({"a": model}, [{"input": x, "attention_mask": mask}], spec)
    assert "unused mask" not in {d.name for d in clean.warnings}
    mask[0, 3] = 0
    found = collect({"a": model}, [{"input": x, "attention_mask": mask}], spec)
    assert "unused mask" in {d.name for d in found.warnings}


def test_what_cannot_be_compared_is_refused(models, ids, spec):
    batch = {"input_ids": ids}
    for arguments, message in [
        (({}, [batch], spec), "no models"),
        ((models, [], spec), "no calibration batches"),
        ((models, [batch], {"a": spec}), "model 'b' has no spec"),
        (({"a": _bert(0).train()}, [batch], spec), r"call eval\(\) first"),
    ]:
        with pytest.raises(CollectionError, match=message):
            collect(*arguments)
    with pytest.raises(CollectionError, match="not among"):
        collect(models, [batch], spec, pairs=[("a", "z")])
    found = collect(models, [batch], spec, pairs=[("a", "b")])
    with pytest.raises(CollectionError, match="pairs="):
        found.between("b", "c")
    with pytest.raises(CollectionError, match="joint=True"):
        found.joint(next(iter(spec.spaces)))
    with pytest.raises(CollectionError, match="no statistics of 'z'"):
        found.between("a", "z")
    with pytest.raises(CollectionError, match="cannot be added"):
        found + collect(models, [batch], spec)


def test_broken_models_are_refused_by_name(ids, spec):
    broken = _bert(0)
    broken.bert.encoder.layer[1].intermediate.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(
        CollectionError, match=r"'b' computes NaN or Inf at bert\.encoder\.layer\.1"
    ):
        collect({"a": _bert(0), "b": broken}, [{"input_ids": ids}], spec)


def test_models_that_differ_are_refused(ids, spec):
    deeper = BertForMaskedLM(
        BertConfig(
            vocab_size=SIZE,
            hidden_size=SIZE,
            intermediate_size=SIZE,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=SIZE,
        )
    ).eval()
    specs = {"a": spec, "b": alloy.find_symmetries(deeper, {"input_ids": ids})}
    with pytest.raises(CollectionError, match=r"'b' has the space .*layer\.2.*'a' has not"):
        collect({"a": _bert(0), "b": deeper}, [{"input_ids": ids}], specs)
    with pytest.raises(CollectionError, match="another model"):
        collect({"a": _vit(8, 0)}, [{"pixel_values": torch.randn(2, 3, 8, 8)}], _vit_spec(12))


def _vit_spec(width: int):
    return alloy.find_symmetries(_vit(width, 0), {"pixel_values": torch.randn(2, 3, 8, 8)})


def test_models_that_cut_an_example_differently_are_refused():
    class Cut(nn.Module):
        def __init__(self, num_tokens):
            super().__init__()
            self.chain, self.num_tokens = chain(0), num_tokens

        def forward(self, input):
            return self.chain(input[:, : self.num_tokens]).sum(1)

    x = torch.randn(4, 3, 3)
    models = {"a": Cut(3).eval(), "b": Cut(2).eval()}
    spec = alloy.find_symmetries(models["a"], {"input": x})
    with pytest.raises(CollectionError, match=r"saw \[12\] and \[8\] tokens"):
        collect(models, [{"input": x}], spec)
