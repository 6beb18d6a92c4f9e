"""Densities of known spectra: where the mass lies, that outliers stand apart, and that the stated error covers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance
from spectra import Floats, clustered, diagonal, fresh, marchenko_pastur, normal

from workbench.numerics.density import SpectralDensity, grid_length, sampling_error, spectral_density
from workbench.numerics.krylov import Krylov, lanczos


def run(eigenvalues: Floats, seed: int = 0, top: int = 4, bottom: int = 1) -> Krylov:
    operator = diagonal(eigenvalues)
    words = {"top": top, "bottom": bottom, "least": 30, "near_zero": 0.05, "fresh": fresh(operator.size, seed)}
    return list(lanczos(operator, normal(operator.size, seed), **words))[-1]


def density(eigenvalues: Floats, seed: int = 0, **words: int) -> SpectralDensity:
    return spectral_density(run(eigenvalues, seed, **words), len(eigenvalues), 0.02)


@pytest.mark.parametrize(
    "truth",
    [clustered(), marchenko_pastur(400), np.linspace(-1, 1, 300), np.r_[np.zeros(200), np.linspace(0, 1, 60)]],
    ids=["outliers", "Marchenko-Pastur", "flat", "half of it zero"],
)
def test_the_stated_error_covers_the_truth(truth: Floats) -> None:
    covered = 0
    for seed in range(30):
        found = density(truth, seed)
        covered += wasserstein_distance(found.measure.nodes, truth, found.measure.weights) <= found.error
        assert found.measure.weights.sum() == pytest.approx(1)
    assert covered >= 28


def test_far_outliers_stand_apart_and_leave_the_bulk_sharp() -> None:
    bulk = marchenko_pastur(1000)
    for far in (10.0, 1e4):
        found = density(np.r_[bulk, 3 * far, 2 * far, 1.5 * far])
        assert found.atoms[:3] == pytest.approx([3 * far, 2 * far, 1.5 * far])
        assert found.width < 0.2
        inside = (found.grid > bulk[0] - 3 * found.width) & (found.grid < bulk[-1] + 3 * found.width)
        assert np.trapezoid(found.density[inside], found.grid[inside]) == pytest.approx(1000 / 1003, abs=0.02)
        at_one = float(np.interp(1.0, found.grid, found.density))
        assert at_one == pytest.approx(0.42108440, rel=0.1)  # of the law itself


def test_the_grid_catches_all_of_the_mass() -> None:
    for truth in (clustered(), marchenko_pastur(300), np.r_[-50.0, np.zeros(99), 1.0, 7.0]):
        found = density(truth)
        assert len(found.grid) == grid_length(5)
        assert np.all(np.diff(found.grid) >= 0)
        assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=5e-3)


def test_a_complete_run_is_exact() -> None:
    truth = np.sort(np.random.default_rng(0).normal(size=20))
    found = density(truth)
    assert found.measure.nodes == pytest.approx(truth)
    assert found.measure.weights == pytest.approx(1 / 20)
    assert found.error == 0


def test_sampling_errors_are_those_of_random_starts() -> None:
    truth, rng = np.sort(clustered()), np.random.default_rng(0)
    distances = []
    for _ in range(200):
        squares = rng.normal(size=truth.size) ** 2
        distances.append(wasserstein_distance(truth, truth, squares / squares.sum()))
    stated = sampling_error(truth, np.full(truth.size, 1 / truth.size), truth.size)
    assert np.mean(distances) == pytest.approx(stated / 2 * np.sqrt(2 / np.pi), rel=0.1)
    assert np.mean(np.array(distances) < stated) > 0.97
