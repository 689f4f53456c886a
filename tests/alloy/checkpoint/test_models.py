"""The result is a model: transformers loads it, it computes, and its surroundings come along."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.func import functional_call
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import alloy
from alloy.checkpoint import MergeRequest, load_weights, plan_merge
from alloy.errors import MergeError

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IDS = torch.arange(12).reshape(2, 6)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
SOUND = torch.linspace(-1, 1, 2 * 400).reshape(2, 400)

ARCHITECTURES = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**TEXT, num_key_value_heads=2), {"input_ids": IDS}),
    "Llama, tied": (
        LlamaForCausalLM,
        LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
        {"input_ids": IDS},
    ),
    "BERT": (BertForMaskedLM, BertConfig(**TEXT), {"input_ids": IDS}),
    "ViT": (ViTForImageClassification, ViTConfig(**VISION, num_labels=5), {"pixel_values": PIXELS}),
    "CLIP": (
        CLIPModel,
        CLIPConfig(
            text_config={**TEXT, "max_position_embeddings": 8, "eos_token_id": 11},
            vision_config=VISION, projection_dim=16,
        ),
        {"input_ids": IDS, "pixel_values": PIXELS},
    ),
    "T5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "Wav2Vec2": (
        Wav2Vec2Model,
        Wav2Vec2Config(
            vocab_size=32, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4,
            conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=4, num_feat_extract_layers=2,
        ),
        {"input_values": SOUND},
    ),
}  # fmt: skip


def build(kind, config, seed):
    torch.manual_seed(seed)
    return kind(config).eval()


def first_output(model, inputs):
    with torch.no_grad():
        outputs = model(**inputs)
    return next(v for k, v in outputs.items() if k != "loss" and isinstance(v, torch.Tensor))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_transformers_loads_the_result_whole(architecture, method, tmp_path):
    """No key is missing or unexpected; it computes what the merge of the state dicts computes."""
    kind, config, inputs = ARCHITECTURES[architecture]
    built = {name: build(kind, config, seed) for seed, name in enumerate(("seed", "a", "b"))}
    for i, (name, model) in enumerate(built.items()):
        model.save_pretrained(tmp_path / name, max_shard_size="50KB" if i == 1 else "5GB")
    base = tmp_path / "seed" if method == "ties" else None
    alloy.merge_checkpoints(method, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=base)

    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = {name: dict(model.state_dict()) for name, model in built.items()}
    merged = alloy.merge(
        method, [weights["a"], weights["b"]], base=weights["seed"] if method == "ties" else None
    )
    expected = build(kind, config, 9)
    expected.load_state_dict(merged)
    assert torch.equal(first_output(loaded.eval(), inputs), first_output(expected, inputs))


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    """Embeddings and head share memory after loading, and the file holds one of them."""
    kind, config, _ = ARCHITECTURES["Llama, tied"]
    for seed, name in enumerate("ab"):
        build(kind, config, seed).save_pretrained(tmp_path / name)
    alloy.merge_checkpoints("linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping


def word_tokenizer(words):
    """A tokenizer that splits at spaces."""
    vocab = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_what_surrounds_the_weights_comes_along(tmp_path):
    """Tokenizer, generation config and processors load; config and weights have the dtype."""
    kind, config, _ = ARCHITECTURES["Llama"]
    for seed, name in enumerate("ab"):
        model = build(kind, config, seed)
        model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=False)
        model.save_pretrained(tmp_path / name)
        word_tokenizer([f"w{i}" for i in range(63)]).save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
        (tmp_path / name / "training_args.bin").write_bytes(b"never copied")
    alloy.merge_checkpoints(
        "linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", dtype="bfloat16"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w5").input_ids == [4, 6]
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def differing(tmp_path):
    """Three Llamas of different vocabularies: `b` is reordered, lacks a word and has a new one."""
    words = {
        "seed": ["cat", "dog", "sun"],
        "a": ["cat", "dog", "sun"],
        "b": ["sun", "moon", "cat"],
    }
    kind, _, _ = ARCHITECTURES["Llama"]
    built = {}
    for seed, (name, vocabulary) in enumerate(words.items()):
        size = len(vocabulary) + 1 + 2 * (name == "seed")  # the base has two rows of padding
        config = LlamaConfig(**{**TEXT, "vocab_size": size}, num_key_value_heads=2)
        built[name] = build(kind, config, seed)
        built[name].save_pretrained(tmp_path / name)
        word_tokenizer(vocabulary).save_pretrained(tmp_path / name)
    return built


def test_union_takes_every_token_and_pairs_rows_by_token(differing, tmp_path):
    """A shared word has the mean of both rows, any other its own row; the result tokenizes."""
    alloy.merge_checkpoints(
        "linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer="union"
    )
    merged, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == len(tokenizer) == 5
    a, b = differing["a"], differing["b"]
    for layer in ("model.embed_tokens.weight", "lm_head.weight"):
        ours, theirs = a.state_dict()[layer], b.state_dict()[layer]
        expected = {
            "[UNK]": (ours[0] + theirs[0]) / 2,
            "cat": (ours[1] + theirs[3]) / 2,
            "dog": ours[2],
            "sun": (ours[3] + theirs[1]) / 2,
            "moon": theirs[2],
        }
        for word, row in expected.items():
            (index,) = tokenizer(word).input_ids
            torch.testing.assert_close(merged.state_dict()[layer][index], row, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert merged(**tokenizer("cat moon dog", return_tensors="pt")).logits.shape == (1, 3, 5)


def test_base_policy_keeps_the_bases_tokenizer(differing, tmp_path):
    """The base's ids and padding stay; missing words add no task vector, new ones are gone."""
    alloy.merge_checkpoints(
        "task_arithmetic",
        [tmp_path / "a", tmp_path / "b"],
        tmp_path / "out",
        base=tmp_path / "seed",
        tokenizer="base",
        coefficients=[0.5, 0.25],
    )
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 6
    assert tokenizer("moon").input_ids == [0]
    seed, a, b = (differing[n].state_dict()["lm_head.weight"] for n in ("seed", "a", "b"))
    got = merged.state_dict()["lm_head.weight"]
    torch.testing.assert_close(got[1], seed[1] + 0.5 * (a[1] - seed[1]) + 0.25 * (b[3] - seed[1]))
    torch.testing.assert_close(got[2], seed[2] + 0.5 * (a[2] - seed[2]))
    torch.testing.assert_close(got[5], seed[5])


