"""Pitfall 15: densities smoothed until the bulk is gone, collapse of absent classes, power laws of a few values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from spectra import Floats, diagonal, fresh, marchenko_pastur, normal
from torch import Tensor, nn

from workbench.numerics import quadrature as quad
from workbench.numerics.density import spectral_density
from workbench.numerics.krylov import lanczos
from workbench.numerics.power_law import fit_tail
from workbench.probes.collapse import NeuralCollapse
from workbench.probes.weight_spectra import WeightSpectra
from workbench.subject import Subject


@dataclass(frozen=True)
class Drawn:
    """A curve, and values that are drawn apart from it."""

    grid: Floats
    density: Floats
    apart: Floats


Density = Callable[[Floats], Drawn]
RATIO = 0.5
BULK = marchenko_pastur(1000, RATIO)
FAR = np.array([3e4, 2e4, 1.5e4])


def keeps_the_bulk(density: Density, outliers: Floats) -> None:
    """98 % of the bulk's mass lies where the bulk is (edges widened by a twentieth of it), outliers are drawn apart."""
    found = density(np.r_[BULK, outliers])
    edge = 0.05 * (BULK[-1] - BULK[0])
    inside = (found.grid >= BULK[0] - edge) & (found.grid <= BULK[-1] + edge)
    assert inside.sum() > 50, "the bulk is a point or two of the grid"
    mass = np.trapezoid(found.density[inside], found.grid[inside])
    assert mass == pytest.approx(len(BULK) / (len(BULK) + len(outliers)), abs=0.02), "mass left the bulk"
    assert found.apart[: len(outliers)] == pytest.approx(outliers), "outliers are not apart"


def has_the_law(density: Density) -> None:
    """Between its edges the curve is that of Marchenko and Pastur, to a tenth of its height in the mean."""
    found, (low, high) = density(BULK), ((1 - RATIO**0.5) ** 2, (1 + RATIO**0.5) ** 2)
    at = np.quantile(BULK, np.linspace(0.05, 0.95, 91))
    law = np.sqrt((high - at) * (at - low)) / (2 * np.pi * RATIO * at)
    apart = np.abs(np.interp(at, found.grid, found.density) - law).mean()
    assert apart < 0.1 * law.max(), f"{apart / law.max():.0%} of its height"


def is_a_spike(density: Density) -> None:
    """All eigenvalues equal: all of the mass within a hundredth of them."""
    found = density(np.full(300, 2.0))
    inside = np.abs(found.grid - 2) <= 0.02
    assert np.trapezoid(found.density[inside], found.grid[inside]) == pytest.approx(1, abs=0.02)


def run(eigenvalues: Floats, top: int) -> tuple[quad.Quadrature, Drawn, float]:
    size = len(eigenvalues)
    words = {"top": top, "bottom": 1, "least": 60, "near_zero": 0.05, "fresh": fresh(size, 0)}
    state = list(lanczos(diagonal(eigenvalues), normal(size, 0), **words))[-1]
    found = spectral_density(state, size, 0.02)
    return quad.gauss(state.alpha, state.beta), Drawn(found.grid, found.density, found.atoms), found.width


def ours(eigenvalues: Floats) -> Drawn:
    return run(eigenvalues, top=4)[1]


def too_wide(times: float) -> Density:
    """The fault: a smoothing so many times too wide."""

    def density(eigenvalues: Floats) -> Drawn:
        measure, found, width = run(eigenvalues, top=4)
        low, high = measure.nodes[0] - 5 * times * width, measure.nodes[-1] + 5 * times * width
        grid = np.sort(np.r_[np.linspace(low, high, 5000), np.linspace(BULK[0], BULK[-1], 500)])
        return Drawn(grid, quad.smooth(measure, grid, times * width), found.apart)

    return density


def a_share_of_the_range(eigenvalues: Floats) -> Drawn:
    """The fault: smoothing by a hundredth of the whole range, outliers and all, on a uniform grid."""
    measure, _, _ = run(eigenvalues, top=4)
    width = 0.01 * float(np.ptp(measure.nodes)) or 0.01
    grid = np.linspace(measure.nodes[0] - 5 * width, measure.nodes[-1] + 5 * width, 100_000)
    return Drawn(grid, quad.smooth(measure, grid, width), np.zeros(0))


@pytest.mark.parametrize("outliers", [np.zeros(0), FAR / 1e3, FAR], ids=["none", "10 times", "10 000 times"])
def test_the_bulk_keeps_its_mass_and_outliers_are_drawn_apart(outliers: Floats) -> None:
    keeps_the_bulk(ours, outliers)
    with pytest.raises(AssertionError, match="mass left the bulk"):
        keeps_the_bulk(too_wide(31), outliers)
    if outliers.size:
        with pytest.raises(AssertionError):
            keeps_the_bulk(a_share_of_the_range, outliers)


