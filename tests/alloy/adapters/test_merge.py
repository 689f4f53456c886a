"""Adapters merged in the space of their factors equal the full merge, where that is defined."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import alloy
from alloy.adapters import merge_adapters
from alloy.adapters.core import merged_in_core
from alloy.checkpoint import load_weights
from alloy.cli.app import app
from alloy.errors import CheckpointError, MergeError
from alloy.merging import MERGE_METHODS

NORM = "model.norm.weight"


@pytest.fixture
def three(adapter: Callable) -> dict[str, Path]:
    """Adapters of other ranks, scalings and layers: not all change the same."""
    return {
        "a": adapter("a", 1),
        "b": adapter("b", 2, rank=5, use_rslora=True),
        "c": adapter("c", 3, layers=("q_proj", "v_proj", "embed_tokens", "lm_head"), rank=2),
    }


def _full(method: str, seed: Path, adapters: dict[str, Path], **settings) -> dict[str, Tensor]:
    """The merge of the models, in float64."""

    def wide(source: Path | str) -> dict[str, Tensor]:
        return {name: value.double() for name, value in load_weights(source).items()}

    base = {"base": wide(seed)} if MERGE_METHODS[method].base != "unused" else {}
    models = {name: wide(f"{seed}+{path}") for name, path in adapters.items()}
    return alloy.merge(method, models, **base, **settings)


def _assert_same(output: Path, seed: Path, expected: dict[str, Tensor], tolerance: float) -> None:
    folded = load_weights(f"{seed}+{output}")
    for name, value in expected.items():
        error = (folded[name] - value).abs().max()
        assert error <= tolerance * max(1, value.abs().max()), name


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {}),
        ("linear", {"coefficients": [0.5, 0.2, 0.3]}),
        ("task_arithmetic", {"coefficients": [0.7, -0.4, 1.1]}),
        ("task_arithmetic", {"coefficients": {"*q_proj*": [1, 0, 0], "*": [0.1, 0.2, 0.3]}}),
        ("modality_arithmetic", {"scale": 0.6}),
        ("karcher", {}),
        ("multislerp", {}),
        ("model_stock", {}),
    ],
)
def test_what_sums_and_inner_products_say_equals_the_merge_of_models(
    method: str, settings: dict, three: dict, seed: Path, tmp_path: Path
) -> None:
    """Concatenation is exact, and orthonormal bases keep inner products: no approximation."""
    report = merge_adapters(method, three, tmp_path / "out", base=seed, **settings)
    _assert_same(tmp_path / "out", seed, _full(method, seed, three, **settings), 2e-5)
    assert report.ranks["model.layers.0.self_attn.q_proj"] <= 3 + 5 + 2


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ties", {"density": 0.3}),
        ("dare_ties", {"density": 0.5, "seed": 3}),
        ("breadcrumbs", {}),
        ("sce", {}),
        ("tsv_m", {}),
    ],
)
def test_other_methods_merge_cores(
    method: str, settings: dict, adapter: Callable, seed: Path, tmp_path: Path
) -> None:
    """Algorithm 1 of arXiv:2509.17786 by whole bases: U merge(U^T dW V) V^T."""
    adapters = {"a": adapter("a", 1), "b": adapter("b", 2, rank=4)}
    merge_adapters(method, adapters, tmp_path / "out", **settings)
    files = {n: load_file(p / "adapter_model.safetensors") for n, p in adapters.items()}
    result = load_file(tmp_path / "out/adapter_model.safetensors")
    keys = [key.removesuffix(".lora_A.weight") for key in files["a"] if "lora_A" in key]
    assert len(keys) == 8
    for key in keys:
        scale = {"a": 2 / 3, "b": 2 / 4}
        lefts = [scale[n] * f[f"{key}.lora_B.weight"].double() for n, f in files.items()]
        rights = [f[f"{key}.lora_A.weight"].double() for f in files.values()]
        u = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False).U
        v = torch.linalg.svd(torch.cat(rights), full_matrices=False).Vh.T
        cores = [u.T @ left @ right @ v for left, right in zip(lefts, rights, strict=True)]
        name = f"{key.removeprefix('base_model.model.')}.weight"
        # the bases' order is free: ours ascends
        flipped = [core.flip(0, 1) for core in cores]
        merged = alloy.merge(
            method,
            [{name: core} for core in flipped],
            base={name: torch.zeros_like(flipped[0])},
            **settings,
        )[name]
        ours = result[f"{key}.lora_B.weight"] @ result[f"{key}.lora_A.weight"]
        if "seed" in settings:  # signs of bases are free, and a mask is drawn by place: norms tell
            assert ours.norm() == pytest.approx(float(merged.norm()), rel=1e-4)
        else:
            expected = u @ merged.flip(0, 1) @ v.T
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_an_adapter_merged_with_itself_is_itself(
    method: str, adapter: Callable, seed: Path, tmp_path: Path
) -> None:
    """Every method that takes adapters: the change comes back, or the method says what it needs."""
    exact = {
        "ties": {"density": 1.0}, "dare_linear": {"density": 1.0}, "dare_ties": {"density": 1.0},
        "breadcrumbs": {"density": 1.0, "gamma": 0.0},
        "breadcrumbs_ties": {"density": 1.0, "gamma": 0.0},
        "della": {"density": 1.0, "epsilon": 0.0}, "della_linear": {"density": 1.0, "epsilon": 0.0},
        "sce": {"density": 1.0}, "modality_arithmetic": {"scale": 0.5},
    }  # fmt: skip
    spec = MERGE_METHODS[method]
    path = adapter("a", 1)
    num = spec.max_models or max(2, spec.min_models)
    adapters = {f"m{i}": path for i in range(min(num, 2))}
    settings = dict(exact.get(method, {}))
    if spec.coefficients == "scales":
        settings["coefficients"] = [1 / len(adapters)] * len(adapters)
    if spec.scope == "model" or spec.statistics or spec.looks_at_weights:
        with pytest.raises(MergeError, match=r"(data of the layers|whole weights).*BASE\+ADAPTER"):
            merge_adapters(method, adapters, tmp_path / "out", **settings)
        return
    merge_adapters(method, adapters, tmp_path / "out", **settings)
    ours = load_weights(f"{seed}+{tmp_path / 'out'}")
    if method in (
        "nearswap",
        "swudi",
        "optmerge",
        "iso_c",
        "iso_cts",
        "tsv_m",
        "boosted_tsv_m",
        "wudi",
    ):
        return  # these are no means: a model merged with itself is another
    _assert_same(tmp_path / "out", seed, load_weights(f"{seed}+{path}"), 1e-4)
    assert ours.keys() == load_weights(seed).keys()


def test_a_rank_keeps_the_most(three: dict, tmp_path: Path) -> None:
    """No product of that rank is closer, whether concatenated or merged as cores."""
    for method, settings in (("linear", {}), ("ties", {"density": 0.5})):
        merge_adapters(method, three, tmp_path / method, **settings)
        merge_adapters(method, three, tmp_path / f"{method}4", rank=4, **settings)
        whole, short = (
            load_file(tmp_path / name / "adapter_model.safetensors")
            for name in (method, f"{method}4")
        )
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
        full = whole[key.format("B")].double() @ whole[key.format("A")].double()
        near = short[key.format("B")].double() @ short[key.format("A")].double()
        assert short[key.format("A")].shape[0] == 4
        best = torch.linalg.svdvals(full)[4:].square().sum().sqrt()
        assert (full - near).norm() == pytest.approx(float(best), rel=1e-4)


def test_factors_that_depend_on_each_other_lose_nothing() -> None:
    """Equal, zero and nearly equal factors; more of them than the matrix has rows."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 4, generator=generator), torch.randn(4, 9, generator=generator)
    near = left + 1e-4 * torch.randn(6, 4, generator=generator)
    factors = [(left, right), (left, right), (near, right), (0 * left, right)]
    made = merged_in_core(factors, lambda cores: torch.stack(cores).sum(0))
    expected = sum(one.double() @ other.double() for one, other in factors)
    torch.testing.assert_close(made[0] @ made[1], expected, rtol=1e-9, atol=1e-9)
    assert made[1].shape[0] == 4
    torch.testing.assert_close(made[1] @ made[1].T, torch.eye(4).double(), rtol=0, atol=1e-6)
    one, other = merged_in_core(factors, lambda cores: torch.stack(cores).sum(0), single=True)
    torch.testing.assert_close(one @ other, expected, rtol=1e-9, atol=1e-9)
    zero = merged_in_core([(0 * left, right)], lambda cores: cores[0])
    assert (zero[0] @ zero[1]).abs().max() == 0


