"""Adaptive sampling against planes, known surfaces on a fine lattice, planted NaN and Inf, and its own stated error."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_allclose

from workbench.numerics.adaptive import Sampler, farthest_first

TICKS = np.linspace(-1, 1, 65)
U, V = np.meshgrid(TICKS, TICKS, indexing="ij")
Surface = Callable[[np.ndarray, np.ndarray], np.ndarray]


def bowl(u, v):
    """A sharp minimum 0.01 high, with ripples."""
    return 0.01 + 3 * (u**2 + v**2) + 0.02 * (np.sin(9 * u) * np.cos(7 * v)) ** 2


def valley(u, v):
    """Curvatures 100 and 1, turned by half a radian."""
    across, along = u * np.cos(0.5) + v * np.sin(0.5), v * np.cos(0.5) - u * np.sin(0.5)
    return 0.02 + 50 * across**2 + 0.5 * along**2


def cliff(u, v):
    """A saddle, and a step by the factor e³ across a slanted line."""
    return np.exp(u**2 - v**2 + 3 / (1 + np.exp(-40 * (u + 0.4 * v - 0.5))))


def fill(sampler: Sampler, surface: Surface, until: int, batch: int = 4) -> list[tuple[int, float, float]]:
    """Ask and tell; the number of points, the true and the stated relative error of log-loss after each batch."""
    exact, seen = np.log(surface(U, V)), []
    while len(sampler) < until:
        points = sampler.ask(batch)
        sampler.tell(points, surface(*points.T))
        if len(sampler) >= 9:
            missed = np.log(sampler.surface(TICKS, TICKS)[0]) - exact
            seen.append((len(sampler), float(np.sqrt(np.mean(missed**2)) / exact.std()), sampler.error))
    return seen


def test_the_coarse_grid_comes_first_and_the_first_nine_points_already_span_the_plane():
    points = Sampler((0.0, 6.0), (-3.0, 3.0), lattice=61).ask(49)
    assert points[0].tolist() == [3.0, 0.0]
    assert {tuple(p) for p in points[:9]} == {(u, v) for u in (0.0, 3.0, 6.0) for v in (-3.0, 0.0, 3.0)}
    assert {tuple(p) for p in points} == {(u, v - 3.0) for u in np.arange(7.0) for v in np.arange(7.0)}
    assert sorted(farthest_first(np.array([0, 2]), 3)) == [0, 2, 6, 8]


@pytest.mark.parametrize(
    ("surface", "scale"),
    [(lambda u, v: np.exp(1 + 2 * u - 3 * v), "log"), (lambda u, v: 1 + 2 * u - 3 * v, "linear")],
)
def test_planes_are_exact_from_three_points_on_and_end_the_sampling(surface, scale):
    sampler = Sampler((-1.0, 3.0), (0.0, 0.5), limit=400)
    sampler.tell(sampler.ask(9), surface(*sampler.ask(9).T))
    u, v = np.linspace(-1, 3, 13), np.linspace(0, 0.5, 6)
    values, apart = sampler.surface(u, v)
    assert_allclose(values, surface(u[:, None], v[None, :]), rtol=1e-9, atol=1e-9)
    assert apart.max() < 1e-9
    assert sampler.scale == scale
    while not sampler.done:
        points = sampler.ask(5)
        sampler.tell(points, surface(*points.T))
    assert len(sampler) <= 50, "a plane needs nothing beyond the coarse grid"
    assert sampler.error < 1e-9


def test_samples_are_met_exactly_and_points_lie_on_the_lattice_once():
    sampler = Sampler()
    fill(sampler, valley, 120, batch=7)
    told = np.round((sampler.ask(3) + 1) * 32, 9)
    assert (told == np.round(told)).all()
    assert len(sampler) >= 120, "no point was asked for twice, or the number of points would not have grown"
    again = Sampler()
    asked = [p for _ in range(17) for p in told_once(again, valley, 7)]
    assert len({tuple(p) for p in asked}) == len(asked) == 119
    for u, v in asked[::10]:
        assert again.surface([u], [v])[0][0, 0] == pytest.approx(valley(u, v), rel=1e-8)


def told_once(sampler: Sampler, surface: Surface, count: int) -> np.ndarray:
    points = sampler.ask(count)
    sampler.tell(points, surface(*points.T))
    return points


def test_the_same_answers_lead_to_the_same_questions_also_after_an_interruption():
    whole, resumed = Sampler(), Sampler()
    batches = [told_once(whole, cliff, 5) for _ in range(16)]
    for points in batches[:11]:
        resumed.tell(points, cliff(*points.T))
    assert (resumed.ask(5) == resumed.ask(5)).all()
    for points in batches[11:]:
        assert (told_once(resumed, cliff, 5) == points).all()
    assert resumed.error == whole.error


@pytest.mark.parametrize(
    ("surface", "points", "error", "uniform"),
    [(bowl, 81, 0.01, 0.122), (valley, 169, 0.04, 0.0638), (cliff, 200, 0.03, 0.0637)],
)
def test_it_converges_where_uniform_grids_need_more(surface, points, error, uniform):
    """``uniform``: the error of bicubic interpolation on 9 × 9 (bowl) or 17 × 17 points of the same surface."""
    *_, (count, true, _) = fill(Sampler(limit=400), surface, points)
    assert count <= points + 3
    assert true < error < uniform


def test_the_stated_error_covers_the_true_one_nearly_always_and_is_not_idle():
    rows = [
        row
        for surface in (bowl, valley, cliff)
        for batch in (1, 4)
        for row in fill(Sampler(limit=400), surface, 150, batch)
    ]
    ratios = np.array([stated / true for n, true, stated in rows if n >= 25])
    assert np.isfinite(ratios).all()
    assert (ratios >= 1).mean() > 0.8
    assert np.quantile(ratios, 0.05) > 0.5
    assert 1 < np.median(ratios) < 3


def test_it_stops_at_the_stated_error_and_at_the_number_of_points():
    sampler = Sampler(tolerance=0.05, limit=400)
    while not sampler.done:
        told_once(sampler, bowl, 4)
    exact = np.log(bowl(U, V))
    missed = np.log(sampler.surface(TICKS, TICKS)[0]) - exact
    assert sampler.error <= 0.05
    assert np.sqrt(np.mean(missed**2)) <= 0.05 * exact.std()
    assert 49 <= len(sampler) < 120
    fill(short := Sampler(limit=60, tolerance=0.0), bowl, 60)
    assert short.done


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_marks_its_neighbourhood_and_nothing_else(bad):
    def holed(u, v):
        return np.where(u + v > 0.9, bad, bowl(u, v))

    sampler = Sampler(limit=400)
    asked = np.concatenate([told_once(sampler, holed, 5) for _ in range(24)])
    values, apart = sampler.surface(TICKS, TICKS)
    hole, known = U + V > 0.9, np.isfinite(values)
    assert (np.isnan(apart) == ~known).all()
    assert (known == hole).mean() < 0.05, "the unknown region is the hole, up to the cells on its edge"
    missed = np.log(values[known & ~hole] / bowl(U, V)[known & ~hole])
    assert np.sqrt(np.mean(missed**2)) < 0.02 * np.log(bowl(U, V)).std()
    assert math.isfinite(sampler.error)
    assert (~np.isfinite(holed(*asked[49:].T))).mean() < 0.3, "few of the later points are wasted inside the hole"


def test_nothing_finite_and_almost_nothing_break_nothing():
    sampler = Sampler()
    sampler.tell(points := sampler.ask(49), np.full(49, np.nan))
    assert sampler.ask(4).shape == (0, 2)
    assert sampler.done
    assert math.isnan(sampler.error)
    assert np.isnan(sampler.surface(TICKS, TICKS)[0]).all()
    sampler.tell(points[:3], [1.0, 2.0, 3.0])
    assert not np.isfinite(sampler.surface(TICKS, TICKS)[0]).all()
    flat = Sampler()
    told_once(flat, lambda u, v: 2.0 + 0 * u, 9)
    told_once(flat, lambda u, v: 2.0 + 0 * u, 40)
    assert flat.error < 1e-6
    assert flat.done


def test_a_value_that_is_not_positive_changes_the_scale_for_good():
    sampler = Sampler(limit=400)
    told_once(sampler, bowl, 49)
    assert sampler.scale == "log"
    sampler.tell(sampler.ask(1), [0.0])
    assert sampler.scale == "linear"
    assert math.isnan(sampler.error), "misses in logarithms say nothing about the new scale"
    told_once(sampler, bowl, 10)
    assert math.isfinite(sampler.error)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="coarse=9, lattice=5"):
        Sampler(coarse=9, lattice=5)
    with pytest.raises(ValueError, match="low before high"):
        Sampler(v_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="points that ask returned"):
        Sampler().tell([[0.01, 0.0]], [1.0])
    with pytest.raises(ValueError, match="2 points, 1 values"):
        Sampler().tell([[0.0, 0.0], [1.0, 1.0]], [1.0])
