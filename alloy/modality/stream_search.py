"""The gauge of the experts in which merging them costs least (`alloy.gauge`), and a start for it.

`inner_alignment` moves heads and neurons alone and leaves the streams as they are. `find_gauge`
searches over both, from that start and from others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alloy.alignment.search import align
from alloy.gauge import Gauge, search_gauge
from alloy.modality.experts import MODALITIES, split_experts
from alloy.modality.modeling import ModalityModel
from alloy.modality.observe import REFERENCE, collect_experts, expert_spec
from alloy.modality.passes import Batch
from alloy.modality.streams import ANCHOR, stream_of, towers
from alloy.statistics.moments import Gram
from alloy.symmetry import Transform, compose, invert


def inner_alignment(
    model: ModalityModel, batches: Iterable[Batch], *, weight_share: float = 0.5
) -> dict[str, dict[str, Transform]]:
    """Align the heads, neurons and units within heads of v and vl with those of l.

    Args:
        model: folded, as `in_gauge(model)` gives it.
        batches: image i and text i belong together.
        weight_share: a of the dual space of `alloy.align`.

    Returns:
        Transforms of v and vl, to start a search from (`find_gauge`'s `initial`).
    """
    aligned: dict[str, dict[str, Transform]] = {}
    experts = split_experts(model.state_dict(), model.config)
    spec = towers(model)[REFERENCE].spec
    moments = collect_experts(model, batches, spec).moments
    for modality, weights in experts.items():
        if modality != REFERENCE and weights:
            aligned[modality] = align(
                {name: experts[REFERENCE][name] for name in weights},
                weights,
                expert_spec(spec, weights),
                moments[modality],
                weight_share=weight_share,
                method="orthogonal",
            )
    # Statistics are of pairs with v. Undoing what brings l to v brings v, and all that follows v,
    # to l, which is the one that cannot move.
    back = invert(aligned[ANCHOR])
    others = {m: compose(t, _within(back, t)) for m, t in aligned.items() if m != ANCHOR}
    return {REFERENCE: back, **others}


def _within(
    transforms: Mapping[str, Transform], others: Mapping[str, Transform]
) -> dict[str, Transform]:
    return {name: transform for name, transform in transforms.items() if name in others}


def find_gauge(
    model: ModalityModel,
    grams: Mapping[str, Mapping[str, Gram]],
    *,
    turn_streams: bool = True,
    fixed_spaces: Sequence[str] = (),
    still: Sequence[str] = (),
    initial: Mapping[str, Mapping[str, Mapping[str, Transform]]] | None = None,
    **settings: Any,
) -> tuple[dict[str, dict[str, Transform]], Gauge]:
    """Search for the transforms of each modality's experts at which merging them costs least.

    Args:
        model: folded, as `in_gauge(model)` gives it.
        grams: `affine_grams` of it. Experts whose modality has none are not moved.
        turn_streams: whether v and vl may have bases of their own, at the price of two adapters.
        fixed_spaces: spaces of the towers' spec that stay as they are in every expert.
        still: modalities whose stream does not turn, besides l.
        initial: further starts by name: each modality's transforms, such as `inner_alignment`.
        settings: of `alloy.gauge.search_gauge`.

    Returns:
        The transforms by modality, for `in_gauge`, and the report of the search.
    """
    folded = towers(model)
    spec = folded[ANCHOR].spec
    stream = stream_of(spec)
    names = [m for m in MODALITIES if grams.get(m)]
    gauge = search_gauge(
        [folded[m].weights for m in names],
        spec,
        [grams[m] for m in names],
        reference=names.index(ANCHOR),
        fixed=[*fixed_spaces, *([] if turn_streams else [stream])],
        held=[(names.index(modality), stream) for modality in still],
        initial={
            start: [transforms.get(modality, {}) for modality in names]
            for start, transforms in (initial or {}).items()
        },
        device=model.device,
        **settings,
    )
    result = {}
    for modality, transforms in zip(names, gauge.transforms, strict=True):
        spaces = folded[modality].spec.spaces
        result[modality] = {name: t for name, t in transforms.items() if name in spaces}
    return result, gauge
