"""Documents name what exists, their code runs, and their prose is wrapped."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModel,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

import alloy
from alloy.adapters import extract_adapter
from alloy.modality import ModalityConfig, ModalityModel
from tests.alloy.modality.towers.reference import state_dict

REPOSITORY = Path(__file__).parents[1]
DOCS = sorted((REPOSITORY / "docs").rglob("*.md"))
GUIDES = [path for path in DOCS if path.name != "log.md"]  # the log keeps the names of its day


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("path", DOCS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_prose_is_wrapped_at_100_columns(path: Path) -> None:
    """Tables alone may be wider."""
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [i for i, line in lines if len(line) > 100 and not line.startswith("|")] == []


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_names_paths_and_links_exist(path: Path) -> None:
    text = path.read_text()
    names = set(re.findall(r"\b(?:alloy|tasks|benchmarks|flows)(?:\.\w+)+\b", text))
    files = {name for name in names if name.endswith((".py", ".yaml"))}
    assert [name for name in sorted(names - files) if not resolves(name)] == []
    paths = re.findall(r"`((?:alloy|tasks|benchmarks|flows|tests|params|docs)/[\w./-]+)`", text)
    assert [name for name in paths if not (REPOSITORY / name).exists()] == []
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


def pages_of(nav: object) -> list[str]:
    """The pages of the site's navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for part in inner for page in pages_of(part)]


def test_every_page_is_in_the_navigation() -> None:
    """A new page in docs/ stands in mkdocs.yml, too, or nobody finds it on the site."""
    listed = pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])
    written = [path.relative_to(REPOSITORY / "docs").as_posix() for path in DOCS]
    assert sorted(listed) == sorted(written)


