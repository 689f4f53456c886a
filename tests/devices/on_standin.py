"""What runs on the stand-in device: `test_devices.py` runs this file in a process of its own."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import alloy
from alloy.alignment import PRESETS
from alloy.checkpoint.engine import accelerator
from alloy.devices import beside, device_of
from alloy.errors import DeviceMemoryError
from alloy.gauge import descent
from alloy.gauge.assignment import Assignment
from alloy.modality import ModalityConfig, ModalityModel
from alloy.modality.sensitivity import affine_grams, sensitivities_of
from alloy.modality.stream_search import find_gauge
from alloy.modality.streams import in_gauge
from alloy.refit import conjugate
from alloy.statistics import linear_systems
from alloy.statistics.moments import Gram
from tasks.command import batch_sizes
from tasks.data.scenes.words import ANSWERS
from tasks.experts import pretrain
from tasks.recipe.load import load
from tasks.recipe.pretraining import PretrainParams
from tasks.workers.memory import within_memory
from tests import tiny_models
from tests.devices import stages, standin
from tests.processes import on_two
from tests.tasks.experts.test_pretrain import PRETRAIN
from tests.tasks.registry.served import picture, save_model

CPU, THERE = torch.device("cpu"), torch.device(standin.NAME, 0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    def choose(device: str) -> None:
        monkeypatch.setenv("ALLOY_DEVICE", device)

    return choose


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal but for the order of sums: linear layers add their bias elsewhere."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            scale = float(theirs[name].double().abs().max()) + 1e-30
            error = float((tensor.double() - theirs[name].double()).abs().max()) / scale
            assert error < 1e-3, (name, error)
        else:
            assert torch.equal(tensor, theirs[name]), name


def test_mixing_with_the_cpu_is_refused() -> None:
    """As CUDA does: matrices and masks do not mix, scalars and indices do, `.to` and copy_ move."""
    x = torch.ones(3, 3, device=THERE)
    for mixed in (
        lambda: x @ torch.ones(3, 3),
        lambda: torch.ones(3, 3) + x,
        lambda: x.index_select(0, torch.tensor([1])),
        lambda: torch.cat([x, torch.ones(3, 3)]),
        lambda: x.numpy(),
        lambda: torch.randn(3, device=THERE, generator=torch.Generator()),
        lambda: torch.nn.Linear(3, 3)(x),
    ):
        with pytest.raises(RuntimeError):
            mixed()
    assert float((x * torch.tensor(2.0))[torch.tensor([0])].sum()) == 6
    assert torch.zeros(3, 3).copy_(x).sum() == 9


def test_data_follow_the_model() -> None:
    """Nested tensors too; what is no tensor stays, a model without values moves nothing."""
    model = torch.nn.Linear(2, 2).to(THERE)
    moved = beside(model, {"x": torch.ones(2), "deep": [torch.ones(1), 3], "word": "a"})
    assert moved["x"].device == moved["deep"][0].device == device_of(model) == THERE
    assert moved["deep"][1] == 3
    assert moved["word"] == "a"
    assert beside(dict(model.state_dict()), {"x": torch.ones(2)})["x"].device == THERE
    meta = torch.nn.Linear(2, 2, device="meta")
    assert beside(meta, {"x": torch.ones(2)})["x"].device == CPU


QUICK = ("dual", "orthogonal", "zipit")
OTHERS = sorted({*PRESETS} - {*QUICK, "cycle_consistent"})


@pytest.mark.parametrize(
    "preset", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_every_alignment_moves_weights_where_they_lie(preset: str) -> None:
    """Models on the device are collected, aligned, moved and merged as those on the CPU."""
    name = "ElectraModel"
    inputs = {"input_ids": torch.randint(5, 31, (6, 5), generator=torch.Generator().manual_seed(0))}
    aligned = {}
    for device in (CPU, THERE):
        models = {key: tiny_models.model(name, seed).to(device) for seed, key in enumerate("ab")}
        cpu = tiny_models.model(name, 0)
        spec = alloy.find_symmetries(cpu, inputs)
        statistics = alloy.collect(models, [inputs], spec, joint=True, grams=True)
        weights = {key: dict(model.state_dict()) for key, model in models.items()}
        found = alloy.align_models(weights, spec, statistics, preset=preset)
        moved = found.apply(weights)
        assert {t.device for own in moved.values() for t in own.values()} == {device}
        aligned[device] = {f"{k}/{n}": t.cpu() for k, own in moved.items() for n, t in own.items()}
        if device == THERE and found.exact and not found._folds:
            grams = list(found.move(statistics).grams.values())
            merged = alloy.merge("regmean", list(moved.values()), statistics=grams)
            assert {tensor.device for tensor in merged.values()} == {THERE}
    close(aligned[THERE], aligned[CPU])


@pytest.mark.parametrize("is_slow", [False, True], ids=["float64", "float32_refined"])
@pytest.mark.parametrize("num_lessons", [1, 3])
def test_weighed_fits_are_solved_where_they_lie(monkeypatch, num_lessons: int, is_slow: bool):
    """Large layers' conjugate gradients, preconditioned by two products."""
    monkeypatch.setattr(conjugate, "LARGE", 0)
    slow = {THERE} if is_slow else set()
    for module in (conjugate, linear_systems):
        monkeypatch.setattr(module, "is_slow_in_float64", slow.__contains__)
    generator = torch.Generator().manual_seed(0)
    terms = []
    for _ in range(num_lessons):
        units, inputs, wanted = (
            torch.randn(1, rows, columns, generator=generator, dtype=torch.float64)
            for rows, columns in ((9, 4), (9, 5), (4, 5))
        )
        terms.append((units.mT @ units, inputs.mT @ inputs, wanted))
    floor = torch.full((1, 5), 0.1, dtype=torch.float64)
    expected = conjugate.conjugate_gradients(terms, floor, "layer")
    there = [tuple(x.to(THERE) for x in term) for term in terms]
    solved = conjugate.conjugate_gradients(there, floor.to(THERE), "layer")
    assert solved.device == THERE
    torch.testing.assert_close(solved.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_slow", [False, True], ids=["float64", "float32_refined"])
def test_a_gauge_is_searched_where_the_layers_lie(monkeypatch, is_slow: bool) -> None:
    """Layers stay on the device; J is the CPU's, transforms come back to it."""
    config = {**stages.CONFIG, "num_hidden_layers": 1, "num_joint_layers": 0, "sharing": "none"}
    torch.manual_seed(0)
    model = in_gauge(ModalityModel(ModalityConfig(**config)).eval())
    generator = torch.Generator().manual_seed(1)
    batch = {
        "pixel_values": torch.randint(0, 255, (8, 3, 8, 8), generator=generator).to(torch.uint8),
        "input_ids": torch.randint(1, 12, (8, 6), generator=generator),
        "attention_mask": torch.ones(8, 6, dtype=torch.long),
    }
    for module in (descent, linear_systems):
        monkeypatch.setattr(
            module, "is_slow_in_float64", lambda device: is_slow and device == THERE
        )
    asked, affinity = set(), Assignment._by_axis

    def on_the_device(*arguments: object) -> Tensor:
        values = affinity(*arguments)
        asked.add(values.device)
        return values

    monkeypatch.setattr(Assignment, "_by_axis", on_the_device)
    found = {}
    for device in (CPU, THERE):
        moved = model.to(device)
        grams = affine_grams(moved, [batch], sensitivities_of(moved, [batch]))
        found[device] = find_gauge(moved, grams, starts=["opposed axes"], steps=6, max_rounds=1)
    assert asked == {CPU, THERE}
    (ours, gauge), (theirs, expected) = found[THERE], found[CPU]
    accuracy = 1e-2 if is_slow else 1e-6
    assert gauge.error_after == pytest.approx(expected.error_after, rel=accuracy)
    for name, transform in theirs["l"].items():
        there = ours["l"][name].as_matrix()
        assert there.device == CPU
        assert float((there - transform.as_matrix()).abs().max()) < accuracy


@pytest.mark.parametrize(
    "arms",
    [
        pytest.param(["interpolation", "aligned", "sequential"], id="some"),
        pytest.param([*stages.EXPERT_ARMS], marks=pytest.mark.slow, id="all"),
    ],
)
def test_every_stage_and_arm_of_experts(tmp_path: Path, monkeypatch, on, arms: list[str]) -> None:
    """collect, align, merge, finetune and evaluate give what they give on the CPU."""
    written = {}
    for device in ("cpu", standin.NAME):
        (tmp_path / device).mkdir()
        monkeypatch.chdir(tmp_path / device)
        on(device)
        stages.write_experts(arms)
        stages.run_experts(compared=device == "cpu")
        written[device] = stages.tensors(Path("models/experts"))
    for part in ("statistics/", "arms/", "merged/"):
        ours, theirs = (
            {n: t for n, t in found.items() if n.startswith(part) and "in_gauge" not in n}
            for found in (written[standin.NAME], written["cpu"])
        )
        assert ours
        close(ours, theirs)
    assert Path("reports/experts/metrics.json").is_file()


@pytest.mark.parametrize(
    "name",
    ["RegNetForImageClassification", pytest.param("OPTForCausalLM", marks=pytest.mark.slow)],
)
def test_every_stage_and_arm_of_models(tmp_path: Path, monkeypatch, on, name: str) -> None:
    """collect, align, merge with every repair, evaluate; a full device loses nothing."""
    monkeypatch.chdir(tmp_path)
    on(standin.NAME)
    stages.write_models(name)
    stages.run_models()
    assert len(list(Path("models/models/arms/pair/0").iterdir())) >= 11
    assert Path("reports/models/metrics.json").is_file()
    transformers.AutoModel.from_pretrained("models/models/merged")
    before = stages.tensors(Path("models/models/statistics"))
    recipe = load("models")
    monkeypatch.setattr(standin, "MOST_BYTES", 2000)
    full = r"collect: GPU 0 is full: .* KiB more .* set collect.batch_size to [124] \(now 8\)"
    with (
        pytest.raises(DeviceMemoryError, match=full),
        within_memory("collect", *batch_sizes("collect", recipe)),
    ):
        stages.collect_models.main(recipe)
    close(stages.tensors(Path("models/models/statistics")), before)


def test_pretraining(tmp_path: Path, monkeypatch, on) -> None:
    """Seed and experts, by both optimizers, in parts that recompute layers, as on the CPU."""
    released = {}
    for device in ("cpu", standin.NAME):
        (tmp_path / device).mkdir()
        monkeypatch.chdir(tmp_path / device)
        on(device)
        on_two.write()
        on_two.pretrain_two()
        released[device] = stages.tensors(Path("released"))
        adamw = {**PRETRAIN["training"], "optimizer": "adamw", "accumulation_steps": 2}
        adamw |= {"checkpoint_layers": True}
        del adamw["matrix_learning_rate"]
        params = {**PRETRAIN, "recipe": "experts", "model": on_two.MODEL, "training": adamw}
        pretrain.run_chain(["seed"], PretrainParams.model_validate(params), on_two.quiet)
        again = stages.tensors(Path("released"))
        released[device] |= {f"adamw/{name}": tensor for name, tensor in again.items()}
    close(released[standin.NAME], released["cpu"])


def test_the_served_model(tmp_path: Path, on) -> None:
    """Answers, embeddings and scores are those of the CPU; the model is on the device."""
    with warnings.catch_warnings():  # MLflow's own, at its import
        warnings.simplefilter("ignore")
        from mlflow.pyfunc import PythonModelContext

        from tasks.registry.serving import ServedModel
    save_model(tmp_path)
    context = PythonModelContext({"checkpoint": str(tmp_path)}, {"answers": list(ANSWERS)})
    image, _ = picture()
    rows = pd.DataFrame({"image": [image, picture(1)[0]], "text": ["where is cat"] * 2})
    given = {}
    for device in (CPU, THERE):
        on(str(device))
        model = ServedModel()
        model.load_context(context)
        assert device_of(model.model) == device
        outputs = ("answers", "embeddings", "scores")
        given[device] = [model.predict(context, rows, {"output": name}) for name in outputs]
    for ours, theirs in zip(given[THERE], given[CPU], strict=True):
        for row, expected in zip(ours, theirs, strict=True):
            for key, value in expected.items():
                assert row[key] == (value if key == "answer" else pytest.approx(value, abs=1e-5))


def matrices(folder: Path) -> dict[str, Path]:
    """A base and two fine-tunes with a matrix, fused experts and a vector; Grams of each."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (12, 8), "experts": (2, 6, 5), "b.bias": (7,), "c.weight": (9, 9)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    written = {}
    for name in ("base", "one", "two"):
        change = 0.0 if name == "base" else 0.1
        weights = {
            n: t + change * torch.randn(t.shape, generator=generator) for n, t in base.items()
        }
        (folder / name).mkdir(parents=True)
        save_file(weights, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
        grams = {}
        for layer, width in (("a.weight", 8), ("c.weight", 9)):
            grams[layer] = Gram.zero(width).update(torch.randn(40, width, generator=generator))
        alloy.checkpoint.save_statistics(grams, folder / f"{name}.grams")
        written[name] = folder / name
    return written


@pytest.mark.parametrize(
    "method", ["tsv_m", "iso_cts", "wudi", "regmean", "della", "sce", "geometric_median"]
)
def test_the_engine_merges_whole_tensors_on_the_device(tmp_path: Path, monkeypatch, method) -> None:
    """As on the CPU, out of memory of the device's own; a tensor that does not fit is one error."""
    places = matrices(tmp_path)
    asked: list[int] = []

    def pinned(num_bytes: int) -> np.ndarray:
        asked.append(num_bytes)
        return np.empty(num_bytes, np.uint8)

    monkeypatch.setattr(accelerator, "PINNING", (standin.NAME,))
    monkeypatch.setattr(accelerator, "pinned", pinned)
    given = {"sources": [places["one"], places["two"]], "statistics": None, "base": places["base"]}
    if method in ("regmean", "geometric_median"):
        given["base"] = None
    if method == "regmean":
        given["statistics"] = [tmp_path / "one.grams", tmp_path / "two.grams"]
    for device, output in ((None, "cpu"), (standin.NAME, "there")):
        alloy.merge_checkpoints(method, output=tmp_path / output, device=device, **given)
        assert bool(asked) == (device is not None)
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("there", "cpu")]
    close(*tensors)
    num_inputs = len(given["sources"]) + (given["base"] is not None)
    assert sorted(asked) == sorted(num_inputs * t.nbytes for t in tensors[0].values())
    monkeypatch.setattr(standin, "MOST_BYTES", 100)
    full = r"is full \(CUDA out of memory.*its inputs alone are [\d,]+ bytes.*leave out device"
    with pytest.raises(DeviceMemoryError, match=full):
        alloy.merge_checkpoints(method, output=tmp_path / "full", device=standin.NAME, **given)
    assert not (tmp_path / "full").exists()


def test_what_is_merged_entry_by_entry_stays_on_the_cores(tmp_path: Path) -> None:
    places = matrices(tmp_path)
    report = alloy.merge_checkpoints(
        "linear", [places["one"], places["two"]], tmp_path / "out", device=standin.NAME
    )
    assert any("changes nothing: no tensor is needed as a whole" in n for n in report.notes)
