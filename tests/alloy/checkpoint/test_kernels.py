"""The compiled loops compute what the methods' own functions compute."""

import numpy as np
import pytest
import torch

import alloy
import alloy.checkpoint.engine.kernels as kernels
from alloy.checkpoint import MergeRequest, plan_merge, run_plan
from alloy.checkpoint.engine.execute import _chunk_elements
from alloy.checkpoint.engine.kernels import loops
from alloy.checkpoint.engine.work import Function
from alloy.checkpoint.run import _step
from alloy.merging import MERGE_METHODS
from alloy.merging.randomness import keep, stream_key

HALVES = {kernels.BF16: torch.bfloat16, kernels.F16: torch.float16}
DTYPES = HALVES | {kernels.F32: torch.float32}
ONE = np.ones(1, np.float32)


def _mixed(raw, kind, out, out_kind):
    """`mix` of one model, which converts."""
    return kernels.mix(raw[None], kind, ONE, False, out, out_kind)


def _decoded(raw, kind, out):
    return loops._decode(raw, kind, 0, out)


def _encoded(values, kind, out):
    return loops._encode(values, kind, out, 0)


def _decoded_by_mix(raw, kind, out):
    _mixed(raw, kind, out.view(np.uint8), kernels.F32)


def _encoded_by_mix(values, kind, out):
    return _mixed(values.view(np.uint8), kernels.F32, out, kind)


@pytest.mark.parametrize("decode", [_decoded, _decoded_by_mix])
@pytest.mark.parametrize("kind", HALVES)
def test_decoding_is_exact_for_every_16_bit_number(kind, decode):
    """All 65,536 bfloat16 and float16 numbers become torch's float32; NaN and Inf stay."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    decoded = np.empty(1 << 16, np.float32)
    decode(halves.view(np.uint8), kind, decoded)
    expected = torch.from_numpy(halves.view(np.int16)).view(HALVES[kind]).float().numpy()
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(decoded[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert not np.isfinite(decoded[~finite]).any()


@pytest.mark.parametrize("encode", [_encoded, _encoded_by_mix])
@pytest.mark.parametrize("kind", HALVES)
def test_encoding_rounds_to_nearest_even(kind, encode):
    """float32 of every size, ties, subnormals and the largest round to the bits of torch."""
    bits = np.concatenate(
        [
            np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint32),
            *(
                np.arange(c - 20_000, c + 20_000, dtype=np.uint32)
                for c in (0x33000000, 0x38800000, 0x477FF000)
            ),
            *(
                np.arange(c, c + (1 << 16), dtype=np.uint32)
                for c in (0, 0x3F800000, 0x3F810000, 0x387F0000)
            ),
        ]
    )
    values = bits.view(np.float32)
    values = values[np.isfinite(values)].copy()
    out = np.empty(2 * len(values), np.uint8)
    encode(values, kind, out)
    expected = torch.from_numpy(values).to(HALVES[kind]).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(out.view(np.uint16), expected)


@pytest.mark.parametrize("encode", [_encoded, _encoded_by_mix])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_encoding_and_checking_notice_what_is_not_finite(kind, value, encode):
    """NaN, Inf, and what the output dtype cannot hold."""
    values = np.array([1.0, value, 2.0], np.float32)
    out = np.empty(12, np.uint8)
    assert not encode(values, kind, out)
    assert encode(values[:1], kind, out)
    if kind == kernels.F32:
        assert not kernels.is_finite(values.view(np.uint8), kind)
    else:
        assert not encode(np.array([3.4e38], np.float32), kind, out)
        assert not kernels.is_finite(out[:2].copy(), kind)


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("out_kind", DTYPES)
@pytest.mark.parametrize("kind", DTYPES)
def test_a_mix_of_any_dtypes_has_the_bits_of_torch(kind, out_kind, has_base):
    """Numbers of all sizes, subnormal ones too, and one that is not finite."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-130, 12, (4 + has_base, 30_001), generator=generator)
    models = torch.randn(4 + has_base, 30_001, generator=generator) * 2.0**exponents
    models = models.to(DTYPES[kind])
    coefficients = torch.randn(4, generator=generator)
    base = models[0].float() if has_base else None
    total = torch.zeros(30_001)
    for i, (c, model) in enumerate(zip(coefficients, models[has_base:].float(), strict=True)):
        scaled = c * (model if base is None else model - base)
        total = scaled if i == 0 and base is None else total + scaled
    expected = (total if base is None else total + base).to(DTYPES[out_kind])
    out = torch.empty_like(expected)
    for columns in (slice(None), slice(0, 1), slice(0, 0)):
        rows = models[:, columns].contiguous()
        assert kernels.mix(
            rows.view(torch.uint8).numpy().reshape(len(models), -1), kind, coefficients.numpy(),
            has_base, out[columns].view(torch.uint8).numpy(), out_kind,
        )  # fmt: skip
        assert torch.equal(out[columns].view(torch.uint8), expected[columns].view(torch.uint8))
    for row in models:
        assert kernels.is_finite(row.view(torch.uint8).numpy(), kind)
    models[-1, 17] = float("nan")
    rows = models.view(torch.uint8).numpy()
    assert not kernels.is_finite(rows[-1], kind)
    assert not kernels.mix(
        rows, kind, coefficients.numpy(), has_base, out.view(torch.uint8).numpy(), out_kind
    )


