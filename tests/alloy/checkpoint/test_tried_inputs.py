"""The table of tried inputs: what the engine does with each, as docs/tried_inputs.md says.

Every input ends in one of two ways: a refusal of ours that names what is wrong, with nothing written,
or a merge that is right. `python tests/alloy/checkpoint/test_tried_inputs.py` prints the table anew.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alloy
from alloy.checkpoint import MergeRequest, plan_merge, run_plan
from alloy.checkpoint.format import read_header

TABLE = Path(__file__).parents[3] / "docs" / "tried_inputs.md"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "tie_word_embeddings": False,
}
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class World:
    """Sources a and b and their base in a folder, and the call that will merge a and b."""

    def __init__(self, root: Path):
        self.root = root
        for i, name in enumerate(("seed", "a", "b")):
            self.write(name, self.weights(i))
        self.method: Any = "linear"
        self.sources: Any = [root / "a", root / "b"]
        self.output: Any = root / "out"
        self.keywords: dict[str, Any] = {}
        self.run: dict[str, Any] = {}

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"model.up.weight": (4, 6), "model.norm.weight": (6,), "model.down.weight": (6, 4)}
        return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}

    def write(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "model.safetensors")
        self.json(name, "config.json", CONFIG)

    def json(self, name: str, file: str, value: object) -> None:
        (self.root / name / file).write_text(json.dumps(value))

    def config(self, **keys: object) -> None:
        """Config keys of b, beside the common ones."""
        self.json("b", "config.json", CONFIG | keys)

    def shard(self, name: str = "b") -> dict[str, str]:
        """Store a source in two shards with an index; the index."""
        folder = self.root / name
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = list(weights)
        parts = dict(zip(SHARDS, (names[:1], names[1:]), strict=True))
        for file, part in parts.items():
            save_file({n: weights[n] for n in part}, folder / file)
        index = {n: file for file, part in parts.items() for n in part}
        self.json(name, INDEX, {"metadata": {}, "weight_map": index})
        return index


Case = Callable[[World], object]
CASES: dict[str, dict[str, Case]] = {}


def tried(kind: str, name: str, case: Case) -> None:
    cases = CASES.setdefault(kind, {})
    assert name not in cases, name
    cases[name] = case


# --- JSON files -----------------------------------------------------------------------------------

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "vocab.json",
    INDEX,
    "manifest.json",
)
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": ',
    "a list": b"[1]",
    "null": b"null",
    "a number": b"3",
    "a text": b'"text"',
    "an empty object": b"{}",
    "NaN": b'{"a": NaN}',
    "a key twice": b'{"a": 1, "a": 2}',
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "with a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "nested 100,000 deep": b'{"a": ' + b"[" * 100_000,
    "two objects": b"{} {}",
}


def _put(file: str, content: bytes) -> Case:
    return lambda world: (world.root / "b" / file).write_bytes(content)


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def _outside(path: Path) -> None:
    secret = path.parents[1] / "secret"
    if path.exists():
        shutil.copy(path, secret)
    else:
        secret.write_text('{"secret": 1}')
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


def _loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def _inside(path: Path) -> None:
    if path.exists():
        path.rename(path.with_name("kept." + path.name))
        path.symlink_to("kept." + path.name)


REPLACED = {
    "a pipe": _fifo,
    "a folder": _folder,
    "a link to nowhere": _dangling,
    "a link out of the folder": _outside,
    "a link to itself": _loop,
}


def _replace(file: str, how: Callable[[Path], None], name: str = "b") -> Case:
    return lambda world: how(world.root / name / file)


for _file in JSON_FILES:
    for _what, _content in CONTENTS.items():
        tried("content of a JSON file", f"{_file}: {_what}", _put(_file, _content))
for _file in (*JSON_FILES, "model.safetensors", "LICENSE", "merges.txt", "tokenizer.model"):
    for _what, _how in REPLACED.items():
        tried("a file that is something else", f"{_file} of b is {_what}", _replace(_file, _how))
for _file in ("config.json", "LICENSE", "tokenizer.json"):
    for _what, _how in REPLACED.items():
        tried(
            "a file that is something else",
            f"{_file} of a is {_what}",
            _replace(_file, _how, "a"),
        )
for _file in ("config.json", "model.safetensors"):
    tried(
        "a file that is something else",
        f"{_file} of b is a link within the folder",
        _replace(_file, _inside),
    )

TOKENIZERS: dict[str, object] = {
    "no model": {"added_tokens": []},
    "model is a list": {"model": []},
    "model without vocabulary": {"model": {"type": "BPE"}},
    "vocabulary is a text": {"model": {"vocab": "abc"}},
    "vocabulary is a number": {"model": {"vocab": 3}},
    "an id is a text": {"model": {"vocab": {"a": "0"}}},
    "an id is negative": {"model": {"vocab": {"a": -1}}},
    "an id is true": {"model": {"vocab": {"a": True}}},
    "pieces without scores": {"model": {"type": "Unigram", "vocab": [["a"]]}},
    "pieces are texts": {"model": {"type": "Unigram", "vocab": ["a"]}},
    "type is a number": {"model": {"type": 3, "vocab": {}}},
    "merges is an object": {"model": {"vocab": {"a": 0}, "merges": {}}},
    "a merge of three": {"model": {"vocab": {"a": 0}, "merges": ["a b c"]}},
    "a merge is a number": {"model": {"vocab": {"a": 0}, "merges": [1]}},
    "added tokens is a text": {"model": {"vocab": {"a": 0}}, "added_tokens": "x"},
    "an added token is a text": {"model": {"vocab": {"a": 0}}, "added_tokens": ["x"]},
    "an added token without id": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]},
}
for _what, _value in TOKENIZERS.items():
    tried("a tokenizer's file", _what, _put("tokenizer.json", json.dumps(_value).encode()))

# --- weights --------------------------------------------------------------------------------------


def _file_of(header: object, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a length alone": (2).to_bytes(8, "little"),
    "a length beyond the file": _file_of({}, length=10_000),
    "a length of 2**63": _file_of({}, length=1 << 63),
    "a length of 0": (0).to_bytes(8, "little"),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "a pickle": b"\x80\x04\x95" + b"\0" * 20,
    "a zip": b"PK\x03\x04" + b"\0" * 20,
    "HTML": b"<!DOCTYPE html><html>not found</html>",
    "header not JSON": _file_of(b"not json"),
    "header a list": _file_of([1]),
    "header cut": _file_of(b'{"w": '),
    "header Latin-1": _file_of('{"é": 1}'.encode("latin-1")),
    "header nested deep": _file_of(b"[" * 50_000),
    "no tensor": _file_of({}, b""),
    "metadata alone": _file_of({"__metadata__": {"format": "pt"}}, b""),
    "a tensor is a list": _file_of({"w": [1]}),
    "a tensor is null": _file_of({"w": None}),
    "a name twice": _file_of(
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    ),
    "bytes after the last tensor": _file_of(_entry(), b"\0" * 17),
    "the last byte missing": _file_of(_entry(), b"\0" * 15),
    "no data": _file_of(_entry(), b""),
    "no dtype": _file_of({"w": {"shape": [4], "data_offsets": [0, 16]}}),
    "no shape": _file_of({"w": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "no offsets": _file_of({"w": {"dtype": "F32", "shape": [4]}}),
    "two tensors that overlap": _file_of(
        _entry() | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    ),
    "two tensors with a gap": _file_of(
        _entry() | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, b"\0" * 24
    ),
}
for _value in (
    "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E4M3", "F8_E5M2",
    "C64", "f32", "float32", "", "F128", None, 3, ["F32"], {"a": 1},
):  # fmt: skip
    HEADERS[f"dtype {_value!r}"] = _file_of(_entry(dtype=_value))
for _value in (
    [5], [-4], [4.0], [4.5], ["4"], [True, 4], [None], "4", 4, None, [[4]], {}, [1 << 62, 4],
    [1 << 70], [0], [2, 2],
):  # fmt: skip
    HEADERS[f"shape {_value!r}"] = _file_of(_entry(shape=_value))
for _value in (
    [16, 0], [0, 8], [0, 32], [-16, 0], [0], [0, 8, 16], ["0", "16"], [0.0, 16.0], None, 16, {},
    [0, 1 << 70], [4, 20], [True, 16],
):  # fmt: skip
    HEADERS[f"offsets {_value!r}"] = _file_of(_entry(data_offsets=_value))
for _what, _content in HEADERS.items():
    tried("a safetensors file", _what, _put("model.safetensors", _content))
for _cut in (1, 4, 9, 40, 100, 200):
    tried(
        "a safetensors file",
        f"the first {_cut} bytes of a whole file",
        lambda world, cut=_cut: _put(
            "model.safetensors", (world.root / "b" / "model.safetensors").read_bytes()[:cut]
        )(world),
    )


def _tensor(name: str, value: Callable[[torch.Tensor], Any]) -> Case:
    def case(world: World) -> None:
        weights = world.weights(2)
        weights[name] = value(weights.get(name, torch.ones(3)))
        world.write("b", weights)

    return case


def _both(name: str, value: Callable[[int], torch.Tensor], **call: Any) -> Case:
    def case(world: World) -> None:
        for i, source in enumerate(("a", "b"), 1):
            world.write(source, world.weights(i) | {name: value(i)})
        world.keywords |= call

    return case


UP = "model.up.weight"
for _what, _change in {
    "NaN": lambda t: t.clone().fill_(float("nan")),
    "Inf": lambda t: t.clone().fill_(float("inf")),
    "transposed": lambda t: t.T.contiguous(),
    "flat": lambda t: t.flatten(),
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.double(),
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 0,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: t.to(torch.complex64),
}.items():
    tried("a tensor of b", f"{UP} is {_what}", _tensor(UP, _change))
tried("a tensor of b", "one more", _tensor("extra", lambda t: t))
tried(
    "a tensor of b",
    "names of another version, same shapes",
    lambda w: w.write("b", {n.replace("model.", "decoder."): t for n, t in w.weights(2).items()}),
)
tried(
    "a tensor of b",
    "all under another prefix",
    lambda w: w.write("b", {f"x.{n}": t for n, t in w.weights(2).items()}),
)
for _what, _values in {
    "equal integers": lambda i: torch.arange(4),
    "integers that differ": lambda i: torch.arange(4) + i,
    "equal booleans": lambda i: torch.tensor([True, False]),
    "booleans that differ": lambda i: torch.tensor([True, i == 1]),
    "equal bytes": lambda i: torch.arange(4, dtype=torch.uint8),
    "empty": lambda i: torch.zeros(0, 3),
    "a scalar": lambda i: torch.tensor(float(i)),
}.items():
    tried("a tensor of both", _what, _both("buffer", _values))
    tried(
        "a tensor of both",
        f"{_what}, copied from a",
        _both("buffer", _values, copy={"buffer": "a"}),
    )


def _six(world: World) -> None:
    for i, source in enumerate(("a", "b"), 1):
        ids = {f"layer.{j}.position_ids": torch.arange(4) + i for j in range(6)}
        world.write(source, world.weights(i) | ids)


def _six_settled(world: World) -> None:
    _six(world)
    world.keywords["copy"] = {"*position_ids": "a"}


tried("a tensor of both", "six integer buffers that differ", _six)
tried("a tensor of both", "six integer buffers, one pattern", _six_settled)

# --- index ----------------------------------------------------------------------------------------


def _index(change: Callable[[World, dict[str, str]], object]) -> Case:
    def case(world: World) -> None:
        index = world.shard()
        value = change(world, index)
        if isinstance(value, bytes):
            (world.root / "b" / INDEX).write_bytes(value)
        elif value is not None:
            world.json("b", INDEX, value)

    return case


def _stray(name: str) -> Case:
    return _index(lambda w, i: save_file({"z": torch.ones(1)}, w.root / "b" / name))


for _what, _edit in {
    "right": lambda w, i: None,
    "names a tensor that no file has": lambda w, i: {"weight_map": i | {"ghost": SHARDS[0]}},
    "lacks a tensor": lambda w, i: {"weight_map": dict(list(i.items())[1:])},
    "lacks a shard": lambda w, i: {"weight_map": {n: f for n, f in i.items() if f == SHARDS[1]}},
    "two tensors exchanged": lambda w, i: {"weight_map": dict(zip(i, reversed(i.values()), strict=True))},
    "names a missing file": lambda w, i: {"weight_map": i | {UP: "model-00003-of-00003.safetensors"}},
    "names a file above": lambda w, i: {"weight_map": i | {UP: "../a/model.safetensors"}},
    "names an absolute path": lambda w, i: {"weight_map": i | {UP: str(w.root / "a" / "model.safetensors")}},
    "names a subfolder": lambda w, i: {"weight_map": i | {UP: "sub/model.safetensors"}},
    "names nothing": lambda w, i: {"weight_map": i | {UP: ""}},
    "names a number": lambda w, i: {"weight_map": i | {UP: 1}},
    "names null": lambda w, i: {"weight_map": i | {UP: None}},
    "names a dot": lambda w, i: {"weight_map": i | {UP: "."}},
    "names the config": lambda w, i: {"weight_map": i | {UP: "config.json"}},
    "names the index": lambda w, i: {"weight_map": i | {UP: INDEX}},
    "a name with a null byte": lambda w, i: {"weight_map": i | {UP: "a\0b"}},
    "weight_map empty": lambda w, i: {"weight_map": {}},
    "weight_map a list": lambda w, i: {"weight_map": list(i)},
    "weight_map missing": lambda w, i: {"metadata": {}},
    "weight_map null": lambda w, i: {"weight_map": None},
    "a tensor twice": lambda w, i: json.dumps({"weight_map": i}).replace("{\"weight_map\": {", "{\"weight_map\": {\"" + UP + "\": \"" + SHARDS[1] + "\", ").encode(),
    "a shard removed": lambda w, i: (w.root / "b" / SHARDS[1]).unlink(),
    "the index removed": lambda w, i: (w.root / "b" / INDEX).unlink(),
    "a tensor in both shards": lambda w, i: save_file(load_file(w.root / "b" / SHARDS[0]) | load_file(w.root / "b" / SHARDS[1]), w.root / "b" / SHARDS[1]),
}.items():  # fmt: skip
    tried(
        "index and shards",
        f"index {_what}" if not _what.startswith(("a ", "the ")) else _what,
        _index(_edit),
    )
for _name in (
    "model.safetensors",
    "model-00003-of-00003.safetensors",
    "model-00001-of-00009.safetensors",
    "consolidated.safetensors",
    "adapter_model.safetensors",
):
    tried("index and shards", f"a stray {_name} beside the index", _stray(_name))
tried(
    "index and shards",
    "shards beside model.safetensors, no index",
    lambda w: save_file({"z": torch.ones(1)}, w.root / "b" / SHARDS[0]),
)
tried(
    "index and shards",
    "two safetensors files of other names",
    lambda w: (
        (w.root / "b" / "model.safetensors").rename(w.root / "b" / "x.safetensors"),
        save_file({"z": torch.ones(1)}, w.root / "b" / "y.safetensors"),
    ),
)
tried(
    "index and shards",
    "one safetensors file of another name",
    lambda w: (w.root / "b" / "model.safetensors").rename(w.root / "b" / "x.safetensors"),
)
for _name in ("pytorch_model.bin", "model.pt", "model.ckpt", "tf_model.h5", "model.gguf"):
    tried(
        "index and shards",
        f"{_name} alone",
        lambda w, name=_name: (w.root / "b" / "model.safetensors").rename(w.root / "b" / name),
    )
tried(
    "index and shards",
    "an empty folder",
    lambda w: (shutil.rmtree(w.root / "b"), (w.root / "b").mkdir()),
)

# --- adapters and quantised weights ---------------------------------------------------------------

for _name in (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_magnitude_vector",
    "hada_w1",
):
    tried(
        "adapters and quantised weights",
        f"tensors called {_name}",
        lambda w, name=_name: w.write("b", {f"base_model.model.q.{name}": torch.ones(2, 3)}),
    )
tried(
    "adapters and quantised weights",
    "a LoRA folder",
    lambda w: (
        shutil.rmtree(w.root / "b"),
        (w.root / "b").mkdir(),
        w.json("b", "adapter_config.json", {"peft_type": "LORA", "r": 8}),
        save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, w.root / "b" / "adapter_model.safetensors"),
    ),
)  # fmt: skip
tried(
    "adapters and quantised weights",
    "an adapter beside whole weights",
    lambda w: w.json("b", "adapter_config.json", {"peft_type": "LORA"}),
)
tried(
    "adapters and quantised weights",
    "a LoRA file",
    lambda w: (
        save_file({"q.lora_A.weight": torch.ones(2, 3)}, w.root / "l.safetensors"),
        setattr(w, "sources", [w.root / "a" / "model.safetensors", w.root / "l.safetensors"]),
    ),
)
for _method in (
    "gptq",
    "awq",
    "bitsandbytes",
    "fp8",
    "mxfp4",
    "compressed-tensors",
    "hqq",
    "torchao",
):
    tried(
        "adapters and quantised weights",
        f"quantization_config {_method}",
        lambda w, method=_method: [
            w.json(n, "config.json", CONFIG | {"quantization_config": {"quant_method": method}}) for n in "ab"
        ],
    )  # fmt: skip
for _names in (
    ("q.qweight", "q.qzeros", "q.scales"),
    ("q.weight", "q.weight.absmax", "q.weight.quant_state.bitsandbytes__nf4"),
    ("q.weight_packed", "q.weight_scale"),
    ("q.weight", "q.weight_scale_inv"),
):

    def _packed(world: World, names: tuple[str, ...] = _names) -> None:
        for source in "ab":
            codes = {
                n: torch.arange(4, dtype=torch.uint8 if i == 0 else torch.float32)
                for i, n in enumerate(names)
            }
            world.write(source, codes)

    tried(
        "adapters and quantised weights", f"packed weights {_names[0]} with {_names[-1]}", _packed
    )

# --- configs --------------------------------------------------------------------------------------

for _key, _value in {
    "hidden_size": 7,
    "num_attention_heads": 3,
    "num_hidden_layers": 99,
    "rms_norm_eps": 0.5,
    "hidden_act": "gelu",
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window": 16,
    "attention_bias": True,
    "mlp_bias": True,
    "head_dim": 3,
    "max_position_embeddings": 17,
    "pretraining_tp": 2,
    "made_up_key": 1,
    "output_dim": 5,
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "use_cache": False,
    "torch_dtype": "float16",
    "transformers_version": "4.0.0",
    "_name_or_path": "x",
    "eos_token_id": 5,
    "vocab_size": 9,
    "tie_word_embeddings": True,
    "architectures": ["LlamaModel"],
    "model_type": "mistral",
}.items():
    tried(
        "a config key of b alone",
        f"{_key}={_value!r}",
        lambda w, k=_key, v=_value: w.config(**{k: v}),
    )
    tried(
        "a config key of b alone",
        f"{_key}={_value!r}, allowed",
        lambda w, k=_key, v=_value: (w.config(**{k: v}), w.keywords.update(allow=[k + "*"])),
    )
for _key, _value in {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "made_up_key": None,
}.items():
    tried(
        "a config key of b alone",
        f"{_key}={_value!r}, the default",
        lambda w, k=_key, v=_value: w.config(**{k: v}),
    )
for _key, _value in {
    "vocab_size": "64",
    "vocab_size ": 64.0,
    "vocab_size  ": True,
    "model_type": 3,
    "model_type ": ["llama"],
    "architectures": "LlamaForCausalLM",
    "architectures ": [1],
    "architectures  ": {},
    "tie_word_embeddings": "false",
    "tie_word_embeddings ": 0,
    "auto_map": "x",
    "text_config": [1],
    "text_config ": {"vocab_size": "3"},
    "vision_config": "x",
}.items():
    tried(
        "a config key of another kind",
        f"{_key.strip()}={_value!r}",
        lambda w, k=_key, v=_value: w.config(**{k.strip(): v}),
    )

# --- tokenizers, templates, processors ------------------------------------------------------------


def _text(**of_b: object) -> Case:
    """A tokenizer for a and b; `of_b` are settings of b's that differ."""

    def case(world: World) -> None:
        for name in "ab":
            world.json(
                name,
                "tokenizer.json",
                {"model": {"type": "WordLevel", "vocab": {"x": 0, "y": 1}}}
                | (of_b.get("file", {}) if name == "b" else {}),
            )
            common = {"eos_token": "</s>", "padding_side": "right", "model_max_length": 512}
            settings = of_b.get("settings", {}) if name == "b" else {}
            world.json(name, "tokenizer_config.json", common | settings)
        world.keywords |= of_b.get("call", {})

    return case


