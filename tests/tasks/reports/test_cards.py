"""A model card says how to load the model, and what comes from files is never markup."""

import re
from pathlib import Path

import pytest
import transformers
import yaml

from alloy.modality import ModalityConfig, ModalityModel
from tasks.data.scenes.bank import Bank
from tasks.data.scenes.description import SceneCorpus
from tasks.experts import finetune
from tasks.experts import pretrain as pretrain_experts
from tasks.models import pretrain as pretrain_models
from tasks.reports.cards import (
    MODALITY,
    Card,
    Sources,
    code,
    load_snippet,
    own_licence,
    plain,
    render,
)
from tasks.storage import read_json

RELEASED = Path(__file__).parents[3] / "released"


def card(**more) -> Card:
    return Card(
        title="toy",
        description="A toy.",
        architecture="ViTModel",
        command="python -m tasks.merge toy",
        **{"licences": own_licence(), **more},
    )


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_the_front_matter_is_what_a_hub_reads():
    assert front_matter(render(card())) == {
        "library_name": "transformers",
        "tags": ["merge", "alloy"],
        "license": "apache-2.0",
    }
    unclear = render(card(licences={"a": "mit", "b": None}, base_models=["org/a"]))
    assert front_matter(unclear) == {
        "library_name": "transformers",
        "base_model": ["org/a"],
        "base_model_relation": "merge",
        "tags": ["merge", "alloy"],
    }
    assert "## Licence\n\nNo licence is stated" in unclear


def test_only_a_modality_transformer_needs_alloy_to_load():
    assert ModalityModel.__name__ == MODALITY
    assert "import alloy.modality" in load_snippet(MODALITY)
    assert "alloy" not in load_snippet("ViTModel")
    assert "alloy.modality" not in render(card())


def test_what_a_card_says_loads_the_model(tmp_path):
    """The snippet runs as it stands."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", render(card(folder=str(tmp_path))), re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    assert isinstance(names["model"], transformers.ViTModel)


def test_sources_and_settings_stand_word_for_word():
    sources = Sources(["source", "SHA-256"], [["a | b", "0123"], ["<b>", "x`y"]])
    text = render(card(sources=sources, settings={"method": "ties", "density": 0.3}))
    assert r"| a \| b | `0123` |" in text
    assert "| &lt;b> | `` x`y `` |" in text
    assert "- method: `ties`\n- density: `0.3`" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [("x", "`x`"), ("a\nb", "`a b`"), ("a ``b", "``` a ``b ```"), ({"k": 1}, "`{'k': 1}`")],
)
def test_code_is_code_whatever_is_in_it(value, shown):
    assert code(value) == shown


def test_plain_text_is_no_html():
    assert plain("<script>\n& x") == "&lt;script> &amp; x"


def test_cards_of_stages_load_what_they_describe():
    """From the facts that lie beside the released models, and those of a fine-tuned one."""
    folder = RELEASED / "modality/seed"
    config = ModalityConfig.from_pretrained(folder)
    corpus = SceneCorpus(Bank(None, {}, {}, ""), 0)  # a card asks it for words alone
    seed = pretrain_experts.card(read_json(folder / "pretraining.json"), config, corpus)
    assert "scenes of 48x48 pixels and texts of at most 9 words" in seed
    assert "import alloy.modality" in seed
    assert 'from_pretrained("released/modality/seed")' in seed
    facts = read_json(RELEASED / "multitask/mnist_vit_a0/pretraining.json")
    parent = pretrain_models.card("mnist_vit", facts)
    assert "from transformers import ViTForImageClassification" in parent
    assert "alloy.modality" not in parent
    facts = {"source": "<b>", "best_step": 3, "benchmarks": ["vqa"], "validation_score": 1.0}
    tuned = finetune.card("toy", facts | {"source_sha256": "0123"})
    assert "import alloy.modality" in tuned
    assert "# &lt;b>, fine-tuned" in tuned
    assert "`0123`" in tuned