def test_the_reference_explains_every_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docstrings for all, arguments that exist, and a page of docs/reference/ (`make docs`)."""
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    assert importlib.import_module("hooks").unexplained() == []


def blocks(name: str) -> list[str]:
    text = (REPOSITORY / "docs" / name).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=30,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.randint(0, 30, (16, 6), generator=torch.Generator().manual_seed(0))


def test_the_symmetry_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(0)
    given = {"model": model, "ids": IDS[:2], "generator": torch.Generator().manual_seed(0)}
    trace, fold = blocks("symmetry.md")
    exec("import alloy\n" + trace, given)
    assert "spaces" in capsys.readouterr().out
    assert given["weights"].keys() == model.state_dict().keys()
    given["gains"] = given["weights"]
    exec(fold, given)
    for name, tensor in given["back"].items():
        torch.testing.assert_close(tensor, given["weights"][name])


def test_the_alignment_of_the_documentation(tmp_path: Path) -> None:
    a, b = llama(0), llama(1)
    batches = [{"input_ids": IDS}]
    spec = alloy.find_symmetries(a, {"input_ids": IDS[:2]})
    given = {"a": a, "b": b, "batches": batches, "spec": spec, "path": tmp_path / "alignment"}
    (block,) = blocks("alignment.md")
    exec("import alloy\nfrom safetensors.torch import save_file\n" + block, given)
    assert given["alignment"].exact
    assert given["merged"].keys() == a.state_dict().keys()


def test_the_merges_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = {"a": llama(0), "b": llama(1)}
    folders = {name: f"models/{name}" for name in models}
    for name, model in {**models, "seed": llama(2)}.items():
        model.save_pretrained(f"models/{name}")
    a, b, seed = (m.state_dict() for m in (*models.values(), llama(2)))
    block, _ = blocks("methods.md")
    exec(block, {"a": a, "b": b, "seed": seed})
    ties = Path("merged/model.safetensors").read_bytes()
    shutil.rmtree("merged")
    merge, regmean = blocks("merge_checkpoints.md")
    exec(merge, {})
    assert Path("merged/model.safetensors").read_bytes() == ties
    shutil.rmtree("merged")
    spec = alloy.find_symmetries(models["a"], {"input_ids": IDS[:2]})
    given = {"models": models, "folders": folders, "batches": [{"input_ids": IDS}], "spec": spec}
    exec("import alloy\n" + regmean, given)
    assert Path("merged/model.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `alloy` command of the pages on merging runs, in order, but the one for LLaVA."""
    monkeypatch.chdir(tmp_path)
    config = llama(0).config
    config.num_hidden_layers = 24
    torch.manual_seed(0)
    seed = LlamaForCausalLM(config)
    seed.save_pretrained("models/seed")
    seed.save_pretrained("models/base")
    for name in ("a", "b", "English", "Python"):
        for weight in seed.parameters():
            if weight.dim() == 2:  # norms as they are: adapters then hold nothing whole
                weight.data += 0.01 * torch.randn_like(weight)
        seed.save_pretrained(f"models/{name}")
        if name in "ab":
            extract_adapter(f"models/{name}", f"adapters/{name}", base="models/seed", rank=4)
    for step in range(100, 900, 100):
        llama(step).save_pretrained(f"runs/base/checkpoint-{step}")
    models = "models: [{model: models/a}, {model: models/b}]"
    Path("config.yml").write_text(f"{models}\nmerge_method: linear\nparameters: {{weight: 0.5}}\n")
    for page, language in (
        ("methods.md", "bash"),
        ("merge_checkpoints.md", "bash"),
        ("tutorials/language_models.md", "sh"),
    ):
        text = (REPOSITORY / "docs" / page).read_text()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if "llava" in line:
                    continue
                for made in ("merged", "folded", "deeper", "averaged", "adapters/ab"):
                    shutil.rmtree(made, ignore_errors=True)
                if line.startswith("alloy extract"):
                    shutil.rmtree("adapters/a")
                arguments = shlex.split(line)[1:]
                done = subprocess.run(
                    [sys.executable, "-m", "alloy", *arguments], capture_output=True, text=True
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_the_choice_of_the_documentation() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    models = [BertModel(BertConfig(**sizes, num_hidden_layers=1, vocab_size=30)) for _ in "ab"]
    a, b = (model.state_dict() for model in models)
    merges = {name: alloy.merge("linear", [a, b]) for name in ("average", "regmean", "refit")}
    given = {"model": models[0].eval(), "aligned": {"a": a, "b": b}, **merges}
    _, block = blocks("methods.md")
    exec(block, {**given, "held_out": [{"input_ids": IDS}]})


@pytest.mark.slow
def test_the_towers_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    layers |= {"intermediate_size": 20}
    images, words = {"image_size": 12, "patch_size": 4}, {"vocab_size": 30, "bos_token_id": 1}
    texts = {**layers, **words, "eos_token_id": 2, "max_position_embeddings": 7}
    siglip = SiglipConfig(vision_config={**layers, **images}, text_config=texts)
    SiglipModel(siglip).save_pretrained("models/siglip")
    BeitModel(
        BeitConfig(**layers, **images, use_shared_relative_position_bias=True)
    ).save_pretrained("models/beit")
    torch.save(state_dict("vl-merging"), "models/vl_merging.ckpt")
    trunk, merge, start, release = blocks("towers.md")
    inputs = {"pixel_values": torch.randn(4, 3, 12, 12), "input_ids": torch.randint(3, 30, (4, 7))}
    given: dict = {"torch": torch, "batches": [inputs]}
    exec(trunk, given)
    before, after = given["plan"].num_parameters
    assert sum(p.numel() for p in given["model"].parameters()) == after < before
    exec(merge, given)
    shared = "encoder.layers.1.mlp.fc1.weight"
    both = given["model"].vision_model, given["model"].text_model
    assert torch.equal(*(tower.get_parameter(shared) for tower in both))
    exec(start, given)
    assert AutoModel.from_pretrained("models/start").config.sharing == "none"
    exec(release, given)
    back = torch.load("back.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(back[name], t) for name, t in state_dict("vl-merging").items())


@pytest.mark.slow
def test_the_gauge_of_the_documentation() -> None:
    torch.manual_seed(0)
    config = ModalityConfig(
        sharing="none",
        hidden_size=24,
        num_hidden_layers=2,
        num_joint_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        embedding_size=10,
        image_size=12,
        patch_size=4,
        vocab_size=30,
        max_position_embeddings=7,
    )
    batch = {
        "pixel_values": torch.randint(0, 256, (32, 3, 12, 12), dtype=torch.uint8),
        "input_ids": torch.randint(1, 30, (32, 7)),
        "attention_mask": torch.ones(32, 7, dtype=torch.long),
    }
    given = {"model": ModalityModel(config).eval(), "batches": [batch]}
    (block,) = blocks("gauge.md")
    exec(block, given)
    assert given["gauge"].error_after < given["gauge"].error_before
    assert given["merged"].config.sharing == "all"