for _what, _of_b in {
    "equal": {},
    "another eos_token": {"settings": {"eos_token": "<|im_end|>"}},
    "another eos_token, allowed": {"settings": {"eos_token": "<|im_end|>"}, "call": {"allow": ["tokenizer.eos_token"]}},
    "eos_token as an object": {"settings": {"eos_token": {"content": "</s>", "lstrip": False}}},
    "a pad_token more": {"settings": {"pad_token": "<pad>"}},
    "more special tokens": {"settings": {"additional_special_tokens": ["<a>"]}},
    "more special tokens by their new name": {"settings": {"extra_special_tokens": ["<a>"]}},
    "another padding_side": {"settings": {"padding_side": "left"}},
    "another truncation_side": {"settings": {"truncation_side": "left"}},
    "another model_max_length": {"settings": {"model_max_length": 9}},
    "another name": {"settings": {"name_or_path": "x"}},
    "a post_processor": {"file": {"post_processor": {"type": "ByteLevel"}}},
    "a post_processor, allowed": {"file": {"post_processor": {"type": "ByteLevel"}}, "call": {"allow": ["tokenizer.*"]}},
    "a truncation": {"file": {"truncation": {"max_length": 4}}},
    "a padding": {"file": {"padding": {"strategy": "BatchLongest"}}},
    "a decoder": {"file": {"decoder": {"type": "ByteLevel"}}},
    "another normalizer": {"file": {"normalizer": {"type": "Lowercase"}}},
    "ids exchanged": {"file": {"model": {"type": "WordLevel", "vocab": {"x": 1, "y": 0}}}},
    "a chat template of b": {"settings": {"chat_template": "{{ m }}"}},
    "a chat template of another kind": {"settings": {"chat_template": 3}},
    "a named chat template": {"settings": {"chat_template": [{"name": "default", "template": "x"}]}},
    "chat_template='b'": {"settings": {"chat_template": "{{ m }}"}, "call": {"chat_template": "b"}},
    "chat_template='c'": {"settings": {"chat_template": "{{ m }}"}, "call": {"chat_template": "c"}},
    "chat_template='a', which has none": {"settings": {"chat_template": "{{ m }}"}, "call": {"chat_template": "a"}},
}.items():  # fmt: skip
    tried("how a tokenizer is used", _what, _text(**_of_b))


