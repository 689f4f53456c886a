"""An adapter's file is whole or not there, and its bytes do not tell which thread was first."""

import errno
import json
import os
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file

from alloy.adapters import alike, merge_adapters, threads, write
from alloy.adapters.write import Group, Made, group_of, write_adapter
from alloy.errors import CheckpointError, MergeError

WEIGHTS = "adapter_model.safetensors"
PATIENCE = 60  # seconds


def _group(name: str, tensor: torch.Tensor, before: Callable[[], object] = lambda: None) -> Group:
    """A tensor that is made once `before` is done; its first side may have been one greater."""

    def make() -> list[Made]:
        before()
        return [Made(name, tuple(tensor.shape), [tensor[:1], tensor[1:]])]

    return Group({name: (tensor.shape[0] + 1, *tensor.shape[1:])}, tensor.dtype, make)


def _write(output: Path, groups: list[Group]) -> bytes:
    shapes, num_bytes = write_adapter(groups, output, lambda shapes: {"n": len(shapes)}, "card")
    file = output / WEIGHTS
    header, tensors = _header(file)
    assert {name: tuple(field["shape"]) for name, field in header.items()} == shapes
    assert num_bytes == len(tensors)
    for field in header.values():
        start, stop = field["data_offsets"]
        assert start % max(1, (stop - start) // max(1, prod(field["shape"]))) == 0, "aligned"
    return file.read_bytes()


def _header(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    return header, data[8 + length :]


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(threads.os, "cpu_count", lambda: count)


def test_a_file_does_not_tell_which_group_was_made_first(cores: Callable, tmp_path: Path) -> None:
    values = [torch.arange(12.0).reshape(3, 4), torch.ones(9, 1).half(), torch.rand(2, 5)]
    cores(1)
    alone = _write(tmp_path / "alone", [_group(f"t{i}", v) for i, v in enumerate(values)])
    cores(3)
    second = Event()
    waits = [lambda: second.wait(PATIENCE), lambda: None, second.set]
    groups = [_group(f"t{i}", v, w) for i, (v, w) in enumerate(zip(values, waits, strict=True))]
    assert _write(tmp_path / "together", groups) == alone
    for name, value in load_file(tmp_path / "together" / WEIGHTS).items():
        assert torch.equal(value, values[int(name[1])])


def test_a_group_that_fails_stops_the_group_that_waits_for_its_end(
    cores: Callable, tmp_path: Path
) -> None:
    cores(2)
    second = Event()

    def fail() -> None:
        second.wait(PATIENCE)
        raise MergeError("the first")

    groups = [_group("a", torch.ones(2, 2), fail), _group("b", torch.ones(2, 2), second.set)]
    with pytest.raises(MergeError, match="the first"):
        _write(tmp_path / "out", groups)
    assert not list(tmp_path.iterdir())


def test_calls_that_write_a_part_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tensor has no byte, and where it comes in more pieces than one call takes."""
    many = torch.arange(5000, dtype=torch.float64)
    whole = {"a": many, "b": torch.empty(0, 3), "c": torch.arange(7.0)}

    def groups() -> list[Group]:
        pieces = [Made("a", (5000,), [*many.split(3)])]
        return [
            Group({"a": (5000,)}, torch.float64, lambda: pieces),
            *(group_of(name, whole[name]) for name in "bc"),
        ]

    expected = _write(tmp_path / "expected", groups())
    real = os.pwritev

    def short(descriptor: int, pieces: list[memoryview], start: int) -> int:
        data = b"".join(pieces)
        return real(descriptor, [memoryview(data[: max(1, len(data) // 3)])], start)

    monkeypatch.setattr(os, "pwritev", short)
    assert _write(tmp_path / "out", groups()) == expected
    loaded = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())


def test_a_disk_that_fails_at_last_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of a block that it lost once, to whoever asks first."""
    header, real = Event(), os.pwritev

    def spy(descriptor: int, pieces: list[memoryview], start: int) -> int:
        if start == 0:
            header.set()
        return real(descriptor, pieces, start)

    def sync(_: int) -> None:
        header.wait(PATIENCE)
        time.sleep(0.2)  # until the last call of `put` has looked
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", spy)
    monkeypatch.setattr(write, "_to_disk", sync)
    with pytest.raises(OSError, match="Input/output error"):
        _write(tmp_path / "out", [_group("a", torch.ones(2, 2))])
    assert not list(tmp_path.iterdir())


def test_only_what_is_ours_is_removed_after_a_failure(tmp_path: Path) -> None:
    unfinished = tmp_path / "out.incomplete"
    for left in (False, True):

        def fail() -> None:
            (unfinished / "theirs").touch()
            raise MergeError("no")

        if left:  # by a run that was killed
            unfinished.mkdir()
            (unfinished / WEIGHTS).touch()
        with pytest.raises(MergeError, match="no"):
            _write(tmp_path / "out", [_group("a", torch.ones(2, 2), fail)])
        assert [path.name for path in unfinished.iterdir()] == ["theirs"]
        with pytest.raises(CheckpointError, match=r"'theirs' is not ours"):
            _write(tmp_path / "out", [_group("a", torch.ones(2, 2))])
        (unfinished / "theirs").unlink()
        unfinished.rmdir()


@pytest.mark.parametrize(
    ("method", "rank"), [("ties", None), ("ties", 4), ("linear", None), ("karcher", None)]
)
def test_threads_do_not_change_a_byte(
    method: str,
    rank: int | None,
    cores: Callable,
    adapter: Callable,
    seed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of layers that share a group or not, of tensors held whole, of two dtypes."""
    monkeypatch.setattr(alike, "_LAYERS", 2)
    saved = ("model.norm.weight", "lm_head.weight")
    adapters = {"a": adapter("a", 1, saved=saved), "b": adapter("b", 2, rank=5, saved=saved)}
    for folder in adapters.values():
        file = folder / WEIGHTS
        save_file({k: v.half() if ".k_proj" in k else v for k, v in load_file(file).items()}, file)
    files = []
    for i, count in enumerate((1, 2, 2, 7)):
        cores(count)
        merge_adapters(method, adapters, tmp_path / f"out{i}", base=seed, rank=rank)
        files.append((tmp_path / f"out{i}" / WEIGHTS).read_bytes())
    assert len(set(files)) == 1
    assert {v.dtype for v in load_file(tmp_path / "out0" / WEIGHTS).values()} == {
        torch.float32, torch.float16,
    }  # fmt: skip


@pytest.fixture
def dependent(adapter: Callable) -> dict[str, Path]:
    """Adapters of rank 3 and 7; three layers lack a direction of B, of A, or all of A."""
    adapters = {"a": adapter("a", 1), "b": adapter("b", 2, rank=7)}
    for folder in adapters.values():
        file = folder / WEIGHTS
        tensors = load_file(file)
        for key, value in tensors.items():
            if "layers.0.mlp.up_proj" in key and "lora_A" in key:
                value.zero_()
        if folder.name == "b":
            for layer, part in (("0.self_attn.q_proj", "B"), ("1.self_attn.q_proj", "A")):
                value = tensors[f"base_model.model.model.layers.{layer}.lora_{part}.weight"]
                value = value if part == "A" else value.T
                value[2] = 2 * value[1]
        save_file(tensors, file)
    return adapters


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_layers_of_other_ranks_shorten_the_file(
    dependent: dict, seed: Path, tmp_path: Path
) -> None:
    """The header has room for the greatest rank: others read past the spaces that are left."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    report = merge_adapters("ties", dependent, tmp_path / "out", density=0.6)
    assert {m.removeprefix("model.layers."): r for m, r in report.ranks.items()} == {
        "0.self_attn.q_proj": 10, "0.self_attn.k_proj": 10, "0.mlp.up_proj": 1,
        "0.mlp.down_proj": 10, "1.self_attn.q_proj": 9, "1.self_attn.k_proj": 10,
        "1.mlp.up_proj": 10, "1.mlp.down_proj": 10,
    }  # fmt: skip
    data = (tmp_path / "out" / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 8 == 0
    assert data[8 : 8 + length].endswith(8 * b" "), "more than align it"
    offsets = [field["data_offsets"] for field in _header(tmp_path / "out" / WEIGHTS)[0].values()]
    assert all(one[1] == other[0] for one, other in pairwise(offsets))
    assert offsets[-1][1] == len(data) - 8 - length == report.num_bytes
    model = AutoModelForCausalLM.from_pretrained(seed)
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    before = AutoModelForCausalLM.from_pretrained(seed).state_dict()
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for module in report.ranks:
        left, right = (
            tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "BA"
        )
        change = merged[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        torch.testing.assert_close(change, left @ right, rtol=1e-4, atol=1e-4)
        assert bool(change.any()) != ("layers.0.mlp.up_proj" in module)


def test_a_failure_while_a_file_is_written_leaves_nothing(
    adapter: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the last layer, a full disk, a disk that fails: also the folders above are gone."""
    monkeypatch.setattr(alike, "_LAYERS", 1)
    adapters = {"a": adapter("a", 1), "b": adapter("b", 2)}
    output = tmp_path / "new/folder/out"
    standing = sorted(path.name for path in tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            merge_adapters("ties", adapters, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as context:
        context.setattr(write, "_to_disk", broken)
        with pytest.raises(CheckpointError, match="Input/output error"):
            merge_adapters("linear", adapters, output)
    file = adapters["b"] / WEIGHTS
    tensors = load_file(file)
    last = [key for key in tensors if "lora_A" in key][-1]
    tensors[last][-1, -1] = float("inf")
    save_file(tensors, file)
    for method in ("ties", "linear", "task_arithmetic"):
        with pytest.raises(MergeError, match=rf"{last} in 'b' .* has NaN or Inf"):
            merge_adapters(method, adapters, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == standing


def test_a_concatenation_rounds_once(adapter: Callable, tmp_path: Path) -> None:
    """B of the result is the product in float64, rounded, whatever the factors are stored in."""
    adapters = {"a": adapter("a", 1), "b": adapter("b", 2)}
    for stored, dtype in (("float32", None), ("float64", "float32"), ("float32", "float16")):
        for folder in adapters.values():
            file = folder / WEIGHTS
            tensors = load_file(file)
            noise = {k: v.double() * (1 + 1e-9) for k, v in tensors.items()}
            save_file({k: v.to(getattr(torch, stored)) for k, v in noise.items()}, file)
        output = tmp_path / f"{stored}-{dtype}"
        merge_adapters("task_arithmetic", adapters, output, coefficients=[0.5, 0.25], dtype=dtype)
        files = {name: load_file(folder / WEIGHTS) for name, folder in adapters.items()}
        for key, value in load_file(output / WEIGHTS).items():
            if "lora_B" in key:
                scale = float(torch.tensor(2 / 3))
                parts = [files[n][key].double() * (c * scale) for n, c in (("a", 0.5), ("b", 0.25))]
                assert torch.equal(value, torch.cat(parts, 1).to(value.dtype)), key
