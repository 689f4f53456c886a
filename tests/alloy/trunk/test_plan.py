"""Members correspond by name and by symmetry; the first thing that does not is named."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel

from alloy.errors import MergeError
from alloy.trunk import Member, plan_trunk

LAYERS = ("vision_model.encoder.layers", "text_model.encoder.layers")
PLANNED = {
    "siglip": (LAYERS, {}),
    "clip": (LAYERS, {}),
    "flava": (("image_model.encoder.layer", "text_model.encoder.layer"), {}),
    "whisper": (("model.encoder.layers", "model.decoder.layers"), {}),
}
PRICES = {"siglip": 0, "clip": 0, "flava": 1, "whisper": 1}
"""Matrices of width x width that it takes to let one stream turn beside the other."""
OF_BERT = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "layer_norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "layer_norm2",
}
REFUSED = {
    "blip": (
        ("vision_model.encoder.layers", "text_encoder.encoder.layer"),
        "have no weight of one",
    ),
    "chinese_clip": (
        (LAYERS[0], Member(part="text_model.encoder.layer", names=OF_BERT)),
        "a trunk has one order of layers",
    ),
    "clap": (
        ("audio_model.audio_encoder.layers.0.blocks", "text_model.encoder.layer"),
        "has shape",
    ),
    "vilt": (("encoder.layer", "encoder.layer"), "overlap"),
}


@pytest.mark.parametrize("kind", PLANNED)
def test_two_towers_correspond(kind, tiny, pairs):
    """Blocks of both towers hold each other's weights; what one alone has stays its own."""
    (image, text), _ = PLANNED[kind]
    model = tiny(kind)
    plan = plan_trunk(model, {"image": image, "text": text}, pairs(kind, 2))
    own = plan.parts["text"].names
    assert set(plan.names) | set(plan.own) | set(plan.left["text"]) == set(own)
    assert all(plan.parts["image"].names[n].startswith(image) for n in plan.names)
    saved = sum(model.get_parameter(own[n]).numel() for n in plan.names)
    before, after = plan.num_parameters
    assert before == sum(p.numel() for p in model.parameters())
    assert after == before - saved
    assert f"{before:,} before" in str(plan)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind == "flava" else ()) for kind in PLANNED],
)
def test_a_stream_turns_at_the_least_price(kind, tiny, pairs):
    """Embeddings, norms and heads follow; a matrix stands only where they cannot."""
    (image, text), _ = PLANNED[kind]
    plan = plan_trunk(tiny(kind), {"image": image, "text": text}, pairs(kind, 2), turn=True)
    widths = plan.turning["model"].widths()
    assert widths == [24] * PRICES[kind]
    turning = next(name for name in plan.parts if name != plan.anchor)
    assert plan.turning["model"].turns(plan.parts[turning])


@pytest.mark.parametrize("kind", REFUSED)
def test_towers_that_are_not_alike_are_refused(kind, tiny, pairs):
    (image, text), reason = REFUSED[kind]
    changes = {"text": {"hidden_act": "quick_gelu"}} if kind == "chinese_clip" else {}
    with pytest.raises(MergeError, match=reason):
        plan_trunk(tiny(kind, **changes), {"image": image, "text": text}, pairs(kind, 2))


