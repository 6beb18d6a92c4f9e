"""Distance from initialisation: logarithms and powers come back, walks diffuse, windows end with the rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.dynamics.distance import DistanceFromInit
from workbench.numerics.growth import fit_growth
from workbench.zoo import nets

T = np.unique(np.geomspace(10, 10_000, 30).round())


def test_a_logarithm_comes_back() -> None:
    found = fit_growth(T, 2 * np.log(T) + 1)
    assert (found.slope, found.offset) == pytest.approx((2.0, 1.0))
    assert found.log_r2 == pytest.approx(1.0)
    assert found.power_r2 < found.log_r2
    assert found.evidence > 10


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 2.0), st.floats(0.01, 100.0))
def test_a_power_law_comes_back(exponent: float, scale: float) -> None:
    found = fit_growth(T, scale * T**exponent)
    assert found.exponent == pytest.approx(exponent, abs=1e-4)
    assert found.power_r2 == pytest.approx(1.0)
    assert found.evidence < -10


def test_intervals_of_the_exponent_cover_under_noise() -> None:
    inside = 0
    for seed in range(200):
        d = T**0.5 + np.random.default_rng(seed).normal(size=len(T))
        found = fit_growth(T, d)
        inside += abs(found.exponent - 0.5) <= found.exponent_error
    assert 0.9 <= inside / 200 <= 0.99


def record(folder: Path, rate: float, fall: int | None) -> wb.Trajectory:
    """A random walk of the weights whose optimizer says that its rate falls."""
    model = nets.dense((40, 40, 20)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    rng = torch.Generator().manual_seed(0)
    with wb.Recorder(folder, model, optimizer, every=20) as recorder, torch.no_grad():
        for t in range(1, 401):
            for p in model.parameters():
                p.add_(rate * torch.randn(p.shape, generator=rng, dtype=p.dtype))
            if t == fall:
                optimizer.param_groups[0]["lr"] = rate / 10
            recorder.step(train_loss=1.0)
    return wb.Trajectory.open(folder)


def test_a_walk_diffuses_and_distances_are_norms(tmp_path: Path) -> None:
    trajectory = record(tmp_path / "a", 0.01, None)
    data = DistanceFromInit().run(trajectory).data
    assert float(data.exponent) == pytest.approx(0.5, abs=0.02)
    assert float(data.evidence) < -10
    first, last = trajectory.weights(0), trajectory.weights(400)
    apart = sum(float((last[n] - first[n]).square().sum()) for n in first) ** 0.5
    assert float(data.distance[-1]) == pytest.approx(apart)
    assert float(data.relative[-1]) == pytest.approx(
        apart / sum(float(w.square().sum()) for w in first.values()) ** 0.5
    )
    name = str(data["tensor"].values[0])
    assert float(data.tensor_distance[-1, 0]) == pytest.approx(float((last[name] - first[name]).norm()))


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    model = nets.dense((3, 2)).double()
    with wb.Recorder(tmp_path, model, every=1) as recorder, torch.no_grad():
        for factor in (1.5, float("nan"), 1.0):
            model.linear1.weight.mul_(factor)
            recorder.step()
    reading = DistanceFromInit().run(wb.Trajectory.open(tmp_path))
    assert np.isnan(reading.data.distance.values).tolist() == [False, False, True, True]
    assert "weights are not finite from step 2 on" in reading.notes


def test_the_window_ends_where_the_learning_rate_falls(tmp_path: Path) -> None:
    data = DistanceFromInit(start=50).run(record(tmp_path / "b", 0.01, 205)).data
    steps = data["step"].values
    assert steps[data.fitted.values].tolist() == [s for s in steps if 50 <= s <= 200]
