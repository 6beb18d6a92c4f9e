"""The law of random entries: its density integrated by scipy, random matrices, planted spikes, what is not random."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pytest import approx
from scipy.integrate import quad

from workbench.numerics.marchenko_pastur import Floats, fit_random_bulk, random_bulk_density

SHAPES = [(500, 1000), (1000, 500), (300, 300), (64, 1024)]


def noise(rows: int, columns: int, std: float, seed: int) -> Floats:
    return np.random.default_rng([rows, columns, seed]).normal(0, std, (rows, columns))


def squares(matrix: Floats) -> Floats:
    return np.linalg.svd(matrix, compute_uv=False) ** 2


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_density_has_mass_one_and_the_moments_of_the_law(rows: int, columns: int) -> None:
    """Σx = Σ entries² and Σx² = tr (WᵀW)² fix both moments; the sine takes the edges' singular slope away."""
    std, (narrow, wide) = 0.3, sorted((rows, columns))
    low, high = ((math.sqrt(wide) - math.sqrt(narrow)) * std) ** 2, ((math.sqrt(wide) + math.sqrt(narrow)) * std) ** 2

    def moment(order: int) -> float:
        def height(angle: float) -> float:
            x = (low + high) / 2 + (high - low) / 2 * math.sin(angle)
            slope = (high - low) / 2 * math.cos(angle)
            return x**order * float(random_bulk_density(x, rows, columns, std)) * slope if x > 0 else 0.0

        return quad(height, -math.pi / 2, math.pi / 2, epsabs=0, limit=200)[0]

    assert moment(0) == approx(1, rel=1e-6)
    assert moment(1) == approx(std**2 * wide, rel=1e-6)
    assert moment(2) == approx(std**4 * wide * (wide + narrow), rel=1e-6)
    assert not random_bulk_density([0.99 * low - 1e-9, 1.01 * high], rows, columns, std).any()


def test_the_edges_of_a_thousand_by_five_hundred() -> None:
    found = fit_random_bulk(squares(noise(1000, 500, 0.02, 0)), 1000, 500)
    assert found is not None
    scale = found.std**2 * 1000
    assert (found.low / scale, found.high / scale) == approx((0.08578644, 2.91421356), rel=1e-6)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_random_entries_are_all_bulk(rows: int, columns: int) -> None:
    found = fit_random_bulk(squares(noise(rows, columns, 0.02, 0)), rows, columns)
    assert found is not None
    assert found.std == approx(0.02, rel=0.02)
    assert found.spikes == 0
    assert min(found.mass, found.norm) > 0.99
    assert found.misfit < 0.05


def test_spikes_are_counted_where_they_stand_out_of_the_noise() -> None:
    """A rank-one signal θ moves the largest value to (θ² + m)(θ² + n)/θ² once θ⁴ > m n (Benaych-Georges 2012)."""
    rows, columns, seen, hidden = 200, 300, np.array([40.0, 34.0, 28.0]), 8.0
    left, right = (np.linalg.qr(noise(n, 4, 1, 9))[0] for n in (rows, columns))
    values = squares(noise(rows, columns, 1, 1) + (left * [*seen, hidden]) @ right.T)
    found = fit_random_bulk(values, rows, columns)
    assert found is not None
    assert found.spikes == 3
    assert values[:3] == approx((seen**2 + rows) * (seen**2 + columns) / seen**2, rel=0.06)
    assert values[2] > found.threshold > found.high > values[4]
    assert found.std == approx(1, rel=0.02), "spikes widened the noise"
    assert found.mass == approx(1 - 3 / rows)
    assert found.norm == approx(values[3:].sum() / values.sum())


@pytest.mark.parametrize("blocks", [1, 4])
def test_chance_shows_a_spike_in_one_matrix_of_a_hundred(blocks: int) -> None:
    """Of 300 without signal 3 are to be expected, and 10 once in a thousand times; the edge itself is passed often."""
    spiked = passed = 0
    for seed in range(300):
        values = np.sort(np.r_[tuple(squares(noise(40, 60, 1, 1000 * block + seed)) for block in range(blocks))])
        found = fit_random_bulk(values, 40, 60, blocks)
        assert found is not None
        spiked += found.spikes > 0
        passed += values[-1] > found.high
    assert spiked <= 10
    assert passed > 30


def test_what_no_random_entries_give_is_told() -> None:
    heavy = fit_random_bulk(1 / np.linspace(0.01, 1, 200) ** 2, 200, 300)
    equal = fit_random_bulk(np.full(200, 300.0), 200, 300)
    assert heavy is not None
    assert equal is not None
    assert heavy.spikes > 50
    assert heavy.norm < 0.05
    assert equal.misfit > 0.5, "an orthogonal matrix is no random one"


@pytest.mark.parametrize(
    ("values", "rows"), [(np.ones(9), 9), (np.zeros(20), 20), (np.r_[np.ones(19), np.nan], 20)], ids=str
)
def test_there_is_no_law_of_narrow_or_empty_or_unknown_matrices(values: Floats, rows: int) -> None:
    assert fit_random_bulk(values, rows, 50) is None