def test_hidden_size_equal_to_the_vocabulary_confuses_nothing(tmp_path):
    """4 reordered tokens, hidden size 4: embeddings and head are paired, square weights are not."""
    kind, _, _ = ARCHITECTURES["Llama"]
    config = LlamaConfig(
        vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    built = {}
    for seed, (name, words) in enumerate(
        (("a", ["cat", "dog", "sun"]), ("b", ["sun", "cat", "dog"]))
    ):
        built[name] = build(kind, config, seed).state_dict()
        build(kind, config, seed).save_pretrained(tmp_path / name)
        word_tokenizer(words).save_pretrained(tmp_path / name)
    alloy.merge_checkpoints(
        "linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer="base"
    )
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in built["a"].items():
        other = built["b"][name]
        if "embed" in name or "lm_head" in name:
            other = other[[0, 2, 3, 1]]
        torch.testing.assert_close(merged[name], (tensor + other) / 2, rtol=1e-6, atol=1e-8)


def test_byte_pair_union_merges_what_only_one_source_could(tmp_path):
    """A BPE union has both sources' merges: what was one token for either is one token again."""
    kind, _, _ = ARCHITECTURES["Llama"]
    for seed, (name, pair) in enumerate((("a", ("c", "a")), ("b", ("d", "o")))):
        vocab = {c: i for i, c in enumerate(["c", "a", "d", "o", "".join(pair)])}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [pair])))
        config = LlamaConfig(**{**TEXT, "vocab_size": 5}, num_key_value_heads=2)
        build(kind, config, seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    alloy.merge_checkpoints(
        "linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer="union"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("cado").input_ids) == ["ca", "do"]
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 6


def unigram_tokenizer(pieces, added=()):
    """A SentencePiece-like tokenizer: words begin with ▁, and the likeliest pieces are taken."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_unigram_union_cuts_text_as_the_source_that_knows_its_pieces(tmp_path):
    """Words are cut as by the source's own tokenizer, added tokens stay whole, rows follow."""
    kind, _, _ = ARCHITECTURES["Llama"]
    letters = [(c, -8.0) for c in "▁abcdnort"]
    tokenizers = {
        "a": unigram_tokenizer([*letters, ("▁cat", -2.0), ("▁c", -4.0)], added=["<mask>"]),
        "b": unigram_tokenizer([("▁dorn", -2.0), *letters[::-1], ("or", -3.0)], added=["<end>"]),
    }
    built = {}
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        config = LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)}, num_key_value_heads=2)
        built[name] = build(kind, config, seed)
        built[name].save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="tokenizer='union'"):
        alloy.merge_checkpoints("linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    alloy.merge_checkpoints(
        "linear", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", tokenizer="union"
    )
    union = AutoTokenizer.from_pretrained(tmp_path / "out")
    for name, text in (("a", "cat <mask> cab"), ("b", "dorn<end> torn")):
        assert union.tokenize(text) == tokenizers[name].tokenize(text), name
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == len(union) == len(tokenizers["a"]) + 3
    rows = merged.get_input_embeddings().weight
    ours, theirs = (built[name].get_input_embeddings().weight for name in "ab")
    for piece, i in union.get_vocab().items():
        found = [
            table[tokenizers[name].get_vocab()[piece]]
            for name, table in (("a", ours), ("b", theirs))
            if piece in tokenizers[name].get_vocab()
        ]
        torch.testing.assert_close(rows[i], sum(found) / len(found))


