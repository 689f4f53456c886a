"""One of two processes that each see a part of the data; test_collect.py starts them."""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import alloy
from alloy.statistics.sums import Place, Statistics


def chain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    return nn.Sequential(*layers).eval()


def statistics(x, **more):
    models = {"a": chain(0), "b": chain(1)}
    spec = alloy.find_symmetries(models["a"], {"input": x[:2]})
    return alloy.collect(models, [{"input": part} for part in x.split(5)], spec, **more)


def data():
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def kept(first: int, last: int) -> Statistics:
    """Statistics of units too many to multiply: samples `first` to `last` themselves."""
    x = data()[first:last].double()
    place = Place("p", {"a": x.sum(0)}, {"a": x.square().sum(0)}, {}, len(x), {"a": x})
    return Statistics(("a",), {"space": (place,)})


def main(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    part = data()[:15] if rank == 0 else data()[15:]
    reduced = statistics(part, joint=True, grams=True).reduce()
    save_file(reduced.to_tensors(), f"{folder}/{rank}.safetensors")
    whole = (kept(0, 15) if rank == 0 else kept(15, 40)).reduce()
    save_file(whole.to_tensors(), f"{folder}/kept{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
