"""The ends of error messages."""

from alloy.errors import MOST_NAMES, nearest


def test_the_nearest_name_and_all_names_are_said_but_never_thousands() -> None:
    assert nearest("tise", ["ties", "linear"]) == (
        "did you mean 'ties'? choose one of ['linear', 'ties']"
    )
    names = [f"model.layers.{i}.weight" for i in range(5000)]
    said = nearest("model.layer.7.weight", names)
    assert said.startswith("did you mean 'model.layers.7.weight'? choose one of [")
    assert said.endswith(f"] and {5000 - MOST_NAMES:,} more")
    assert len(said) < 40 * MOST_NAMES
