"""Three experts trained (here: drawn) from one base, with the statistics that the data-based
methods need.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from alloy.merging import MERGE_METHODS, merge
from alloy.statistics.moments import Gram

SHAPES = {
    "embed.weight": (11, 8),
    "layers.0.up.weight": (12, 8),
    "layers.0.up.bias": (12,),
    "layers.1.down.weight": (8, 12),
    "layers.1.norm.weight": (8,),
    "logit_scale": (),
}


@dataclass(frozen=True)
class Family:
    base: dict[str, Tensor]
    models: list[dict[str, Tensor]]
    grams: list[dict[str, Gram]]
    fisher: list[dict[str, Tensor]]

    def merge(self, method: str, *, models=None, **keywords) -> dict[str, Tensor]:
        """Merge with everything that the method needs, as many of the models as it takes."""
        spec = MERGE_METHODS[method]
        models = (self.models if models is None else models)[: spec.max_models]
        if spec.base == "required":
            keywords.setdefault("base", self.base)
        if spec.statistics:
            kind = {"gram": self.grams, "fisher": self.fisher}[spec.statistics]
            keywords.setdefault("statistics", kind[: len(models)])
        return merge(method, models, **keywords)


@pytest.fixture
def family() -> Family:
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> dict[str, Tensor]:
        return {k: scale * torch.randn(s, generator=generator) for k, s in SHAPES.items()}

    base = draw(1.0)
    models = [{k: base[k] + v for k, v in draw(0.3).items()} for _ in range(3)]
    grams = []
    for _ in models:
        per_layer = {}
        for name in ("layers.0.up.weight", "layers.1.down.weight"):
            inputs = torch.randn(40, SHAPES[name][1], generator=generator)
            per_layer[name] = Gram.zero(SHAPES[name][1]).update(inputs)
        grams.append(per_layer)
    fisher = [{k: v.square() for k, v in draw(1.0).items()} for _ in models]
    return Family(base, models, grams, fisher)
