"""Time of discovery and transport: `python -m benchmarks.symmetry`.

Discovery runs on full-size configurations without weights, each in a process of its own, so that
peak memory is that of one model. Goals: under 1 GB, and

    1 s    BERT-base, ViT-B
    2 s    FLAVA, Llama-7B
    5 s    a 70B Llama

Transport of BERT-base: under 0.3 s, and at most 3 times the time of copying its weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers as hf

import alloy

GOALS_SECONDS = {"bert-base": 1.0, "vit-b": 1.0, "flava": 2.0, "llama-7b": 2.0, "llama-70b": 5.0}
GOAL_MEGABYTES = 1024
GOAL_TRANSPORT_SECONDS = 0.3
GOAL_TRANSPORT_COPIES = 3.0
REPEATS = 7
"""Runs of which the shortest counts: other processes only ever slow a run down."""


def build(name: str) -> tuple[torch.nn.Module, dict]:
    """Build a model without weights, and example inputs."""
    ids = torch.randint(5, 1000, (2, 16))
    image = torch.rand(2, 3, 224, 224)
    llama_70b = hf.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "bert-base": lambda: hf.BertForMaskedLM(hf.BertConfig()),
        "vit-b": lambda: hf.ViTForImageClassification(hf.ViTConfig()),
        "flava": lambda: hf.FlavaForPreTraining(hf.FlavaConfig()),
        "llama-7b": lambda: hf.LlamaForCausalLM(hf.LlamaConfig()),
        "llama-70b": lambda: hf.LlamaForCausalLM(llama_70b),
    }
    inputs: dict[str, object] = {"pixel_values": image} if name == "vit-b" else {"input_ids": ids}
    if name == "flava":
        inputs = {
            "input_ids": ids,
            "input_ids_masked": ids,
            "pixel_values": image,
            "bool_masked_pos": torch.ones(2, 196, dtype=torch.long),
            "return_loss": False,
            "codebook_pixel_values": torch.rand(2, 3, 112, 112),
        }
    with torch.device("meta"):
        return makers[name]().eval(), inputs


def discovery(name: str) -> dict[str, float]:
    model, inputs = build(name)
    start = time.perf_counter()
    spec = alloy.find_symmetries(model, inputs)
    seconds = time.perf_counter() - start
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "megabytes": megabytes, "spaces": len(spec.spaces)}


def best(function: Callable[[], object]) -> float:
    """The shortest of several runs, seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def transport() -> dict[str, float]:
    model = hf.BertForMaskedLM(hf.BertConfig()).eval()
    spec = alloy.find_symmetries(model, {"input_ids": torch.randint(5, 1000, (2, 16))})
    weights = model.state_dict()
    spec = alloy.symmetry.with_kind(spec, "permutation")
    transforms = alloy.random_transforms(spec, torch.Generator().manual_seed(0))
    unique = list({id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    moved = best(lambda: alloy.transport(weights, spec, transforms))
    copied = best(lambda: [tensor.detach().clone() for tensor in unique])
    return {"seconds": moved, "copy_seconds": copied, "copies": moved / copied}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", choices=[*GOALS_SECONDS], help="discover in this one alone, print JSON"
    )
    if model := parser.parse_args().model:
        print(json.dumps(discovery(model)))
        return
    missed = []
    for name, goal in GOALS_SECONDS.items():
        command = [sys.executable, "-m", "benchmarks.symmetry", name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        cost = json.loads(run.stdout.strip().splitlines()[-1])
        met = cost["seconds"] <= goal and cost["megabytes"] <= GOAL_MEGABYTES
        missed += [] if met else [name]
        print(
            f"{name:10} {cost['seconds']:5.2f} s (goal {goal:.0f}) {cost['megabytes']:5.0f} MB "
            f"{cost['spaces']:4d} spaces  {'ok' if met else 'MISSED'}"
        )
    cost = transport()
    met = cost["seconds"] <= GOAL_TRANSPORT_SECONDS and cost["copies"] <= GOAL_TRANSPORT_COPIES
    missed += [] if met else ["transport"]
    print(
        f"transport of BERT-base {cost['seconds']:.3f} s (goal {GOAL_TRANSPORT_SECONDS}), "
        f"{cost['copies']:.2f} copies (goal {GOAL_TRANSPORT_COPIES:.0f})  "
        f"{'ok' if met else 'MISSED'}"
    )
    if missed:
        raise SystemExit(f"goals missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
