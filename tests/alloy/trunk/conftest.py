"""Tiny models with two towers, and what they read."""

import pytest

from tests import two_towers


@pytest.fixture
def tiny():
    """Make a tiny model of a kind."""
    return two_towers.model


@pytest.fixture
def pairs():
    """Make examples of a kind's inputs."""
    return two_towers.examples