def test_sentencepiece_without_tokenizer_json_is_compared_by_its_bytes(tmp_path):
    """Equal models come along; different ones are refused, and a union names the file it needs."""
    kind, config, _ = ARCHITECTURES["Llama"]
    for seed, name in enumerate("ab"):
        build(kind, config, seed).save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.model").write_bytes(b"pieces")
    folders = [tmp_path / "a", tmp_path / "b"]
    alloy.merge_checkpoints("linear", folders, tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.model").read_bytes() == b"pieces"
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"other pieces")
    with pytest.raises(ValueError, match="'a' and 'b' cut text differently"):
        alloy.merge_checkpoints("linear", folders, tmp_path / "out")
    with pytest.raises(ValueError, match=r"needs a tokenizer\.json; save it again from a fast"):
        alloy.merge_checkpoints("linear", folders, tmp_path / "out", tokenizer="union")


def test_embeddings_are_skipped_by_name_and_told_of_by_shape(tmp_path):
    """GPT-2's wte is no layer to WUDI; a table of tokens by another name is told in the plan."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    for seed, name in enumerate(("seed", "a", "b")):
        build(GPT2LMHeadModel, GPT2Config(vocab_size=64, **sizes), seed).save_pretrained(
            tmp_path / name
        )
    folders = [tmp_path / "a", tmp_path / "b"]
    for options, told in (({}, False), ({"skip": ("*wpe*",)}, True)):
        request = MergeRequest(
            "wudi", folders, tmp_path / "out", base=tmp_path / "seed", options=options
        )
        plan = plan_merge(request)
        assert any("wte.weight has a row per token" in note for note in plan.notes) == told


def test_gpt2_is_merged_by_what_its_layers_read(tmp_path):
    """WUDI knows weights stored [in, out]: files give what their transposes give in memory."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    built = {n: build(GPT2LMHeadModel, config, seed) for seed, n in enumerate(("seed", "a", "b"))}
    for name, model in built.items():
        model.save_pretrained(tmp_path / name)
    alloy.merge_checkpoints(
        "wudi", [tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "seed"
    )
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict()
    for name in ("transformer.h.0.mlp.c_proj.weight", "transformer.h.0.attn.c_attn.weight"):
        base, *models = ({name: m.state_dict()[name].T} for m in built.values())
        wanted = alloy.merge("wudi", models, base=base)[name].T
        torch.testing.assert_close(merged[name], wanted)


@pytest.mark.parametrize(
    "method",
    ["regmean_plus_plus", "adamerging", pytest.param("sequential", marks=pytest.mark.slow)],
)
def test_methods_that_run_the_model_merge_checkpoints_as_they_merge_in_memory(method, tmp_path):
    """From sharded files to a model that loads: the same weights as from state dicts."""
    kind, config, _ = ARCHITECTURES["Llama"]
    built = {name: build(kind, config, seed) for seed, name in enumerate(("seed", "a", "b"))}
    for name, model in built.items():
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
    module = build(kind, config, 5)
    batches = [[{"input_ids": (IDS + i) % 64}] * 2 for i in range(2)]

    def forward(weights, batch, task):
        return functional_call(module, dict(weights), kwargs=batch).logits

    given = {
        "regmean_plus_plus": {
            "module": module, "batches": batches, "blocks": ["model.layers.0", "model.layers.1"],
        },
        "adamerging": {"forward": forward, "batches": batches, "num_steps": 2},
        "sequential": {"module": module, "batches": batches},
    }[method]  # fmt: skip
    base = method == "adamerging"
    alloy.merge_checkpoints(
        method,
        [tmp_path / "a", tmp_path / "b"],
        tmp_path / "out",
        base=tmp_path / "seed" if base else None,
        **given,
    )
    expected = alloy.merge(
        method,
        [built[name].state_dict() for name in "ab"],
        base=built["seed"].state_dict() if base else None,
        **given,
    )
    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def _renamed(folder, change, drop=()):
    """Rename the tensors of a checkpoint's single file."""
    file = folder / "model.safetensors"
    tensors = {change(name): t for name, t in load_file(file).items() if name not in drop}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("prefix", "architectures"),
    [("", None), ("", ["GPT2Model"]), ("transformer.", []), ("backbone.", None)],
)
def test_orientation_is_known_whatever_prefix_the_names_have(prefix, architectures, tmp_path):
    """GPT-2 under the hub's names (`h.0...`) or others: WUDI gives the prefixed file's bits."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    for seed, name in enumerate(("seed", "a", "b")):
        for kind in ("plain", "other"):
            folder = tmp_path / kind / name
            build(GPT2LMHeadModel, config, seed).save_pretrained(folder)
            if kind == "other":
                _renamed(folder, lambda n: prefix + n.removeprefix("transformer."))
                if architectures is not None:
                    data = json.loads((folder / "config.json").read_text())
                    data["architectures"] = architectures
                    (folder / "config.json").write_text(json.dumps(data))
    for kind in ("plain", "other"):
        root = tmp_path / kind
        alloy.merge_checkpoints("wudi", [root / "a", root / "b"], root / "out", base=root / "seed")
    plain = load_file(tmp_path / "plain" / "out" / "model.safetensors")
    other = load_file(tmp_path / "other" / "out" / "model.safetensors")
    for name, tensor in plain.items():
        assert torch.equal(other[prefix + name.removeprefix("transformer.")], tensor), name


@pytest.mark.parametrize("method", ["wudi", "tsv_m", "iso_c"])
def test_fused_experts_are_merged_one_by_one(method, tmp_path):
    """[E, 2I, H] gives what its E matrices give; a convolution of three dims gets the mean."""
    weights = {}
    for seed, name in enumerate(("seed", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        experts = torch.randn(3, 8, 6, generator=generator)
        weights[name] = {
            "layers.0.mlp.experts.gate_up_proj": experts,
            "conv.weight": torch.randn(5, 4, 3, generator=generator),
            **{f"m{i}.weight": experts[i].clone() for i in range(3)},
        }
        (tmp_path / name).mkdir()
        save_file(weights[name], tmp_path / name / "model.safetensors")
    report = alloy.merge_checkpoints(
        method, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "seed"
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for i in range(3):
        assert torch.equal(merged["layers.0.mlp.experts.gate_up_proj"][i], merged[f"m{i}.weight"])
    memory = alloy.merge(method, [weights["a"], weights["b"]], base=weights["seed"])
    assert all(torch.equal(memory[name], tensor) for name, tensor in merged.items())
    mean = {n: (weights["a"][n] + weights["b"][n]) / 2 for n in ("conv.weight", "m0.weight")}
    torch.testing.assert_close(merged["conv.weight"], mean["conv.weight"])
    assert not torch.allclose(merged["m0.weight"], mean["m0.weight"])
    assert any("1 of 5 tensors" in note and "'conv.weight'" in note for note in report.notes)


def test_names_of_two_versions_are_one_models(tmp_path):
    """The same shapes under other names: not another architecture, another version."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    for seed, name in enumerate(("a", "b")):
        build(GPT2LMHeadModel, config, seed).save_pretrained(tmp_path / name)
    sources = [tmp_path / "a", tmp_path / "b"]
    alloy.merge_checkpoints("linear", sources, tmp_path / "plain")
    _renamed(tmp_path / "b", lambda n: n.removeprefix("transformer."))
    report = alloy.merge_checkpoints("linear", sources, tmp_path / "out")
    assert any("names of 'b' as the first source has them" in note for note in report.notes)
    plain, ours = (load_weights(tmp_path / name) for name in ("plain", "out"))
    assert all(torch.equal(ours[n], plain[n]) for n in plain)


