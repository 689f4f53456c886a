"""The licence of a merge is its strictest parent's, or it is not guessed; the card says so."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import ViTConfig, ViTModel

import alloy
from alloy.checkpoint.licence import licence_of, repositories, strictest, unclear


def test_the_strictest_of_one_chain_holds() -> None:
    """Whatever the order; equal licences stay, whatever they are."""
    for pair in [("mit", "apache-2.0"), ("apache-2.0", "mit")]:
        assert strictest(dict(zip("ab", pair, strict=True))) == "apache-2.0"
    assert strictest({"a": "apache-2.0", "b": "agpl-3.0", "c": "mit"}) == "agpl-3.0"
    assert strictest({"a": "cc-by-4.0", "b": "cc-by-nc-4.0"}) == "cc-by-nc-4.0"
    assert strictest({"a": "llama3", "b": "llama3"}) == "llama3"


@pytest.mark.parametrize(
    "licences",
    [
        ("apache-2.0", None),
        ("apache-2.0", "llama3"),
        ("gpl-3.0", "cc-by-nc-4.0"),
        ("cc-by-sa-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0"),
        ("other/ours", "mit"),
        (None, None),
    ],
)
def test_what_takes_a_lawyer_is_not_guessed(licences) -> None:
    named = dict(zip("ab", licences, strict=True))
    assert strictest(named) is None
    assert f"a: {licences[0] or 'says none'}" in unclear(named)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"README.md": "---\ntags: [x]\nlicense: MIT\n---\n# A"}, "mit"),
        ({"README.md": "---\nlicense: 'llama3.1'\n---\n"}, "llama3.1"),
        ({"README.md": "---\nlicense: other\nlicense_name: ours-1\n---\n"}, "other/ours-1"),
        ({"README.md": "---\nlicense: other\n---\n"}, None),
        ({"README.md": "---\nlicense: [mit, gpl-3.0]\n---\n"}, None),
        ({"README.md": "license: mit\n"}, None),
        (
            {"README.md": "# A", "LICENSE": "Apache License\n  Version 2.0, May"},
            "apache-2.0",
        ),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "All rights reserved"}, None),
        ({}, None),
    ],
)
def test_a_checkpoint_says_its_licence_by_its_card_or_its_text(tmp_path, files, found) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == found


def test_repositories_are_sources_of_a_hub() -> None:
    sources = ["hf://org/a@main", "s3://bucket/x", "models/b", "hf://org/a@v2", "hf://o/c"]
    assert repositories(sources) == ["org/a", "o/c"]


def _save(folder: Path, licence: str) -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A\n")


def test_the_card_of_a_merge_has_what_a_hub_reads_and_its_snippet_runs(
    tmp_path, monkeypatch
) -> None:
    """Licence, base models from the hub's cache, tags; the snippet loads the model beside it."""
    place = tmp_path / "models--org--a/snapshots/0123"
    _save(place, "mit")
    _save(tmp_path / "b", "apache-2.0")
    alloy.merge_checkpoints("linear", [place, tmp_path / "b"], tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: transformers\nlicense: apache-2.0\n"
        'base_model: ["org/a"]\nbase_model_relation: merge\ntags: [merge, alloy, linear]\n---\n'
    )
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(snippet, names)
    assert isinstance(names["model"], transformers.ViTModel)
    (tmp_path / "b/README.md").write_text("# B says nothing")
    alloy.merge_checkpoints("linear", [place, tmp_path / "b"], tmp_path / "other")
    card = (tmp_path / "other/README.md").read_text()
    assert "license:" not in card
    assert "## Licence\nNo licence is stated" in card
    assert licence_of(tmp_path / "other") is None
