"""mergekit's methods by name: ours, the settings that both have, and what each takes otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alloy.errors import MergeError
from alloy.mergekit.settings import number


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A method of mergekit in ours' terms."""

    ours: str
    shared: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """By its setting of the whole merge our option and its default."""
    of_models: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """By its setting of a model our option and its default."""
    weights: bool = True
    """Each model has a `weight`."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Our options that give mergekit's definition."""
    base: str = "base"
    """Where its base goes: to our base, among our models (`model`), or nowhere (`none`)."""
    adds: bool = False
    """Weights are scales of task vectors, times `lambda`, over their sum with `normalize`."""
    ignored: tuple[str, ...] = ("int8_mask",)
    """Settings that change nothing in the result here."""
    differs: str | None = None
    """Why the numbers are not mergekit's, where the definitions differ."""


_ELECTION = {"election": "weighted mass"}
_DENSITY = {"density": ("density", 1.0)}
_GAMMA = {"gamma": ("gamma", 0.01)}
_SPREAD = {"epsilon": ("epsilon", 0.15)}
_SCALED = {"lambda": ("scale", 1.0)}
_DRAWN = (
    "which entries are dropped is drawn otherwise, and survivors are scaled by 1/density, where "
    "mergekit scales them to the old sum of magnitudes"
)


def _normalized(default: bool) -> dict[str, tuple[str, Any]]:
    return {"normalize": ("normalize", default), **_SCALED}


def _rescaled() -> dict[str, tuple[str, Any]]:
    return {"rescale": ("rescale", True)}


PEERS: Mapping[str, Peer] = {
    "linear": Peer(ours="linear", shared={"normalize": ("normalize", True)}, base="model"),
    "slerp": Peer(ours="slerp", shared={"t": ("t", ...)}, weights=False, base="model"),
    "nuslerp": Peer(
        ours="nuslerp",
        shared={
            "nuslerp_flatten": ("nuslerp_flatten", True),
            "nuslerp_row_wise": ("nuslerp_row_wise", False),
        },
        differs="tensors within two degrees of parallel are interpolated linearly, as by slerp",
    ),
    "multislerp": Peer(
        ours="multislerp",
        shared={"normalize_weights": ("normalize_weights", True)},
        ignored=("int8_mask", "eps"),
    ),
    "karcher": Peer(
        ours="karcher",
        shared={"max_iter": ("max_iterations", 10), "tol": ("tolerance", 1e-5)},
        weights=False,
        base="model",
    ),
    "task_arithmetic": Peer(ours="task_arithmetic", adds=True, ignored=("int8_mask", "density")),
    "ties": Peer(ours="ties", shared=_normalized(True), of_models=_DENSITY, fixed=_ELECTION),
    "dare_linear": Peer(
        ours="dare_linear", shared=_rescaled(), of_models=_DENSITY, adds=True, differs=_DRAWN
    ),
    "dare_ties": Peer(
        ours="dare_ties",
        shared={**_normalized(False), **_rescaled()},
        of_models=_DENSITY,
        fixed=_ELECTION,
        differs=_DRAWN,
    ),
    "breadcrumbs": Peer(ours="breadcrumbs", of_models={**_DENSITY, **_GAMMA}, adds=True),
    "breadcrumbs_ties": Peer(
        ours="breadcrumbs_ties",
        shared=_normalized(False),
        of_models={**_DENSITY, **_GAMMA},
        fixed=_ELECTION,
    ),
    "della_linear": Peer(
        ours="della_linear",
        shared=_rescaled(),
        of_models={**_DENSITY, **_SPREAD},
        adds=True,
        differs=_DRAWN,
    ),
    "della": Peer(
        ours="della",
        shared={**_normalized(True), **_rescaled()},
        of_models={**_DENSITY, **_SPREAD},
        fixed=_ELECTION,
        differs=_DRAWN,
    ),
    "sce": Peer(ours="sce", shared={"select_topk": ("density", 1.0)}, weights=False),
    "model_stock": Peer(
        ours="model_stock",
        shared={"filter_wise": ("filter_wise", False)},
        weights=False,
        differs="where task vectors oppose each other the base is kept",
    ),
    "nearswap": Peer(ours="nearswap", shared={"t": ("t", ...)}, weights=False),
    "arcee_fusion": Peer(
        ours="arcee_fusion",
        weights=False,
        differs="quartiles are exact, where mergekit draws a million entries of larger tensors",
    ),
    "ram": Peer(ours="ram", shared={"epsilon": ("epsilon", 1e-5)}, weights=False),
    "ramplus_tl": Peer(
        ours="ram_plus",
        shared={"epsilon": ("epsilon", 1e-5), "r": ("r", 0.1), "alpha": ("alpha", 0.2)},
        weights=False,
    ),
    "passthrough": Peer(
        ours="passthrough", of_models={"scale": ("scale", 1.0)}, weights=False, base="none"
    ),
}

NEAREST: Mapping[str, str] = {
    "ranked_ties": "ties",
    "cabs": "breadcrumbs_ties",
    "zipit": "a recipe with `align`, preset zipit",
    "encoder_decoder_weighted": "linear with coefficients by pattern, '*encoder*' and '*decoder*'",
    "core_space": "`alloy adapters`",
    "lrp": "ties, which keeps what is large, not what is relevant to data",
    "moe": "no method: a mixture of experts is larger than its parts",
}
"""Methods of forks and old versions, with what comes nearest."""


ELSEWHERE: Mapping[str, str] = {
    "align_weights": "units are aligned by a recipe with `align`, preset zipit among others",
    "genome": "coefficients are searched by `python -m tasks.search RECIPE ARM ...`",
    "metric_method": "models are compared by `alloy distance`",
    "gate_mode": "a mixture of experts is larger than its parts; no method here makes one",
    "experts": "a mixture of experts is larger than its parts; no method here makes one",
}
"""Keys of configurations that are no merges, with what does that here."""


def _whole(value: float) -> int | float:
    """A whole number as one; others stay what they are, for the method to refuse."""
    return int(value) if value % 1 == 0 else value


def finished(peer: Peer, values: dict[str, Any]) -> dict[str, Any]:
    """Options of one tensor in our terms, from mergekit's values under our names.

    Raises:
        MergeError: a value that has no counterpart.
    """
    options = dict(values)
    if peer.ours == "nuslerp":
        flat, by_row = options.pop("nuslerp_flatten"), options.pop("nuslerp_row_wise")
        if not flat and by_row:
            raise MergeError(
                "nuslerp_row_wise: true interpolates column by column (dim 0); the nearest here is "
                "nuslerp_row_wise: false, row by row"
            )
        options["vectors"] = "tensor" if flat else "rows"
    if "filter_wise" in options:
        options["vectors"] = "rows" if options.pop("filter_wise") else "tensor"
    if options.pop("normalize_weights", True) is False:
        raise MergeError(
            "normalize_weights: false: a mean on the sphere has weights that sum to 1; leave it out"
        )
    convert: Mapping[str, Callable[[float], Any]] = {"max_iterations": _whole}
    for key, value in options.items():
        if not isinstance(value, bool) and key not in ("vectors", "t"):
            options[key] = convert.get(key, float)(number(value, key))
    return options