def _templates(world: World) -> None:
    _text()(world)
    for name in "ab":
        (world.root / name / "chat_template.jinja").write_text(f"{name}: {{{{ m }}}}")


tried("how a tokenizer is used", "two chat templates", _templates)
for _what, _wanted in {
    "a's": lambda w: "a",
    "b's": lambda w: "b",
    "a file's": lambda w: str((w.root / "t.jinja").write_text("x") and w.root / "t.jinja"),
    "a folder's": lambda w: str(w.root),
    "nobody's": lambda w: "nobody",
}.items():
    tried(
        "how a tokenizer is used",
        f"two chat templates, {_what} taken",
        lambda w, wanted=_wanted: (_templates(w), w.keywords.update(chat_template=wanted(w))),
    )


def _renamed_tokens(world: World) -> None:
    _text(settings={"extra_special_tokens": ["<a>"]})(world)
    world.json("a", "special_tokens_map.json", {"additional_special_tokens": ["<a>"]})


tried("how a tokenizer is used", "the same special tokens by old and new name", _renamed_tokens)
for _file in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
    for _what, _values in {
        "of a alone": ({"size": 1}, None),
        "of b alone": (None, {"size": 1}),
        "equal": ({"size": 1}, {"size": 1}),
        "different": ({"size": 1}, {"size": 2}),
        "a key more": ({"size": 1}, {"size": 1, "x": 2}),
    }.items():
        tried(
            "how a tokenizer is used",
            f"{_file} {_what}",
            lambda w, file=_file, values=_values: [
                w.json(n, file, v) for n, v in zip("ab", values, strict=True) if v is not None
            ],
        )

