"""Labels of members whose heads would be averaged: they must mean the same things."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from alloy.errors import MergeError
from tasks.recipe.models import ModelsRecipe

LABELLED = ("Classification", "Detection", "Segmentation")  # in names of classes with labels
PLAIN = "label {}".format  # of an output that nobody gave a name


def refuse_labels(
    recipe: ModelsRecipe, name: str, configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse to average heads whose outputs mean different things.

    Labels of the same words count as the same, however they are spelt; `LABEL_0` says nothing.

    Args:
        name: of the set.
        configs: of its members.

    Raises:
        MergeError: members of other labels, or of the same in another order, whose heads would be
            averaged.
    """
    entry = recipe.sets[name]
    tails = any("until" in own.settings for own in recipe.alignments(name).values())
    if entry.heads or entry.kept or tails:
        return
    named = {member: words for member, config in configs.items() if (words := labels(config))}
    for (first, ours), (second, theirs) in combinations(named.items(), 2):
        for why in _differences(first, ours, second, theirs):
            raise MergeError(
                f"set {name!r}: {why}: their heads would be averaged. Let each keep its own "
                "(`heads: [head]`, or patterns of its tensors), or the first member's stay "
                "(`kept: [head]`)"
            )


def labels(config: Mapping[str, Any]) -> list[str]:
    """The words for each output of a model; none of one without labels."""
    kind, id2label = " ".join(config.get("architectures") or ()), config.get("id2label") or {}
    if not any(word in kind for word in LABELLED):
        return []
    words = [str(id2label[key]) for key in sorted(id2label, key=int)]
    return [word.casefold().replace("_", " ").strip() for word in words]


def _differences(first: str, ours: list[str], second: str, theirs: list[str]) -> Iterator[str]:
    if len(ours) != len(theirs):
        yield f"{first!r} has {len(ours)} labels and {second!r} {len(theirs)}"
    elif ours == theirs or any(own == list(map(PLAIN, range(len(own)))) for own in (ours, theirs)):
        return
    elif sorted(ours) == sorted(theirs):
        word = next(word for word, other in zip(ours, theirs, strict=True) if word != other)
        yield (
            f"{first!r} and {second!r} number the same labels differently ({word!r} is "
            f"{ours.index(word)} and {theirs.index(word)})"
        )
    else:
        i = next(i for i, word in enumerate(ours) if word != theirs[i])
        yield f"label {i} is {ours[i]!r} of {first!r} and {theirs[i]!r} of {second!r}"
