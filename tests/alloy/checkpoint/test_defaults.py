"""Defaults of configs read in transformers' source are those of its classes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from alloy.checkpoint.checks.configs import compare_configs
from alloy.checkpoint.checks.defaults import UNKNOWN, default_of
from alloy.checkpoint.checks.findings import Findings


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen2_vl", "mistral", "gpt2", "vit"])
def test_what_the_source_says_plainly_is_the_default(kind):
    """Every key of a config, left out alone: UNKNOWN or what the class makes of nothing."""
    complete = CONFIG_MAPPING[kind]().to_dict()
    complete = complete.get("text_config", complete)
    defaults = {key: default_of({"model_type": kind}, key) for key in complete}
    known = {key for key, value in defaults.items() if value is not UNKNOWN}
    assert len(known) > 5
    assert {key: defaults[key] for key in known} == {key: complete[key] for key in known}


def test_a_field_that_others_give_is_made_of_the_configs_own():
    config = {"model_type": "llama", "num_attention_heads": 16}
    assert default_of(config, "num_key_value_heads") == 16
    assert default_of(config, "head_dim") == 256  # 4096 is the default width
    assert default_of({"text_config": config}, "text_config.head_dim") == 256


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "gpt2", "hidden_size": 4}, "n_embd"),  # it has a second name
        ({"model_type": "qwen2", "sliding_window": 4}, "layer_types"),  # made by code
        ({"model_type": "../llama"}, "hidden_size"),
        ({"model_type": "no such"}, "hidden_size"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size"),
        ({}, "text_config.hidden_size"),
    ],
)
def test_what_it_does_not_say_plainly_is_unknown(config, key):
    assert default_of(config, key) is UNKNOWN


def test_a_true_difference_from_a_default_is_refused():
    findings = Findings()
    configs = {"a": {"model_type": "llama"}, "b": {"model_type": "llama", "rms_norm_eps": 0.5}}
    compare_configs(findings, configs, ())
    assert "rms_norm_eps is 'missing' in 'a' and 0.5 in 'b'" in findings.problems[0]
    findings = Findings()
    compare_configs(findings, {**configs, "b": {"model_type": "llama", "hidden_size": 4096}}, ())
    assert not findings.problems


def test_a_plan_imports_no_architecture(tmp_path: Path):
    """Seconds of a plan are those of imports: 0.7 with these two left out, 4.8 with them."""
    code = (
        "import sys; from alloy.checkpoint.checks.configs import compare_configs as compare\n"
        "from alloy.checkpoint.checks.findings import Findings\n"
        "text = {'model_type': 'llama', 'vocab_size': 128}\n"
        "full = {**text, 'hidden_size': 4096, 'num_key_value_heads': 32, 'mlp_bias': False}\n"
        "compare(found := Findings(), {'vlm': {'model_type': 'llava_next', 'text_config': text},"
        " 'llm': full}, ())\n"
        "print([found.problems, [m for m in ('torch', 'transformers') if m in sys.modules]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], []]
