"""Every merge method, its needs and its options, as data. The functions say what they compute.

They are named here and imported when they are first looked at: torch takes longer to import than
many a merge of checkpoints, which needs the registry but not the functions where it has compiled
loops.
"""

from collections.abc import Mapping

from alloy.errors import MergeError
from alloy.merging.method import MergeMethod, Option


def _check_breadcrumbs(*, density: float, gamma: float, **_) -> None:
    if density + gamma > 1:
        raise MergeError(
            f"density {density} and gamma {gamma} keep and set aside more than there is; "
            "their sum must be at most 1 (dense: density=1, gamma=0)"
        )


def _check_della(*, density: float, epsilon: float, **_) -> None:
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise MergeError(
            f"density {density} ± epsilon {epsilon} are not probabilities in (0, 1]: take epsilon "
            f"below {min(density, 1 - density):g} (epsilon=0 is DARE)"
        )


_DENSITY = Option(type=float, default=0.5, minimum=0, maximum=1)
_SURVIVAL = Option(type=float, default=0.5, minimum=0, maximum=1, excludes=(0,), by_model=True)
_RESCALE = Option(type=bool, default=True)
_SEED = Option(type=int, default=0, minimum=0)
_SHARE = Option(type=float, default=0.8, minimum=0, maximum=1)
_GAMMA = Option(type=float, default=0.01, minimum=0, maximum=1, excludes=(1,), by_model=True)
_EPSILON = Option(type=float, default=0.1, minimum=0, maximum=0.5, by_model=True)
_CHANGE = Option(type=float, default=1e-5, minimum=0)
_NORMALIZE = Option(type=bool, default=True)
_SKIP = Option(
    type=tuple,
    default=("*embed*", "*lm_head*", "*wte*", "*wpe*", "*shared.weight", "*predictions.decoder*"),
)
_TRANSPOSED = Option(type=bool, default=False)
"""True if the inputs meet dim 0 of the matrix, as in GPT-2's Conv1D."""
_WHOLE_OR_ROWS = Option(type=str, default="tensor", choices=("tensor", "rows"))
_START = Option(type=str, default="sum", choices=("sum", "mean", "zero"))
_GRAM_OPTIONS = {
    "shrinkage": Option(type=float, default=0.1, minimum=0, maximum=1),
    "ridge": Option(type=float, default=1e-3, minimum=0),
    "normalize_grams": Option(type=bool, default=True),
}
_ELECTION_OPTIONS = {
    "election": Option(type=str, default="mass", choices=("mass", "weighted mass", "count")),
    "normalize": _NORMALIZE,
    "scale": Option(type=float, default=1.0),
}
_DARE_OPTIONS = {"density": _SURVIVAL, "rescale": _RESCALE, "seed": _SEED}
_DELLA_OPTIONS = {**_DARE_OPTIONS, "epsilon": _EPSILON}
_BREADCRUMBS_OPTIONS = {
    "density": Option(type=float, default=0.85, minimum=0, maximum=1, by_model=True),
    "gamma": _GAMMA,
}

