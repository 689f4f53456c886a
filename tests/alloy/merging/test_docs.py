"""`docs/methods.md` says of every method what the registry says."""

import re
from pathlib import Path

from alloy.merging import MERGE_METHODS

DOCS = Path(__file__).parents[3] / "docs" / "methods.md"


def test_the_table_has_every_method_with_its_options():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| .*? \| .*? \|$", DOCS.read_text(), re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(dict.fromkeys(name for name, *_ in rows))
    assert {name for name, *_ in rows} == set(MERGE_METHODS)
    for name, formula, needs in rows:
        spec = MERGE_METHODS[name]
        options = re.findall(r"`(\w+)`", formula.partition("options: ")[2])
        assert sorted(options) == sorted(spec.options), name
        assert ("base" in needs) == (spec.base != "unused"), name
        assert ("Gram" in needs or "Fisher" in needs) == (spec.statistics is not None), name
