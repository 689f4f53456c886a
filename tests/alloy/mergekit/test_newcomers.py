"""Ten configurations that newcomers bring: each runs in one command, or is refused with the reason.

They are the kinds of files that people exchange: whole models, slices, gradients, vocabularies of
chat models, adapters, mixtures.
"""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from alloy.checkpoint import load_weights
from alloy.cli.app import app

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WORDS = "pqrstuvw"
SAYS = "<|im_start|>"
TEMPLATE = "{% for m in messages %}" + SAYS + "{{ m.content }}{% endfor %}"
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A base in float32, a fine-tune, one with a token and a template more, and an adapter."""
    folder, result = tmp_path_factory.mktemp("newcomers"), {}
    for seed, (name, more) in enumerate({"seed": [], "orca": [], "chatml": [SAYS]}.items()):
        torch.manual_seed(0)
        words = [*WORDS, *more]
        model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(words)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.02 * (seed > 0))
        model = model if name == "seed" else model.bfloat16()
        result[name] = folder / name
        model.save_pretrained(result[name])
        made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="p"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="p", eos_token="r")
        if more:
            tokenizer.add_special_tokens({"additional_special_tokens": more})
            tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(result[name])
    base = LlamaForCausalLM.from_pretrained(result["seed"])
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(folder / "lora")
    return {**result, "lora": folder / "lora"}


RUN = {
    "linear": """
models:
  - {model: orca, parameters: {weight: 1.0}}
  - {model: seed, parameters: {weight: 0.3}}
merge_method: linear
dtype: float16
""",
    "bio-merge, dtypes mixed": """
models:
  - {model: orca, parameters: {density: 0.5, weight: 0.5}}
  - {model: orca2, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: seed
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "union of tokenizers": """
models:
  - {model: orca, parameters: {weight: 1.0}}
  - {model: chatml, parameters: {weight: 1.0}}
merge_method: linear
dtype: bfloat16
tokenizer_source: union
""",
    "gradient-slerp": """
slices:
  - sources:
      - {model: orca, layer_range: [0, 4]}
      - {model: seed, layer_range: [0, 4]}
merge_method: slerp
base_model: orca
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
""",
    "density of each model, gradients, dtypes and vocabularies that differ": """
models:
  - {model: orca, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - model: chatml
    parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
merge_method: ties
base_model: seed
parameters: {normalize: true, int8_mask: true}
dtype: float16
tokenizer: {source: union}
""",
    "passthrough of slices": """
slices:
  - sources: [{model: orca, layer_range: [0, 3]}]
  - sources: [{model: seed, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float16
""",
    "arcee_fusion": """
models: [{model: orca}, {model: seed}]
merge_method: arcee_fusion
base_model: orca
dtype: float16
""",
    "model+lora": """
models: [{model: seed+lora, parameters: {weight: 1}}]
merge_method: task_arithmetic
base_model: seed
""",
    "chat templates": """
models:
  - {model: chatml, parameters: {weight: 0.5}}
  - {model: orca, parameters: {weight: 0.5}}
merge_method: linear
base_model: orca
dtype: bfloat16
tokenizer: {source: union}
chat_template: auto
""",
}
REFUSED = {
    "a mixture of experts": (
        """
base_model: orca
gate_mode: hidden
dtype: bfloat16
experts:
  - {source_model: orca, positive_prompts: [a]}
  - {source_model: chatml, positive_prompts: [b]}
""",
        "a mixture of experts is larger than its parts; no method here makes one",
    ),
    "another vocabulary and no word of it": (
        RUN["union of tokenizers"].replace("tokenizer_source: union", ""),
        "take tokenizer_source: union (all tokens)",
    ),
}


def run(text: str, folders: dict[str, Path], folder: Path):
    """`alloy mergekit config.yml OUT` in `folder`, and its output's place."""
    names = re.compile(r"\b(model|base_model|source_model): (seed|orca|chatml)2?((?:\+lora)?)")
    placed = names.sub(lambda m: f"{m[1]}: {folders[m[2]]}{m[3]}", text)
    placed = placed.replace("+lora", f"+{folders['lora']}")
    file = folder / "config.yml"
    file.write_text(placed)
    return CliRunner().invoke(app, ["mergekit", str(file), str(folder / "out")]), folder / "out"


@pytest.mark.parametrize("name", RUN)
def test_runs_in_one_command_and_speaks(name, folders, tmp_path):
    """The result loads, with every row that its tokenizer knows, and is finite."""
    linked = tmp_path / "orca2"
    linked.symlink_to(folders["orca"])
    text = RUN[name].replace("model: orca2", f"model: {linked}")
    done, output = run(text, folders, tmp_path)
    assert done.exit_code == 0, done.output
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == model.config.vocab_size
    logits = model(**tokenizer("q s p", return_tensors="pt")).logits
    assert logits.isfinite().all()
    assert model.config.num_hidden_layers == (6 if name == "passthrough of slices" else 4)
    if SAYS in tokenizer.get_vocab():
        assert SAYS in tokenizer.all_special_tokens
        assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name, folders, tmp_path):
    text, reason = REFUSED[name]
    done, output = run(text, folders, tmp_path)
    assert done.exit_code == 1
    assert reason in done.output
    assert not output.exists()


def test_what_a_file_cannot_say_is_an_option(folders, tmp_path):
    """Another end of texts: refused with the option, and merged with it."""
    other = tmp_path / "other"
    other.mkdir()
    for file in folders["seed"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = other / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "r"', '"eos_token": "s"'))
    text = RUN["linear"].replace("model: seed", f"model: {other}")
    done, output = run(text, folders, tmp_path)
    assert done.exit_code == 1
    assert "--allow tokenizer.eos_token" in done.output
    command = ["mergekit", str(tmp_path / "config.yml"), str(output)]
    done = CliRunner().invoke(app, [*command, "--allow", "tokenizer.eos_token"])
    assert done.exit_code == 0, done.output
    kept = CliRunner().invoke(
        app, [*command[:2], str(tmp_path / "kept"), "--allow", "tokenizer.*", "--kept", "norms"]
    )
    assert kept.exit_code == 0, kept.output
    orca, result = load_weights(folders["orca"]), load_weights(tmp_path / "kept")
    assert torch.equal(result["model.norm.weight"], orca["model.norm.weight"].half())
    assert not torch.equal(result["lm_head.weight"], orca["lm_head.weight"].half())
