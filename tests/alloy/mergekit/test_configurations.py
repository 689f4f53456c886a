"""mergekit's own configurations: what runs, equal to its output, and what is refused with what.

The examples are those of its repository and documentation, with tiny models in the place of theirs.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from alloy.checkpoint import load_weights, plan_merge, run_plan
from alloy.cli.app import app
from alloy.errors import MergeError
from alloy.mergekit import merge_request
from alloy.mergekit.settings import setting_of
from tests import multimodal

LAYERS = 40
SIZES = {
    "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 16,
    "num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "max_position_embeddings": 32,
}  # fmt: skip
EQUAL = {
    "examples/bio-merge.yml": """
models:
  - model: a
    parameters: {density: 0.5, weight: 0.5}
  - model: b
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: seed
parameters: {normalize: false, int8_mask: true}
dtype: float32
""",
    "examples/gradient-slerp.yml": """
slices:
  - sources:
      - {model: a, layer_range: [0, 40]}
      - {model: b, layer_range: [0, 40]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
""",
    "examples/linear.yml": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
""",
    "examples/orcamini-platy-44layer.yml": """
slices:
  - sources:
    - {model: a, layer_range: [0, 24]}
  - sources:
    - {model: b, layer_range: [20, 40]}
merge_method: passthrough
dtype: float32
""",
    "examples/mega.yml, the second": """
models:
  - model: a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: b
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: seed
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "examples/vlm-ties.yml, as language models": """
models:
  - model: a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: b
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
merge_method: ties
base_model: seed
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "examples/arcee_fusion.yml": """
models:
  - model: a
  - model: b
merge_method: arcee_fusion
base_model: a
dtype: float32
""",
    "examples/gpt2-small.yml, of a Llama": """
slices:
  - sources:
    - {model: a, layer_range: [0, 8]}
merge_method: passthrough
dtype: float32
""",
    "docs: depth up-scaling with scaled copies": """
slices:
  - sources:
    - {model: a, layer_range: [0, 24]}
  - sources:
    - model: a
      layer_range: [8, 40]
      parameters:
        scale:
          - {filter: o_proj, value: 0.0}
          - {filter: down_proj, value: 0.0}
          - value: 1.0
merge_method: passthrough
dtype: float32
""",
    "docs: task arithmetic, normalised, times lambda": """
models:
  - {model: a, parameters: {weight: 0.8}}
  - {model: b, parameters: {weight: [0.1, 0.9]}}
merge_method: task_arithmetic
base_model: seed
parameters: {normalize: true, lambda: 1.5}
dtype: float32
""",
    "docs: breadcrumbs with settings of each model": """
models:
  - {model: a, parameters: {weight: 0.8, density: 0.7, gamma: 0.05}}
  - {model: b, parameters: {weight: 0.5, density: 0.4, gamma: 0.01}}
merge_method: breadcrumbs
base_model: seed
dtype: float32
""",
    "docs: nearswap": """
models: [{model: a}]
merge_method: nearswap
base_model: seed
parameters: {t: 0.01}
dtype: float32
""",
    "docs: RAM+": """
models: [{model: a}, {model: b}]
merge_method: ramplus_tl
base_model: seed
parameters: {epsilon: 1e-2, r: 0.3}
dtype: float32
""",
    "docs: SCE": """
models: [{model: a}, {model: b}]
merge_method: sce
base_model: seed
parameters: {select_topk: 0.5}
dtype: float32
""",
    "docs: Karcher mean": """
models: [{model: a}, {model: b}, {model: c}]
merge_method: karcher
dtype: float32
""",
}
"""Configurations that give mergekit's own weights."""

NEARLY = {
    "docs: nuslerp, two slices": """
slices:
  - sources:
      - {model: a, layer_range: [0, 10], parameters: {weight: [0, 1]}}
      - {model: b, layer_range: [0, 10], parameters: {weight: [1, 0]}}
  - sources:
      - {model: a, layer_range: [30, 40], parameters: {weight: 0.3}}
      - {model: b, layer_range: [30, 40], parameters: {weight: 0.7}}
merge_method: nuslerp
dtype: float32
""",
    "docs: model stock": """
models: [{model: a}, {model: b}, {model: c}]
merge_method: model_stock
base_model: seed
dtype: float32
""",
}
"""Configurations whose definitions differ in cases that the word names: here equal for matrices,
or not at all."""