@pytest.mark.parametrize("rank", [None, 6])
def test_factors_that_nearly_depend_on_each_other_keep_their_digits(
    rank: int | None, adapter: Callable, seed: Path, tmp_path: Path
) -> None:
    """Trained factors decay: products whose inverse grows past float32's digits are in float64."""
    from safetensors.torch import save_file

    adapters = {"a": adapter("a", 1), "b": adapter("b", 2)}
    for folder in adapters.values():
        file = folder / "adapter_model.safetensors"
        decay = torch.tensor([1.0, 1e-2, 2e-4])
        tensors = {
            key: value * decay if "lora_B" in key else value
            for key, value in load_file(file).items()
        }
        save_file(tensors, file)
    merge_adapters("modality_arithmetic", adapters, tmp_path / "out", scale=0.5, rank=rank)
    expected = _full("modality_arithmetic", seed, adapters, scale=0.5)
    _assert_same(tmp_path / "out", seed, expected, 1e-6)


def test_layers_of_any_shape_come_out_as_if_they_were_merged_alone(
    adapter: Callable, tmp_path: Path
) -> None:
    """Layers that share ranks are merged together, one that has a direction less among them."""
    from safetensors.torch import save_file

    adapters = {"a": adapter("a", 1), "b": adapter("b", 2)}
    file = adapters["b"] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_{}.weight"
    tensors[key.format("B")][:, 2] = tensors[key.format("B")][:, 1]
    save_file(tensors, file)
    merge_adapters("ties", adapters, tmp_path / "out", density=0.4)
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    for module in {name.partition(".lora_")[0] for name in merged}:
        alone = {name: tmp_path / "alone" / name for name in adapters}
        for name, folder in adapters.items():
            alone[name].mkdir(parents=True, exist_ok=True)
            config = (folder / "adapter_config.json").read_text()
            (alone[name] / "adapter_config.json").write_text(config)
            of_module = load_file(folder / "adapter_model.safetensors")
            of_module = {k: v for k, v in of_module.items() if k.startswith(module)}
            save_file(of_module, alone[name] / "adapter_model.safetensors")
        merge_adapters("ties", alone, tmp_path / module, density=0.4)
        for name, value in load_file(tmp_path / module / "adapter_model.safetensors").items():
            torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-5)


