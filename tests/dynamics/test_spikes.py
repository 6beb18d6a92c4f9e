"""Spikes: the score of nine ones and a 91, plain windows, and a record with one spike planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.dynamics.spikes import Spikes, robust_scores, spike_scores
from workbench.zoo import nets


def test_nine_ones_and_a_ninety_one() -> None:
    scores = spike_scores(np.array([1.0] * 9 + [91.0]), 200)
    assert scores == pytest.approx([0.1] * 9 + [9.1])


@settings(max_examples=25, deadline=None)
@given(st.integers(10, 30), st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-5, 5))
def test_robust_scores_are_plain_windows_and_ignore_scale_and_shift(
    window: int, seed: int, scale: float, shift: float
) -> None:
    values = np.random.default_rng(seed).normal(size=60)
    values[7] = np.nan
    found = robust_scores(values, window)
    for t in range(60):
        before = values[max(0, t - window) : t]
        before = before[np.isfinite(before)]
        if len(before) < 10 or t == 7:
            assert np.isnan(found[t])
            continue
        middle = np.median(before)
        expected = (values[t] - middle) / (1.4826 * np.median(np.abs(before - middle)))
        assert found[t] == pytest.approx(expected)
    assert robust_scores(scale * values + shift, window) == pytest.approx(found, nan_ok=True, rel=1e-6, abs=1e-9)


def test_a_planted_spike_is_found_once_in_loss_and_gradient(tmp_path: Path) -> None:
    rng, model = np.random.default_rng(0), nets.dense((4, 3, 2))
    with wb.Recorder(tmp_path / "run", model, every=1000) as recorder:
        for t in range(1, 121):
            spike = 30.0 if t in (70, 71) else 0.0
            grad = 400.0 if t == 70 else 1.0
            recorder.step(train_loss=1 / t + 0.01 * rng.normal() + spike, grad_norm=grad, accuracy=0.5)
    trajectory = wb.Trajectory.open(tmp_path / "run")
    data = Spikes().run(trajectory).data
    assert list(data["series"].values) == ["train_loss", "grad_norm"]
    assert data["count"].values.tolist() == [1, 1]
    assert data["at"].values.tolist() == [70, 70]
    assert float(data.score.sel(step=70, series="grad_norm")) == pytest.approx(400 / ((119 + 400) / 120))
    with pytest.raises(ValueError, match="it has: train_loss, grad_norm, accuracy"):
        Spikes(series="nothing").run(trajectory)
