"""Axes that met their data: transforms, limits, thresholds, ticks and levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.draw.rulers import Ruler, contour_levels, ruler
from workbench.figure import Axis

SCALES = st.sampled_from(["linear", "log", "symlog"])
NUMBERS = st.floats(-1e12, 1e12).filter(lambda v: v == 0 or abs(v) > 1e-12)


@given(scale=SCALES, values=st.lists(NUMBERS, min_size=1), threshold=st.floats(1e-6, 1e3))
def test_forward_has_an_inverse_and_keeps_order(scale, values, threshold):
    r = Ruler(scale, 1.0, 2.0, threshold)
    v = np.unique(values)
    u = r.forward(v)
    shown = np.isfinite(u)
    assert np.array_equal(shown, v > 0 if scale == "log" else np.ones(v.size, dtype=bool))
    np.testing.assert_allclose(r.inverse(u[shown]), v[shown], rtol=1e-9, atol=1e-15)
    assert (np.diff(u[shown]) >= 0).all()


@given(values=st.lists(NUMBERS, min_size=1), threshold=st.floats(1e-6, 1e3))
def test_symlog_is_matplotlibs(values, threshold):
    from matplotlib.scale import SymmetricalLogTransform

    theirs = SymmetricalLogTransform(10, threshold, 1).transform(np.array(values)) / threshold
    np.testing.assert_allclose(Ruler("symlog", 0, 1, threshold).forward(values), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
def test_nothing_that_is_not_finite_is_shown_or_moves_the_limits(scale):
    values = [1.0, np.nan, np.inf, -np.inf, 8.0]
    r = ruler(Axis("loss", scale), [values])
    assert np.isfinite(r.forward(values)).tolist() == [True, False, False, False, True]
    assert (r.low, r.high) == pytest.approx((1.0, 8.0))


def test_a_logarithm_masks_what_is_not_positive_and_shifts_nothing():
    r = ruler(Axis("loss", "log"), [[-5.0, 0.0, 0.5, 50.0]])
    assert (r.low, r.high) == pytest.approx((0.5, 50.0))
    np.testing.assert_allclose(r.forward([-5.0, 0.0, 0.5, 50.0]), [np.nan, np.nan, np.log10(0.5), np.log10(50.0)])


def test_a_symlog_says_where_it_turns_linear():
    assert ruler(Axis("loss", "symlog", "nats", threshold=0.01), [[-3, 4]]).words() == "loss (nats), linear below 0.01"
    found = ruler(Axis("loss", "symlog"), [[-300.0, 0.0, 0.25]])
    assert found.threshold == pytest.approx(0.1)
    assert "linear below 0.1" in found.words()


@pytest.mark.parametrize("values", [[], [np.nan], [3.0, 3.0], [0.0], [-2.0], [1e-300]])
@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
def test_there_are_always_limits(scale, values):
    r = ruler(Axis("x", scale), [values], margin=0.05)
    low, high = r.span
    assert np.isfinite([low, high]).all()
    assert low < high
    assert np.isfinite(r.ticks()).all()


@given(scale=SCALES, low=st.floats(1e-6, 1e6), width=st.floats(0.01, 1e6), count=st.integers(3, 20))
def test_levels_are_even_and_cover_the_values(scale, low, width, count):
    r = ruler(Axis("x", scale), [[low, low * (1 + width)]])
    levels = contour_levels(r, count)
    start, end = r.span
    slack = 1e-6 * (end - start)
    assert levels[0] <= start + slack
    assert levels[-1] >= end - slack
    assert 2 <= levels.size <= count + 3
    np.testing.assert_allclose(np.diff(levels, 2), 0, atol=1e-6 * (levels[-1] - levels[0]))


@given(scale=SCALES, low=st.floats(1e-3, 1e3), width=st.floats(0.5, 1e6))
def test_ticks_are_inside_and_not_too_many(scale, low, width):
    r = ruler(Axis("x", scale), [[low, low * (1 + width)]])
    ticks = r.ticks()
    u, (start, end) = r.forward(ticks), r.span
    assert ((u >= start - 1e-6) & (u <= end + 1e-6 * max(1, abs(end)))).all()
    assert 2 <= ticks.size <= 14


@pytest.mark.parametrize(
    "axis",
    [Axis("x", "log", limits=(0.0, 1.0)), Axis("x", limits=(2.0, 1.0)), Axis("x", "symlog", threshold=-1.0)],
)
def test_limits_and_thresholds_that_cannot_be_are_refused(axis):
    with pytest.raises(ValueError, match="'x'"):
        ruler(axis, [[1.0]])
