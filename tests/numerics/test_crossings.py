"""Crossings against a plain loop, and the definition's own example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.numerics.crossings import Crossing, below_geometric_mean, ratio, sustained


def test_the_definitions_example() -> None:
    steps = [1, 100, 200, 1000, 5000, 20000, 30000, 40000, 50000]
    train = [0.1, 0.5, 0.995, 1, 1, 1, 1, 1, 1]
    test = [0.1, 0.1, 0.1, 0.1, 0.3, 0.992, 1, 1, 1]
    first, second = sustained(steps, train, 0.99), sustained(steps, test, 0.99)
    assert (first.step, second.step) == (200, 20000)
    assert (first.earliest, second.earliest) == (101, 5001)
    value, error = ratio(first, second)
    assert value == 100
    assert error == pytest.approx(20000 / 101 - 100)


scores = st.lists(st.sampled_from([0.2, 0.985, 0.99, 1.0, math.nan]), min_size=1, max_size=12)


@given(values=scores, gaps=st.lists(st.integers(1, 9), min_size=12, max_size=12))
def test_sustained_is_a_plain_loop(values: list[float], gaps: list[int]) -> None:
    steps = np.cumsum(gaps[: len(values)])
    pairs = [(int(s), v) for s, v in zip(steps, values, strict=True) if v == v]
    wanted = math.nan
    for i, (step, value) in enumerate(pairs):
        if value >= 0.99 and all(later >= 0.98 for _, later in pairs[i + 1 : i + 4]):
            wanted = step
            break
    found = sustained(steps, values, 0.99)
    assert found.step == wanted or (math.isnan(found.step) and math.isnan(wanted))
    if found.step == found.step:
        assert found.earliest <= found.step


@given(start=st.floats(1e-3, 1e3), end=st.floats(1e-3, 1e3), scale=st.floats(1e-3, 1e3))
def test_a_loss_is_half_way_down_on_a_log_axis_whatever_its_unit(start: float, end: float, scale: float) -> None:
    steps = np.arange(41)
    losses = start * (end / start) ** (steps / 40)
    found = below_geometric_mean(steps, losses * scale)
    if end < start * (1 - 1e-6):
        assert found.step in (20, 21)
    elif end > start:
        assert math.isnan(found.step)


def test_what_never_crosses_is_unknown_and_never_the_last_step() -> None:
    assert math.isnan(sustained([1, 2, 3], [0.1, 0.2, 0.3], 0.99).step)
    assert math.isnan(sustained([1, 2, 3], [1.0, 0.2, 0.3], 0.99).step), "not sustained"
    assert sustained([1, 2, 3], [0.1, 1.0, 1.0], 0.99) == Crossing(2.0, 2.0, 1)
    assert all(map(math.isnan, ratio(Crossing(2, 2, 3), Crossing())))
    assert math.isnan(below_geometric_mean([1, 2], [1.0, math.inf]).step)
    with pytest.raises(ValueError, match="ascending steps"):
        sustained([2, 1], [0.0, 0.0], 0.5)
