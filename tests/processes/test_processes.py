"""Two processes do what one does: the same bits of sums and scores, training within rounding.

Training in N processes adds up gradients in another order than in one, in float32: after six steps
at a rate of .01 the weights differ by at most 1e-4 of their norm; with bfloat16, by 1e-2.
"""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alloy.devices import device_pool, devices_of_processes
from alloy.errors import DeviceError, ProcessError
from alloy.processes import Processes
from tasks.experts import collect, evaluate
from tasks.recipe.load import load
from tasks.storage import read_json
from tasks.workers import together
from tests.devices import stages
from tests.processes import on_two

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose stages have two processes, of one thread each."""
    monkeypatch.setenv("ALLOY_PROCESSES", "2")
    monkeypatch.setenv("ALLOY_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    on_two.write()
    return tmp_path / "two"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*parts: str) -> int:
    return together.launch("tests.processes.on_two", parts)


def distance(ours: Path, theirs: Path) -> float:
    """The norm of two checkpoints' difference over that of their weights."""
    left, right = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert left.keys() == right.keys()
    apart = torch.cat([(x - right[name]).flatten() for name, x in left.items()]).norm()
    return float(apart / torch.cat([x.flatten() for x in right.values()]).norm())


@pytest.mark.usefixtures("one_thread")
def test_two_processes_do_what_one_does(two: Path, tmp_path: Path, monkeypatch) -> None:
    """collect, finetune, evaluate and pre-training of a recipe of experts."""
    assert run("all") == 0
    shared = {part: (two / "reports/experts" / part).read_bytes() for part in ("metrics.json",)}
    evaluate.main(load("experts"))
    for part, content in shared.items():
        assert (two / "reports/experts" / part).read_bytes() == content
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    on_two.write()
    recipe = load("experts")
    on_two.collect_and_merge(recipe)
    statistics = stages.tensors(Path("models/experts/statistics"))
    both = stages.tensors(two / "models/experts/statistics")
    assert both.keys() == statistics.keys()
    assert all(torch.equal(both[name], tensor) for name, tensor in statistics.items())
    on_two.train(recipe)
    finetuned = Path("models/experts/finetuned")
    assert distance(two / finetuned, finetuned) < 1e-4
    for setting, tolerance in {"scaled": 1e-4, "half": 1e-2}.items():
        done = Path("trained") / setting / "done"
        assert distance(two / done, done) < tolerance, setting
    on_two.pretrain_two()
    for arm in ("seed", "specific"):
        folder = Path("released/modality") / arm
        assert distance(two / folder, folder) < 1e-4
        losses = [read_json(at / folder / "pretraining.json")["losses"] for at in (two, Path())]
        for name, loss in losses[0].items():
            assert loss == pytest.approx(losses[1][name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_do_what_one_does_with_any_architecture(
    two: Path, tmp_path: Path, monkeypatch
) -> None:
    """Statistics, and so alignments, merges and scores, to the byte."""
    (tmp_path / "one").mkdir()
    for place in ("two", "one"):
        (tmp_path / place / "models_recipe").mkdir()
        monkeypatch.chdir(tmp_path / place / "models_recipe")
        stages.write_models("RegNetForImageClassification")
        if place == "two":
            assert run("models") == 0
        else:
            monkeypatch.delenv("ALLOY_PROCESSES")
            on_two.run_models()
    shared = two / "models_recipe"
    written = [*Path("models").rglob("*.safetensors"), Path("reports/models/metrics.json")]
    assert len(written) > 10
    for file in written:
        assert (shared / file).read_bytes() == file.read_bytes(), file


@pytest.mark.slow
def test_an_interrupted_training_goes_on_together(two: Path, capfd) -> None:
    """Where one process ends both do; the next run ends with the bits of one that never stopped."""
    assert run("interrupted") == 3
    assert run("interrupted") == 0
    (two / "trained/interrupted/done").rename(two / "trained/broken")
    for path in ("trained/interrupted", "trained/died"):
        assert (two / path).exists()
    shutil.rmtree(two / "trained/interrupted")
    assert run("interrupted") == 0
    assert distance(two / "trained/broken", two / "trained/interrupted/done") == 0


@pytest.mark.slow
def test_processes_that_differ_are_refused_by_one_line(two: Path, capfd) -> None:
    assert run("differing") == 1
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith("[transformers]")] == [
        "test: torch: process 0 has 2.13, process 1 has 2.12; all processes need the same "
        "packages, params, checkpoints and data"
    ]


def test_a_process_that_is_killed_ends_the_others(monkeypatch, capfd) -> None:
    """It is named, and the exit status is a shell's for the signal."""
    monkeypatch.setenv("ALLOY_PROCESSES", "3")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    began = time.monotonic()
    assert together.launch("tests.processes.killed", []) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 500  # they sleep for 600
    assert capfd.readouterr().err == "process 1 of 3 was killed (SIGKILL)\n"


class Told(Processes):
    """Two processes, of which the other one has told other facts."""

    def objects(self, thing):
        return [thing, {**thing, "torch": "2.12"}]


def test_processes_need_the_same_facts() -> None:
    """The first difference is named, with who differs; facts that agree are no error."""
    together.agree(Told(0, 2), {"torch": "2.12", "data": "d"})
    with pytest.raises(ProcessError, match=r"^torch: process 0 has 2\.13, process 1 has 2\.12"):
        together.agree(Told(0, 2), {"data": "d", "torch": "2.13"})


class Elsewhere(Processes):
    """Two processes, of which the other one has something else under one name."""

    def __init__(self, name: str) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "name", name)

    def objects(self, thing):
        assert self.name in thing
        return [thing, {**thing, self.name: "another digest"}]


