"""One of two processes that take the batches in turns; test_collection.py starts them."""

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import alloy
from alloy.errors import CollectionError, ProcessError
from alloy.processes import ALONE, Processes
from alloy.statistics.sums import Statistics
from alloy.symmetry import parts

PATIENCE = timedelta(seconds=60)


def chain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    return nn.Sequential(*layers).eval()


def data():
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def statistics(processes: Processes = ALONE, size: int = 8) -> dict[str, Statistics]:
    """Five batches: products of units, Grams; and samples, where units are too many to multiply."""
    models = {"a": chain(0), "b": chain(1)}
    spec = alloy.find_symmetries(models["a"], {"input": data()[:2]})
    batches = [{"input": part} for part in data().split(size)]
    sums = alloy.collect(models, batches, spec, joint=True, grams=True, processes=processes)
    models = {"a": mixture(0), "b": mixture(1)}
    ids = torch.randint(12, (40, 12), generator=torch.Generator().manual_seed(0))
    spec = alloy.find_symmetries(models["a"], {"input_ids": ids[:2]})
    batches = [{"input_ids": part} for part in ids.split(size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LARGEST", 1000)
        samples = alloy.collect(models, batches, spec, processes=processes)
    return {"sums": sums, "samples": samples}


def mixture(seed: int) -> nn.Module:
    """Experts, whose units are too many to multiply where few are many."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=12,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=12,
    )
    return MixtralForCausalLM(config).eval()


def main(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=PATIENCE
    )
    processes = Processes(rank, 2)
    for name, found in statistics(processes).items():
        save_file(found.to_tensors(), f"{folder}/{name}{rank}.safetensors")
    refusals = []
    for refused in (
        lambda: statistics(processes, size=40),
        lambda: processes.share({"x": torch.ones(3)}),
    ):
        try:
            refused()
        except (CollectionError, ProcessError) as error:
            refusals.append(str(error))
    Path(f"{folder}/{rank}.txt").write_text("\n".join(refusals))
    x = torch.tensor([[1.0 + rank, 2.0]], requires_grad=True)
    gathered = processes.gather(x)
    (gathered * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().mul(1 + rank).backward()
    save_file({"gathered": gathered.detach(), "grad": x.grad}, f"{folder}/grad{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
