"""Faults that users of other tools reported, each with its smallest input and the right behaviour.

The numbers are the issues of those tools.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import alloy
from alloy.checkpoint import MergeRequest, plan_merge
from alloy.checkpoint import plan as planning
from alloy.checkpoint.format import encode_header
from alloy.errors import MergeError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {"model_type": "toy", "vocab_size": 8, "hidden_size": 4, "tie_word_embeddings": False}
TEMPLATE = "{% for m in messages %}{{ m }}{% endfor %}"


def rows(seed: int, num: int = 8) -> torch.Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))


def tokenizer(folder: Path, tokens: str, template: str | None = None) -> None:
    vocab = {token: i for i, token in enumerate(tokens)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]}
    text = {"model": model, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    settings = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_an_adapter_alone_is_no_model(write):
    """peft 3761: averaged A and B apart, or an rsLoRA scaled as a LoRA."""
    model = write("model", {EMBED: rows(0)}, config=CONFIG)
    adapter = write("adapter", {"x.lora_A.weight": rows(1)}, config=None)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "use_rslora": true}')
    with pytest.raises(MergeError, match=r"adapter.*BASE\+ADAPTER"):
        plan_merge(MergeRequest("linear", [model, adapter], "out"))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_what_survives_is_rescaled(method):
    """peft 3152: the mean of the result is 1, its entries 0 or 5 (of DELLA: 1/p around 5)."""
    base = {"w": torch.zeros(1000, 1000)}
    settings = {"epsilon": 0.0} if method.startswith("della") else {}
    merged = alloy.merge(
        method, [{"w": torch.ones(1000, 1000)}], base=base, density=0.2, **settings
    )
    assert abs(float(merged["w"].mean()) - 1) < 5e-3
    assert {round(v, 4) for v in merged["w"].unique().tolist()} == {0.0, 5.0}


def test_tied_in_the_config_and_untied_in_the_file(write):
    """LlamaFactory 10832: one of the two would overwrite the other."""
    tied = {**CONFIG, "tie_word_embeddings": True}
    a = write("a", {EMBED: rows(0), HEAD: rows(1)}, config=tied)
    b = write("b", {EMBED: rows(2), HEAD: rows(2)}, config=tied)
    c = write("c", {EMBED: rows(3), HEAD: rows(4)}, config=CONFIG)
    with pytest.raises(MergeError, match="tied weights untied"):
        plan_merge(MergeRequest("linear", [a, b], "out"))
    with pytest.raises(MergeError, match="tied in one and not in the other"):
        plan_merge(MergeRequest("linear", [b, c], "out"))


SILENT = {"vocab_size": 8, "n_embd": 4}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({**SILENT, "model_type": "gpt2"}, ("transformer.wte.weight", HEAD)),
        ({"model_type": "llava", "text_config": {**SILENT, "tie_word_embeddings": True}},
         (f"language_model.{EMBED}", f"language_model.{HEAD}")),
        ({**CONFIG, "model_type": "t5", "tie_word_embeddings": True},
         ("shared.weight", "encoder.embed_tokens.weight")),
    ],
)  # fmt: skip
def test_tied_by_an_architectures_default_or_a_part(write, config, names):
    """As above, where the config leaves it to its class or its language model; copies are one."""
    weights = {
        "a": {names[0]: rows(0), names[1]: rows(9)},
        "b": {name: rows(1) for name in names},
        "c": {name: rows(2) for name in names},
    }
    apart, *alike = (write(name, of, config=config) for name, of in weights.items())
    with pytest.raises(MergeError, match=r"tied weights untied: config.json of 'a'"):
        plan_merge(MergeRequest("linear", [apart, alike[0]], "out"))
    plan = plan_merge(MergeRequest("linear", alike, "out"))
    assert [t.name for t in plan.tensors] == [names[0]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("absent", r"model.safetensors.index.json disagrees .* about 'mtp.fc.weight'"),
        ("not indexed", r"model.safetensors.index.json disagrees .* about 'extra.weight'"),
        ("stray", r"model.safetensors stands beside model.safetensors.index.json"),
    ],
)
def test_index_and_shards_that_disagree(write, spoil, message):
    """huggingface_hub 4728, sglang 32279: random weights, or tensors that are dropped."""
    good = {EMBED: rows(0), HEAD: rows(1)}
    a = write("a", good, config=CONFIG, num_shards=2)
    b = write("b", good, config=CONFIG, num_shards=2)
    index = b / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if spoil == "absent":
        content["weight_map"]["mtp.fc.weight"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(content))
    elif spoil == "not indexed":
        shard = b / "model-00001-of-00002.safetensors"
        save_file({**load_file(shard), "extra.weight": rows(2)}, shard)
    else:
        save_file(good, b / "model.safetensors")
    with pytest.raises(MergeError, match=message):
        plan_merge(MergeRequest("linear", [a, b], "out"))


@pytest.mark.parametrize("policy", ["base", "union"])
def test_one_vocabulary_with_two_paddings(write, tmp_path, policy):
    """Qwen2.5's sizes differ in padding alone: the first one's rows, shared padding averaged."""
    folders = [
        write(name, {EMBED: rows(i, num)}, config={**CONFIG, "vocab_size": num})
        for i, (name, num) in enumerate({"a": 8, "b": 12}.items())
    ]
    for folder in folders:
        tokenizer(folder, "xyz")
    with pytest.raises(MergeError, match="vocab_size differs"):
        plan_merge(MergeRequest("linear", folders, "out"))
    alloy.merge_checkpoints("linear", folders, tmp_path / "out", tokenizer=policy)
    merged = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    torch.testing.assert_close(merged, (rows(0) + rows(1, 12)[:8]) / 2)


@pytest.mark.parametrize("policy", ["base", "union"])
def test_padding_rows_of_a_vocabulary_stay(write, tmp_path, policy):
    """mergekit 425: embeddings cut to the tokenizer's length."""
    folders = [write(name, {EMBED: rows(i)}, config=CONFIG) for i, name in enumerate("ab")]
    tokenizer(folders[0], "xyz")
    tokenizer(folders[1], "xyw")
    alloy.merge_checkpoints("linear", folders, tmp_path / "out", tokenizer=policy)
    merged = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    assert merged.shape == (8, 4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 8
    torch.testing.assert_close(merged[7], (rows(0)[7] + rows(1)[7]) / 2)


def test_the_experts_template_stays_where_the_base_has_none(write, tmp_path):
    """MLLMerging: prompts were empty, because the base's files have no chat template."""
    names = ("base", "a", "b")
    folders = {n: write(n, {EMBED: rows(i)}, config=CONFIG) for i, n in enumerate(names)}
    for name, folder in folders.items():
        tokenizer(folder, *(("xyz", None) if name == "base" else ("xyzw", TEMPLATE)))
    report = alloy.merge_checkpoints(
        "task_arithmetic",
        [folders["a"], folders["b"]],
        tmp_path / "out",
        base=folders["base"],
        tokenizer="base",
    )
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert report.notes


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_templates_in_a_folder_of_their_own_stay(write, tmp_path, order):
    """transformers saves named templates so; here the first source's, or those of another."""
    folders = {name: write(name, {EMBED: rows(i)}, config=CONFIG) for i, name in enumerate(order)}
    for folder in folders.values():
        tokenizer(folder, "xyz")
    (folders["b"] / "chat_template.jinja").write_text(TEMPLATE)
    more = folders["b"] / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools }}")
    alloy.merge_checkpoints("linear", list(folders.values()), tmp_path / "out")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == {"default": TEMPLATE, "tool_use": "{{ tools }}"}


