"""A mean over seeds has the error of that mean; of one seed it is the value with its own error."""

from dataclasses import dataclass

import pytest

from tasks.reports.means import mean, means


@dataclass
class Row:
    name: str
    value: float
    standard_error: float = 0.5


def test_one_value_is_its_own_mean_with_its_own_error():
    assert mean([3.0], 0.5) == (3.0, 0.5, None)
    assert mean([3.0], 0.5).shown(1) == "3.0 ± 0.5"


def test_of_several_the_spread_is_the_standard_deviation_and_the_error_that_of_the_mean():
    value, error, spread = mean([1.0, 2.0, 3.0], 99.0)
    assert (value, spread) == (2.0, 1.0)
    assert error == pytest.approx(3**-0.5)
    assert mean([1.0, 2.0, 3.0]).shown(2) == "2.00 ± 1.00"


def test_rows_of_equal_keys_are_averaged_in_the_order_in_which_the_keys_come():
    rows = [Row("b", 1.0), Row("a", 5.0), Row("b", 3.0)]
    found = means(rows, lambda row: (row.name,))
    assert list(found) == [("b",), ("a",)]
    assert found["b",].value == 2.0
    assert found["a",] == (5.0, 0.5, None)
