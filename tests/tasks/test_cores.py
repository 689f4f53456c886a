"""Cores share work, and the results are those of one core, in order."""

import threading

import pytest
import torch

from tasks.workers import cores


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    monkeypatch.setenv("ALLOY_DEVICE", "cpu")
    monkeypatch.setenv("ALLOY_JOB_CORES", "1")  # restored behind what share_cores sets


def test_items_come_in_order_with_the_bits_of_one_core(two_cores):
    items = [torch.randn(200, 64, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    alone = [x.T @ x for x in items]
    cores.share_cores(1)
    assert all(map(torch.equal, cores.in_order(lambda x: x.T @ x, items), alone))


def test_two_threads_meet_where_one_job_has_two_cores(two_cores):
    cores.share_cores(1)
    barrier = threading.Barrier(2, timeout=600)
    assert sorted(cores.in_order(lambda _: barrier.wait(), [0, 1])) == [0, 1]


@pytest.mark.parametrize(("num_jobs", "each"), [(1, "2"), (2, "1"), (3, "2"), (4, "1")])
def test_no_core_is_left_idle(two_cores, num_jobs, each):
    cores.share_cores(num_jobs)
    assert cores.os.environ["ALLOY_JOB_CORES"] == each


@pytest.mark.parametrize("num_jobs", [2, 4])
def test_jobs_that_share_the_cores_have_one_each(two_cores, num_jobs):
    cores.share_cores(num_jobs)
    names = set(cores.in_order(lambda _: threading.current_thread().name, [0, 1, 2]))
    assert names == {threading.current_thread().name}


def test_an_error_of_one_item_is_raised(two_cores):
    cores.share_cores(1)
    with pytest.raises(ZeroDivisionError):
        list(cores.in_order(lambda x: 1 / x, [1, 0, 2]))