# --- arguments ------------------------------------------------------------------------------------

ARGUMENTS: dict[str, list[Any]] = {
    "method": [None, 3, "", "linaer", "Linear", ["linear"], {"linear": 1}, b"linear", True],
    "output": [None, 3, "", "a\0b", b"x", ["x"], ".", "..", "/", True],
    "base": [3, "", "nowhere", "a\0b", ["seed"], b"x", True, {"seed": 1}],
    "coefficients": [
        0.5, 1, True, "12", "0.5,0.5", [], [1.0], [1, 2, 3], ["1", "2"], [1, None], [True, False],
        [1, float("nan")], [1, float("inf")], [1, -1], [[1, 2]], {}, {"a": 0.5, "b": 0.5},
        {"a": 0.5}, {"a": 1, "b": 1, "c": 1}, {"*": 0.5}, {"*": [1, 1]}, {"*": "11"},
        {"*": [1]}, {"nothing*": [1, 1], "*": [1, 1]}, {"model.up*": [1, 1]}, {"*": {"a": 1, "b": 3}},
        {"*": {"a": 1}}, {1: [1, 1]}, {"*": None}, {"a": "x", "b": "y"}, (0.25, 0.75),
        np.array([0.5, 0.5]), {1, 2}, object, 1j, [1j, 1], b"12", range(1, 3),
    ],
    "statistics": ["x", 3, ["x"], {"a": "x"}, {"a": 3, "b": 4}, [3, 4], True, {}],
    "dtype": [
        "float8", "f32", "F32", "", 3, ["float32"], "float32", torch.float32, torch.int8, "int8",
        "bfloat16", "float64", "complex64", True, {"a": 1},
    ],
    "shard_bytes": [
        0, -1, 1, 10**9, "5GB", "1.5MiB", "5 GB", "5gb", "GB", "5", "", "-5GB", "nanGB", "infGB",
        1.5, True, [5], "5TB", float("nan"), 1 << 70, {"a": 1}, b"5GB",
    ],
    "tokenizer": ["onion", "Same", "", 3, ["same"], "base", "union", True, {"a": "same"}],
    "chat_template": ["nobody", 3, "", ["a"], True, "a"],
    "copy": [
        "a", ["model.*"], {"model.*": "a"}, {"model.*": 3}, {"nothing*": "a"}, {"model.*": "c"},
        {"": "a"}, {3: "a"}, {"model.*": ["a"]}, {}, True, [("model.*", "a")],
    ],
    "drop": ["model.up*", ["model.up*"], ["nothing*"], ["*"], [3], [""], 3, {"model.up*": 1}, (), True],
    "allow": ["rms*", "*", ["rms*"], [3], [""], 3, {"rms*": 1}, (), True, None],
}  # fmt: skip


