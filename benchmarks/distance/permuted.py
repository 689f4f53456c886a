"""A sweep of merges whose experts compute the same and lie apart by any chosen amount.

Units and heads of an expert may be reordered without changing what it computes (docs/symmetry.md).
Each merge of the sweep reorders a random share of them in the language and the cross-modal experts
of a modality checkpoint, so that the distance of the experts varies while their abilities stay;
whatever the merged model loses is due to the distance. Scores are on validation data, without
training.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

import alloy
from alloy.alignment.grams import transport_grams
from alloy.errors import nearest
from alloy.measures.distances import distance
from alloy.merging import MERGE_METHODS
from alloy.modality import ModalityModel, agnostic_config, shared_weights, split_experts
from alloy.modality.observe import REFERENCE, expert_spec
from alloy.symmetry import SymmetrySpec
from alloy.symmetry.transforms import Transform, identity
from benchmarks.distance.settings import PermutedSweepParams
from tasks.experts.measures.benchmark import load_split
from tasks.experts.measures.benchmarks import BENCHMARKS, FREE_ON_SCENES
from tasks.experts.merge import merge_experts
from tasks.experts.shared.loading import load_model
from tasks.experts.shared.statistics import load_spec, load_statistics
from tasks.recipe.load import load_experts
from tasks.recipe.section import ParamsError

MODELS = Path("models")
Experts = Mapping[str, Mapping[str, Tensor]]


def permuted_merges(
    params: PermutedSweepParams,
) -> Iterator[tuple[str, str, dict[str, float], dict[str, float]]]:
    """Make the merges: yields name, arm, mean distances of the experts' pairs, scores in %."""
    arms = load_experts(params.recipe).merge.arms
    data = {name: load_split(params.recipe, name, "validation") for name in FREE_ON_SCENES}
    for name in params.arms:
        if name not in arms:
            raise ParamsError(f"arms: {name!r}: {nearest(name, list(arms))}")
        if arms[name].align or arms[name].base is not None:
            raise ParamsError(f"arms: {name!r} aligns or has a base: units that move do not fit it")
    torch.set_num_threads(1)  # numbers do not depend on the number of cores, as in evaluate
    with tqdm(total=len(params.arms) * params.merges, desc="distance", unit="merge") as bar:
        for name in params.arms:
            arm = arms[name]
            source = load_model(MODELS / params.recipe / "checkpoints" / arm.checkpoint).cpu()
            weights = source.state_dict()
            experts = split_experts(weights, source.config)
            statistics = MODELS / params.recipe / "statistics" / arm.checkpoint
            spec, grams = load_spec(statistics), None
            if MERGE_METHODS[arm.method].statistics == "gram":
                grams = load_statistics(statistics).grams
            generator = torch.Generator().manual_seed(params.seed)
            for i in range(params.merges):
                share = i / max(1, params.merges - 1)
                moved, moved_grams = dict(experts), dict(grams or {})
                for modality in (m for m in experts if m != REFERENCE and experts[m]):
                    inner = expert_spec(spec, experts[modality])
                    transforms = reordered(inner, share, generator)
                    moved[modality] = alloy.transport(experts[modality], inner, transforms)
                    if grams is not None:
                        moved_grams[modality] = transport_grams(grams[modality], inner, transforms)
                merged = merge_experts(moved, arm, grams=moved_grams if grams else None)
                model = ModalityModel(agnostic_config(source.config))
                model.load_state_dict({**shared_weights(weights, source.config), **merged})
                scores = {
                    f"{b} {BENCHMARKS[b].metric}": _score(b, model.eval(), data[b])
                    for b in FREE_ON_SCENES
                }
                apart = mean_distances(
                    moved, keep=params.keep, zeros=params.zeros, truncation=params.truncation
                )
                yield f"{name} {share:.2f}", name, apart, scores
                bar.update()


def reordered(spec: SymmetrySpec, share: float, generator: Generator) -> dict[str, Transform]:
    """Permute a random share of every space's units among themselves."""
    result = identity(spec)
    for transform in result.values():
        order = transform.permutation
        assert order is not None, "the identity is made of permutations"
        for row in order.view(-1, order.shape[-1]):
            chosen = torch.randperm(len(row), generator=generator)[: round(share * len(row))]
            row[chosen] = row[chosen[torch.randperm(len(chosen), generator=generator)]]
    return result


def _score(benchmark: str, model: ModalityModel, examples: Mapping[str, Tensor]) -> float:
    judge = BENCHMARKS[benchmark]
    return judge.score(judge.outputs(model, examples), examples)[judge.metric].value


def mean_distances(experts: Experts, **settings: Any) -> dict[str, float]:
    """Average each distance over the pairs of experts, of the matrices that both have."""
    values_of: dict[str, list[float]] = {}
    for one, other in combinations((m for m in experts if experts[m]), 2):
        a, b = experts[one], experts[other]
        names = [n for n in a if n in b and a[n].dim() == 2]
        apart = distance(
            {n: a[n].float() for n in names}, {n: b[n].float() for n in names}, **settings
        )
        for measure, value in vars(apart.overall).items():
            values_of.setdefault(measure, []).append(value)
    return {measure: fmean(values) for measure, values in values_of.items()}
