"""Whatever bytes stand where files of a checkpoint are due: it is read, or our error names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.checkpoint.format import Checkpoint, open_checkpoint, read_header
from alloy.checkpoint.tokenizer import read_tokenizer
from alloy.errors import CheckpointError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
SIZES = st.lists(st.integers(-2, 40) | JSON, max_size=3)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4", "F8_E4M3", "X"]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": SIZES | JSON,
    },
)
HEADER = st.dictionaries(st.text(max_size=4), TENSOR | JSON, max_size=3) | JSON
CONFIG_KEYS = (
    "model_type", "architectures", "vocab_size", "tie_word_embeddings", "auto_map", "text_config",
    "vision_config", "quantization_config",
)  # fmt: skip


def content(value: Any, raw: bytes, cut: int) -> bytes:
    """A JSON text, cut or not, or any bytes."""
    text = raw or json.dumps(value).encode()
    return text[:cut] if cut else text


def read(function: Callable[[Path], Any], path: Path) -> Any:
    """What a reader gives, or the error by which it refuses; any other exception fails the test."""
    try:
        return function(path)
    except CheckpointError as error:
        return error


FILE = st.tuples(st.binary(max_size=20) | st.just(b""), st.integers(0, 30))


@settings(max_examples=300)
@given(header=HEADER, raw=FILE, data=st.binary(max_size=64), lie=st.integers(-3, 3))
def test_any_header_is_read_or_refused(header, raw, data, lie, tmp_path_factory):
    text = content(header, *raw)
    file = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    file.write_bytes(max(0, len(text) + lie).to_bytes(8, "little") + text + data)
    entries = read(read_header, file)
    if isinstance(entries, CheckpointError):
        assert str(file) in str(entries)
    else:
        assert sum(entry.num_bytes for entry in entries) == len(data) - lie


@settings(max_examples=200)
@given(
    config=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON) | JSON,
    index=st.dictionaries(st.just("weight_map"), JSON) | JSON,
    modules=JSON,
    which=st.sampled_from(["config.json", "model.safetensors.index.json", "modules.json"]),
    raw=FILE,
)
def test_any_folder_is_opened_or_refused(config, index, modules, which, raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "model.safetensors").write_bytes(weights)
    value = {"config.json": config, "modules.json": modules}.get(which, index)
    (folder / which).write_bytes(content(value, *raw))
    opened = read(open_checkpoint, folder)
    if isinstance(opened, CheckpointError):
        assert str(folder) in str(opened)
    else:
        assert isinstance(opened, Checkpoint)
        assert [*opened.entries] == ["w"]


MODEL = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["BPE", "Unigram", "WordLevel"]) | JSON,
        "vocab": st.dictionaries(st.text(max_size=3), st.integers(-1, 5) | JSON, max_size=4) | JSON,
        "merges": st.lists(st.text(max_size=5) | JSON, max_size=3) | JSON,
    },
)


@settings(max_examples=200)
@given(
    tokenizer=st.fixed_dictionaries({}, optional={"model": MODEL | JSON, "added_tokens": JSON})
    | JSON,
    raw=FILE,
    name=st.sampled_from(["tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json"]),
)
def test_any_tokenizer_is_read_or_refused(tokenizer, raw, name, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("fuzz")
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / name).write_bytes(content(tokenizer, *raw))
    result = read(read_tokenizer, folder)
    assert result is not None
    if isinstance(result, CheckpointError):
        assert str(folder) in str(result)