def _call(argument: str, value: Any) -> Case:
    def case(world: World) -> None:
        if argument in ("method", "output"):
            setattr(world, argument, value)
        else:
            world.keywords[argument] = value

    return case


for _argument, _values in ARGUMENTS.items():
    for _value in _values:
        tried("an argument", f"{_argument}={_value!r}", _call(_argument, _value))

SOURCES: dict[str, Callable[[World], Any]] = {
    "one path": lambda w: w.root / "a",
    "one text": lambda w: str(w.root / "a"),
    "none": lambda w: [],
    "no mapping's": lambda w: {},
    "null": lambda w: None,
    "a number": lambda w: 3,
    "a set": lambda w: {1, 2},
    "a generator": lambda w: (w.root / n for n in "ab"),
    "numbers": lambda w: [1, 2],
    "bytes": lambda w: [bytes(w.root / "a"), bytes(w.root / "b")],
    "texts": lambda w: [str(w.root / "a"), str(w.root / "b")],
    "a tuple": lambda w: (w.root / "a", w.root / "b"),
    "named": lambda w: {"x": w.root / "a", "y": w.root / "b"},
    "named base": lambda w: {"base": w.root / "a", "y": w.root / "b"},
    "named by numbers": lambda w: {1: w.root / "a", 2: w.root / "b"},
    "named nothing": lambda w: {"": w.root / "a", "y": w.root / "b"},
    "named by a line break": lambda w: {"x\ny": w.root / "a", "y": w.root / "b"},
    "named with null": lambda w: {"x": None, "y": w.root / "b"},
    "twice the same": lambda w: [w.root / "a", w.root / "a"],
    "nowhere": lambda w: [w.root / "a", w.root / "nowhere"],
    "an empty text": lambda w: [w.root / "a", ""],
    "a null byte": lambda w: [w.root / "a", "x\0y"],
    "a name of 5,000 letters": lambda w: [w.root / "a", "x" * 5000],
    "a config": lambda w: [w.root / "a", w.root / "b" / "config.json"],
    "single files": lambda w: [w.root / n / "model.safetensors" for n in "ab"],
    "a file and a folder": lambda w: [w.root / "a", w.root / "b" / "model.safetensors"],
    "a device": lambda w: [w.root / "a", "/dev/null"],
    "a link to a folder": lambda w: [w.root / "a", _linked(w)],
    "one only": lambda w: [w.root / "a"],
}