MERGE_METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod(
        implementation="averages.linear",
        coefficients="weights",
        elementwise=True,
        options={"normalize": _NORMALIZE},
    ),
    "passthrough": MergeMethod(
        implementation="averages.passthrough",
        coefficients=None,
        elementwise=True,
        max_models=1,
        options={"scale": Option(type=float, default=1.0)},
    ),
    "interpolation": MergeMethod(
        implementation="averages.interpolation",
        coefficients=None,
        elementwise=True,
        max_models=3,
        options={"ratio": Option(type=float, default=0.5, minimum=0, maximum=1)},
    ),
    "geometric_median": MergeMethod(
        implementation="averages.geometric_median",
        coefficients=None,
        options={
            "max_iterations": Option(type=int, default=100, minimum=1),
            "tolerance": Option(type=float, default=1e-7, minimum=0),
        },
    ),
    "fisher": MergeMethod(
        implementation="averages.fisher",
        coefficients="nonnegative weights",
        statistics="fisher",
        elementwise=True,
    ),
    "slerp": MergeMethod(
        coefficients="weights",
        two_pass=True,
        mixture="spherical.slerp_mixture",
        min_models=2,
        max_models=2,
    ),
    "nuslerp": MergeMethod(
        coefficients="weights",
        base="optional",
        two_pass=True,
        mixture="spherical.nuslerp_mixture",
        min_models=2,
        max_models=2,
        options={"vectors": _WHOLE_OR_ROWS},
    ),
    "multislerp": MergeMethod(
        coefficients="nonnegative weights",
        base="optional",
        two_pass=True,
        mixture="spherical.multislerp_mixture",
    ),
    "karcher": MergeMethod(
        coefficients="nonnegative weights",
        base="optional",
        two_pass=True,
        mixture="spherical.karcher_mixture",
        options={
            "max_iterations": Option(type=int, default=100, minimum=1),
            "tolerance": Option(type=float, default=1e-9, minimum=0),
        },
    ),
    "model_stock": MergeMethod(
        coefficients=None,
        base="required",
        two_pass=True,
        mixture="spherical.model_stock_mixture",
        min_models=2,
        options={"vectors": _WHOLE_OR_ROWS},
    ),
    "task_arithmetic": MergeMethod(
        implementation="arithmetic.task_arithmetic",
        coefficients="scales",
        base="required",
        elementwise=True,
    ),
    "modality_arithmetic": MergeMethod(
        implementation="arithmetic.modality_arithmetic",
        coefficients=None,
        base="required",
        vectorizes=True,
        elementwise=True,
        options={"scale": Option(type=float, default=0.75)},
    ),
    "nearswap": MergeMethod(
        implementation="arithmetic.nearswap",
        coefficients=None,
        base="required",
        vectorizes=True,
        elementwise=True,
        max_models=1,
        options={"t": Option(type=float, default=1e-3, minimum=0)},
    ),
    "arcee_fusion": MergeMethod(
        implementation="arithmetic.arcee_fusion",
        coefficients=None,
        base="required",
        looks_at_weights=True,
        max_models=1,
    ),
    "ram": MergeMethod(
        implementation="arithmetic.ram",
        coefficients=None,
        base="required",
        vectorizes=True,
        elementwise=True,
        options={"epsilon": _CHANGE},
    ),
    "ram_plus": MergeMethod(
        implementation="arithmetic.ram_plus",
        coefficients=None,
        base="required",
        options={
            "epsilon": _CHANGE,
            "r": Option(type=float, default=0.1, minimum=0),
            "alpha": Option(type=float, default=0.2, minimum=0),
        },
    ),
    "ties": MergeMethod(
        implementation="arithmetic.ties",
        coefficients="nonnegative weights",
        base="required",
        vectorizes=True,
        two_pass=True,
        options={
            "density": Option(type=float, default=0.2, minimum=0, maximum=1, by_model=True),
            **_ELECTION_OPTIONS,
        },
    ),
    "dare_linear": MergeMethod(
        implementation="arithmetic.dare_linear",
        coefficients="scales",
        base="required",
        elementwise=True,
        random=True,
        options=_DARE_OPTIONS,
    ),
    "dare_ties": MergeMethod(
        implementation="arithmetic.dare_ties",
        coefficients="nonnegative weights",
        base="required",
        elementwise=True,
        random=True,
        options={**_DARE_OPTIONS, **_ELECTION_OPTIONS},
    ),
    "della_linear": MergeMethod(
        implementation="arithmetic.della_linear",
        coefficients="scales",
        base="required",
        random=True,
        options=_DELLA_OPTIONS,
        check=_check_della,
    ),
    "della": MergeMethod(
        implementation="arithmetic.della",
        coefficients="nonnegative weights",
        base="required",
        random=True,
        options={**_DELLA_OPTIONS, **_ELECTION_OPTIONS},
        check=_check_della,
    ),
    "breadcrumbs": MergeMethod(
        implementation="arithmetic.breadcrumbs",
        coefficients="scales",
        base="required",
        vectorizes=True,
        two_pass=True,
        options=_BREADCRUMBS_OPTIONS,
        check=_check_breadcrumbs,
    ),
    "breadcrumbs_ties": MergeMethod(
        implementation="arithmetic.breadcrumbs_ties",
        coefficients="nonnegative weights",
        base="required",
        vectorizes=True,
        two_pass=True,
        options={**_BREADCRUMBS_OPTIONS, **_ELECTION_OPTIONS},
        check=_check_breadcrumbs,
    ),
    "sce": MergeMethod(
        implementation="arithmetic.sce",
        coefficients=None,
        base="required",
        two_pass=True,
        min_models=2,
        options={"density": _DENSITY},
    ),
    "regmean": MergeMethod(
        implementation="regression.regmean",
        coefficients="nonnegative weights",
        statistics="gram",
        matrices_only=True,
        options=_GRAM_OPTIONS,
    ),
    "regmean_plus_plus": MergeMethod(
        implementation="adaptive.regmean_plus_plus",
        coefficients="nonnegative weights",
        scope="model",
        inputs=("module", "batches", "blocks"),
        options=_GRAM_OPTIONS,
    ),
    "sequential": MergeMethod(
        implementation="sequential.sequential",
        coefficients="nonnegative weights",
        scope="model",
        inputs=("module", "batches"),
        extras=("answers",),
        options={
            "ridge": Option(type=float, default=1e-2, minimum=0),
            "residual": Option(type=bool, default=True),
        },
    ),
    "wudi": MergeMethod(
        implementation="regression.wudi",
        coefficients="nonnegative weights",
        base="required",
        matrices_only=True,
        options={"start": _START, "transposed": _TRANSPOSED, "skip": _SKIP},
    ),
    "swudi": MergeMethod(
        implementation="regression.swudi",
        coefficients="nonnegative weights",
        base="required",
        matrices_only=True,
        options={
            "start": _START,
            "rank": Option(type=float, default=0.65, minimum=0, maximum=1, excludes=(0,)),
            "time": Option(type=float, default=300.0, minimum=0),
            "transposed": _TRANSPOSED,
            "skip": _SKIP,
        },
    ),
    "aswudi": MergeMethod(
        implementation="regression.aswudi",
        coefficients="nonnegative weights",
        base="required",
        matrices_only=True,
        options={
            "start": _START,
            "rule": Option(
                type=str, default="participation", choices=("participation", "gavish_donoho")
            ),
            "transposed": _TRANSPOSED,
            "skip": _SKIP,
        },
    ),
    "optmerge": MergeMethod(
        implementation="regression.optmerge",
        coefficients="nonnegative weights",
        base="required",
        matrices_only=True,
        options={
            "learning_rate": Option(type=float, default=1e-4, minimum=0, excludes=(0,)),
            "transposed": _TRANSPOSED,
            "skip": _SKIP,
        },
    ),
    "tsv_m": MergeMethod(
        implementation="spectral.tsv_m",
        coefficients="scales",
        base="required",
        matrices_only=True,
        options={"skip": _SKIP},
    ),
    "boosted_tsv_m": MergeMethod(
        implementation="spectral.boosted_tsv_m",
        coefficients="scales",
        base="required",
        matrices_only=True,
        options={
            "beta": Option(type=float, default=0.3, minimum=0, maximum=1),
            "skip": _SKIP,
        },
    ),
    "iso_c": MergeMethod(
        implementation="spectral.iso_c",
        coefficients="scales",
        base="required",
        matrices_only=True,
        options={"skip": _SKIP},
    ),
    "iso_cts": MergeMethod(
        implementation="spectral.iso_cts",
        coefficients="scales",
        base="required",
        matrices_only=True,
        options={"common": _SHARE, "skip": _SKIP},
    ),
    "adamerging": MergeMethod(
        implementation="adaptive.adamerging",
        coefficients="scales",
        default_scale=0.3,
        base="required",
        scope="model",
        inputs=("forward", "batches"),
        options={
            "per": Option(type=str, default="layer", choices=("task", "layer")),
            "num_steps": Option(type=int, default=500, minimum=0),
            "learning_rate": Option(type=float, default=1e-3, minimum=0, excludes=(0,)),
        },
    ),
}
"""Every merge method by name: its function, its coefficients and its options."""
