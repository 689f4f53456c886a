"""Laws of the loader: a step's batches depend on its number, whoever makes them, and when."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alloy.processes import ALONE, Processes
from tasks.data.archives.catalogue import open_set
from tasks.data.sets.description import Description
from tasks.data.sets.loader import Loader
from tasks.data.sets.splits import StoredSplit
from tasks.data.sets.stored import write_rows
from tasks.data.sets.transforms import Augmentation
from tasks.training.loop import parts_of, step_numbers

NUM_STEPS = 4


@pytest.fixture(scope="module")
def data(drawn_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredSplit:
    """Images of classes on the disk, which training crops and changes at random."""
    folder = tmp_path_factory.mktemp("rows")
    reader = open_set("imagenet", drawn_sets / "imagenet", held_out=2)
    write_rows(folder / "train.arrow", "classes", reader.rows("train"))
    about = Description("classes", 16, 2, classes=tuple(reader.classes()))
    split = StoredSplit(folder / "train.arrow", about, folder)
    return replace(split, augmentation=Augmentation(2, 7, 0.5, mirror=False))


def loader(data: StoredSplit, processes: Processes = ALONE, num_workers: int = 0) -> Loader:
    """Two batches of two examples a step, as a training in two parts has them."""

    def places(step: int) -> list[Tensor]:
        drawn = {"places": torch.randperm(len(data), generator=step_numbers(3, step))[:4]}
        return [processes.share(part)["places"] for part in parts_of(drawn, 2)]

    return Loader(data, places, num_steps=NUM_STEPS, seed=1, num_workers=num_workers)


def pixels(batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([batch["pixel_values"] for batch in batches])


def test_a_run_that_goes_on_sees_what_it_would_have_seen(data: StoredSplit) -> None:
    """From any step on, and back: batches are a function of the step; steps differ."""
    whole = loader(data)
    steps = [pixels(whole.at(step)) for step in range(NUM_STEPS)]
    again = loader(data)
    for step in (2, 3, 0):
        assert torch.equal(pixels(again.at(step)), steps[step])
    assert not torch.equal(pixels([data.take([0, 1], seed=1)]), pixels([data.take([0, 1], seed=2)]))


def test_two_processes_see_together_what_one_sees(data: StoredSplit) -> None:
    """Crops and changes included: they depend on the row, not on its place in a share."""
    whole = pixels(loader(data).at(1))
    shares = [pixels(loader(data, Processes(rank, 2)).at(1)) for rank in (0, 1)]
    assert torch.equal(torch.cat(shares, dim=1), whole)


def num_ready(loader: Loader) -> int:
    """How many batches lie ready that nobody has asked for."""
    return loader._iterator._worker_result_queue.qsize()


@pytest.mark.slow
def test_two_processes_with_workers_are_fed_and_go_on_exactly(data: StoredSplit) -> None:
    """Their workers make the next step before it is asked for, and from any step on what one
    process alone would make; torch's own source stays as it is."""
    before = torch.random.get_rng_state()
    here = loader(data)
    two = [loader(data, Processes(rank, 2), num_workers=1) for rank in (0, 1)]
    for step in (0, 1, 3):  # after 1 both were ended, and go on
        shares = [pixels(own.at(step)) for own in two]
        assert torch.equal(torch.cat(shares, dim=1), pixels(here.at(step)))
        deadline = time.monotonic() + 300
        while step == 0 and min(map(num_ready, two)) < 2:
            assert time.monotonic() < deadline, "nothing is made ahead"
            time.sleep(0.05)
    assert torch.equal(torch.random.get_rng_state(), before)
