"""Errors inside a rule fail the tests instead of pinning what the operation touches."""

import pytest

from alloy.symmetry.tracing.engine import RAISE_FAULTS


@pytest.fixture(autouse=True)
def _raise_faults():
    token = RAISE_FAULTS.set(True)
    yield
    RAISE_FAULTS.reset(token)
