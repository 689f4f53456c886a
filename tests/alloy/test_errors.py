"""The ends of error messages."""

from alloy.errors import MOST_NAMES, most_alike, nearest, nearest_tensors


def test_the_nearest_name_and_all_names_are_said_but_never_thousands() -> None:
    assert nearest("tise", ["ties", "linear"]) == (
        "did you mean 'ties'? choose one of ['linear', 'ties']"
    )
    names = [f"model.layers.{i}.weight" for i in range(5000)]
    said = nearest("model.layer.7.weight", names)
    assert said.startswith("did you mean 'model.layers.7.weight'? choose one of [")
    assert said.endswith(f"] and {5000 - MOST_NAMES:,} more")
    assert len(said) < 40 * MOST_NAMES


def test_a_pattern_that_matches_no_tensor_gets_the_three_nearest() -> None:
    """By its letters, in whatever layer; one name stands for all layers."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(2500) for part in parts]
    names += ["model.embed_tokens.weight", "lm_head.weight"]
    for pattern, nearest_one in {
        "*atn.q_proj*": "model.layers.0.self_attn.q_proj.weight",
        "*layrnorm*": "model.layers.0.input_layernorm.weight",
        "model.layer.7.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight",
        "lm_haed.*": "lm_head.weight",
    }.items():
        alike = most_alike(pattern, names)
        assert alike[0] == nearest_one, alike
        assert len(alike) == 3
    said = nearest_tensors("*atn.q_proj*", names)
    assert said.startswith("of 10,002 the nearest are ['model.layers.0.self_attn.q_proj.weight', ")
    assert nearest_tensors("x", ["b", "a"]) == "the tensors are ['a', 'b']"
