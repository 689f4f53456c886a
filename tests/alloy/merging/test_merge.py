"""`merge` accounts for every tensor and refuses what it cannot do, saying what would be right."""

import importlib
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alloy.errors import MergeError
from alloy.merging import MERGE_METHODS, merge, merge_tensor, merge_tensors, validate
from alloy.statistics.moments import Gram

CONTEXT = {"coefficients", "base", "statistics", "name", "offset"}


def weights(value: float = 1.0, **extra):
    return {"a": torch.full((2, 3), value), "b": torch.full((3,), value)} | extra


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_a_function_takes_exactly_what_its_entry_says(method):
    spec = MERGE_METHODS[method]
    given = set(spec.options) | set(spec.inputs) | set(spec.extras)
    given |= {"coefficients"} if spec.coefficients else set()
    given |= {"base"} if spec.base != "unused" else set()
    given |= {"statistics"} if spec.statistics else set()
    given |= {"name", "offset"} if spec.random else set()
    function = spec.mix or spec.function
    taken = {
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    assert taken | ({"base"} if spec.mix and spec.base != "unused" else set()) == given
    assert not (spec.elementwise and spec.two_pass)
    assert all(
        option.check(name, option.default) == option.default
        for name, option in spec.options.items()
    )


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_a_docstring_has_the_formula_or_algorithm_and_its_source(method):
    text = inspect.getdoc(MERGE_METHODS[method].mix or MERGE_METHODS[method].function)
    assert text is not None
    assert any(
        source in text
        for source in (
            "arXiv:",
            "github.com",
            "Shoemake",
            "goddard",
            "alchemonaut",
            "Weiszfeld",
            "(see `",
        )
    )


REFUSED = {
    "unknown method": ({"method": "tise"}, "did you mean 'ties'"),
    "unknown option": (
        {"method": "ties", "base": weights(), "desnity": 0.5},
        "did you mean 'density'",
    ),
    "option of a method that has none": (
        {"method": "task_arithmetic", "base": weights(), "density": 0.5},
        "it has none",
    ),
    "density above 1": (
        {"method": "ties", "base": weights(), "density": 1.7},
        r"density=1.7 is outside \[0, 1\]",
    ),
    "density below 0": (
        {"method": "ties", "base": weights(), "density": -1},
        r"density=-1.0 is outside \[0, 1\]",
    ),
    "density 0 where survivors are rescaled": (
        {"method": "dare_ties", "base": weights(), "density": 0},
        r"outside \(0, 1\]",
    ),
    "density that is not a number": (
        {"method": "ties", "base": weights(), "density": "half"},
        "must be a number",
    ),
    "density that is a bool": (
        {"method": "ties", "base": weights(), "density": True},
        "must be a number",
    ),
    "density that is nan": ({"method": "ties", "base": weights(), "density": math.nan}, "outside"),
    "flag that is a number": ({"method": "linear", "normalize": 1}, "must be true or false"),
    "seed that is a float": (
        {"method": "dare_linear", "base": weights(), "seed": 1.5},
        "must be a whole number",
    ),
    "unknown choice": (
        {"method": "ties", "base": weights(), "election": "mas"},
        "did you mean 'mass'",
    ),
    "masks that overlap": (
        {"method": "breadcrumbs", "base": weights(), "density": 0.9, "gamma": 0.2},
        "at most 1",
    ),
    "probability above 1": (
        {"method": "della", "base": weights(), "density": 0.95, "epsilon": 0.1},
        "probabilities",
    ),
    "missing base": ({"method": "ties"}, "needs base="),
    "base that would be ignored": ({"method": "linear", "base": weights()}, "ignore the base"),
    "missing statistics": ({"method": "regmean"}, "needs statistics="),
    "statistics that would be ignored": (
        {"method": "linear", "statistics": [{}, {}]},
        "ignore the statistics",
    ),
    "missing forward": (
        {"method": "adamerging", "base": weights(), "batches": [[1], [1]]},
        r"also needs \['forward'\]",
    ),
    "no model": ({"method": "linear", "models": []}, "1 or more models .* got 0"),
    "too many models": ({"method": "slerp", "models": [weights()] * 3}, "merges 2 models .* got 3"),
    "too few models": (
        {"method": "model_stock", "models": [weights()], "base": weights()},
        "got 1",
    ),
    "too few coefficients": ({"method": "linear", "coefficients": [1.0]}, "one for each of the 2"),
    "weights that cancel": ({"method": "linear", "coefficients": [1, -1]}, "sum to 0"),
    "weights that are all zero": ({"method": "linear", "coefficients": [0, 0]}, "sum to 0"),
    "negative weight of a mean over some": (
        {"method": "ties", "base": weights(), "coefficients": [2, -1]},
        "not be negative",
    ),
    "coefficient that is not finite": (
        {"method": "linear", "coefficients": [1, math.inf]},
        "finite",
    ),
    "coefficients of a method without": (
        {"method": "sce", "base": weights(), "coefficients": [1, 1]},
        "takes no coefficients",
    ),
    "pattern that matches nothing": (
        {"method": "linear", "coefficients": {"layers.*": [1, 1], "*": [1, 2]}},
        "pattern 'layers.*' matches no tensor",
    ),
    "option pattern that matches nothing": (
        {"method": "modality_arithmetic", "base": weights(), "scale": {"layers.*": 1.0, "*": 0.5}},
        "option scale pattern 'layers.*' matches no tensor",
    ),
    "option patterns that leave a tensor out": (
        {"method": "nearswap", "models": [weights()], "base": weights(), "t": {"a": 1.0}},
        r"no option t for b.* end the patterns \['a'\] with '\*'",
    ),
    "option outside its range in one pattern": (
        {"method": "interpolation", "ratio": {"a": 1.5, "*": 0.5}},
        r"option ratio of 'a'=1.5 is outside \[0, 1\]",
    ),
    "options wrong together in one pattern": (
        {"method": "breadcrumbs", "base": weights(), "density": {"a": 0.5, "*": 0.995}},
        "density 0.995 and gamma 0.01",
    ),
    "patterns of a list of patterns": (
        {"method": "wudi", "base": weights(), "skip": {"*": ["a"]}},
        "list of patterns itself",
    ),
    "option patterns of a method that runs the model": (
        {
            "method": "adamerging",
            "base": weights(),
            "forward": None,
            "batches": [],
            "num_steps": {"a": 1, "*": 2},
        },
        "'adamerging' works on whole models",
    ),
    "weights that cancel in the tensors that are normalised": (
        {"method": "linear", "coefficients": [1, -1], "normalize": {"a": False, "*": True}},
        "sum to 0",
    ),
    "pattern that is shadowed": (
        {"method": "linear", "coefficients": {"*": [1, 2], "a": [1, 1]}},
        "'a' decides nothing",
    ),
    "name that no pattern matches": (
        {"method": "linear", "coefficients": {"a": [1, 1]}},
        "no coefficients for b",
    ),
    "skip that matches nothing": (
        {"method": "tsv_m", "base": weights(), "skip": ("*head*",)},
        "'\\*head\\*' matches no tensor",
    ),
    "missing tensor": (
        {"method": "linear", "models": [weights(c=torch.ones(2)), weights()]},
        "models\\[0\\] has tensors that models\\[1\\] lacks: c",
    ),
    "extra tensor": (
        {"method": "linear", "models": [weights(), weights(c=torch.ones(2))]},
        "models\\[1\\] has tensors that models\\[0\\] lacks: c",
    ),
    "tensor missing in the base": (
        {"method": "ties", "base": {"a": torch.ones(2, 3)}},
        "base lacks: b",
    ),
    "shape": (
        {"method": "linear", "models": [weights(), weights(b=torch.ones(4))]},
        r"differ in shape: b \(3,\) and \(4,\)",
    ),
    "dtype": (
        {"method": "linear", "models": [weights(), weights(b=torch.ones(3).half())]},
        "differ in dtype: b torch.float32 and torch.float16",
    ),
    "nan": (
        {"method": "linear", "models": [weights(), weights(b=torch.tensor([1.0, math.nan, 2.0]))]},
        r"b in models\[1\] has 1 NaN or Inf",
    ),
    "inf in the base": (
        {"method": "ties", "base": weights(b=torch.full((3,), math.inf))},
        "b in base has 3 NaN or Inf",
    ),
    "overflow of the result": (
        {
            "method": "linear",
            "models": [weights(b=torch.full((3,), 6e4).half())] * 2,
            "coefficients": [1, 1],
            "normalize": False,
        },
        "b in the result has 3 NaN or Inf",
    ),
    "integers that differ": (
        {
            "method": "linear",
            "models": [weights(n=torch.tensor([1])), weights(n=torch.tensor([2]))],
        },
        "n is torch.int64 and differs",
    ),
    "gram of another size": (
        {"method": "regmean", "statistics": [{"a": Gram(torch.eye(2), 4)}] * 2},
        r"a: a Gram has shape \(2, 2\)",
    ),
    "gram of no tokens": (
        {"method": "regmean", "statistics": [{"a": Gram.zero(3)}] * 2},
        "no tokens",
    ),
    "gram of an unknown tensor": (
        {"method": "regmean", "statistics": [{"z": Gram.zero(3)}] * 2},
        "models lack: z",
    ),
    "grams of one model only": (
        {"method": "regmean", "statistics": [{"a": Gram(torch.eye(3), 4)}, {}]},
        "some models only: a",
    ),
    "statistics of too few models": (
        {"method": "regmean", "statistics": [{"a": Gram(torch.eye(3), 4)}]},
        "1 .* 2 models",
    ),
    "no statistics": ({"method": "regmean", "statistics": [{}, {}]}, "empty"),
    "fisher of some tensors only": (
        {"method": "fisher", "statistics": [{"a": torch.ones(2, 3)}] * 2},
        "b has no fisher statistics",
    ),
    "fisher that is negative": (
        {"method": "fisher", "statistics": [{"a": -torch.ones(2, 3), "b": torch.ones(3)}] * 2},
        "a: .* negative",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_bad_input_is_refused_with_what_would_be_right(case):
    keywords, message = REFUSED[case]
    keywords = {"models": [weights(1.0), weights(2.0)]} | keywords
    with pytest.raises(MergeError, match=message):
        merge(keywords.pop("method"), keywords.pop("models"), **keywords)


def test_tied_tensors_are_merged_once_and_stay_tied():
    def tied(value):
        shared = torch.full((4, 2), value)
        return {"embed": shared, "norm": torch.full((2,), value), "head": shared}

    merged = merge("linear", [tied(1.0), tied(3.0)])
    assert merged["embed"] is merged["head"]
    assert merged["embed"].unique().tolist() == [2.0]
    assert list(merged) == ["embed", "norm", "head"]


def test_tied_in_one_model_only_is_refused():
    shared = torch.ones(2, 2)
    tied, untied = {"e": shared, "h": shared}, {"e": torch.ones(2, 2), "h": torch.ones(2, 2)}
    with pytest.raises(MergeError, match=r"tied in one of .* but not in the other: h"):
        merge("linear", [tied, untied])
    with pytest.raises(MergeError, match="h is tied to e"):
        merge("linear", [tied, tied], coefficients={"e": [1, 2], "h": [2, 1]})


def test_tensors_that_are_not_floating_point_pass_through():
    models = [weights(i, steps=torch.tensor([5]), used=torch.tensor([True])) for i in (1.0, 2.0)]
    merged = merge("linear", models)
    assert merged["steps"].tolist() == [5]
    assert merged["used"].tolist() == [True]


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "della", "tsv_m"])
def test_inputs_are_not_written_to_and_outputs_do_not_share_their_memory(family, method):
    before = [{k: v.clone() for k, v in m.items()} for m in (family.base, *family.models)]
    merged = family.merge(method)
    for tensor in merged.values():
        tensor.fill_(7.0)
    for then, now in zip(before, (family.base, *family.models), strict=True):
        assert all(torch.equal(then[k], now[k]) for k in then)


def test_empty_tensors_and_non_contiguous_views_are_merged():
    a, b = torch.arange(12.0).reshape(3, 4), torch.ones(4, 3)
    merged = merge(
        "ties",
        [{"x": a.T, "none": torch.ones(0, 3)}],
        base={"x": b, "none": torch.ones(0, 3)},
        density=1.0,
    )
    torch.testing.assert_close(merged["x"], a.T)
    assert merged["none"].shape == (0, 3)


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
@pytest.mark.parametrize("alike", [True, False])
def test_many_tensors_at_once_come_out_as_one_by_one(method: str, alike: bool) -> None:
    """To the bit, whether or not the tensors share their settings."""
    spec = MERGE_METHODS[method]
    if spec.scope == "model" or spec.statistics:
        pytest.skip("it needs more than tensors")
    num_models, names = min(3, spec.max_models or 3), ["a", "b", "c", "d"]
    options = {}
    if not alike and "density" in spec.options:
        options = {"density": {"a": 0.3, "*": 0.6}}
    settings = validate(
        method, names, num_models=num_models, base=spec.base != "unused", options=options
    )
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(4, 6, 5, generator=generator) for _ in range(num_models)]
    base = None if spec.base == "unused" else torch.randn(4, 6, 5, generator=generator)
    together = merge_tensors(settings, names, models, base=base)
    for i, name in enumerate(names):
        alone = merge_tensor(
            settings, name, [m[i] for m in models], base=None if base is None else base[i]
        )
        assert torch.equal(together[i], alone), name
    models[0][2, 1, 1] = float("nan")
    with pytest.raises(MergeError, match=r"c in models\[0\] has 1 NaN or Inf"):
        merge_tensors(settings, names, models, base=base)