def test_the_chosen_chat_template_is_the_results(tmp_path):
    """A base without one keeps the experts'; if two differ, the one that is named is written."""
    sources = {}
    for seed, (name, template) in enumerate((("a", "A {{ m }}"), ("b", "B {{ m }}"), ("c", None))):
        folder = sources[name] = tmp_path / name
        config = LlamaConfig(**TEXT, num_key_value_heads=2)
        build(LlamaForCausalLM, config, seed).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    with pytest.raises(MergeError, match=r"chat templates of 'a', 'b' differ.*chat_template='a'"):
        alloy.merge_checkpoints("linear", sources, tmp_path / "out")
    (tmp_path / "mine.jinja").write_text("mine {{ m }}")
    wanted = {"a": "A {{ m }}", "b": "B {{ m }}", str(tmp_path / "mine.jinja"): "mine {{ m }}"}
    for i, (name, text) in enumerate(wanted.items()):
        out = tmp_path / f"out{i}"
        alloy.merge_checkpoints("linear", sources, out, chat_template=name)
        assert AutoTokenizer.from_pretrained(out).chat_template == text
    lacking = {"c": sources["c"], "a": sources["a"]}
    report = alloy.merge_checkpoints("linear", lacking, tmp_path / "lacking")
    assert AutoTokenizer.from_pretrained(tmp_path / "lacking").chat_template == "A {{ m }}"
    assert any("the chat template is that of 'a'" in note for note in report.notes)