BAD = {
    "no such part": (("vision_model.encoder.layer", LAYERS[1]), {}, "did you mean 'vision_model.e"),
    "one member": ((LAYERS[0],), {}, "two members or more"),
    "inside each other": ((LAYERS[0], "vision_model.encoder.layers.1"), {}, "blocks and|overlap"),
    "fewer layers": (
        (Member(part=LAYERS[0], layers=[0]), LAYERS[1]), {}, "1 blocks and m1 2: say which",
    ),
    "no such layer": (
        (Member(part=LAYERS[0], layers=[0, 2]), LAYERS[1]), {}, "has the blocks 0 to 1",
    ),
    "layers of a block": (
        (Member(part=f"{LAYERS[0]}.0", layers=[0]), f"{LAYERS[1]}.0"), {}, "leave it out",
    ),
    "kept what is not there": (LAYERS, {"kept": ["*.norm9.*"]}, "no weight of the trunk fits"),
    "kept everything": (LAYERS, {"kept": ["*"]}, "nothing is left to merge"),
    "another checkpoint": (
        (Member(part=LAYERS[0], checkpoint="siglib"), LAYERS[1]), {}, "part of checkpoint 'siglib'",
    ),
    "a pattern that is no list": (LAYERS, {"kept": "*norm*"}, "kept='.norm.': give a list"),
    "a member by number": ((3, LAYERS[1]), {}, "member 'm0': 3: give a part's name"),
    "a prefix that nothing has": (
        (Member(part=LAYERS[0], names={"self_atn": "attn"}), LAYERS[1]), {}, "mean 'self_attn'",
    ),
    "no part named": (("", LAYERS[1]), {}, "has no part ''"),
    **{
        f"an encoder, member {i}": (
            [n.removesuffix(".layers") if i == j else n for j, n in enumerate(LAYERS)], {},
            f"'m{i}': '{LAYERS[i].removesuffix('.layers')}' is one .*blocks are {LAYERS[i]}$",
        )
        for i in (0, 1)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_members_are_refused(case, tiny, pairs):
    given, options, reason = BAD[case]
    members = {f"m{i}": member for i, member in enumerate(given)}
    with pytest.raises(MergeError, match=reason):
        plan_trunk(tiny("siglip"), members, pairs("siglip", 2), **options)


OTHER_TOWERS = {
    "width": ({"hidden_size": 32}, "has shape .* in image and .* in text"),
    "heads": (
        {"num_attention_heads": 2},
        "0.self_attn.[a-z_]*: the number of heads is 4 in image and 2 in text",
    ),
    "feed-forward width": ({"intermediate_size": 48}, "mlp.fc1.weight has shape"),
    "activation": ({"hidden_act": "relu"}, "block 0 computes .* in image and .*ReLU.* in text"),
}


@pytest.mark.parametrize("case", OTHER_TOWERS)
def test_towers_of_other_sizes_are_refused(case, tiny, pairs):
    changes, reason = OTHER_TOWERS[case]
    model = tiny("clip", text=changes)
    with pytest.raises(MergeError, match=reason):
        plan_trunk(model, dict(zip(("image", "text"), LAYERS, strict=True)), pairs("clip", 2))


def test_data_without_one_modality_are_refused(tiny, pairs):
    examples = pairs("flava", 2)
    del examples["input_ids"]
    parts = dict(zip(("image", "text"), PLANNED["flava"][0], strict=True))
    with pytest.raises(MergeError, match=r"never reach text_model.* of member 'text': they have"):
        plan_trunk(tiny("flava"), parts, examples)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("input_ids", torch.full((2, 8), 99), "index out of range"),
        ("pixel_values", torch.randn(2, 3, 16, 16), "must match"),
    ],
)
def test_data_that_the_model_cannot_read_are_refused(name, value, reason, tiny, pairs):
    """Words of another vocabulary, pictures of another size."""
    examples = {**pairs("siglip", 2), name: value}
    with pytest.raises(MergeError, match=f"SiglipModel does not run on .*{reason}"):
        plan_trunk(tiny("siglip"), dict(zip("ab", LAYERS, strict=True)), examples)


def test_blocks_in_another_order_are_refused(tiny, pairs):
    members = {"a": Member(part=LAYERS[0], layers=[1, 0]), "b": LAYERS[1]}
    reason = r"is 1\.layer_norm1 in a and 0\.layer_norm1 in b: .* in which they run"
    with pytest.raises(MergeError, match=reason):
        plan_trunk(tiny("siglip"), members, pairs("siglip", 2))