def test_tensors_held_whole_are_merged_on_the_bases(
    adapter: Callable, seed: Path, tmp_path: Path
) -> None:
    adapters = {
        "a": adapter("a", 1, saved=(NORM,)),
        "b": adapter("b", 2, saved=(NORM, "lm_head.weight")),
    }
    with pytest.raises(MergeError, match=r"held whole .*'lm_head.weight' not by all.*: give base"):
        merge_adapters("linear", adapters, tmp_path / "out")
    report = merge_adapters("linear", adapters, tmp_path / "out", base=seed)
    assert set(report.saved) == {NORM, "lm_head.weight"}
    _assert_same(tmp_path / "out", seed, _full("linear", seed, adapters), 1e-5)


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_the_result_may_be_a_model(method: str, three: dict, seed: Path, tmp_path: Path) -> None:
    """It is the base with the merged adapter on it, to the bit, and says where it is from."""
    merge_adapters(method, three, tmp_path / "adapter", base=seed)
    merge_adapters(method, three, tmp_path / "model", base=seed, result="model")
    folded = load_weights(f"{seed}+{tmp_path / 'adapter'}")
    model = load_weights(tmp_path / "model")
    assert all(torch.equal(model[name], folded[name]) for name in folded)
    assert not (tmp_path / "model.adapter").exists()
    notes = "\n".join(json.loads((tmp_path / "model/alloy_merge.json").read_text())["notes"])
    assert f"the adapter was merged by {method}" in notes


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_peft_loads_it(three: dict, seed: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merge_adapters("ties", three, tmp_path / "out", base=seed, dtype="float32")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(seed), tmp_path / "out")
    merged = model.merge_and_unload().state_dict()
    for name, value in load_weights(f"{seed}+{tmp_path / 'out'}").items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(adapter: Callable, seed: Path, tmp_path: Path) -> None:
    a, output = adapter("a", 1, base_model_name_or_path="org/one"), tmp_path / "out"
    other = adapter("b", 2, base_model_name_or_path="org/two")
    with pytest.raises(MergeError, match=r"different bases: .*allow=\['base_model_name_or_path'\]"):
        merge_adapters("linear", {"a": a, "b": other}, output)
    merge_adapters("linear", [a, other], tmp_path / "ok", allow=["base_model_name_or_path"])
    dora = adapter("dora", 3)
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="no lora_magnitude_vector"):
        merge_adapters("linear", {"a": a, "b": dora}, output)
    for settings, message in (
        ({"result": "modell"}, "result='modell': choose 'adapter' or 'model'"),
        ({"result": "model"}, "needs the base that the adapters go on"),
        ({"rank": 0}, "rank=0: give a whole number"),
        ({"density": 0.5}, "has no option 'density'"),
        ({"coefficients": [1]}, "one for each of the 2"),
    ):
        with pytest.raises(MergeError, match=message):
            merge_adapters("linear", [a, a], output, **settings)
    with pytest.raises(MergeError, match=r"is the source|not an empty folder"):
        merge_adapters("linear", [a, a], a)
    assert not output.exists()