@pytest.mark.parametrize("stage", [collect, evaluate])
def test_processes_with_other_data_or_checkpoints_write_nothing(two: Path, monkeypatch, stage):
    """Data, every checkpoint and the stage's params are compared before anything is read."""
    recipe = load("experts")
    name = stage.__name__.rpartition(".")[2]
    compared = {
        collect: ["data/experts/calibration.safetensors", "models/experts/checkpoints/specific"],
        evaluate: ["data/experts", "models/experts/merged"],
    }
    if stage is evaluate:
        subjects = evaluate.subjects(recipe)
        for folder in {f for subject in subjects for own in subject.folders.values() for f in own}:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.safetensors").touch()
    for what in (*compared[stage], name):
        monkeypatch.setattr(stage, "join", lambda *_, what=what, **__: Elsewhere(what))
        with pytest.raises(ProcessError, match=f"^{what}: process 0 has .*, process 1 has another"):
            stage.main(recipe)
    assert not (two / "models/experts/statistics").exists()
    assert not (two / "reports/experts").exists()


@pytest.mark.parametrize("number", ["two", "0", "-1", "1.5"])
def test_what_is_no_number_of_processes_is_refused(monkeypatch, number: str) -> None:
    monkeypatch.setenv("ALLOY_PROCESSES", number)
    with pytest.raises(ProcessError, match=rf"PROCESSES='{re.escape(number)}' is no number"):
        together.num_processes()


def test_no_number_of_processes_is_one(monkeypatch) -> None:
    for nothing in ("", "1"):
        monkeypatch.setenv("ALLOY_PROCESSES", nothing)
        assert together.num_processes() == 1
        assert not together.is_asked_for()


def test_processes_have_a_gpu_each(monkeypatch) -> None:
    """All GPUs, unless one is named; on the CPU they share the cores, and jobs need no queue."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device, pool in ((torch.device("cuda"), ["cuda:0", "cuda:1"]), (torch.device("cpu"), [])):
        monkeypatch.setattr("alloy.devices.chosen_device", lambda device=device: device)
        assert device_pool() == pool
        assert devices_of_processes(2) == (pool or ["cpu", "cpu"])
    monkeypatch.setattr("alloy.devices.chosen_device", lambda: torch.device("cuda"))
    with pytest.raises(DeviceError, match=r"PROCESSES=3 needs 3 .*there are cuda:0, cuda:1"):
        devices_of_processes(3)
    monkeypatch.setattr("alloy.devices.chosen_device", lambda: torch.device("cuda:1"))
    with pytest.raises(DeviceError, match=r"PROCESSES=2 needs 2 devices, .*there is cuda:1: lower"):
        devices_of_processes(2)
