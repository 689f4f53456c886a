"""Laws that tests of the modality transformer share."""

import torch

from alloy.modality.streams import towers
from alloy.symmetry import random_transforms, with_kind

STREAM = "writer.weight[0]"
SHORT = {"steps": 5, "max_rounds": 1}


def drawn(model, seed: int = 0) -> dict:
    """A random element of every expert's group; l keeps its stream."""
    generator = torch.Generator().manual_seed(seed)
    transforms = {
        modality: random_transforms(with_kind(tower.spec, "orthogonal"), generator)
        for modality, tower in towers(model).items()
    }
    del transforms["l"][STREAM]
    return transforms


@torch.no_grad()
def outputs(model, inputs):
    return {name: value for name, value in model(**inputs).items() if name != "joint_states"}


def assert_same_function(one, other, inputs, **tolerance):
    ours, theirs = outputs(one, inputs), outputs(other, inputs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, **tolerance)
