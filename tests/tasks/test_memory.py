"""Memory that runs out is one error: what was needed, what would fit, for either kind of memory."""

import numpy as np
import pytest
import torch

from alloy.errors import DeviceMemoryError
from tasks.command import batch_sizes
from tasks.recipe.load import load
from tasks.workers.memory import LESS, within_memory

CUDA = (
    "CUDA out of memory. Tried to allocate {tried}. GPU 1 has a total capacity of 15.90 GiB of "
    "which 1.40 GiB is free. Process 7 has 14.50 GiB memory in use. Of the allocated memory "
    "14.00 GiB is allocated by PyTorch, and 22.00 MiB is reserved by PyTorch but unallocated."
)
MPS = (
    "MPS backend out of memory (MPS allocated: 8.80 GB, other allocations: 1.00 GB, max allowed: "
    "9.07 GB). Tried to allocate 256.00 MB on private pool."
)
CUDA_ERRORS = [
    (torch.OutOfMemoryError(CUDA.format(tried="2.50 GiB")), "GPU 1 is full: 2.5 GiB more were", 32),
    (torch.OutOfMemoryError(CUDA.format(tried="80.00 GiB")), "80 GiB more were needed", 8),
    (RuntimeError(MPS), "256 MiB more were needed beside 8.8 GiB", 32),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"),
        "the GPU is full",
        32,
    ),
]


@pytest.mark.parametrize(("raised", "said", "fits"), CUDA_ERRORS)
def test_a_full_device_says_what_was_needed_and_what_would_fit(raised, said, fits):
    """The batch is halved until what was asked for, in proportion, is no more than there is."""
    with (
        pytest.raises(DeviceMemoryError, match=said) as refused,
        within_memory("collect", {"collect.batch_size": 64}),
    ):
        raise raised
    message = str(refused.value)
    assert message.startswith("collect: ")
    assert f"set collect.batch_size to {fits} (now 64)" in message
    assert "DEVICE=cpu" in message
    assert "the same command goes on from here" in message


def test_the_machines_own_memory_runs_out_alike():
    """torch's allocator and NumPy's say so in words of their own."""
    for allocate in (lambda: torch.empty(2**58), lambda: np.empty(2**58)):
        with (
            pytest.raises(DeviceMemoryError, match=r"memory is full: .* were needed") as refused,
            within_memory("finetune", {"a": 1}, LESS),
        ):
            allocate()
        assert "DEVICE=cpu" not in str(refused.value)
        assert "What would fit: double training.accumulation_steps" in str(refused.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^mat1"), within_memory("collect", {}):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_the_batch_sizes_of_a_stage_are_named_as_in_its_params():
    modality = load("modality")
    assert batch_sizes("collect", modality) == ({"collect.batch_size": 64}, "")
    sizes, advice = batch_sizes("finetune", modality)
    assert sizes["finetune.batch_sizes.vqa"] == modality.finetune.batch_sizes["vqa"]
    assert advice == LESS
    assert list(batch_sizes("align", load("multitask"))[0]) == [
        "collect.batch_size",
        "evaluate.batch_size",
    ]
    assert batch_sizes("fetch", modality) == ({}, "")
