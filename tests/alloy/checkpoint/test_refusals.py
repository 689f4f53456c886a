"""Everything that is wrong is refused by name, with the fix, before anything is written.

The first table holds the cases that mergekit 0.1.5 was probed with: most of them passed in silence,
dropped tensors, or failed after an empty folder was written. The others are ours. Models that
mergekit could not merge although they are right (ViT, BERT, CLIP, Wav2Vec2, each with itself) are
in test_models.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import alloy
from alloy.errors import CheckpointError, DeviceError, MergeError


class Case(NamedTuple):
    name: str
    change: Callable  # receives the world: folders `a`, `b`, `seed`, and the keywords of the call
    message: str


class World:
    """Two models and their base, not yet written, and the call that will merge them."""

    def __init__(self, weights, config):
        self.weights = {name: weights(i) for i, name in enumerate(("seed", "a", "b"))}
        self.config = {name: dict(config) for name in self.weights}
        self.extra: dict[str, dict[str, bytes]] = {name: {} for name in self.weights}
        self.num_shards = 1
        self.method, self.base = "linear", False
        self.keywords: dict = {}
        self.spoil: Callable[[dict[str, Path], Path], None] = lambda folders, output: None

    def ties(self, **options):
        self.method, self.base, self.keywords = "ties", True, options


def edit(**keys):
    def change(world):
        world.config["b"] |= keys

    return change


def call(method="linear", base=False, **keywords):
    def change(world):
        world.method, world.base, world.keywords = method, base, keywords

    return change


def spoil(function, num_shards=1):
    def change(world):
        world.spoil, world.num_shards = function, num_shards

    return change


def tensor(name, value, source="b"):
    def change(world):
        if value is None:
            del world.weights[source][name]
        else:
            world.weights[source][name] = value(world.weights[source].get(name))

    return change


def _set(index, value):
    def change(old):
        new = old.clone()
        new.view(-1)[index] = value
        return new

    return change


def _processor(world):
    for name, mean in (("a", 0.5), ("b", 0.4)):
        world.extra[name]["preprocessor_config.json"] = json.dumps(
            {"image_mean": [mean] * 3}
        ).encode()


def _untied(world):
    for name in ("a", "b"):
        world.config[name]["tie_word_embeddings"] = True


def _integers(world):
    for i, weights in enumerate(world.weights.values()):
        weights["position_ids"] = torch.arange(4) + i


def _wordpiece(tokens):
    return json.dumps(
        {
            "added_tokens": [],
            "model": {
                "type": "WordPiece",
                "vocab": {t: i for i, t in enumerate(tokens)},
                "unk_token": "a",
            },
        }
    ).encode()


def _tokenizers(world):
    world.extra["a"]["tokenizer.json"] = _wordpiece("abc")
    world.extra["b"]["tokenizer.json"] = _wordpiece("acbd")


def truncate(folders, output):
    file = folders["b"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _overwrite(name, content):
    return lambda folders, output: (folders["b"] / name).write_bytes(content)


def corrupt(folders, output):
    file = folders["b"] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:20] = b"not json at "
    file.write_bytes(data)


def overlapping(folders, output):
    file = folders["b"] / "model.safetensors"
    data = file.read_bytes()
    assert b'"data_offsets":[0,' in data
    file.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[2,', 1))


def pickle_only(folders, output):
    (folders["b"] / "model.safetensors").rename(folders["b"] / "pytorch_model.bin")


def lost_shard(folders, output):
    (folders["b"] / "model-00002-of-00003.safetensors").unlink()


def escaping_index(folders, output):
    file = folders["b"] / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00002-of", "../model-00002-of"))


def lying_index(folders, output):
    file = folders["b"] / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))


def occupied(folders, output):
    output.mkdir()
    (output / "precious.txt").write_text("mine")


UP = "model.layers.0.mlp.up.weight"


def grams(**changes):
    """Merge by RegMean with Grams of one layer; `changes` replace entries of b's, None drops."""

    def write_files(folders, output):
        whole = {
            f"{UP}/sum": torch.eye(24),
            f"{UP}/count": torch.tensor(9),
            f"{UP}/dim": torch.tensor(1),
        }
        for name, edits in (("a", {}), ("b", changes)):
            tensors = {**whole, **{f"{UP}/{key}": value for key, value in edits.items()}}
            file = folders[name].parent / f"grams_{name}.safetensors"
            save_file({k: v for k, v in tensors.items() if v is not None}, file)
            files.append(file)

    files: list[Path] = []

    def change(world):
        files.clear()
        world.method, world.keywords, world.spoil = "regmean", {"statistics": files}, write_files

    return change


