"""Persistence against hand-made curves, a flood filled level by level, and laws that hold for any samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from workbench.numerics.persistence import excess_variation, persistence

CURVE = (0.0, 3.0, 1.0, 4.0, 2.0, 5.0)
grids = hnp.arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(0, 9).map(float))


def test_a_curve_with_three_basins() -> None:
    found = persistence(CURVE)
    assert found.birth.tolist() == [0, 1, 2]
    assert found.death.tolist() == [5, 3, 4]
    assert found.place.tolist() == [[0], [2], [4]]
    assert found.saddle.tolist() == [3, 3, 4]
    assert found.saddle_minimum_distance == pytest.approx(7 / 3)
    assert [found.count(t) for t in (0.0, 2.0, 2.5, 9.0)] == [3, 3, 1, 0]
    assert excess_variation(CURVE) == pytest.approx(1.6)


def basins_below(grid: np.ndarray, level: float, structure: np.ndarray) -> int:
    """Connected pieces of the samples at or below a level, counted by an image library."""
    return int(ndimage.label(grid <= level, structure=structure)[1])


@pytest.mark.parametrize("diagonal", [True, False])
@given(grid=grids)
def test_at_every_level_as_many_basins_live_as_there_are_pieces(diagonal: bool, grid: np.ndarray) -> None:
    structure = np.ones((3, 3)) if diagonal else ndimage.generate_binary_structure(2, 1)
    found = persistence(grid, diagonal=diagonal)
    for level in np.unique(grid):
        dead = np.where(np.arange(found.birth.size) == 0, math.inf, found.death)
        assert ((found.birth <= level) & (dead > level)).sum() == basins_below(grid, level, structure)


@given(grid=grids, shift=st.integers(-5, 5), scale=st.integers(1, 4))
def test_lifetimes_follow_the_scale_and_ignore_the_offset(grid: np.ndarray, shift: int, scale: int) -> None:
    assert np.array_equal(persistence(scale * grid + shift).lifetime, scale * persistence(grid).lifetime)


def test_holes_are_no_part_of_the_domain_and_are_counted() -> None:
    found = persistence([[0.0, math.nan, 1.0], [2.0, math.inf, 3.0]])
    assert found.holes == 2
    assert found.birth.tolist() == [0, 1]
    assert found.death.tolist() == [3, 3], "neither of two separate domains dies"
    assert persistence([math.nan, math.inf]).birth.size == 0
    with pytest.raises(ValueError, match=r"got \(1, 1, 1\)"):
        persistence([[[0.0]]])


@given(st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=12))
def test_a_curve_is_rough_exactly_when_it_has_more_than_one_basin(values: list[float]) -> None:
    rough = excess_variation(values)
    if max(values) == min(values):
        assert math.isnan(rough)
    else:
        assert (rough > 1e-12) == (persistence(values).count(1e-12) > 1)