def test_a_part_of_a_block_merges_and_turns_no_stream(tiny, pairs):
    """The attention of one block beside that of another: nothing but its heads may turn."""
    members = {
        name: f"{part}.{i}.self_attn"
        for i, (name, part) in enumerate(zip("ab", LAYERS, strict=True))
    }
    plan = plan_trunk(tiny("siglip"), members, pairs("siglip", 2))
    assert {n.partition(".")[0] for n in plan.names} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    with pytest.raises(MergeError, match="cannot turn"):
        plan_trunk(tiny("siglip"), members, pairs("siglip", 2), turn=True)


def test_a_part_that_the_model_uses_twice_is_refused():
    torch.manual_seed(0)
    model = AlbertModel(
        AlbertConfig(
            vocab_size=30, embedding_size=8, hidden_size=12, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=16, num_hidden_groups=2, inner_group_num=1,
        )
    ).eval()  # fmt: skip
    model.config.num_hidden_layers = 4
    groups = "encoder.albert_layer_groups"
    with pytest.raises(MergeError, match="times in a pass"):
        plan_trunk(
            model,
            {"a": f"{groups}.0.albert_layers.0", "b": f"{groups}.1.albert_layers.0"},
            {"input_ids": torch.randint(2, 30, (2, 6))},
        )


def test_a_part_that_is_tied_already_is_refused(tiny, pairs):
    model = tiny("siglip")
    blocks = [model.get_submodule(f"{part}.0.mlp.fc1") for part in LAYERS]
    blocks[1].weight = blocks[0].weight
    with pytest.raises(MergeError, match=r"overlap|is the same weight as"):
        plan_trunk(model, dict(zip(("image", "text"), LAYERS, strict=True)), pairs("siglip", 2))


def test_layers_say_what_goes_with_what(tiny, pairs):
    """Blocks 0 and 2 of three stand for the two of the other tower; block 1 stays."""
    model = tiny("siglip", vision={"num_hidden_layers": 3})
    plan = plan_trunk(
        model,
        {"image": Member(part=LAYERS[0], layers=[0, 2]), "text": LAYERS[1]},
        pairs("siglip", 2),
    )
    assert plan.parts["image"].names["1.mlp.fc1.weight"] == f"{LAYERS[0]}.2.mlp.fc1.weight"


def test_names_say_what_a_prefix_is_called(tiny, pairs):
    """Members of two checkpoints whose layers have other names."""
    examples = {"one": pairs("siglip", 2), "two": pairs("flava", 2)}
    of_flava = {
        "attention.attention.query": "self_attn.q_proj",
        "attention.attention.key": "self_attn.k_proj",
        "attention.attention.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "layernorm_before": "layer_norm1",
        "layernorm_after": "layer_norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    image = Member(part=LAYERS[0], checkpoint="one")
    other = Member(part="image_model.encoder.layer", checkpoint="two", names=of_flava)
    models = {"one": tiny("siglip", vision={"hidden_act": "gelu"}), "two": tiny("flava")}
    plan = plan_trunk(models, {"a": image, "b": other}, examples)
    assert len(plan.names) + len(plan.own) == 2 * 16
    assert not plan.left["a"]


def test_a_plan_looks_at_any_module(tiny):
    """No class of transformers is needed."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in "ab"
            )

        def forward(self, x):
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    plan = plan_trunk(Two(), {"a": "a", "b": "b"}, {"x": torch.randn(3, 6)})
    assert plan.num_parameters == (2 * 123, 123)


@pytest.mark.slow
def test_two_towers_of_base_size_are_planned_in_seconds_and_merged_in_little_memory():
    """12 layers at width 768: 5 s, and below 12 GB in a process of its own."""
    code = "import json; from benchmarks.towers.scale import measure\n"
    code += "print(json.dumps(measure('average')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["plan"]["cpu_seconds"] < 5
    assert found["average"]["peak_gb"] < 12