def _linked(world: World) -> Path:
    (world.root / "link").symlink_to(world.root / "b")
    return world.root / "link"


for _what, _sources in SOURCES.items():
    tried("sources", _what, lambda w, given=_sources: setattr(w, "sources", given(w)))

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"normalize": 3}, {"normalize": "yes"}, {"normalise": True}, {"normalize": False}, {"density": 0.5}],
    "ties": [
        {"density": 2}, {"density": -1}, {"density": "0.5"}, {"density": None}, {"density": [0.5]},
        {"density": True}, {"density": float("nan")}, {"density": {}}, {"density": {"*": 0.5}},
        {"density": {"nothing": 1, "*": 1}}, {"density": {"*": "x"}}, {"density": {1: 0.5}},
        {"election": "cuont"}, {"election": 3}, {"election": ["mass"]}, {"election": {"a"}},
        {"desnity": 0.5}, {"method": "linear"}, {"scale": float("inf")}, {"density": 0.5},
    ],
    "wudi": [{"skip": "lm_head"}, {"skip": [1]}, {"skip": ["nothing*"]}, {"skip": ["*norm*"]}, {"skip": {}}],
    "dare_linear": [{"seed": 1.5}, {"seed": "x"}, {"seed": True}, {"density": 0}, {"rescale": 1}],
}  # fmt: skip


