"""Roughness against the definition's curve, a valley, waves computed by hand, and structure between the points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from landscape.test_plane import Weights, quadratic
from torch import nn

from workbench.landscape.roughness import MEASURES, Roughness, measures
from workbench.numerics.persistence import second_difference_spread
from workbench.numerics.sampling import Draw
from workbench.subject import Subject

ZIGZAG = np.array([0.0, 3, 1, 4, 2, 5])


def test_the_definitions_curve() -> None:
    excess, bend, minima, coarse = measures(ZIGZAG, 0.01)
    assert excess == pytest.approx(1.6)
    assert bend == pytest.approx(5 * math.sqrt(4 / 3) / 5), "second differences are -5, 5, -5, 5"
    assert minima == 3
    assert coarse == 0, "0, 1, 2 only rises"
    assert measures(ZIGZAG, 0.5)[2] == 1
    assert all(map(math.isnan, measures(np.array([0, 1, math.nan, 1, 0]), 0.01)))
    assert all(map(math.isnan, measures(np.ones(5), 0.01)))
    assert second_difference_spread(np.arange(9.0) ** 2) == pytest.approx(0, abs=1e-12)


def test_a_quadratic_is_not_rough() -> None:
    found = Roughness(lines=4, points=11, normalization="none").run(quadratic())
    assert found.data.excess_variation.values == pytest.approx(np.zeros(4), abs=1e-12)
    assert found.data.second_differences.values == pytest.approx(np.zeros(4), abs=1e-12)
    assert found.data.minima.values.tolist() == [1] * 4
    assert found.converged


def waves(model: nn.Module, batch: object) -> torch.Tensor:
    return model.w[0] ** 2 + torch.cos(9 * model.w[1])


def test_lines_means_and_errors_are_those_of_curves_made_by_hand() -> None:
    subject = Subject(Weights([0.3, -0.2]), [torch.zeros(1, 1)], objective=waves, reduction="mean")
    probe = Roughness(lines=5, points=21, extent=2.0, threshold=0.1, normalization="none")
    data, draw = probe.run(subject, seed=4).data, Draw(4, "Roughness", 2)
    alpha, each = np.linspace(-2, 2, 21), []
    for k in range(5):
        w = np.array([0.3, -0.2])[:, None] + alpha * draw(k).numpy()[:, None]
        f = w[0] ** 2 + np.cos(9 * w[1])
        assert data.loss[k].values == pytest.approx(f, rel=1e-12)
        up = np.abs(np.diff(f)).sum() - f[0] - f[-1] + 2 * f.min()
        deep = [i for i in range(21) if f[i] <= min(f[max(i - 1, 0)], f[min(i + 1, 20)])]
        assert float(data.minima[k]) <= len(deep)
        each.append((up / np.ptp(f), np.diff(np.diff(f)).std(ddof=1) / np.ptp(f)))
    for name, values in zip(MEASURES, np.transpose(each), strict=False):
        assert data[name].values == pytest.approx(values)
        assert float(data[f"{name}_mean"]) == pytest.approx(values.mean())
        assert float(data[f"{name}_mean_error"]) == pytest.approx(values.std(ddof=1) / 5**0.5)
    assert float(data.spacing) == pytest.approx(0.2)


def test_structure_between_the_points_is_told_by_the_coarse_value() -> None:
    alpha = np.linspace(-1, 1, 41)
    ripple = alpha**2 + 0.1 * np.cos(np.pi * alpha / 0.05)  # its period is two steps
    fine, _, minima, coarse = measures(ripple, 0.01)
    assert fine > 2
    assert minima > 10
    assert coarse == pytest.approx(0, abs=1e-9)


def test_a_partial_reading_holds_the_means_of_complete_lines_and_nan_stays() -> None:
    def broken(model: nn.Module, batch: object) -> torch.Tensor:
        return torch.where(model.w[0] > 0.5, torch.tensor(float("nan")), model.w[0] ** 2)

    subject = Subject(Weights([0.0]), [torch.zeros(1, 1)], objective=broken, reduction="mean")
    probe = Roughness(lines=3, points=7, normalization="none")
    early, *_, last = probe.stream(subject, Draw(0, "Roughness", 1))
    assert np.isnan(early.data.excess_variation.values).all()
    lost = np.isnan(last.data.loss.values).any(axis=1)
    assert lost.any()
    assert np.isnan(last.data.excess_variation.values).tolist() == lost.tolist()
    assert math.isnan(float(last.data.excess_variation_mean))
