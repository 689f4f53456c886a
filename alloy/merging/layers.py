"""Tensors that form a layer."""

import re

_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def layer_of(name: str) -> str:
    """A name up to its first number (`encoder.layer.3`): tensors that share it are one layer.

    A tensor without a number is a layer by itself.
    """
    numbered = _NUMBERED.match(name)
    return numbered.group() if numbered else name
