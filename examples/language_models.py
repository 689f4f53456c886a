"""Merge two language models and judge the merges by their perplexity.

    python examples/language_models.py

A base model of bytes reads English and Python. Two copies go on, one with more of each. Their
merges should know both. It takes a minute and writes examples/out/language_models.png.
"""

import math
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from transformers import LlamaConfig, LlamaForCausalLM

import alloy

OUT = Path(__file__).parent / "out"
LENGTH, BATCH = 64, 32
MERGES = {
    "average": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {"coefficients": [0.7, 0.7]}),
    "TIES": ("ties", {"density": 0.5, "coefficients": [1.0, 1.0]}),
}
"""The methods that are compared, with their settings."""


def texts() -> Mapping[str, torch.Tensor]:
    """English and Python that every Python brings along: bytes as integers [N]."""
    english = "\n".join(topics.topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    python = "\n".join(path.read_text() for path in sorted(library.glob("[a-d]*.py")))
    found = {"English": english, "Python": python}
    return {
        name: torch.tensor(list(text.encode("ascii", "ignore")[:400_000]))
        for name, text in found.items()
    }


def batch(text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Passages of a text from random places, [BATCH, LENGTH]."""
    starts = torch.randint(0, len(text) - LENGTH, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


def train(model: LlamaForCausalLM, sources: list[torch.Tensor], num_steps: int) -> None:
    """Train on passages of the texts in turn."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(num_steps):
        ids = batch(sources[step % len(sources)], generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@torch.no_grad()
def perplexity(folder: Path, text: torch.Tensor) -> float:
    """Perplexity by byte of a checkpoint, on fixed passages."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(1)
    passages = [batch(text, generator) for _ in range(4)]
    losses = [model(input_ids=ids, labels=ids).loss for ids in passages]
    return math.exp(torch.stack(losses).mean())


def make_models(training: Mapping[str, torch.Tensor], num_steps: int, folder: Path) -> None:
    """Train the base and, from it, one expert a text; save them as checkpoints."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    base = LlamaForCausalLM(config)
    train(base, list(training.values()), num_steps)
    base.save_pretrained(folder / "base")
    for name, text in training.items():
        expert = LlamaForCausalLM.from_pretrained(folder / "base")
        train(expert, [text], num_steps)
        expert.save_pretrained(folder / name)


def main(num_steps: int = 150, out: Path = OUT) -> Mapping[str, Mapping[str, float]]:
    """Train, merge and judge; return perplexities by model and text."""
    held_out, training = {}, {}
    for name, text in texts().items():
        training[name], held_out[name] = text.split([len(text) - 50_000, 50_000])
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(training, num_steps, folder)
        members = {name: folder / name for name in training}
        for name, (method, settings) in MERGES.items():
            base = None if method == "linear" else folder / "base"
            alloy.merge_checkpoints(method, members, folder / name, base=base, **settings)
        scores = {
            name: {text: perplexity(folder / name, held_out[text]) for text in held_out}
            for name in ("base", *members, *MERGES)
        }
    out.mkdir(parents=True, exist_ok=True)
    print(f"{'perplexity by byte':20}", *(f"{text:>8}" for text in held_out))
    for name, of_texts in scores.items():
        print(f"{name:20}", *(f"{value:8.2f}" for value in of_texts.values()))
    plot(scores, out / "language_models.png")
    return scores


def plot(scores: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Draw the models in the plane of both perplexities: low and left is good at both."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, of_texts in scores.items():
        x, y = of_texts.values()
        axis.scatter(x, y, color="#e07b39" if name in MERGES else "#8c9bab")
        axis.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points")
    x, y = next(iter(scores.values()))
    axis.set(xlabel=f"perplexity, {x}", ylabel=f"perplexity, {y}")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    print(f"The plot: {file}")


if __name__ == "__main__":
    main()