def test_coefficients_are_divided_by_their_sum_unless_told_otherwise():
    plan = validate("linear", ["x"], num_models=2, coefficients=[1, 3])
    assert plan.coefficients["x"] == (0.25, 0.75)
    plan = validate(
        "linear", ["x"], num_models=2, coefficients=[1, 3], options={"normalize": False}
    )
    assert plan.coefficients["x"] == (1.0, 3.0)


def test_matrix_methods_take_the_mean_of_everything_else(family):
    """Biases, norms, skipped and unmeasured matrices: the weighted mean, or base + mean of scaled
    task vectors.
    """
    mean = family.merge("linear")
    for method in ("regmean", "wudi", "swudi", "optmerge", "tsv_m", "iso_c", "iso_cts"):
        merged = family.merge(method)
        for name in ("embed.weight", "layers.0.up.bias", "layers.1.norm.weight", "logit_scale"):
            torch.testing.assert_close(merged[name], mean[name], atol=1e-6, rtol=1e-6)
        for name in ("layers.0.up.weight", "layers.1.down.weight"):
            assert (merged[name] - mean[name]).abs().max() > 1e-5
    whole = family.merge("wudi", skip=())
    assert (whole["embed.weight"] - mean["embed.weight"]).abs().max() > 1e-5


@pytest.fixture
def without_alloy():
    """As if nothing of alloy had been imported; torch stays loaded."""

    def ours():
        return [name for name in sys.modules if name == "alloy" or name.startswith("alloy.")]

    before = {name: sys.modules.pop(name) for name in ours()}
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize(
    "order",
    [
        "import alloy, alloy.merging, alloy.measures.distances",
        "import alloy.merging; import alloy.measures.distances",
        "from alloy.merging import MERGE_METHODS; from alloy.measures.distances import Distances",
        "import alloy; alloy.merge; import alloy.merging; import alloy.measures.distances",
        "from alloy import merge, distance",
        "import alloy.merging.methods",
    ],
)
def test_alloy_merge_is_the_function_in_any_import_order(order, without_alloy):
    scope: dict = {}
    exec(f"{order}\nimport alloy", scope)
    alloy, x = scope["alloy"], {"a": torch.ones(2)}
    assert alloy.merge("linear", [x, x])["a"].tolist() == [1, 1]
    assert alloy.distance(x, x).overall.l2 == 0
    assert "ties" in importlib.import_module("alloy.merging").MERGE_METHODS


def test_importing_alloy_loads_nothing_heavy():
    program = "import alloy, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
