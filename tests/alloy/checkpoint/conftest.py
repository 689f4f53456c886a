"""Checkpoints small enough to write in every test."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}

Write = Callable[..., Path]


def tensors(
    seed: int = 0, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0
) -> dict[str, Tensor]:
    """Weights near a common origin: matrices and vectors of odd sizes, a scalar, nothing."""
    shapes = {
        "model.embed_tokens.weight": (40, 24),
        "model.layers.0.mlp.up.weight": (37, 24),
        "model.layers.0.norm.weight": (24,),
        "model.layers.10.mlp.up.weight": (24, 37),
        "model.layers.2.mlp.up.weight": (300, 301),
        "model.scale": (),
        "model.empty": (0, 3),
        "lm_head.weight": (40, 24),
    }
    result = {}
    for i, (name, shape) in enumerate(shapes.items()):
        origin = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i))
        result[name] = (origin + 0.1 * spread * noise * (seed > 0)).to(dtype)
    return result


def write_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Mapping | None = CONFIG,
    num_shards: int = 1,
) -> Path:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = list(weights)
    if num_shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {n: weights[n] for n in names[i::num_shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a checkpoint folder: `write("a", tensors, config=..., num_shards=...)`."""

    def _write(name: str, weights: Mapping[str, Tensor], **keywords) -> Path:
        return write_checkpoint(tmp_path / name, weights, **keywords)

    return _write


@pytest.fixture
def sources(write: Write) -> list[Path]:
    """Three models of one base, sharded differently."""
    return [
        write(name, tensors(i + 1), num_shards=shards)
        for i, (name, shards) in enumerate((("a", 3), ("b", 1), ("c", 2)))
    ]


@pytest.fixture
def base(write: Write) -> Path:
    return write("seed", tensors(0))


@pytest.fixture
def weights() -> Callable[..., dict[str, Tensor]]:
    """`weights(seed, dtype)`: those of one model; seed 0 is the base."""
    return tensors


@pytest.fixture
def load() -> Callable[[Path], dict[str, Tensor]]:
    """All tensors of a checkpoint, read by the reference implementation."""

    def _load(folder: Path) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            result |= load_file(file)
        return result

    return _load


@pytest.fixture
def config() -> dict:
    return dict(CONFIG)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from alloy.checkpoint import MergeRequest, plan_merge, run_plan

output, *sources = map(Path, sys.argv[1:])
journal = output.with_name(output.name + ".incomplete") / "journal.jsonl"
plan = plan_merge(MergeRequest("linear", sources, output))
first = len(next(iter(plan.layout.values())))
written = []

def die(num_bytes):
    written.append(num_bytes)
    if len(written) > first:
        while "sha256" not in journal.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

run_plan(plan, threads=1, on_bytes=die)
"""


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory) -> tuple[list[Path], Path, Path]:
    """Sources, the output of a run killed in its second file, and a copy of what it left."""
    folder = tmp_path_factory.mktemp("killed")
    sources = [write_checkpoint(folder / n, tensors(i), num_shards=3) for i, n in enumerate("ab")]
    output = folder / "out"
    command = [sys.executable, "-c", KILLED, str(output), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    assert not output.exists()
    (folder / "out.incomplete").rename(folder / "left")
    return sources, output, folder / "left"


@pytest.fixture
def killed(killed_once) -> tuple[list[Path], Path, Path]:
    """Sources, output and unfinished folder as the killed run left them."""
    sources, output, left = killed_once
    unfinished = output.with_name("out.incomplete")
    for folder in (output, unfinished):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(left, unfinished)
    return sources, output, unfinished