def test_the_commonest_template_and_one_that_is_given(write, tmp_path):
    """mergekit's `auto`, and a template as text."""
    folders = [write(name, {EMBED: rows(i)}, config=CONFIG) for i, name in enumerate("abc")]
    for folder, template in zip(folders, ("{{ x }}", TEMPLATE, TEMPLATE), strict=True):
        tokenizer(folder, "xyz", template)
    for name, wanted in (("auto", "auto"), ("text", TEMPLATE)):
        alloy.merge_checkpoints("linear", folders, tmp_path / name, chat_template=wanted)
        assert (tmp_path / name / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.zeros(8, 4).to(torch.float8_e4m3fn), "q.weight_scale_inv"),
        (torch.zeros(8, 4, dtype=torch.uint8), "q.weight_scale"),
        (torch.zeros(8, 4, dtype=torch.int8), "q.SCB"),  # bitsandbytes
        (torch.zeros(8, 4, dtype=torch.int8), "q.weight_scales"),  # EETQ
        (torch.zeros(4, 4, dtype=torch.uint8), "q.scale"),  # HQQ
    ],
)
def test_quantised_weights_are_refused_by_name(write, weight, scale):
    """unsloth 4919, axolotl 3771: scales ignored, codes averaged."""
    a = write("a", {"q.weight": weight, scale: torch.ones(8, 1)}, config=CONFIG)
    b = write("b", {"q.weight": rows(0)}, config=CONFIG)
    with pytest.raises(MergeError, match="dequantise"):
        plan_merge(MergeRequest("linear", [a, b], "out"))