RUNS = {
    "docs: DARE with TIES": ("dare_ties", "drawn otherwise"),
    "docs: DARE": ("dare_linear", "drawn otherwise"),
    "docs: DELLA": ("della", "drawn otherwise"),
}
BARE = [{"model": "a"}, {"model": "b"}]
REFUSED = {
    "examples/ties.yml": ({"merge_method": "ranked_ties"}, "the nearest is ties"),
    "examples/cabs.yml": ({"merge_method": "cabs"}, "the nearest is breadcrumbs_ties"),
    "examples/zipit.yml": ({"align_weights": "zipit"}, "a recipe with `align`"),
    "examples/whisper-encoder-decoder-weighted.yml, -test.yml": (
        {"merge_method": "encoder_decoder_weighted"},
        "coefficients by pattern",
    ),
    "examples/whisper-merge-multilingual.yml": (
        {"merge_method": "slerp", "base_model": None},
        "slerp needs base_model",
    ),
    "examples/whisper-lora-multilingual.yml": (
        {"models": [{"model": "a", "lora": "b", "parameters": {"weight": 1}}]},
        r"'lora' of model .* is written MODEL\+ADAPTER",
    ),
    "examples/chipalign.yml": (
        {"merge_method": "nuslerp", "parameters": {"geodesic": True}},
        "geodesic: nuslerp has none",
    ),
    "examples/core_space.yml": ({"merge_method": "core_space"}, "`alloy adapters`"),
    "examples/lrp.yml": ({"merge_method": "lrp"}, "the nearest is ties"),
    "examples/evo_bert_large.yml": ({"genome": {"models": []}}, "python -m tasks.search"),
    "examples/metrics-1.yml, -small, -llama, linear_small.yml": (
        {"metric_method": "all", "merge_method": None},
        "`alloy distance`",
    ),
    "docs/moe.md": ({"experts": [], "gate_mode": "hidden"}, "larger than its parts"),
    "docs/multimerge.md and examples/mega.yml hold several: see the file's test": (
        {"models": None},
        "exactly one of models",
    ),
    "a typing error": ({"merge_method": "tise"}, "did you mean 'ties'"),
    "no method": ({"merge_method": None}, "merge_method is missing"),
    "modules": ({"modules": {"text": {}}, "models": None}, "--kept vision_tower"),
    "models and slices": ({"slices": [{}]}, "exactly one of models, slices, modules"),
    "a setting of another": ({"parameters": {"gamma": 0.1}}, "gamma: ties has none"),
    "a setting misspelt": ({"parameters": {"desnity": 0.1}}, "did you mean 'density'"),
    "rescaled trims": ({"parameters": {"rescale": True}}, "dare_ties comes nearest"),
    "no weight": ({"models": [{"model": "a"}, {"model": "b"}]}, "weight is missing"),
    "no number": ({"parameters": {"lambda": "much"}}, "lambda|scale"),
    "a name alone": ({"models": ["a"]}, "each model is"),
    "tokenizer of the second": ({"tokenizer_source": "b"}, "list the model first"),
    "both tokenizers": (
        {"tokenizer_source": "union", "tokenizer": {"source": "base"}},
        "not both",
    ),
    "one model twice": (
        {"models": [{"model": "a", "parameters": {"weight": w}} for w in (1, 3)]},
        "one model twice",
    ),
    "layers in halves": (
        {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0.5, 2]}]}]},
        "two whole numbers, not .0.5, 2.",
    ),
    "no layers": (
        {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [None, 2]}]}]},
        "two whole numbers",
    ),
    "slices as text": ({"models": None, "slices": "a"}, "slices: 'a': it must be a list"),
    "parameters as a list": ({"parameters": [1]}, "parameters: .1.: it must be a mapping"),
    "a filter by number": (
        {"parameters": {"lambda": [{"filter": 3, "value": 1}]}},
        "parameters.lambda.0.filter: 3: it must be a text",
    ),
    "tokenizer as text": ({"tokenizer": "union"}, "tokenizer: 'union': it must be a mapping"),
    "tokens as text": (
        {"tokenizer": {"tokens": {"<s>": "a"}}},
        "tokenizer.tokens.<s>: 'a': it must be a mapping",
    ),
    "a token of no model": (
        {"tokenizer": {"tokens": {"<s>": {"source": {"kind": "model_token"}}}}},
        "tokens.<s>: None: choose one of",
    ),
    "padding in words": (
        {"tokenizer": {"pad_to_multiple_of": "64 rows"}},
        "pad_to_multiple_of: '64 rows': it must be a whole number",
    ),
    "a base as a list": ({"base_model": ["seed"]}, "base_model: .* a text or a mapping"),
    "half an iteration": (
        {"merge_method": "karcher", "parameters": {"max_iter": 2.5}, "models": BARE},
        "max_iterations=2.5: it must be a whole number",
    ),
    "a template by name": ({"chat_template": "chatml"}, "is a file of mergekit's"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mergekit")
    result = {}
    for seed, name in enumerate(("seed", "a", "b", "c")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=LAYERS))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.02 * (seed > 0))
        result[name] = multimodal.saved(model, folder / name)
    return result


