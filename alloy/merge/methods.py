"""Every merge method, what it needs and what can be set, as data. The functions say what they compute."""

from collections.abc import Mapping

from alloy.merge import adaptive, arithmetic, averages, regression, spectral, spherical
from alloy.merge._method import MergeMethod, Option

_DENSITY = Option(type=float, default=0.5, minimum=0, maximum=1)
_SURVIVAL = Option(type=float, default=0.5, minimum=0, maximum=1, excludes=(0,))
_RESCALE = Option(type=bool, default=True)
_SEED = Option(type=int, default=0, minimum=0)
_SHARE = Option(type=float, default=0.8, minimum=0, maximum=1)
_GAMMA = Option(type=float, default=0.01, minimum=0, maximum=1, excludes=(1,))
_EPSILON = Option(type=float, default=0.1, minimum=0, maximum=0.5)
_NORMALIZE = Option(type=bool, default=True)
_SKIP = Option(type=tuple, default=("*embed*", "*lm_head*"))
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
    "density": Option(type=float, default=0.85, minimum=0, maximum=1),
    "gamma": _GAMMA,
}

MERGE_METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod(
        function=averages.linear,
        coefficients="weights",
        elementwise=True,
        options={"normalize": _NORMALIZE},
    ),
    "interpolation": MergeMethod(
        function=averages.interpolation,
        coefficients=None,
        elementwise=True,
        max_models=3,
        options={"ratio": Option(type=float, default=0.5, minimum=0, maximum=1)},
    ),
    "fisher": MergeMethod(
        function=averages.fisher,
        coefficients="nonnegative weights",
        statistics="fisher",
        elementwise=True,
    ),
    "slerp": MergeMethod(
        function=spherical.mixture_of(spherical.slerp_mixture),
        coefficients="weights",
        two_pass=True,
        mix=spherical.slerp_mixture,
        min_models=2,
        max_models=2,
    ),
    "nuslerp": MergeMethod(
        function=spherical.mixture_of(spherical.nuslerp_mixture),
        coefficients="weights",
        base="optional",
        two_pass=True,
        mix=spherical.nuslerp_mixture,
        min_models=2,
        max_models=2,
        options={"vectors": _WHOLE_OR_ROWS},
    ),
    "multislerp": MergeMethod(
        function=spherical.mixture_of(spherical.multislerp_mixture),
        coefficients="nonnegative weights",
        base="optional",
        two_pass=True,
        mix=spherical.multislerp_mixture,
    ),
    "karcher": MergeMethod(
        function=spherical.mixture_of(spherical.karcher_mixture),
        coefficients="nonnegative weights",
        base="optional",
        two_pass=True,
        mix=spherical.karcher_mixture,
        options={
            "max_iterations": Option(type=int, default=100, minimum=1),
            "tolerance": Option(type=float, default=1e-9, minimum=0),
        },
    ),
    "model_stock": MergeMethod(
        function=spherical.mixture_of(spherical.model_stock_mixture),
        coefficients=None,
        base="required",
        two_pass=True,
        mix=spherical.model_stock_mixture,
        min_models=2,
        options={"vectors": _WHOLE_OR_ROWS},
    ),
    "task_arithmetic": MergeMethod(
        function=arithmetic.task_arithmetic,
        coefficients="scales",
        base="required",
        elementwise=True,
    ),
    "modality_arithmetic": MergeMethod(
        function=arithmetic.modality_arithmetic,
        coefficients=None,
        base="required",
        elementwise=True,
        options={"scale": Option(type=float, default=0.75)},
    ),
    "nearswap": MergeMethod(
        function=arithmetic.nearswap,
        coefficients=None,
        base="required",
        elementwise=True,
        max_models=1,
        options={"t": Option(type=float, default=1e-3, minimum=0)},
    ),
    "ties": MergeMethod(
        function=arithmetic.ties,
        coefficients="nonnegative weights",
        base="required",
        two_pass=True,
        options={
            "density": Option(type=float, default=0.2, minimum=0, maximum=1),
            **_ELECTION_OPTIONS,
        },
    ),
    "dare_linear": MergeMethod(
        function=arithmetic.dare_linear,
        coefficients="scales",
        base="required",
        elementwise=True,
        random=True,
        options=_DARE_OPTIONS,
    ),
    "dare_ties": MergeMethod(
        function=arithmetic.dare_ties,
        coefficients="nonnegative weights",
        base="required",
        elementwise=True,
        random=True,
        options={**_DARE_OPTIONS, **_ELECTION_OPTIONS},
    ),
    "della_linear": MergeMethod(
        function=arithmetic.della_linear,
        coefficients="scales",
        base="required",
        random=True,
        options=_DELLA_OPTIONS,
        check=arithmetic.check_della,
    ),
    "della": MergeMethod(
        function=arithmetic.della,
        coefficients="nonnegative weights",
        base="required",
        random=True,
        options={**_DELLA_OPTIONS, **_ELECTION_OPTIONS},
        check=arithmetic.check_della,
    ),
    "breadcrumbs": MergeMethod(
        function=arithmetic.breadcrumbs,
        coefficients="scales",
        base="required",
        two_pass=True,
        options=_BREADCRUMBS_OPTIONS,
        check=arithmetic.check_breadcrumbs,
    ),
    "breadcrumbs_ties": MergeMethod(
        function=arithmetic.breadcrumbs_ties,
        coefficients="nonnegative weights",
        base="required",
        two_pass=True,
        options={**_BREADCRUMBS_OPTIONS, **_ELECTION_OPTIONS},
        check=arithmetic.check_breadcrumbs,
    ),
    "sce": MergeMethod(
        function=arithmetic.sce,
        coefficients=None,
        base="required",
        two_pass=True,
        min_models=2,
        options={"density": _DENSITY},
    ),
    "regmean": MergeMethod(
        function=regression.regmean,
        coefficients="nonnegative weights",
        statistics="gram",
        matrices_only=True,
        options=_GRAM_OPTIONS,
    ),
    "regmean_plus_plus": MergeMethod(
        function=adaptive.regmean_plus_plus,
        coefficients="nonnegative weights",
        scope="model",
        inputs=("module", "batches", "blocks"),
        options=_GRAM_OPTIONS,
    ),
    "wudi": MergeMethod(
        function=regression.wudi,
        coefficients="nonnegative weights",
        base="required",
        matrices_only=True,
        options={"start": _START, "skip": _SKIP},
    ),
    "swudi": MergeMethod(
        function=regression.swudi,
        coefficients="nonnegative weights",
        base="required",
        matrices_only=True,
        options={
            "start": _START,
            "rank": Option(type=float, default=0.65, minimum=0, maximum=1, excludes=(0,)),
            "time": Option(type=float, default=300.0, minimum=0),
            "skip": _SKIP,
        },
    ),
    "optmerge": MergeMethod(
        function=regression.optmerge,
        coefficients="nonnegative weights",
        base="required",
        matrices_only=True,
        options={
            "learning_rate": Option(type=float, default=1e-4, minimum=0, excludes=(0,)),
            "skip": _SKIP,
        },
    ),
    "tsv_m": MergeMethod(
        function=spectral.tsv_m,
        coefficients="scales",
        base="required",
        matrices_only=True,
        options={"skip": _SKIP},
    ),
    "iso_c": MergeMethod(
        function=spectral.iso_c,
        coefficients="scales",
        base="required",
        matrices_only=True,
        options={"skip": _SKIP},
    ),
    "iso_cts": MergeMethod(
        function=spectral.iso_cts,
        coefficients="scales",
        base="required",
        matrices_only=True,
        options={"common": _SHARE, "skip": _SKIP},
    ),
    "adamerging": MergeMethod(
        function=adaptive.adamerging,
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