def _with_options(method: str, options: dict[str, Any]) -> Case:
    def case(world: World) -> None:
        world.method, world.keywords = method, {"options": options}
        if method != "linear":
            world.keywords["base"] = world.root / "seed"

    return case


for _method, _all in OPTIONS.items():
    for _options in _all:
        tried("an option", f"{_method}: {_options!r}", _with_options(_method, _options))

for _name, _values in {
    "threads": [0, -1, 1.5, "2", True, [2], float("nan"), 1, 64],
    "on_bytes": [3, "print", None],
}.items():
    for _value in _values:
        tried(
            "how the work is done",
            f"{_name}={_value!r}",
            lambda w, name=_name, value=_value: w.run.update({name: value}),
        )

# --- places ---------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[World], Any]] = {
    "an empty folder": lambda w: (w.root / "out").mkdir(),
    "a folder with a file": lambda w: ((w.root / "out").mkdir(), (w.root / "out" / "x").touch()),
    "a file": lambda w: (w.root / "out").touch(),
    "a link to a folder": lambda w: (w.root / "out").symlink_to(w.root / "seed"),
    "a link to nowhere": lambda w: (w.root / "out").symlink_to("nowhere"),
    "a pipe": lambda w: os.mkfifo(w.root / "out"),
    "a source": lambda w: setattr(w, "output", w.root / "a"),
    "inside a source": lambda w: setattr(w, "output", w.root / "a" / "out"),
    "above a source": lambda w: setattr(w, "output", w.root),
    "below a file": lambda w: setattr(w, "output", w.root / "a" / "config.json" / "out"),
    "in a folder that does not exist": lambda w: setattr(w, "output", w.root / "x" / "y" / "out"),
    "a name of 255 letters": lambda w: setattr(w, "output", w.root / ("x" * 255)),
    "a name of 244 letters": lambda w: setattr(w, "output", w.root / ("x" * 244)),
    "a path of 5,000 letters": lambda w: setattr(w, "output", w.root.joinpath(*["x" * 100] * 50)),
    "a name with a line break": lambda w: setattr(w, "output", w.root / "x\ny"),
    "a name with quotes": lambda w: setattr(w, "output", w.root / "x'y\"z"),
    "a device": lambda w: setattr(w, "output", "/dev/null"),
    "unfinished: a file": lambda w: (w.root / "out.incomplete").touch(),
    "unfinished: a link": lambda w: (w.root / "out.incomplete").symlink_to(w.root / "seed"),
    "unfinished: somebody's file": lambda w: (
        (w.root / "out.incomplete").mkdir(), (w.root / "out.incomplete" / "x").touch()),
    "unfinished: somebody's journal": lambda w: (
        (w.root / "out.incomplete").mkdir(), (w.root / "out.incomplete" / "journal.jsonl").write_text("{}\n")),
    "unfinished: empty": lambda w: (w.root / "out.incomplete").mkdir(),
    "unfinished is a source": lambda w: (
        (w.root / "b").rename(w.root / "out.incomplete"), setattr(w, "sources", [w.root / "a", w.root / "out.incomplete"])),
}  # fmt: skip
for _what, _place in PLACES.items():
    tried("the output", _what, _place)


