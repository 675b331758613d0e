"""How errors are measured, and what cannot pass for a small one."""

import math

import numpy as np

from parity.check.tolerances import first_position, flips, relative


def test_an_error_is_relative_to_the_size_of_the_truth() -> None:
    truth = np.array([[3.0, -4.0], [0.0, 5.0]])
    assert relative(truth, truth) == 0
    assert math.isclose(relative(1.01 * truth, truth), 0.01)
    assert relative(1e6 * truth, 1e6 * truth + 1e-3) < 1e-9


def test_what_is_no_number_or_of_another_shape_is_no_small_error() -> None:
    truth = np.ones((2, 3))
    assert math.isnan(relative(np.full((2, 3), np.nan), truth))
    assert math.isnan(relative(np.ones((3, 2)), truth))
    assert relative(truth, np.zeros((2, 3))) == math.inf
    assert relative(np.zeros(3), np.zeros(3)) == 0


def test_the_first_position_over_budget_is_named() -> None:
    truth = np.ones((2, 5, 3))
    found = truth.copy()
    found[1, 3, 2] += 1e-3
    found[0, 4] = np.nan
    assert first_position(found, truth, 1e-6) == 3
    assert first_position(found[:, :3], truth[:, :3], 1e-6) is None
    assert first_position(found[:, 4:], truth[:, 4:], 1e-6) == 0, "no number is over any budget"


def test_numbers_that_are_not_the_same_are_counted_whatever_their_size() -> None:
    """So that a channel a hundred times the others does not hide what happens to these."""
    a = np.array([1e4, 1.0, 2.0, 3.0])
    assert flips(a, a) == 0
    assert flips(a, np.array([1e4, 1.001, 2.0, 3.0])) == 0.25
    assert flips(a, 2 * a) == 1
    assert math.isnan(flips(a, np.array([math.inf, 1.0, 2.0, 3.0])))
    assert math.isnan(flips(a, a[:3]))
