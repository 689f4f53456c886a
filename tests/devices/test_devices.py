"""Every stage on a device that is not the CPU, without such hardware; and the choice of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alloy.devices import chosen_device, device_of
from alloy.errors import DeviceError
from tasks.evaluation.loading import use_device

REPOSITORY = Path(__file__).parents[2]
PARTS = ["not slow", pytest.param("slow", marks=pytest.mark.slow)]


@pytest.mark.parametrize("chosen", PARTS)
def test_all_stages_run_on_a_device_that_refuses_to_mix(tmp_path: Path, chosen: str) -> None:
    """`on_standin.py` in a process of its own: the device stays registered for its life."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", chosen]
    command += ["-p", "no:cacheprovider", "-p", "tests.devices.standin"]
    command += [f"--basetemp={tmp_path / 'stages'}", "tests/devices/on_standin.py"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpux"])
def test_a_device_that_is_not_there_is_one_error(monkeypatch, name: str) -> None:
    """It names what was asked and what there is."""
    monkeypatch.setenv("ALLOY_DEVICE", name)
    with pytest.raises(DeviceError, match=rf"DEVICE='{name}' is not there .*this machine has cpu"):
        chosen_device()


def test_a_stage_names_its_device(monkeypatch, capsys) -> None:
    monkeypatch.setenv("ALLOY_DEVICE", "cpu")
    use_device("merge")
    assert capsys.readouterr().out == "merge: on cpu\n"


def test_float64_is_the_cpus_where_a_device_has_none(monkeypatch, capsys) -> None:
    """mps sums nothing in float64: such stages run on the CPU, and say so."""
    monkeypatch.setenv("ALLOY_DEVICE", "mps")
    monkeypatch.setattr("tasks.evaluation.loading.chosen_device", lambda: torch.device("mps"))
    use_device("finetune")
    assert os.environ["ALLOY_DEVICE"] == "mps"
    use_device("collect", float64=True)
    assert os.environ["ALLOY_DEVICE"] == "cpu"
    assert capsys.readouterr().out == "finetune: on mps\ncollect: on cpu: mps has no float64\n"


def test_the_device_of_nothing_is_the_cpu() -> None:
    assert device_of(torch.nn.ReLU()) == device_of({}) == torch.device("cpu")
