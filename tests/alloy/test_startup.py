"""Main programs look for garbage rarely; whoever imports the library keeps their own habits."""

import subprocess
import sys

import pytest

SAYS = """
import {module}, gc

class Cycle:
    def __init__(self):
        self.own = self
    def __del__(self):
        print("visited at the end")

print(gc.get_threshold() == (700, 10, 10))
cycle = Cycle()
del cycle
"""


@pytest.mark.parametrize(("module", "spared"), [("alloy", False), ("tasks", True)])
def test_garbage_is_not_sought_at_the_end_of_stages_and_flows(module, spared):
    said = subprocess.run(
        [sys.executable, "-c", SAYS.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said == (["False"] if spared else ["True", "visited at the end"])
