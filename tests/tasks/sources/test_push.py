"""`alloy push`: a dry run first, one commit then, nothing that could harm or mislead a reader."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from alloy.cli import app as cli
from tasks.sources import push
from tasks.sources.source import SourceError

CARD = """---
library_name: transformers
license: apache-2.0
tags: [merge, alloy]
---
# A merge

```python
from transformers import ViTModel

model = ViTModel.from_pretrained(".")
```
"""


@pytest.fixture
def model(workspace: Path) -> Path:
    folder = workspace / "merged"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "README.md").write_text(CARD)
    (folder / "manifest.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("hidden")
    return folder


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["push", *map(str, arguments)])


@pytest.fixture
def writer(hub, monkeypatch):
    """A hub, and the right token for it; large files go by the old protocol, which we can serve."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub


def test_a_dry_run_sends_nothing_and_says_what_would_be(model, writer) -> None:
    done = run(model, "hf://org/name")
    assert done.exit_code == 0, done.output
    assert re.search(r"700 bytes  model.safetensors", done.output)
    assert "hf://org/name (private), one commit:" in done.output
    assert "license: apache-2.0" in done.output
    assert "nothing was sent" in done.output
    assert "manifest.json" not in done.output
    assert writer.requests == []


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_a_push_is_one_commit_that_the_hubs_readers_load(model, writer) -> None:
    """Files to the byte, the card with the repository's name in its snippet; again: the next."""
    done = run(model, "hf://org/name", "--yes")
    assert done.exit_code == 0, done.output
    (commit,) = writer.repos["org/name"]
    files = writer.repos["org/name"][commit]
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == b"weights" * 100
    assert b'from_pretrained("org/name")' in files["README.md"]
    assert (model / "README.md").read_text() == CARD
    assert writer.created["org/name"]["visibility"] == "private"
    (model / "config.json").write_text('{"a": 1}')
    assert run(model, "hf://org/name", "--yes", "--public").exit_code == 0
    assert len(writer.repos["org/name"]) == 2


def test_a_licence_that_is_given_goes_into_the_metadata(model) -> None:
    (model / "README.md").write_text(CARD.replace("license: apache-2.0\n", ""))
    planned = push.plan(model, "hf://org/name", licence="gpl-3.0")
    assert yaml.safe_load(planned.card.split("---")[1])["license"] == "gpl-3.0"
    (model / "README.md").write_text("# No metadata")
    card = push.plan(model, "hf://org/name", licence="mit").card
    assert card == "---\nlicense: mit\n---\n# No metadata"


BAD = [
    (lambda f: (f / "README.md").write_text("# A"), "hf://o/n", "states no licence.*--license"),
    (lambda f: (f / "README.md").unlink(), "hf://o/n", "has no README.md"),
    (lambda f: (f / "config.json").unlink(), "hf://o/n", "it is no checkpoint"),
    (lambda f: (f / "model.safetensors").unlink(), "hf://o/n", "has no weights"),
    (lambda f: (f / "a.bin").write_text("x"), "hf://o/n", "a.bin: pickles run code"),
    (lambda f: (f / "b").symlink_to("/etc/hostname"), "hf://o/n", "is a link out of its folder"),
    (lambda f: (f / "README.md").write_text(CARD + "hf_" + "a1B2" * 9), "hf://o/n", "a secret"),
    (lambda f: None, "hf://name", "is no place on a hub"),
    (lambda f: None, "s3://bucket/x", "is no place on a hub"),
    (lambda f: None, "hf://o/n@main", "is no place on a hub"),
    (lambda f: None, "hf://../n", "is no place on a hub"),
    (lambda f: None, "hf://o/-n", "is no place on a hub"),
]


@pytest.mark.parametrize(("change", "target", "message"), BAD)
def test_what_should_not_be_published_is_refused(model, change, target, message) -> None:
    change(model)
    with pytest.raises(SourceError, match=message):
        push.plan(model, target)


def test_a_push_that_fails_says_why(model, writer, monkeypatch) -> None:
    for name, value, message in [
        ("HF_TOKEN", "", "HF_TOKEN is not set"),
        ("HF_TOKEN", "wrong", "the hub refuses"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "no answer from"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            done = run(model, "hf://org/name", "--yes")
            assert done.exit_code == 1
            assert message in done.output, done.output
