"""What can be said of a checkpoint before it is fetched."""

import json
from pathlib import Path

from tasks.sources.glance import glance

CONFIG = {"model_type": "toy", "width": 12}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "preprocessor_config.json": b"{}",
    "model.safetensors": b"weights",
}


def test_a_look_at_a_hub_moves_no_weights(hub):
    hub.publish("org/toy", FILES)
    seen = glance("hf://org/toy@main", Path("nowhere"))
    assert seen is not None
    assert seen.config == CONFIG
    assert {*FILES} == {*seen.files}
    assert [path.rpartition("/")[2] for path in hub.sent] == ["config.json"]


def test_what_was_fetched_is_not_asked_for(hub, tmp_path):
    """Nothing answers, and nothing has to."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "manifest.json").write_text(json.dumps({"source": "hf://org/toy@main"}))
    seen = glance("hf://org/toy@main", tmp_path)
    assert seen is not None
    assert seen.config == CONFIG
    assert not hub.requests


def test_nothing_is_said_of_what_does_not_answer(hub, tmp_path):
    """No such repository, no such folder, a config that is none: fetch says why."""
    assert glance("hf://org/other", tmp_path) is None
    assert glance(str(tmp_path / "other"), tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert glance(str(tmp_path), tmp_path) is None