def test_the_curve_is_the_law() -> None:
    has_the_law(ours)
    with pytest.raises(AssertionError):
        has_the_law(too_wide(31))


def test_equal_eigenvalues_are_a_spike() -> None:
    is_a_spike(ours)
    with pytest.raises(AssertionError):
        is_a_spike(lambda e: Drawn(g := np.linspace(0, 4, 4001), np.exp(-((g - 2) ** 2) / 0.02) / 0.2507, e[:1]))


# ------------------------------------------------------------------------------------------------ neural collapse

Collapse = Callable[[Tensor, Tensor, nn.Linear], tuple[float, bool]]


def uses_the_classes_that_are_there(measure: Collapse) -> None:
    """NC1 of three classes is the same whether or not the head knows of a fourth; its absence is said."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 3, 90))
    inputs = torch.from_numpy(rng.normal(size=(90, 5)) + 4 * np.eye(4, 5)[labels])
    heads = [nn.Linear(5, classes).double() for classes in (3, 4)]
    (present, said_nothing), (absent, said) = (measure(inputs, labels, head) for head in heads)
    assert absent == pytest.approx(present, rel=1e-9), "an absent class changed the measure"
    assert said, "the absence was not said"
    assert not said_nothing


def our_collapse(inputs: Tensor, labels: Tensor, head: nn.Linear) -> tuple[float, bool]:
    reading = NeuralCollapse().run(Subject(nn.Sequential(nn.Identity(), head), (inputs, labels)))
    noted = any("class 3" in note for note in reading.notes)
    assert noted == (reading.summary.get("missing_classes", 0) == 1)
    return float(reading.data.nc1), noted


def with_zeros_for_the_absent(inputs: Tensor, labels: Tensor, head: nn.Linear) -> tuple[float, bool]:
    """The fault: every class of the head has a mean, that of no examples being zero."""
    hot = nn.functional.one_hot(labels, head.out_features).double()
    means = hot.T @ inputs / hot.sum(0).clamp(min=1)[:, None]
    centred, rest = means - means.mean(0), inputs - means[labels]
    between, within = centred.T @ centred / len(means), rest.T @ rest / len(rest)
    inverse = torch.linalg.pinv(between, rtol=1e-10, hermitian=True)
    return float(torch.trace(within @ inverse)) / len(means), False


def unsaid(inputs: Tensor, labels: Tensor, head: nn.Linear) -> tuple[float, bool]:
    """The fault: right, and silent."""
    return our_collapse(inputs, labels, head)[0], False


def test_an_absent_class_is_left_out_and_said() -> None:
    uses_the_classes_that_are_there(our_collapse)
    with pytest.raises(AssertionError, match="changed the measure"):
        uses_the_classes_that_are_there(with_zeros_for_the_absent)
    with pytest.raises(AssertionError, match="not said"):
        uses_the_classes_that_are_there(unsaid)


# -------------------------------------------------------------------------------------------------------- power laws

Exponent = Callable[[Tensor], tuple[float, float]]
"""(exponent, error) of a weight's eigenvalues, nan where none is said."""


def refuses_a_few_values(exponent: Exponent) -> None:
    """Below 50 eigenvalues no exponent; from there on one with an interval."""
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(80, 80)))
    assert not np.isfinite(exponent(weight[:49])[0]), "an exponent of 49 values"
    found, error = exponent(weight[:50])
    assert np.isfinite(found)
    assert error > 0.1, "an exponent without an interval"


def our_exponent(weight: Tensor) -> tuple[float, float]:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weight)
    subject = Subject(model, (torch.zeros(2, weight.shape[1], dtype=torch.float64), torch.tensor([0, 1])))
    found = WeightSpectra(resamples=20).run(subject).data
    return float(found.alpha[0]), float(found.alpha_error[0])


def of_whatever_there_is(weight: Tensor) -> tuple[float, float]:
    """The fault: Hill's estimate of any tail of any length, and nothing beside it."""
    values = np.linalg.svd(weight.numpy(), compute_uv=False) ** 2
    law = fit_tail(values, float(np.median(values)))
    return (law.alpha if law else np.nan), 0.0


def test_a_power_law_refuses_a_few_values() -> None:
    refuses_a_few_values(our_exponent)
    with pytest.raises(AssertionError, match="of 49 values"):
        refuses_a_few_values(of_whatever_there_is)
    with pytest.raises(AssertionError, match="without an interval"):
        refuses_a_few_values(lambda w: of_whatever_there_is(w) if len(w) > 49 else (np.nan, np.nan))