def test_masks_of_bytes_are_no_codes(write):
    """Old GPT-2 files hold causal masks as 8-bit integers."""
    mask = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8).tril()}
    a, b = (write(n, {EMBED: rows(i), **mask}, config=CONFIG) for i, n in enumerate("ab"))
    assert len(plan_merge(MergeRequest("linear", [a, b], "out")).tensors) == 2


def test_counters_that_differ_are_asked_about(write, tmp_path):
    """OLMo-core 396, espnet 2283: integers averaged by division."""
    a, b = (
        write(name, {"w": rows(i), "bn.num_batches_tracked": torch.tensor(10 + i)}, config=CONFIG)
        for i, name in enumerate("ab")
    )
    with pytest.raises(MergeError, match=r"num_batches_tracked is I64 and differs .* copy="):
        plan_merge(MergeRequest("linear", [a, b], "out"))
    copy = {"*num_batches_tracked": "b"}
    alloy.merge_checkpoints("linear", [a, b], tmp_path / "out", copy=copy)
    assert load_file(tmp_path / "out" / "model.safetensors")["bn.num_batches_tracked"] == 11


def test_two_names_of_one_storage_count_once():
    """fairseq 747: shared parameters added twice while averaging."""
    shared = [rows(i) for i in range(2)]
    merged = alloy.merge("linear", [{"a": s, "b": s} for s in shared])
    assert merged["a"].data_ptr() == merged["b"].data_ptr()
    torch.testing.assert_close(merged["a"], sum(shared) / 2)


def test_a_plan_of_two_models_of_15_gigabytes_is_seconds(tmp_path, monkeypatch):
    """A vision-language model, its language model and their base: headers alone are read."""
    width, inner, layers = 4096, 14336, 32
    body = [
        (f"model.layers.{i}.{name}.weight", "BF16", shape)
        for i in range(layers)
        for name, shape in {
            "input_layernorm": (width,), "mlp.down_proj": (width, inner),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "post_attention_layernorm": (width,), "self_attn.k_proj": (1024, width),
            "self_attn.o_proj": (width, width), "self_attn.q_proj": (width, width),
            "self_attn.v_proj": (1024, width),
        }.items()
    ]  # fmt: skip
    text = {"model_type": "llama", "vocab_size": 128256, "hidden_size": width}

    def sparse(name: str, prefix: str, config: dict, more=()) -> Path:
        ends = [
            ("model.embed_tokens.weight", "BF16", (128256, width)),
            ("lm_head.weight", "BF16", (128256, width)),
        ]
        tensors = [(prefix + n, d, s) for n, d, s in body + ends] + list(more)
        header = encode_header(tensors)
        folder = tmp_path / name
        folder.mkdir()
        size = len(header) + sum(2 * torch.Size(s).numel() for _, _, s in tensors)
        assert size > 15e9
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(size)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    tower = [(f"vision_tower.layers.{i}.fc.weight", "BF16", (4096, 1024)) for i in range(24)]
    whole = {"model_type": "llava_next", "text_config": text, "tie_word_embeddings": False}
    sources = {
        "vlm": sparse("vlm", "language_model.", whole, tower),
        "llm": sparse("llm", "", text),
    }
    base, start = sparse("seed", "", text), time.process_time()
    groups = ["vision_tower", "embeddings", "head"]
    request = MergeRequest("ties", sources, tmp_path / "out", base=base, kept=groups)
    monkeypatch.setattr(planning, "check_room", lambda *_: None)  # 16 GB are not there
    plan = plan_merge(request)
    assert time.process_time() - start < 3
    assert sum(t.how == "ties" for t in plan.tensors) == len(body)
