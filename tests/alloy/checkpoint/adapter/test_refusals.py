"""What cannot be folded exactly is refused by name, before anything is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import alloy
from alloy.checkpoint import open_source
from alloy.errors import CheckpointError, MergeError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"]}
PREFIX = "base_model.model.model.layers.0.mlp.up"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def _weights() -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on a weight [6, 4]."""
    return {
        f"{PREFIX}.lora_A.weight": torch.ones(2, 4),
        f"{PREFIX}.lora_B.weight": torch.ones(6, 2),
    }


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    folder = tmp_path / "seed"
    folder.mkdir()
    config = {"model_type": "none", "vocab_size": 9, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.layers.0.mlp.up.weight": torch.zeros(6, 4),
        "model.embed_tokens.weight": torch.zeros(9, 4),
        "model.steps": torch.zeros(3, dtype=torch.int64),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """`adapter(change)`: a small adapter, its config and weights changed."""

    def _adapter(change: Change = lambda c, w: None, name: str = "lora") -> Path:
        config, weights = dict(CONFIG), _weights()
        change(config, weights)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(weights, folder / "adapter_model.safetensors")
        return folder

    return _adapter


def setting(**values: object) -> Change:
    return lambda config, _: config.update(values)


def tensor(name: str, *shape: int, **keywords: Any) -> Change:
    return lambda _, weights: weights.update({name: torch.ones(*shape, **keywords)})


REFUSED: dict[str, tuple[Change, str]] = {
    **{
        f"peft_type {kind}": (setting(peft_type=kind), rf"peft_type is '{kind}'; LORA alone")
        for kind in ("LOHA", "LOKR", "IA3", "ADALORA", "PROMPT_TUNING", "PREFIX_TUNING", "VERA")
    },
    "no peft_type": (lambda c, _: c.pop("peft_type"), "peft_type is None"),
    "tokens": (setting(trainable_token_indices=[1]), r"trainable_token_indices is \[1\]: rows of"),
    "parameters": (setting(target_parameters=["experts"]), "LoRA on parameters"),
    "aLoRA": (setting(alora_invocation_tokens=[1]), "aLoRA works from some token on"),
    "Arrow": (setting(arrow_config={"top_k": 3}), "Arrow routes"),
    "KaSA": (setting(kasa_config={"beta": 1}), "KaSA changes the base"),
    "replicated layers": (setting(layer_replication=[[0, 1]]), "layers that the base lacks"),
    "QALoRA": (setting(use_qalora=True), "QALoRA pools"),
    "BD-LoRA": (setting(use_bdlora={"nblocks": 2}), "block-diagonal"),
    "MonteCLoRA": (setting(monteclora_config={"num_samples": 8}), "samples its weights"),
    "VeLoRA": (setting(velora_config={"scale": 1}), "VeLoRA"),
    "Megatron": (setting(megatron_config={"a": 1}), "Megatron"),
    **{
        start: (setting(init_lora_weights=start), f"init_lora_weights is '{start}', which moves")
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")
    },
    "an unknown key": (setting(use_new_thing=True), "use_new_thing is True, a setting that is not"),
    "bias": (setting(bias="some"), "bias is 'some'; it must be none, all or lora_only"),
    "rank 0": (setting(r=0), "r is 0; a rank is a whole number from 1"),
    "alpha of text": (setting(lora_alpha="4"), "lora_alpha is '4'; it must be a finite number"),
    "DoRA of text": (setting(use_dora="yes"), "use_dora is 'yes'; it must be true or false"),
    "a broken pattern": (setting(rank_pattern={"(": 2}), "no regular expression"),
    "a rank of text": (setting(rank_pattern={"up": "2"}), r"rank_pattern\['up'\] is '2'"),
    "another rank": (setting(r=3), r"lora_B \[6, 2\] and lora_A \[2, 4\].* the rank 3"),
    "DoRA without norms": (
        setting(use_dora=True),
        "no lora_magnitude_vector, and use_dora is True",
    ),
    "a bias of lora_B where the layer has none": (
        lambda c, w: (setting(lora_bias=True)(c, w), tensor(f"{PREFIX}.lora_B.bias", 6)(c, w)),
        r"these layers have no bias in the base, so .*mlp.up.bias.* \(lora_bias\) has no place",
    ),
    "norms without DoRA": (
        tensor(f"{PREFIX}.lora_magnitude_vector", 6),
        "has a lora_magnitude_vector, and use_dora is False",
    ),
    "norms of another size": (
        lambda c, w: (
            setting(use_dora=True)(c, w),
            tensor(f"{PREFIX}.lora_magnitude_vector", 5)(c, w),
        ),
        r"lora_magnitude_vector of .* is \[5\]; 6 are due",
    ),
    "A alone": (lambda _, w: w.pop(f"{PREFIX}.lora_B.weight"), "has 'lora_A' alone"),
    "another naming": (tensor("up.lora_A.weight", 2, 4), "not named as PEFT names"),
    "nothing": (lambda _, w: w.clear(), "it holds no tensor"),
    "an integer": (tensor(f"{PREFIX}.count", 1, dtype=torch.int32), "is I32; an adapter's tensors"),
    "a weight that the base lacks": (
        tensor("base_model.model.score.weight", 2, 4),
        "the base has no 'score.weight', which the adapter changes.*task_type",
    ),
    "another width": (
        tensor(f"{PREFIX}.lora_A.weight", 2, 5),
        r"up.weight is \[6, 4\] in the base, and lora_B @ lora_A is \[6, 5\]",
    ),
    "a bias of a layer without": (
        tensor(f"{PREFIX}.lora_B.bias", 6),
        "no bias in the base, so 'model.layers.0.mlp.up.bias' of the adapter",
    ),
    "integers of the base": (
        tensor("base_model.model.model.steps", 3),
        "model.steps is I64, to which nothing can be added",
    ),
    "tied embeddings": (
        tensor("base_model.model.model.embed_tokens.weight", 9, 4),
        "embed_tokens.weight is tied to the model's head.*tie_word_embeddings=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_is_refused_by_name(case: str, seed: Path, adapter: Callable) -> None:
    change, message = REFUSED[case]
    folder = adapter(change)
    with pytest.raises(CheckpointError, match=message):
        open_source(f"{seed}+{folder}")
    output = seed.parent / "out"
    with pytest.raises(MergeError, match=message):
        alloy.merge_checkpoints("linear", [f"{seed}+{folder}"], output)
    assert not output.exists()


def test_resized_embeddings_of_an_untied_base_are_refused(seed: Path, adapter: Callable) -> None:
    config = json.loads((seed / "config.json").read_text()) | {"tie_word_embeddings": False}
    (seed / "config.json").write_text(json.dumps(config))
    folder = adapter(tensor("base_model.model.model.embed_tokens.weight", 11, 4))
    with pytest.raises(CheckpointError, match=r"saves it as \[11, 4\]; resize the base's embedd"):
        open_source(f"{seed}+{folder}")


def test_pickles_are_refused(seed: Path, adapter: Callable) -> None:
    folder = adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only 'adapter_model.bin'(?s:.*)executes no pickle"):
        open_source(f"{seed}+{folder}")


def test_an_adapter_alone_is_told_how_to_name_its_base(adapter: Callable) -> None:
    with pytest.raises(
        CheckpointError, match=r"an adapter, which.*name it with its base, BASE\+ADAPTER"
    ):
        open_source(adapter())


def test_a_part_that_is_not_there_is_named(seed: Path, adapter: Callable) -> None:
    with pytest.raises(CheckpointError, match=r"'.*nowhere' is not there"):
        open_source(f"{seed}+{seed.parent / 'nowhere'}")
    folder = adapter()
    with pytest.raises(CheckpointError, match=r"several become one by `alloy adapters`"):
        open_source(f"{seed}+{folder}+{folder}")


def test_a_plus_in_a_folders_name_is_no_adapter(seed: Path, adapter: Callable) -> None:
    """A path that is there is what it says; one that splits in one way alone is split so."""
    folder = adapter(name="a+b")
    named = seed.rename(seed.with_name("c++"))
    assert open_source(named).adapter is None
    opened = open_source(f"{named}+{folder}")
    assert (opened.path, opened.adapter) == (named, folder)


def test_a_source_that_splits_in_two_ways_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b+c", "a+b", "c"):
        Path(name).mkdir()
    with pytest.raises(CheckpointError, match=r"'a and b.c', 'a.b and c' are all there; rename"):
        open_source("a+b+c")


def test_the_output_may_not_be_the_adapter(seed: Path, adapter: Callable) -> None:
    folder = adapter()
    with pytest.raises(MergeError, match=r"is the source 'adapter of lora'|not an empty folder"):
        alloy.merge_checkpoints("linear", [f"{seed}+{folder}"], folder)


def test_another_base_of_the_hub_is_refused_unless_allowed(
    tmp_path: Path, seed: Path, adapter: Callable
) -> None:
    snapshot = tmp_path / "models--org--seed" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    seed.rename(snapshot)
    folder = adapter(setting(base_model_name_or_path="org/other"))
    source = f"{snapshot}+{folder}"
    with pytest.raises(CheckpointError, match=r"is 'org/other', and this base is hf://org/seed"):
        open_source(source)
    allow = ["base_model_name_or_path"]
    assert open_source(source, allow).adapter == folder
    alloy.merge_checkpoints("linear", [source], tmp_path / "out", allow=allow)
    same = adapter(setting(base_model_name_or_path="org/seed"), name="same")
    assert open_source(f"{snapshot}+{same}").notes == ()


def test_a_base_of_another_name_is_noted(seed: Path, adapter: Callable, tmp_path: Path) -> None:
    folder = adapter(setting(base_model_name_or_path="/somewhere/else"))
    (folder / "tokenizer.json").write_text("{}")
    report = alloy.merge_checkpoints("linear", [f"{seed}+{folder}"], tmp_path / "out")
    notes = "\n".join(report.notes)
    assert re.search("base_model_name_or_path='/somewhere/else', and its base here is", notes)
    assert re.search("'tokenizer.json' of its own; those of .*seed are taken", notes)


@pytest.mark.parametrize(("old", "new"), [("model.", "bert.model."), ("model.layers.", "")])
def test_one_change_of_prefix_places_an_adapter(
    old: str, new: str, seed: Path, adapter: Callable, tmp_path: Path
) -> None:
    """The base's files may hold the model with another prefix than it was trained with."""
    file = seed / "model.safetensors"
    tensors = {
        new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in load_file(file).items()
    }
    save_file(tensors, file)
    opened = open_source(f"{seed}+{adapter()}")
    assert re.search("its names begin with '.*' where the base's begin with", opened.notes[0])
    changed = [name for name, entry in opened.entries.items() if entry.fold is not None]
    assert changed == [f"{new}{'layers.' if old == 'model.' else ''}0.mlp.up.weight"]


def test_the_record_names_base_and_adapter(seed: Path, adapter: Callable, tmp_path: Path) -> None:
    folder = adapter()
    alloy.merge_checkpoints(
        "linear", {"x": f"{seed}+{folder}"}, tmp_path / "out", hash_sources=True
    )
    account = json.loads((tmp_path / "out/alloy_merge.json").read_text())
    assert account["sources"]["x"]["source"] == "seed + lora"
    assert set(account["sources"]["x"]["files"]) == {
        "model.safetensors",
        "adapter_model.safetensors",
    }


def test_an_interrupted_merge_starts_anew_if_alpha_changed(
    seed: Path, adapter: Callable, tmp_path: Path
) -> None:
    from alloy.checkpoint import MergeRequest, plan_merge

    folder = adapter()
    request = MergeRequest("linear", [f"{seed}+{folder}"], tmp_path / "out")
    before = plan_merge(request).digest
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 123}))
    assert plan_merge(request).digest != before