EXACT = [
    ("linear", {}, [0.2, 0.3, 0.4]),
    ("linear", {"normalize": False}, [0.7, -0.3, 0.9]),
    ("task_arithmetic", {}, [0.7, -0.3, 0.9]),
    ("modality_arithmetic", {"scale": 0.75}, None),
    *(
        (
            "ties",
            {"density": density, "election": election, "normalize": normalize, "scale": 0.6},
            [0.5, 0.2, 0.9],
        )
        for density, election, normalize in (
            (0.5, "mass", True),
            (0.2, "weighted mass", True),
            (0.031, "count", False),
            (1.0, "mass", False),
            (0.0, "mass", True),
        )
    ),
    ("dare_linear", {"density": 0.3, "seed": 7}, [0.5, 0.2, -0.9]),
    ("dare_ties", {"density": 0.6, "rescale": False}, [0.5, 0.2, 0.9]),
    ("dare_ties", {"density": 1.0, "election": "weighted mass"}, [0.5, 0.2, 0.9]),
    ("breadcrumbs", {"density": 0.7, "gamma": 0.05}, [0.5, 0.2, -0.9]),
    ("breadcrumbs_ties", {"density": 0.9, "gamma": 0.1}, [0.5, 0.2, 0.9]),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("method", "options", "coefficients"), EXACT)
def test_compiled_loops_give_the_bits_of_the_torch_functions(
    method, options, coefficients, dtype, write, weights, load, tmp_path
):
    """Every compiled method, every dtype it is compiled for: the same bytes."""
    folders = [write(name, weights(i, dtype)) for i, name in enumerate(("seed", "a", "b", "c"))]
    base = folders[0] if MERGE_METHODS[method].base == "required" else None
    outputs = []
    for compiled in (True, False):
        request = MergeRequest(
            method,
            folders[1:],
            tmp_path / f"out{compiled}",
            base=base,
            coefficients=coefficients,
            options=options,
        )
        plan = plan_merge(request)
        run_plan(plan, compiled=compiled, threads=1)
        outputs.append(load(plan.output))
    for name, tensor in outputs[1].items():
        assert outputs[0][name].shape == tensor.shape
        ours, theirs = (t.reshape(-1).view(torch.uint8) for t in (outputs[0][name], tensor))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("method", "with_base"),
    [
        ("slerp", False),
        ("nuslerp", True),
        ("multislerp", False),
        ("karcher", False),
        ("karcher", True),
        ("model_stock", True),
    ],
)
def test_compiled_mixtures_differ_from_torch_in_the_order_of_a_sum_only(
    method, with_base, write, weights, load, tmp_path
):
    """Inner products agree to float32: at most 1 in 10,000 entries rounds to its neighbour."""
    folders = [write(name, weights(i)) for i, name in enumerate(("seed", "a", "b"))]
    outputs = []
    for compiled in (True, False):
        base = folders[0] if with_base else None
        output = tmp_path / f"out{compiled}"
        plan = plan_merge(MergeRequest(method, folders[1:], output, base=base))
        run_plan(plan, compiled=compiled, threads=1)
        outputs.append(load(plan.output))
    differing = sum(int((outputs[0][n] != t).sum()) for n, t in outputs[1].items())
    total = sum(t.numel() for t in outputs[1].values())
    assert differing <= total / 10_000
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2**-7, atol=1e-6)


def test_what_has_a_compiled_loop_uses_it(sources, base, tmp_path):
    """The methods above do not fall back to torch."""
    for method in ("linear", "slerp", "ties", "dare_ties", "breadcrumbs", "task_arithmetic"):
        request = MergeRequest(
            method,
            sources[: MERGE_METHODS[method].max_models],
            tmp_path / "out",
            base=base if MERGE_METHODS[method].base == "required" else None,
        )
        plan = plan_merge(request)
        for tensor in plan.tensors:
            assert not isinstance(_step(plan, tensor, True).work(), Function), (method, tensor.name)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 12, 200_000, 1 << 20])