def test_a_dora_is_refused_with_the_way_to_merge_it(
    adapter: Callable, seed: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = adapter("dora", 1, use_dora=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "lora_B" in key]:
        module = key.removesuffix(".lora_B.weight")
        tensors[f"{module}.lora_magnitude_vector"] = torch.ones(len(tensors[key]))
    save_file(tensors, file)
    with pytest.raises(MergeError, match=r"'dora' is a DoRA.*`alloy merge METHOD OUT BASE"):
        merge_adapters("linear", [folder], tmp_path / "out")


def test_nan_is_refused_by_name(adapter: Callable, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = adapter("a", 1)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(MergeError, match=r"in 'a' .* has NaN or Inf"):
        merge_adapters("ties", {"a": folder}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_merges_adapters(three: dict, seed: Path, tmp_path: Path) -> None:
    sources = [f"{name}={path}" for name, path in three.items()]
    arguments = ["adapters", "ties", str(tmp_path / "out"), *sources, "--set", "density=0.4"]
    done = CliRunner().invoke(app, [*arguments, "--coefficients", "0.5,0.3,0.2", "--rank", "6"])
    assert done.exit_code == 0, done.output
    merge_adapters(
        "ties", three, tmp_path / "same", density=0.4, coefficients=[0.5, 0.3, 0.2], rank=6
    )
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "same")]
    assert files[0].read_bytes() == files[1].read_bytes()
    model = CliRunner().invoke(
        app, ["adapters", "linear", str(tmp_path / "m"), *sources, "--base", str(seed), "--model"]
    )
    assert model.exit_code == 0, model.output
    assert (tmp_path / "m/config.json").is_file()
    refused = CliRunner().invoke(
        app, ["adapters", "linear", str(tmp_path / "n"), *sources, "--model"]
    )
    assert refused.exit_code == 1
    assert "give --base" in " ".join(refused.output.split())