# --- the proof ------------------------------------------------------------------------------------


def snapshot(root: Path) -> dict[str, object]:
    return {
        str(p.relative_to(root)): p.readlink()
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(root.rglob("*"))
    }


def outcome(case: Case, root: Path) -> str:
    """What the engine does with an input; anything but a merge or a refusal of ours is raised."""
    world = World(root)
    case(world)
    before = snapshot(root)
    try:
        plan = plan_merge(MergeRequest(world.method, world.sources, world.output, **world.keywords))
        report = run_plan(plan, **({"threads": 1} | world.run))
    except alloy.AlloyError as error:
        assert snapshot(root) == before, "a refused merge changes nothing"
        text = str(error).replace(str(root), "").replace(str(Path.cwd()), ".")
        text = re.sub(r" at 0x[0-9a-f]+", "", text)
        return "refused: " + " ".join(text.split())
    assert all((report.output / name).is_file() for name in report.files)
    right = _is_right(world, plan, report.output)
    return "; ".join(["merged" + right, *(f"note: {note}" for note in report.notes)])


def _is_right(world: World, plan: Any, output: Path) -> str:
    """Check a weighted mean against its sources, read by the reference implementation."""
    if plan.settings.name != "linear":
        return ""
    merged = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
    stored = {name: _under_plan_names(source) for name, source in plan.sources.items()}
    assert merged.keys() == {tensor.name for tensor in plan.tensors}
    for tensor in plan.tensors:
        parts = [stored[source][tensor.name] for source in tensor.sources]
        if tensor.how != "linear":
            assert torch.equal(merged[tensor.name].to(parts[0].dtype), parts[0])
            continue
        mean = sum(c * p.double() for c, p in zip(tensor.coefficients, parts, strict=True))
        torch.testing.assert_close(merged[tensor.name].double(), mean, rtol=1e-2, atol=1e-3)
    return ", equal to the mean"


def _under_plan_names(source: Any) -> dict[str, torch.Tensor]:
    """A source's tensors, under the names that the plan gives them."""
    new = {(e.file, e.start, e.shape): e.name for e in source.entries.values()}
    return {
        new.get((file, e.start, e.shape), e.name): tensors[e.name]
        for file in source.files
        for tensors in [load_file(file)]
        for e in read_header(file)
    }


def rows() -> Iterator[tuple[str, str, str]]:
    for kind, cases in CASES.items():
        for name, case in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                yield kind, name, outcome(case, Path(folder).resolve())


def cell(text: str) -> str:
    text = text if len(text) <= 200 else text[:197] + "..."
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").strip()


def table() -> str:
    """The page, a section a kind."""
    lines = [
        "# Inputs that were tried on the merge engine",
        "",
        f"{sum(map(len, CASES.values()))} inputs in {len(CASES)} kinds, each with what happens: a refusal "
        "that names what is wrong, with nothing",
        "written, or a merge, checked against its sources. Made by",
        "`python tests/alloy/checkpoint/test_tried_inputs.py > docs/tried_inputs.md`; the test of that name",
        "compares each row. `a` and `b` are the sources, `b` is the one that is tampered with.",
    ]
    last = None
    for kind, name, result in rows():
        if kind != last:
            lines += ["", f"## {kind[0].upper()}{kind[1:]}", "| input | outcome |", "|---|---|"]
            last = kind
        lines.append(f"| {cell(name)} | {cell(result)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", CASES)
def test_every_input_of_a_kind_ends_as_the_table_says(kind, tmp_path):
    """A refusal of ours with its message, or a right merge: the committed outcome, nothing else."""
    committed = set(TABLE.read_text().splitlines())
    for i, (name, case) in enumerate(CASES[kind].items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        row = f"| {cell(name)} | {cell(outcome(case, folder))} |"
        assert row in committed, row


def test_the_table_holds_every_input():
    """At least 500 inputs, one row each."""
    text = TABLE.read_text()
    count = sum(map(len, CASES.values()))
    assert count >= 500
    assert sum(line.startswith("| ") for line in text.splitlines()) == count + len(CASES)


if __name__ == "__main__":
    sys.stdout.write(table())
