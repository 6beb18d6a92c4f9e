"""Imbalanced collapse: small problems against the closed form, verdicts on data written down, one seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

from workbench.experiments.experiment import judge
from workbench.experiments.imbalanced_collapse import FreeFeatures, ImbalancedCollapse

SMALL = ImbalancedCollapse(classes=3, dimension=5, largest=12, imbalance=4, rarest=1, iterations=200)


def test_lengths_are_those_of_the_closed_form_for_one_matrix() -> None:
    """‖w_k‖² = √(n_k λ_H / λ_W) - N λ_H where positive, and ‖μ_k‖² = ‖w_k‖² / (‖w_k‖² + N λ_H)²."""
    data = SMALL.run(seed=3).data
    assert data.class_count.values.tolist() == [[7, 7, 7], [12, 6, 3], [12, 6, 3], [24, 12, 1]]
    for arm, problem in enumerate(SMALL.problems):
        counts = data.class_count.values[arm]
        shift = counts.sum() * problem.feature_decay
        square = np.maximum(np.sqrt(counts * problem.feature_decay / problem.weight_decay) - shift, 0)
        if problem.matrices == 1:
            assert data.row_norm.values[arm] == pytest.approx(np.sqrt(square), rel=1e-3, abs=1e-4)
            assert data.mean_norm.values[arm] == pytest.approx(np.sqrt(square) / (square + shift), rel=1e-3, abs=1e-4)
    assert data.orthogonality.values[:3] == pytest.approx(0, abs=1e-3)


def test_the_objective_is_half_the_squared_distance_with_both_penalties() -> None:
    problem = SMALL.problems[2]
    net = FreeFeatures(problem, 5, 0)
    h, (a, b, c) = net.features.detach().numpy(), (p.detach().numpy() for p in net.maps.parameters())
    distance = sum(((c @ b @ a @ h[i] - np.eye(3)[k]) ** 2).sum() for i, k in enumerate([0] * 12 + [1] * 6 + [2] * 3))
    wanted = distance / 42 + problem.weight_decay / 2 * sum((w**2).sum() for w in (a, b, c))
    assert net.objective().item() == pytest.approx(wanted + problem.feature_decay / 2 * (h**2).sum())


def written(error: float = 1e-5, gap: float = 1e-9, nc1: float = 1e-9, gone: float = 0.0) -> xr.Dataset:
    """Two classes in four arms; in the last one the second class is to be given up."""
    theory = np.array([[2.0, 1.0]] * 3 + [[2.0, 0.0]])
    rows = theory * (1 + error) + np.array([[0, 0]] * 3 + [[0, gone]])
    held = {"row_norm": (("arm", "class_"), rows), "theory_row_norm": (("arm", "class_"), theory)}
    held["loss_gap"] = (("arm", "iteration"), [[1.0, gap, math.nan]] * 4)
    return xr.Dataset(held | {"nc1": ("arm", [nc1, nc1, nc1, 1.0])})


@pytest.mark.parametrize(
    ("told", "passed"),
    [
        ({}, True),
        ({"error": 2e-3}, False),
        ({"gap": 2e-6}, False),
        ({"nc1": 2e-6}, False),
        ({"gone": 0.01}, False),
        ({"nc1": math.nan}, False),
    ],
)
def test_lengths_loss_collapse_and_the_rare_class_must_all_be_right(told: dict, passed: bool) -> None:
    assert SMALL.verdict(written(**told)).passed is passed


def test_a_minimisation_that_diverges_or_is_not_over_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    SMALL.run(seed=0, on_reading=lambda reading: seen.append(SMALL.verdict(reading.data).passed))
    assert not any(seen[:-1])
    build = FreeFeatures.__init__

    def broken(self, *given) -> None:
        build(self, *given)
        with torch.no_grad():
            self.features[0, 0] = math.nan

    monkeypatch.setattr(FreeFeatures, "__init__", broken)
    assert not SMALL.verdict(SMALL.run(seed=0).data).passed


def test_seeds_differ_and_no_room_is_said() -> None:
    first, second = (found.reading.data for found in judge(SMALL, (0, 1)))
    assert not np.allclose(first.train_loss[:, 0], second.train_loss[:, 0])
    with pytest.raises(ValueError, match="no room"):
        ImbalancedCollapse(classes=4, dimension=3)


def test_the_effect_shows_on_one_seed() -> None:
    (found,) = judge(ImbalancedCollapse(), [0])
    assert found.verdict.passed, str(found.verdict)
