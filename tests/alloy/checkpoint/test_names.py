"""Names of a checkpoint in another: the smallest change of prefixes that places all of them."""

import pytest

from alloy.checkpoint.names import find_renamings, renamed

BODY = {
    "model.embed_tokens.weight": (40, 24),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(12)
        for name, shape in {
            "input_layernorm.weight": (24,),
            "mlp.up_proj.weight": (48, 24),
            "self_attn.q_proj.weight": (24, 24),
        }.items()
    },
    "model.norm.weight": (24,),
    "lm_head.weight": (40, 24),
}
TOWER = {
    f"vision_tower.encoder.layers.{i}.{name}": shape
    for i in range(12)
    for name, shape in {
        "layer_norm1.weight": (24,),
        "mlp.fc1.weight": (48, 24),
        "self_attn.q_proj.weight": (24, 24),
    }.items()
} | {"multi_modal_projector.linear_1.weight": (24, 24), "vision_tower.norm.weight": (24,)}


def found(names, targets):
    return find_renamings(list(names), targets, lambda n, t: names[n] == targets[t])


@pytest.mark.parametrize(
    "prefixes",
    [
        {"": "language_model."},
        {"model.": "model.language_model."},
        {"model.": "model.text_model."},
        {"model.": ""},
        {"model.": "language_model.model.", "lm_head.": "decoder.lm_head."},
    ],
)
def test_planted_prefixes_come_back(prefixes):
    """A language model within another, beside a tower of the same sizes and the same tails."""
    planted = {name: renamed(name, prefixes) for name in BODY}
    targets = TOWER | {planted[name]: shape for name, shape in BODY.items()}
    (only,) = found(BODY, targets)
    assert only.names == planted
    assert {name: renamed(name, only.prefixes) for name in BODY} == planted


def test_two_places_are_two_answers():
    names = {"layers.0.mlp.weight": (4, 4), "layers.1.mlp.weight": (4, 4)}
    targets = {f"{tower}.{name}": s for tower in ("text", "image") for name, s in names.items()}
    assert len(found(names, targets)) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"body.layers.0.mlp.weight": (4, 5), "body.layers.1.mlp.weight": (4, 4)},
        {"body.layers.0.mlp.weight": (4, 4)},
        {"body.layers.1.mlp.weight": (4, 4), "body.layers.2.mlp.weight": (4, 4)},
        {"body.layers.0.other.weight": (4, 4), "body.layers.1.other.weight": (4, 4)},
    ],
)
def test_nothing_is_forced(changed):
    """Another shape, a layer that is missing, layers counted from 1, another leaf."""
    names = {"layers.0.mlp.weight": (4, 4), "layers.1.mlp.weight": (4, 4)}
    assert found(names, changed) == []


def test_the_longest_prefix_decides():
    prefixes = {"": "a.", "model.": "b.", "model.layers.": "c."}
    assert [renamed(n, prefixes) for n in ("x", "model.x", "model.layers.x")] == [
        "a.x",
        "b.x",
        "c.x",
    ]