PROBED = [  # what mergekit 0.1.5 was given
    Case(
        "other architecture",
        edit(model_type="vit", architectures=["ViTModel"]),
        "different architectures: model_type",
    ),
    Case(
        "other class",
        edit(architectures=["LlamaModel"]),
        "different architectures: architectures is .*LlamaModel",
    ),
    Case(
        "NaN in an input",
        tensor("lm_head.weight", _set(7, torch.nan)),
        r"lm_head.weight in 'b' .*NaN or Inf at flat index 7",
    ),
    Case(
        "Inf in an input",
        tensor("model.scale", _set(0, torch.inf)),
        "model.scale in 'b' .*NaN or Inf",
    ),
    Case("weights 1 and -1", call(coefficients=[1, -1]), "sum"),
    Case("option typo", lambda w: w.ties(desnity=0.5), "desnity.*did you mean 'density'"),
    Case("unknown option", call(unknown_key=1), "no option 'unknown_key'"),
    Case("density 1.7", lambda w: w.ties(density=1.7), r"density=1.7 is outside \[0, 1\]"),
    Case("density -1", lambda w: w.ties(density=-1), r"density=-1.* is outside \[0, 1\]"),
    Case(
        "filter without match",
        call(coefficients={"*.attention.*": [1, 2], "*": [1, 1]}),
        "'\\*.attention.\\*' matches no tensor",
    ),
    Case(
        "extra tensor",
        tensor("extra.weight", lambda _: torch.ones(2)),
        r"1 tensor missing in 'a' that 'b' has: 'extra.weight'",
    ),
    Case(
        "missing tensor",
        tensor("lm_head.weight", None),
        r"1 tensor missing in 'b' that 'a' has: 'lm_head.weight'",
    ),
    Case(
        "width",
        tensor("model.layers.0.mlp.up.weight", lambda _: torch.zeros(37, 32).bfloat16()),
        r"shapes of 'model.layers.0.mlp.up.weight' differ: .*\[37, 24\].*\[37, 32\]",
    ),
    Case("hidden size", edit(hidden_size=32), "config hidden_size is 24 in 'a' and 32 in 'b'"),
    Case("vocabulary size", edit(vocab_size=48), "vocab_size differs.*tokenizer='base' or 'union'"),
    Case("depth", tensor("model.layers.10.mlp.up.weight", None), "missing in 'b'.*layers.10"),
    Case("method typo", call("dare-ties"), "'dare-ties' is unknown: did you mean 'dare_ties'"),
    Case("no base", call("ties"), "'ties' needs base"),
    Case("base ignored", call("linear", base=True), "'linear' would ignore the base"),
    Case(
        "wrong path",
        lambda w: w.keywords.update(sources=["nowhere/at/all"]),
        "nowhere/at/all: no such folder or file",
    ),
    Case(
        "truncated",
        spoil(truncate),
        r"b/model.safetensors: truncated: \d+ bytes where its header says \d+",
    ),
    Case("dtype ignored", call(dtype="float16x"), "dtype='float16x'.*float16"),
    Case("tied and untied", lambda w: w.config["b"].update(tie_word_embeddings=True), "tied"),
    Case("tied weights untied", _untied, "tied weights untied: config.json of 'a'.*lm_head.weight"),
    Case(
        "quantised",
        tensor("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "dtypes of 'lm_head.weight' differ",
    ),
    Case("tokenizers", _tokenizers, r"tokens have other ids.*'d'.*tokenizer='union'"),
    Case("one coefficient too few", call(coefficients=[1.0]), "one for each of the 2 models"),
    Case("too many models", call("nearswap", base=True), "'nearswap' merges 1 models"),
    Case("output occupied", spoil(occupied), "not an empty folder"),
    Case("corrupt header", spoil(corrupt), "b/model.safetensors: header: corrupt"),
]

OURS = [
    Case("overlapping tensors", spoil(overlapping), "corrupt header.*lies at"),
    Case(
        "LFS pointer",
        spoil(_overwrite("model.safetensors", b"version https://git-lfs")),
        "Git LFS pointer.*git lfs pull",
    ),
    Case("empty file", spoil(_overwrite("model.safetensors", b"")), "truncated or not safetensors"),
    Case(
        "pickle",
        spoil(pickle_only),
        "no safetensors file, only 'pytorch_model.bin'.*save_pretrained",
    ),
    Case("lost shard", spoil(lost_shard, 3), "model-00002-of-00003.safetensors: missing"),
    Case("index leaves the folder", spoil(escaping_index, 3), "leaves the folder"),
    Case(
        "index lies",
        spoil(lying_index, 3),
        "disagrees with the files about 'ghost', 'lm_head.weight'",
    ),
    Case("corrupt config", spoil(_overwrite("config.json", b"{")), "config.json: corrupt"),
    Case(
        "other heads",
        edit(num_attention_heads=8),
        "config num_attention_heads is 4 in 'a' and 8 in 'b'.*allow=",
    ),
    Case(
        "other rope",
        lambda w: [w.config[n].update(rope_theta=t) for n, t in (("a", 1e4), ("b", 1e6))],
        "config rope_theta is 10000.0 in 'a' and 1000000.0 in 'b'",
    ),
    Case(
        "nested config",
        lambda w: [
            w.config[n].update(vision_config={"patch_size": p}) for n, p in (("a", 16), ("b", 14))
        ],
        "config vision_config.patch_size is 16 in 'a' and 14 in 'b'",
    ),
    Case(
        "integers differ", _integers, "position_ids is I64 and differs between 'a' and 'b'.*copy="
    ),
    Case(
        "processors differ",
        _processor,
        r"preprocessor_config.json of 'a' and 'b' differ in \['image_mean'\]",
    ),
    Case(
        "copy of nothing",
        call(copy={"nothing*": "a"}),
        "copy pattern 'nothing\\*' matches no tensor",
    ),
    Case(
        "copy from nobody",
        call(copy={"lm_head*": "aa"}),
        "copy\\['lm_head\\*'\\]='aa' is no source: did you mean 'a'",
    ),
    Case("drop of nothing", call(drop=["nothing*"]), "drop pattern 'nothing\\*' matches no tensor"),
    Case("drop of everything", call(drop=["*"]), "drop leaves no tensor"),
    Case("policy typo", call(tokenizer="onion"), "tokenizer='onion': did you mean 'union'"),
    Case(
        "float16 overflow",
        lambda w: (
            w.weights["a"].update(big=torch.full((3,), 1e6).bfloat16()),
            [w.weights[n].update(big=torch.full((3,), 1e6).bfloat16()) for n in ("b", "seed")],
            w.keywords.update(dtype="float16"),
        ),
        "big: the result leaves the range of F16",
    ),
    Case("statistics missing", call("regmean"), "'regmean' needs statistics"),
    Case("statistics ignored", call(statistics=["x", "y"]), "x: no such folder or file"),
    Case(
        "needs the running model",
        call("adamerging", base=True),
        r"'adamerging' also needs \['batches', 'forward'\]: it runs the model",
    ),
    Case(
        "NaN in the base",
        lambda w: (w.ties(), tensor("lm_head.weight", _set(3, torch.nan), "seed")(w)),
        "lm_head.weight in 'base' .*NaN or Inf at flat index 3",
    ),
    Case(
        "NaN in what is copied",
        lambda w: (
            call(copy={"lm_head*": "b"})(w),
            tensor("lm_head.weight", _set(3, torch.nan))(w),
        ),
        "lm_head.weight in 'b' .*NaN or Inf",
    ),
    Case(
        "NaN in a matrix method",
        lambda w: (call("wudi", base=True)(w), tensor(UP, _set(3, torch.nan))(w)),
        "up.weight in 'b' .*NaN or Inf",
    ),
    Case(
        "base of another shape",
        lambda w: (w.ties(), tensor(UP, lambda _: torch.zeros(37, 32).bfloat16(), "seed")(w)),
        "shapes of 'model.layers.0.mlp.up.weight' differ: .*'base': \\[37, 32\\]",
    ),
    Case(
        "base that lacks a tensor",
        lambda w: (w.ties(), tensor(UP, None, "seed")(w)),
        "missing in 'base' that 'a', 'b' have",
    ),
    Case(
        "base of another architecture",
        lambda w: (w.ties(), w.config["seed"].update(model_type="vit")),
        "different architectures: model_type .*'base'",
    ),
    Case(
        "Gram that is not finite",
        grams(sum=torch.full((24, 24), torch.inf)),
        "up.weight: a Gram has NaN or Inf",
    ),
    Case("Gram of no tokens", grams(count=torch.tensor(0)), "up.weight: a Gram of no tokens"),
    Case(
        "Gram without its dim",
        grams(dim=None),
        "grams_b.safetensors: .*has no 'dim'.*1 of nn.Linear, 0 of Conv1D",
    ),
    Case(
        "Gram of another size",
        grams(sum=torch.eye(37)),
        r"up.weight/sum is \[37, 37\]; .*dim 1, needs \[24, 24\]",
    ),
    Case(
        "Gram of the other dim",
        grams(dim=torch.tensor(0)),
        r"up.weight/sum is \[24, 24\]; .*dim 0, needs \[37, 37\]",
    ),
    Case("Gram of a third dim", grams(dim=torch.tensor(2)), "dim is 2; it is 0 or 1"),
    Case(
        "statistics of one source",
        lambda w: call("regmean", statistics=["x"])(w),
        "give one file for each of",
    ),
    Case(
        "option by pattern without match",
        lambda w: w.ties(density={"*.attention.*": 0.5, "*": 0.2}),
        "option density pattern '\\*.attention.\\*' matches no tensor",
    ),
    Case(
        "option by pattern with gaps",
        lambda w: w.ties(density={"model.*": 0.5}),
        "no option density for lm_head.weight",
    ),
    Case(
        "option by pattern out of range",
        lambda w: w.ties(density={"model.*": 1.7, "*": 0.2}),
        r"density of 'model.\*'=1.7 is outside \[0, 1\]",
    ),
    Case(
        "negative share",
        lambda w: (w.ties(), w.keywords.update(coefficients=[1, -0.5])),
        "must not be negative",
    ),
    Case("infinite coefficient", call(coefficients=[1, float("inf")]), "must be finite"),
    Case("shard of nothing", call(shard_bytes=0), "shard_bytes=0: give a positive number"),
    Case("no worker", call(threads=0), "threads=0: give at least 1"),
    Case("no source", call(sources=[]), "no source: give at least one"),
    Case("one path", call(sources="a"), "give several sources"),
    Case("source called base", call(sources={"base": "a"}), "'base', which means the base"),
    Case(
        "several problems at once",
        lambda w: (edit(hidden_size=32)(w), edit(num_attention_heads=8)(w)),
        "2 problems:",
    ),
    Case(
        "output inside a source",
        lambda w: w.keywords.update(output="a/merged"),
        "lies inside the source 'a'",
    ),
]


@pytest.mark.parametrize("case", PROBED + OURS, ids=lambda case: case.name)
def test_refused_with_name_and_fix_and_nothing_is_written(case, write, weights, config, tmp_path):
    """Every case raises its message, and no output appears that was not there."""
    world = World(weights, config)
    case.change(world)
    folders = {
        name: write(
            name, world.weights[name], config=world.config[name], num_shards=world.num_shards
        )
        for name in world.weights
    }
    for name, files in world.extra.items():
        for file, content in files.items():
            (folders[name] / file).write_bytes(content)
    keywords = dict(world.keywords)
    output = tmp_path / keywords.pop("output", "merged")
    world.spoil(folders, output)
    before = sorted(output.rglob("*")) if output.exists() else None
    sources = keywords.pop("sources", [folders["a"], folders["b"]])
    with pytest.raises((MergeError, CheckpointError), match=case.message):
        alloy.merge_checkpoints(
            world.method, sources, output, base=folders["seed"] if world.base else None, **keywords
        )
    assert (sorted(output.rglob("*")) if output.exists() else None) == before
    assert not list(tmp_path.glob("*.incomplete"))


def test_the_probed_table_is_complete():
    """mergekit was probed with 30 cases; no name stands twice in the tables."""
    assert len(PROBED) == 30
    assert len({case.name for case in PROBED + OURS}) == len(PROBED + OURS)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", "device='cuda:99' is not there"), ("gpu", "device='gpu' is not there")],
)
def test_a_device_that_is_not_there_is_refused(sources, tmp_path, device, message):
    with pytest.raises(DeviceError, match=message):
        alloy.merge_checkpoints("linear", sources, tmp_path / "out", device=device)
    assert not list(tmp_path.glob("out*"))
