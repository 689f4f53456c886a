"""Time of planning the merge of a vision-language model and a language model of 15 GB each.

    python -m benchmarks.plan             half a minute, no disk: files are headers and a hole

Every plan is a command of its own, `alloy plan`, from the start of Python on: what a user waits for
before a merge writes. Configs are those that the hub's models have: the defaults that one of them
leaves out and another writes are looked up in transformers. The base of both is a third model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from alloy.checkpoint.format import encode_header
from benchmarks.merge import machine

RESULTS = Path("benchmarks/results/plan.md")
GOAL = 3.0
"""Seconds of a plan of 2 x 15 GB."""

Tensors = Sequence[tuple[str, str, tuple[int, ...]]]


def language_model(
    width: int, inner: int, layers: int, narrow: int, vocabulary: int, *, biases: bool
) -> Tensors:
    """The tensors of a Llama, or of a Qwen2, which has biases in attention."""
    block = {
        "input_layernorm.weight": (width,),
        "mlp.down_proj.weight": (width, inner),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "post_attention_layernorm.weight": (width,),
        "self_attn.k_proj.weight": (narrow, width),
        "self_attn.o_proj.weight": (width, width),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.v_proj.weight": (narrow, width),
    }
    if biases:
        sides = {"q": width, "k": narrow, "v": narrow}
        block |= {f"self_attn.{side}_proj.bias": (n,) for side, n in sides.items()}
    return [
        ("model.embed_tokens.weight", "BF16", (vocabulary, width)),
        *(
            (f"model.layers.{i}.{name}", "BF16", shape)
            for i in range(layers)
            for name, shape in block.items()
        ),
        ("model.norm.weight", "BF16", (width,)),
        ("lm_head.weight", "BF16", (vocabulary, width)),
    ]


def write_sparse(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """Write a checkpoint whose weights are a hole in the file."""
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header := encode_header(list(tensors)))
        file.truncate(len(header) + sum(2 * prod(shape) for _, _, shape in tensors))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llava_next(folder: Path) -> list[str]:
    """A LLaVA-NeXT of a Llama 3 8B; its text config has what differs from a Llama 2's defaults."""
    text = {
        "model_type": "llama", "vocab_size": 128320, "max_position_embeddings": 8192,
        "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    whole = {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "tie_word_embeddings": False, "text_config": text, "image_token_index": 128256,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
    }  # fmt: skip
    plain = {
        **text, "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "vocab_size": 128256,
        "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
        "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
        "rope_scaling": None, "tie_word_embeddings": False,
    }  # fmt: skip
    tower = [
        (f"vision_tower.vision_model.encoder.layers.{i}.mlp.fc{n}.weight", "BF16", shape)
        for i in range(24)
        for n, shape in enumerate(((4096, 1024), (1024, 4096)), 1)
    ]
    sizes = (4096, 14336, 32, 1024)
    body = language_model(*sizes, 128320, biases=False)
    vlm = [(f"language_model.{name}", dtype, shape) for name, dtype, shape in body] + tower
    write_sparse(folder / "vlm", whole, vlm)
    for name in ("llm", "start"):
        write_sparse(folder / name, plain, language_model(*sizes, 128256, biases=False))
    return ["vision_tower", "embeddings", "head"]


def qwen2_vl(folder: Path) -> list[str]:
    """A Qwen2-VL 7B, whose config holds that of its text at the top."""
    shared = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 152064, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    }  # fmt: skip
    whole = {
        **shared, "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "image_token_id": 151655, "vision_config": {"depth": 32, "embed_dim": 1280},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    plain = {
        **shared, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "attention_dropout": 0.0,
    }  # fmt: skip
    tower = [
        (f"visual.blocks.{i}.mlp.fc{n}.weight", "BF16", shape)
        for i in range(32)
        for n, shape in enumerate(((5120, 1280), (1280, 5120)), 1)
    ]
    body = language_model(3584, 18944, 28, 512, 152064, biases=True)
    write_sparse(folder / "vlm", whole, [*body, *tower])
    for name in ("llm", "start"):
        write_sparse(folder / name, plain, body)
    return ["vision_tower", "embeddings", "head"]


CASES = {"LLaVA-NeXT 8B and Llama 3 8B": llava_next, "Qwen2-VL 7B and Qwen2 7B": qwen2_vl}


def seconds_of(command: Sequence[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command that must succeed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return wall, sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    importing = [sys.executable, "-c", "import torch, transformers"]
    with tempfile.TemporaryDirectory(prefix="alloy-plan-") as given:
        for name, write in CASES.items():
            folder = Path(given) / write.__name__
            kept = [f"--kept={group}" for group in write(folder)]
            vlm, llm, base = (str(folder / n) for n in ("vlm", "llm", "start"))
            plan = [sys.executable, "-m", "alloy", "plan", "ties", str(folder / "out"), vlm, llm]
            costs = [
                (*seconds_of([*plan, "--base", base, *kept]), *seconds_of(importing))
                for _ in range(arguments.rounds)
            ]
            wall, cpu, _, floor = (statistics.median(column) for column in zip(*costs, strict=True))
            ratio = statistics.median(cost[1] / cost[3] for cost in costs)
            met = "met" if cpu <= GOAL else "missed"
            rows.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {floor:.2f} | {ratio:.2f} | {met} |")
    page = "\n".join(
        [
            "# Cost of planning a merge",
            "",
            "`alloy plan ties` of a vision-language model and a language model of 15 to 17 GB "
            "each, and their base, as a command from the start of Python on. Files are headers and "
            f"a hole. {machine()} Medians of {arguments.rounds} rounds. Last but one: the plan's "
            "CPU time divided by that of `import torch, transformers` in the same round.",
            "",
            f"| models | s | CPU s | CPU s of the imports | ratio | goal of {GOAL:.0f} s |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(page)
    RESULTS.write_text(page)


if __name__ == "__main__":
    main()
