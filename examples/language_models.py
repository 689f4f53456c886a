"""Merge two language models and have lm-evaluation-harness judge the merges.

    python examples/language_models.py

A base model of bytes reads English and Python. Two copies go on, one with more of each. Their
merges should know both. lm-eval measures them by tasks that the example writes, offline. It takes a
minute and writes examples/out/language_models.png.
"""

import json
import logging
import os
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory
from typing import Any

# Before any import of the libraries that read them.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")
if find_spec("lm_eval") is None:
    sys.exit("lm_eval, which judges the merges, is missing: pip install 'alloy-merge[harness]'")

import matplotlib

matplotlib.use("Agg")

import torch
import yaml
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from matplotlib import pyplot as plt
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import alloy

OUT = Path(__file__).parent / "out"
LENGTH, BATCH = 64, 32
HELD_OUT, PASSAGE = 20_000, 500  # bytes of each text for the harness, and of one of its documents
MERGES = {
    "average": ("linear", {}),
    "task arithmetic": ("task_arithmetic", {"coefficients": [0.7, 0.7]}),
    "TIES": ("ties", {"density": 0.5, "coefficients": [1.0, 1.0]}),
}
"""The methods that are compared, with their settings."""


def texts() -> Mapping[str, str]:
    """English and Python that every Python brings along."""
    english = "\n".join(topics.topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    python = "\n".join(path.read_text() for path in sorted(library.glob("[a-d]*.py")))
    found = {"English": english, "Python": python}
    return {name: text.encode("ascii", "ignore")[:400_000].decode() for name, text in found.items()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of ASCII. The harness begins a passage with `eos_token`: after a newline."""
    bytewise = Tokenizer(models.BPE({chr(number): number for number in range(128)}, []))
    bytewise.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="\n")


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


def make_models(training: Mapping[str, str], num_steps: int, folder: Path) -> None:
    """Train the base and, from it, one expert a text; save them as checkpoints."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids = {name: torch.tensor(tokenizer.encode(text)) for name, text in training.items()}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    base = LlamaForCausalLM(config)
    train(base, list(ids.values()), num_steps)
    base.save_pretrained(folder / "base")
    for name in training:
        expert = LlamaForCausalLM.from_pretrained(folder / "base")
        train(expert, [ids[name]], num_steps)
        expert.save_pretrained(folder / name)
    for name in ("base", *training):
        tokenizer.save_pretrained(folder / name)


def make_tasks(held_out: Mapping[str, str], folder: Path) -> Mapping[str, Any]:
    """Write a task of the harness for each text, a file of YAML and one of passages; load them."""
    folder.mkdir()
    for name, text in held_out.items():
        passages = [text[start : start + PASSAGE] for start in range(0, len(text), PASSAGE)]
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps({"passage": passage}) for passage in passages))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder)},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "num_fewshot": 0,
            "doc_to_text": "",
            "doc_to_target": "passage",
            "metric_list": [{"metric": "byte_perplexity"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False).load(list(held_out))


def judge(checkpoint: Path, tasks: Mapping[str, Any]) -> Mapping[str, float]:
    """Perplexity by byte of a checkpoint on each text, as the harness measures it."""
    model = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=BATCH)
    with redirect_stderr(StringIO()):  # a bar of progress for each batch
        results = evaluate(model, tasks)["results"]
    return {name: result["byte_perplexity,none"] for name, result in results.items()}


def main(num_steps: int = 150, out: Path = OUT) -> Mapping[str, Mapping[str, float]]:
    """Train, merge and judge; return perplexities by model and text."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    training = {name: text[:-HELD_OUT] for name, text in texts().items()}
    held_out = {name: text[-HELD_OUT:] for name, text in texts().items()}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(training, num_steps, folder)
        members = {name: folder / name for name in training}
        for name, (method, settings) in MERGES.items():
            base = None if method == "linear" else folder / "base"
            alloy.merge_checkpoints(method, members, folder / name, base=base, **settings)
        tasks = make_tasks(held_out, folder / "tasks")
        scores = {name: judge(folder / name, tasks) for name in ("base", *members, *MERGES)}
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
