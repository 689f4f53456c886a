"""The study that holds distances against outcomes over a sweep of merges."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from scipy import stats

import alloy
from alloy.modality import ModalityConfig, ModalityModel
from alloy.modality.observe import expert_spec
from benchmarks.distance import __main__ as command
from benchmarks.distance import study
from benchmarks.distance.permuted import reordered
from tasks.experts.collect import agnostic_symmetries
from tasks.recipe.section import ParamsError


def test_correlations_and_intervals_are_scipys():
    generator = np.random.default_rng(0)
    x = generator.normal(size=12)
    y = -x + generator.normal(size=12)
    pearson, spearman = study.correlate(x, y)
    expected = stats.pearsonr(x, y)
    low, high = expected.confidence_interval(0.95)
    assert math.isclose(pearson.value, expected.statistic)
    assert math.isclose(pearson.low, low)
    assert math.isclose(pearson.high, high)
    assert math.isclose(spearman.value, stats.spearmanr(x, y).statistic)
    assert spearman.low < spearman.value < spearman.high


@pytest.mark.parametrize("kind", [0, 1])
def test_the_intervals_cover_the_truth_as_often_as_they_say(kind):
    """2,000 samples of 15 from a bivariate normal whose correlations are known."""
    generator = np.random.default_rng(1)
    r = 0.6
    truth = (r, 6 / math.pi * math.asin(r / 2))[kind]
    covered = 0
    for _ in range(2000):
        x, noise = generator.normal(size=(2, 15))
        interval = study.correlate(x, r * x + math.sqrt(1 - r * r) * noise)[kind]
        covered += interval.low <= truth <= interval.high
    assert 0.93 < covered / 2000 < 0.97


def test_small_and_constant_samples_say_so():
    short, _ = study.correlate(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
    assert (short.value, short.low) == (pytest.approx(0.5), None)
    constant, _ = study.correlate(np.ones(5), np.arange(5.0))
    assert constant.value is None


def sweep_file(tmp_path, noise=0.0):
    """Merges whose outcome falls with the l2 distance of what was merged."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(30, generator=generator)
    save_to(tmp_path / "base", start)
    merges = []
    for i in range(6):
        step = (i + 1) * torch.randn(30, generator=generator)
        save_to(tmp_path / f"a{i}", start + step)
        merges.append(
            {
                "name": f"m{i}",
                "checkpoints": [str(tmp_path / "base"), str(tmp_path / f"a{i}")],
                "base": None,
                "outcomes": {"accuracy": 90 - float(step.norm())},
            }
        )
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"keep": 0.2, "zeros": "exclude", "truncation": "tensor", "merges": merges})
    )
    return path


def save_to(folder, tensor):
    folder.mkdir()
    half = len(tensor) // 2
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, part in enumerate((tensor[:half], tensor[half:])):
        save_file({f"part{i}": part.contiguous()}, folder / files[i])
    index = {"weight_map": {f"part{i}": file for i, file in enumerate(files)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sweep_of_checkpoints_shows_a_planted_correlation(tmp_path, monkeypatch, capsys):
    path = sweep_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    written = json.loads(command.main(path).read_text())
    found = {(row["measure"], row["outcome"]): row for row in written["correlations"]}
    assert found["l2", "accuracy"]["pearson"]["value"] == pytest.approx(-1)
    assert found["l2", "accuracy"]["spearman"]["value"] == pytest.approx(-1)
    assert abs(found["cosine", "accuracy"]["pearson"]["value"]) < 1
    assert found["l2", "accuracy"]["num_merges"] == 6
    assert len(written["merges"]) == 6
    assert "6 merges" in capsys.readouterr().out


def report(folder, arm_distances, arm_scores):
    plots = folder / "plots"
    plots.mkdir(parents=True)
    distances = [
        {
            "model": arm,
            "checkpoint": "c",
            "aligned": False,
            "experts": pair,
            "measure": m,
            "value": value + shift,
        }
        for arm, value in arm_distances.items()
        for pair, shift in (("v-l", -0.1), ("v-vl", 0.1))
        for m in study.MEASURES
    ]
    scores = [
        {
            "split": split,
            "finetuned": False,
            "kind": "merged",
            "model": arm,
            "title": arm,
            "benchmark": "vqa",
            "metric": "accuracy",
            "value": value if split == "test" else 0.0,
            "standard_error": 1.0,
        }
        for arm, value in arm_scores.items()
        for split in ("validation", "test")
    ]
    (plots / "distances.json").write_text(json.dumps(distances))
    (plots / "scores.json").write_text(json.dumps(scores))


def test_a_folder_of_reports_is_a_sweep_with_each_arm_a_group(tmp_path, monkeypatch):
    """Within an arm the score falls with distance; over all arms the arms' levels hide it."""
    runs = tmp_path / "runs"
    for i in range(5):
        report(
            runs / f"run{i}" / "modality",
            {"interpolation": i, "regmean": i + 5},
            {"interpolation": 40 - 2 * i, "regmean": 60 - i},
        )
    monkeypatch.chdir(tmp_path)
    written = json.loads(command.main(runs).read_text())
    found = {(r["group"], r["measure"]): r for r in written["correlations"]}
    for arm in ("interpolation", "regmean"):
        assert found[arm, "tssd"]["pearson"]["value"] == pytest.approx(-1)
        assert found[arm, "tssd"]["num_merges"] == 5
    assert found["all merges", "tssd"]["num_merges"] == 10
    assert found["all merges", "tssd"]["pearson"]["value"] > 0
    assert written["merges"][0]["distances"]["l2"] == pytest.approx(0.0)
    assert written["merges"][0]["outcomes"] == {"vqa accuracy (training-free)": 40}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 2.0}, "keep"),
        ({"kep": 0.1}, "did you mean 'keep'"),
        ({"merges": []}, "merges"),
        ({"zeros": "drop"}, "zeros"),
    ],
)
def test_a_wrong_sweep_file_is_refused(tmp_path, change, message):
    path = sweep_file(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ParamsError, match=message):
        command.main(path)


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(ParamsError, match="does not exist"):
        command.main(tmp_path / "nothing")
    with pytest.raises(ParamsError, match="no report of a merge"):
        command.main(tmp_path)
    path = sweep_file(tmp_path)
    (tmp_path / "a3" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing, model\.safetensors\.index\.json names it"):
        command.main(path)


def test_reordering_changes_the_place_of_units_and_not_what_an_expert_computes():
    """Share 0 moves nothing, share 1 nearly everything, any share leaves the model's outputs."""
    config = ModalityConfig(
        sharing="all", hidden_size=12, num_hidden_layers=2, num_joint_layers=1,
        num_attention_heads=3, intermediate_size=24, layer_scale=None,
        image_size=8, patch_size=4, vocab_size=12,
        max_position_embeddings=6, embedding_size=12, num_answers=4, num_segment_classes=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ModalityModel(config).eval()
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    spec = agnostic_symmetries(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = model.encode_image(images)
    mlp = "blocks.0.ffn.fc1.weight"
    moved = []
    for share in (0.0, 0.5, 1.0):
        inner = expert_spec(spec, [n for n in before if n.startswith("blocks.")])
        generator = torch.Generator().manual_seed(1)
        blocks = {n: t for n, t in before.items() if n.startswith("blocks.")}
        after = alloy.transport(blocks, inner, reordered(inner, share, generator))
        model.load_state_dict({**before, **after})
        torch.testing.assert_close(model.encode_image(images), outputs)
        moved.append(int((after[mlp] != before[mlp]).any(1).sum()))
    assert moved[0] == 0
    assert 0 < moved[1] <= 12 < moved[2]
