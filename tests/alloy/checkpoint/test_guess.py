"""TIES in one pass over the sources: thresholds bracketed by a sample, and exact."""

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

import alloy.checkpoint.engine.execute as execute
from alloy.checkpoint import MergeRequest, plan_merge, run_plan
from alloy.checkpoint.engine import guess, kernels
from alloy.checkpoint.engine.work import Trim
from alloy.errors import MergeError

SIZE = 40_000
CHUNK = 1 << 14


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    """Tensors of 40,000 elements are sampled as large ones are."""
    monkeypatch.setattr(guess, "PLACES", 32)
    monkeypatch.setattr(guess, "PLACE", 64)
    monkeypatch.setattr(guess, "MOST_DOUBTS", 3.0)


@pytest.fixture
def settled(monkeypatch):
    """What came of each guess, by tensor."""
    outcomes = {}

    def settle(self, outs):
        outcomes[self.tensors.name] = settle_as_it_is(self, outs)
        return outcomes[self.tensors.name]

    settle_as_it_is = Trim.settle
    monkeypatch.setattr(Trim, "settle", settle)
    return outcomes


def noise(seed, scale=1.0):
    return scale * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def merged(write, load, tmp_path, base, models, *, held=True, threads=2, **options):
    """One tensor by TIES, as bytes; `held` False measures it before it is merged."""
    tensors = [base, *models]
    folders = [write(f"{held}-{i}", {"w": t}, config=None) for i, t in enumerate(tensors)]
    coefficients = [0.5, 0.2, 0.9, 0.4][: len(models)]
    output = tmp_path / f"{held}"
    plan = plan_merge(
        MergeRequest(
            "ties",
            folders[1:],
            output,
            base=folders[0],
            coefficients=coefficients,
            options=options,
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        if not held:
            patch.setattr(execute, "HELD_BYTES", 0)
        run_plan(plan, threads=threads, chunk_bytes=CHUNK)
    return load(plan.output)["w"].view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("num_models", "election"),
    [(1, "mass"), (2, "weighted mass"), (3, "mass"), (3, "count"), (4, "weighted mass")],
)
def test_one_pass_gives_the_bits_of_two(
    dtype, num_models, election, write, load, tmp_path, settled
):
    """Any dtype, number of models and election."""
    base = noise(0).to(dtype)
    models = [(base + noise(1 + i, 0.1)).to(dtype) for i in range(num_models)]
    options = {"election": election, "density": 0.4, "scale": 0.7}
    once = merged(write, load, tmp_path, base, models, **options)
    assert settled == {"w": True}
    assert torch.equal(once, merged(write, load, tmp_path, base, models, held=False, **options))
    assert settled == {"w": True}, "the second merge measured"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.97, 0.9999])
def test_thresholds_of_any_rank_are_exact(density, dtype, write, load, tmp_path, settled):
    """Near the ends too, where the bracket is open."""
    base, models = torch.zeros(SIZE, dtype=dtype), [noise(i).to(dtype) for i in (1, 2)]
    once = merged(write, load, tmp_path, base, models, density=density)
    twice = merged(write, load, tmp_path, base, models, held=False, density=density)
    assert "w" in settled
    assert torch.equal(once, twice)


def test_a_threshold_shared_by_many_elements_needs_no_list(write, load, tmp_path, monkeypatch):
    """Half of a task vector has one magnitude: two counts confirm it."""
    base = torch.zeros(SIZE, dtype=torch.bfloat16)
    model = torch.where(noise(1) > 0, 0.25, noise(2)).bfloat16()
    listed = []
    add = guess.Guess.add
    monkeypatch.setattr(
        guess.Guess, "add", lambda self, *rest: (listed.append(rest[-1]), add(self, *rest))
    )
    once = merged(write, load, tmp_path, base, [model], density=0.6)
    assert listed
    assert not any(listed)
    assert torch.equal(once, merged(write, load, tmp_path, base, [model], held=False, density=0.6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sample_that_misleads_is_found_out(dtype, write, load, tmp_path, settled, monkeypatch):
    """The places see small values only: the tensor is measured, and has the same bits."""
    base = torch.zeros(SIZE, dtype=dtype)
    model = noise(1, 10.0)
    for p in range(32):
        start = (SIZE - 64) * p // 31
        model[start : start + 64] *= 1e-3
    once = merged(write, load, tmp_path, base, [model.to(dtype)], density=0.5)
    assert settled == {"w": False}
    twice = merged(write, load, tmp_path, base, [model.to(dtype)], held=False, density=0.5)
    assert torch.equal(once, twice)


def test_one_part_that_lies_in_the_bracket_is_found_out(write, load, tmp_path, settled):
    """More elements in doubt than a piece may list: the tensor is measured."""
    base, model = torch.zeros(SIZE, dtype=torch.bfloat16), noise(1)
    middle = model.abs().median()
    starts = [(SIZE - 64) * p // 31 for p in range(32)]
    dense = torch.arange(SIZE) >= SIZE - 9000
    for start in starts:
        dense[start : start + 64] = False
    model[dense] = middle * (1 + 0.002 * noise(2)[dense])
    once = merged(write, load, tmp_path, base, [model.bfloat16()], density=0.5)
    assert settled == {"w": False}
    twice = merged(write, load, tmp_path, base, [model.bfloat16()], held=False, density=0.5)
    assert torch.equal(once, twice)


def test_tensors_that_wait_and_tensors_that_are_measured_share_a_file(
    write, load, tmp_path, monkeypatch
):
    """Whoever hashes a piece gives back its own buffer: no worker waits for one for ever."""
    settle = Trim.settle
    monkeypatch.setattr(Trim, "settle", lambda self, outs: time.sleep(0.1) or settle(self, outs))
    tensors = {f"w{i}": noise(i).bfloat16() for i in range(6)}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    base, model = write("base", zeros, config=None), write("model", tensors, config=None)
    outputs = {}
    for name, size in (("mixed", 2 * SIZE), ("measured", 0)):  # room for one tensor, for none
        monkeypatch.setattr(execute, "HELD_BYTES", size)
        options = {"density": 0.5}
        request = MergeRequest("ties", [model], tmp_path / name, base=base, options=options)
        plan = plan_merge(request)
        run = partial(run_plan, plan, threads=2, chunk_bytes=CHUNK)
        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        worker.join(300)
        assert not worker.is_alive(), "the workers wait for buffers that nobody gives back"
        outputs[name] = load(plan.output)
    for name in tensors:
        assert torch.equal(outputs["mixed"][name], outputs["measured"][name])


def test_what_is_not_finite_is_named_by_its_place(write, load, tmp_path):
    """As in a merge that measures first."""
    base = torch.zeros(SIZE, dtype=torch.bfloat16)
    model = noise(1).bfloat16()
    model[31_337] = float("nan")
    with pytest.raises(MergeError, match="NaN or Inf at flat index 31337"):
        merged(write, load, tmp_path, base, [model, noise(2).bfloat16()], density=0.5)


def test_a_small_tensor_is_not_sampled():
    """Fewer places than half would say too little."""
    assert guess.guess_thresholds([], 16 * 64 * 15, kernels.BF16, 10) is None


def test_the_kth_largest_is_found_in_a_histogram():
    """Its bin, and its rank within."""
    values = np.random.default_rng(0).integers(0, 50, 1000)
    counts = np.bincount(values, minlength=64)
    ordered = np.sort(values)[::-1]
    for k in (1, 17, 500, 1000):
        bin_, rank = guess.kth_largest(counts, k)
        assert bin_ == ordered[k - 1]
        assert rank == k - (values > bin_).sum()