def placed(text: str, folders) -> dict:
    """A configuration with the tiny models' folders."""
    names = re.compile(r"(model|base_model): (seed|a|b|c)\b")
    return yaml.safe_load(names.sub(lambda m: f"{m[1]}: {folders[m[2]]}", text))


def theirs(config: dict, output: Path) -> dict[str, torch.Tensor]:
    config_module = pytest.importorskip("mergekit.config")
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(
        config_module.MergeConfiguration.model_validate(config),
        str(output),
        MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
    )
    return load_weights(output)


DEFAULT = {
    "examples/gradient-slerp.yml", "examples/orcamini-platy-44layer.yml",
    "examples/mega.yml, the second", "docs: task arithmetic, normalised, times lambda",
    "docs: depth up-scaling with scaled copies",
}  # fmt: skip
"""Those that are not slow: half a second each, of which most is mergekit's."""


@pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in EQUAL]
)
@pytest.mark.filterwarnings("ignore")
def test_equal_to_mergekits_own_output(name, folders, tmp_path):
    config = placed(EQUAL[name], folders)
    translation = merge_request(config, tmp_path / "ours")
    run_plan(plan_merge(translation.request))
    ours, expected = load_weights(tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[key], atol=3e-6, rtol=3e-6, msg=key)
    layers = [
        json.loads((tmp_path / n / "config.json").read_text())["num_hidden_layers"]
        for n in ("ours", "theirs")
    ]
    assert layers[0] == layers[1]
    assert any("int8_mask" in n for n in translation.notes) == ("int8_mask" in EQUAL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NEARLY)
