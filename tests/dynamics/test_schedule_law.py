"""The law of schedules: areas by loops, a law that comes back, and a held-out schedule that it predicts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.dynamics.schedule_law import ScheduleLaw, areas, fit_law
from workbench.several import Runs
from workbench.zoo import nets


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1))
def test_areas_are_sums(rates: list[float], decay: float) -> None:
    first, second = areas(np.array(rates), decay)
    for s in range(len(rates)):
        double = sum((rates[k - 1] - rates[k]) * decay ** (i - k) for i in range(1, s + 1) for k in range(1, i + 1))
        assert first[s] == pytest.approx(sum(rates[: s + 1]))
        assert second[s] == pytest.approx(double, abs=1e-9)


def schedules() -> dict[str, np.ndarray]:
    t = np.arange(600)
    return {
        "constant": np.full(600, 0.1),
        "cosine": 0.05 * (1 + np.cos(math.pi * t / 600)),
        "plateau": np.where(t < 400, 0.1, 0.1 * (600 - t) / 200),
    }


def truth(rates: np.ndarray) -> np.ndarray:
    first, second = areas(rates, 0.99)
    return 0.5 + 0.8 * first**-0.6 - 0.02 * second


def test_a_law_comes_back_from_two_schedules_and_predicts_a_third(tmp_path: Path) -> None:
    runs = {}
    for label, rates in schedules().items():
        with wb.Recorder(tmp_path / label, nets.dense((2, 2)), every=10_000) as recorder:
            for rate, loss in zip(rates, truth(rates), strict=True):
                recorder.step(train_loss=loss, lr=rate)
        runs[label] = wb.Trajectory.open(tmp_path / label)
    data = ScheduleLaw(decay=0.99, start=20, held_out="plat*").run(Runs(runs)).data
    assert float(data.floor) == pytest.approx(0.5, rel=1e-3)
    assert float(data.scale) == pytest.approx(0.8, rel=1e-3)
    assert float(data.exponent) == pytest.approx(0.6, rel=1e-3)
    assert float(data.annealing) == pytest.approx(0.02, rel=1e-3)
    assert data.predicted_only.values.tolist() == [False, False, True]
    assert float(data.error.sel(run="plateau")) < 1e-4
    assert float(data.error_without.sel(run="plateau")) > 0.005
    with pytest.raises(ValueError, match="none is left to fit"):
        ScheduleLaw(held_out="*").run(Runs(runs))


def test_intervals_cover_and_constant_rates_say_nothing_of_annealing() -> None:
    inside = 0
    chosen = [areas(r, 0.99) for r in (schedules()["constant"], schedules()["cosine"])]
    first, second = (np.concatenate([c[i][20::10] for c in chosen]) for i in (0, 1))
    for seed in range(60):
        noise = 0.01 * np.random.default_rng(seed).normal(size=len(first))
        law, error = fit_law(first, second, 0.5 + 0.8 * first**-0.6 - 0.02 * second + noise)
        inside += abs(law[3] - 0.02) <= error[3]
    assert 0.85 <= inside / 60 <= 1.0
    law, error = fit_law(first, 0 * second, 0.5 + 0.8 * first**-0.6)
    assert math.isnan(law[3])
    assert math.isnan(error[3])
    assert law[2] == pytest.approx(0.6, rel=1e-4)