def test_a_mixtures_chunks_hold_whole_reductions(chunk_bytes, sources, tmp_path):
    """Inner products are summed by the same blocks wherever a tensor is cut, each by one worker."""
    plan = plan_merge(MergeRequest("slerp", sources[:2], tmp_path / "out"))
    for tensor in plan.tensors:
        if tensor.num_elements:
            step = _step(plan, tensor, compiled=True)
            assert _chunk_elements(step, step.work(), chunk_bytes) % kernels.REDUCTION == 0


def test_float32_thresholds_are_exact(write, load, tmp_path):
    """TIES on float32 keeps exactly int(density * n) entries when no two magnitudes tie."""
    magnitudes = torch.randperm(200_000, generator=torch.Generator().manual_seed(0)).float() + 1
    signs = torch.randint(0, 2, (200_000,), generator=torch.Generator().manual_seed(1)) * 2 - 1
    zero = write("seed", {"w": torch.zeros(200_000)}, config=None)
    one = write("a", {"w": magnitudes * signs * 1e-6}, config=None)
    request = MergeRequest("ties", [one], tmp_path / "out", base=zero, options={"density": 0.123})
    plan = plan_merge(request)
    run_plan(plan, threads=2)
    merged = load(plan.output)["w"]
    assert int((merged != 0).sum()) == int(0.123 * 200_000)
    assert merged[merged != 0].abs().min() > (magnitudes * 1e-6)[merged == 0].max()


def test_random_masks_are_kept_at_the_asked_rate(write, load, tmp_path):
    """DARE keeps density n entries within 5 standard deviations, whatever the chunk."""
    n, density = 300_000, 0.3
    zero = write("seed", {"w": torch.zeros(n)}, config=None)
    one = write("a", {"w": torch.ones(n)}, config=None)
    kept = []
    for i, chunk_bytes in enumerate((1 << 16, 99_996, 1 << 20)):  # 24,999 entries: cuts are odd
        options = {"density": density}
        output = tmp_path / f"out{i}"
        plan = plan_merge(MergeRequest("dare_linear", [one], output, base=zero, options=options))
        run_plan(plan, chunk_bytes=chunk_bytes)
        kept.append(load(plan.output)["w"] != 0)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert torch.equal(kept[0], keep(stream_key(0, "w", 0), density, kept[0]))
    assert abs(int(kept[0].sum()) - density * n) < 5 * (n * density * (1 - density)) ** 0.5


@pytest.mark.parametrize("num_models", [1, 2, 4, 5])
def test_a_vote_of_any_number_of_models_has_the_bits_of_torch(num_models):
    """Up to three keep their sums in registers, more in the cache."""
    generator = torch.Generator().manual_seed(num_models)
    base = torch.randn(3000, generator=generator)
    models = [base + 0.1 * torch.randn(3000, generator=generator) for _ in range(num_models)]
    coefficients = [0.3 + 0.1 * i for i in range(num_models)]
    expected = alloy.merge(
        "ties", [{"w": m} for m in models], base={"w": base}, coefficients=coefficients,
        density=1.0, election="weighted mass",
    )["w"]  # fmt: skip
    shares = [c / sum(coefficients) for c in coefficients]
    out = np.empty(12_000, np.uint8)
    assert kernels.sparse(
        np.stack([t.numpy().view(np.uint8) for t in (base, *models)]), kernels.F32,
        np.array(shares, np.float32), np.array([(0, 0xFFFFFFFF)] * num_models, np.uint32),
        np.zeros((0, 2), np.uint64), np.float32(1), 0, 1, True, np.float32(1), out, kernels.F32,
    )  # fmt: skip
    np.testing.assert_array_equal(out.view(np.uint32), expected.numpy().view(np.uint32))


@pytest.mark.parametrize("kind", [kernels.BF16, kernels.F16, kernels.F32])
def test_a_rounded_magnitude_is_bounded_by_its_bits(kind):
    """Bits reach `_least_bits` exactly where their magnitude, rounded, reaches the bound."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0x30000000, 0x45000000, 20_000, dtype=np.uint32)
    rounded = np.array([loops._magnitude(b, kind) for b in bits])
    for bound in rounded[:20]:
        least = loops._least_bits(kind, np.uint32(bound))
        np.testing.assert_array_equal(rounded >= bound, bits >= least)