@pytest.mark.filterwarnings("ignore")
def test_equal_but_for_what_is_said(name, folders, tmp_path):
    """Parallel norms of nuslerp; opposed task vectors of model stock."""
    config = placed(NEARLY[name], folders)
    translation = merge_request(config, tmp_path / "ours")
    run_plan(plan_merge(translation.request))
    ours, expected = load_weights(tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    (word,) = (note for note in translation.notes if "not mergekit's numbers" in note)
    if "nuslerp" in name:
        assert "parallel" in word
        matrices = [key for key in ours if ours[key].ndim == 2]
        close = [torch.allclose(ours[k], expected[k], atol=1e-4) for k in matrices]
        assert all(close)
    else:
        assert "oppose" in word


TWO = """
models:
  - {model: a, parameters: {weight: 0.5, density: 0.6}}
  - {model: b, parameters: {weight: 0.5, density: 0.4}}
merge_method: ties
base_model: seed
"""


@pytest.mark.parametrize("name", RUNS)
def test_runs_with_a_word_where_definitions_differ(name, folders, tmp_path):
    method, word = RUNS[name]
    config = placed(TWO, folders) | {"merge_method": method}
    translation = merge_request(config, tmp_path / "out")
    assert any(word in note for note in translation.notes)
    plan = plan_merge(translation.request)
    assert plan.settings.name == method
    assert plan.settings.patterned["lm_head.weight"]["density"] == (0.6, 0.4)


def test_gradients_of_numbers_that_yaml_takes_for_texts():
    """1e-3 is a text in YAML 1.1; mergekit reads it as a number and goes from one to the next."""
    scopes = [{"weight": ["1e-3", "3e-3"], "kind": ["first", "last"]}]
    assert setting_of("weight", scopes, "x", 0.5, None) == pytest.approx(2e-3)
    assert setting_of("kind", scopes, "x", 0.5, None) == "first"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_comes_nearest(name, folders, tmp_path):
    changed, message = REFUSED[name]
    config = {k: v for k, v in (placed(TWO, folders) | changed).items() if v is not None}
    for entry in config.get("models") or []:
        if isinstance(entry, dict) and entry["model"] in folders:
            entry["model"] = str(folders[entry["model"]])
    with pytest.raises(MergeError, match=message):
        plan_merge(merge_request(config, tmp_path / "out").request)


def test_a_vision_language_model_as_in_vlm_linear(tmp_path):
    """examples/vlm-linear.yml: all of two Qwen2-VL, towers and all."""
    models = {
        name: multimodal.saved(multimodal.whole("Qwen2VL", seed), tmp_path / name)
        for seed, name in enumerate("ab", 1)
    }
    entries = [{"model": str(path), "parameters": {"weight": 1.0}} for path in models.values()]
    config = {"models": entries, "merge_method": "linear", "dtype": "float32"}
    run_plan(plan_merge(merge_request(config, tmp_path / "out").request))
    a, b, out = (load_weights(tmp_path / name) for name in ("a", "b", "out"))
    assert all(torch.allclose(out[n], (a[n] + b[n]) / 2) for n in a)


def test_an_adapter_on_its_base_and_references_as_mappings(folders, tmp_path):
    """`model+lora`, and the long form of the same."""
    adapter = tmp_path / "lora"
    adapter.mkdir()
    name = "base_model.model.model.layers.3.self_attn.q_proj"
    left, right = torch.randn(8, 2), torch.randn(2, 8)
    save_file(
        {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    settings["base_model_name_or_path"] = str(folders["a"])
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    short = f"{folders['a']}+{adapter}"
    long = {"model": {"path": str(folders["a"])}, "lora": {"path": str(adapter)}}
    outputs = []
    for i, model in enumerate((short, long)):
        config = {
            "models": [{"model": model, "parameters": {"weight": 1}}],
            "merge_method": "task_arithmetic",
            "base_model": str(folders["seed"]),
        }
        run_plan(plan_merge(merge_request(config, tmp_path / str(i)).request))
        outputs.append(load_weights(tmp_path / str(i)))
    key = "model.layers.3.self_attn.q_proj.weight"
    expected = load_weights(folders["a"])[key] + 2 * left @ right
    for output in outputs:
        torch.testing.assert_close(output[key], expected, atol=1e-5, rtol=1e-5)


def test_the_command(folders, tmp_path):
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump(placed(EQUAL["examples/linear.yml"], folders)))
    shown = CliRunner().invoke(app, ["mergekit", str(file), str(tmp_path / "out"), "--plan"])
    assert shown.exit_code == 0, shown.output
    assert "method   linear" in shown.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["mergekit", str(file), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: linear\n---\nmerge_method: ties\n", "2 configurations in one file"),
        ("# later\n", "it is empty; write models or slices"),
        ("models: [{model: a}]\nmerge_methd: linear\n", "did you mean 'merge_method'?"),
        ("merge_method: linear\nbase_modl: a\nmodels: []\n", "did you mean 'base_model'?"),
        ("models: [", "while parsing"),
        ("", "it is empty"),
        ("merge_method: linear\nmerge_method: ties\n", "key 'merge_method' stands twice"),
        ("models: [{model: a, model: b}]\n", "key 'model' stands twice"),
        ("? [a]\n: 2\n", "found unhashable key"),
        ("a: 2024-13-45\n", "month must be in 1..12"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 2: an alias (*a) within"),
        ("a: &a [*a]\n", "line 1: an alias"),
        ("[" * 1000 + "]" * 1000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    file = tmp_path / "config.yml"
    file.write_text(text)
    done = CliRunner().invoke(app, ["mergekit", str(file), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert message in done.output


@pytest.fixture(scope="module")
def speaking(tmp_path_factory) -> dict[str, Path]:
    """Models whose vocabularies share some tokens: a has `y`, b has `z`, and their ids differ."""
    folder, result = tmp_path_factory.mktemp("tokens"), {}
    for seed, (name, words) in enumerate({"seed": "pqx", "a": "pqxy", "b": "pqzx"}.items()):
        torch.manual_seed(seed)
        sizes = {**SIZES, "vocab_size": len(words)}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        result[name] = multimodal.saved(model, folder / name)
        vocab = {word: i for i, word in enumerate(words)}
        made = Tokenizer(models.WordLevel(vocab, unk_token="p"))
        PreTrainedTokenizerFast(tokenizer_object=made, unk_token="p").save_pretrained(folder / name)
    return result


VOCABULARIES = {
    "union": "tokenizer: {source: union}",
    "union, as a source": "tokenizer_source: union",
    "one token of another": """
tokenizer:
  source: union
  tokens:
    y: {source: {kind: model_token, model: b, token: z}}
""",
    "one token of one model for all": """
tokenizer:
  source: union
  tokens:
    q: {source: a, force: true}
""",
    "a token of nothing": """
tokenizer:
  source: union
  tokens:
    z: {source: {kind: zero}}
""",
    "padded": "tokenizer: {source: union, pad_to_multiple_of: 8}",
}


@pytest.mark.parametrize("source", ["base", "b", "model:b"])
def test_the_tokenizer_of_one_model_is_found_by_its_name(source, speaking, tmp_path):
    """A base_model among those that are averaged gives the result its form, wherever it stands."""
    weighted = [{"model": str(speaking[n]), "parameters": {"weight": 1}} for n in "ab"]
    named = source.replace("b", str(speaking["b"])) if source != "base" else source
    config = {"models": weighted, "merge_method": "linear", "tokenizer_source": named}
    config["base_model"] = str(speaking["b"])
    run_plan(plan_merge(merge_request(config, tmp_path / "out").request))
    data = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert list(data["model"]["vocab"]) == list("pqzx")


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("base", ["", "base_model: seed"])
@pytest.mark.filterwarnings("ignore")
def test_rows_of_tokens_are_mergekits(name, base, speaking, tmp_path):
    """Row by row of equal tokens; ids of the union may be in another order."""
    method = "task_arithmetic" if base else "linear"
    text = f"""
models:
  - {{model: a, parameters: {{weight: 0.5}}}}
  - {{model: b, parameters: {{weight: 0.5}}}}
merge_method: {method}
dtype: float32
{base}
{VOCABULARIES[name]}
"""
    config = placed(text.replace("source: a,", f"source: {speaking['a']},"), speaking)
    run_plan(plan_merge(merge_request(config, tmp_path / "ours").request))
    ours, expected = load_weights(tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    ids = []
    for folder in ("ours", "theirs"):
        data = json.loads((tmp_path / folder / "tokenizer.json").read_text())
        added = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
        ids.append(data["model"]["vocab"] | added)
    assert ids[0].keys() == ids[1].keys()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours[key].shape == expected[key].shape
        for token in ids[0]:
            torch.testing.assert_close(
                ours[key][ids[0][token]], expected[key][ids[1][token]], msg=f"{key}: {token}"
            )
