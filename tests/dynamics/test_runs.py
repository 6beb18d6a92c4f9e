"""Runs that differ in learning rate or batch size: the sensitivity of three losses, and a hyperbola that comes back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.dynamics.critical_batch import CriticalBatch, first_reached, fit_hyperbola
from workbench.dynamics.learning_rates import LearningRateSensitivity
from workbench.several import Runs
from workbench.trajectory import Trajectory
from workbench.zoo import nets


def record(folder: Path, losses: list[float], rate: float | None = None, **more: float) -> Trajectory:
    model = nets.dense((2, 2))
    optimizer = None if rate is None else torch.optim.SGD(model.parameters(), lr=rate)
    with wb.Recorder(folder, model, optimizer, every=1000) as recorder:
        for loss in losses:
            recorder.step(train_loss=loss, **more)
    return Trajectory.open(folder)


def test_three_rates_one_of_which_diverged(tmp_path: Path) -> None:
    """Final losses 3, 2.5 and nan from 10: ((3 - 2.5) + 0 + (10 - 2.5))/3."""
    finals = {0.01: 3.0, 0.1: 2.5, 1.0: math.nan}
    runs = {f"run {r}": record(tmp_path / str(r), [10.0, 5.0, final], r) for r, final in finals.items()}
    data = LearningRateSensitivity().run(Runs(runs)).data
    assert float(data.sensitivity) == pytest.approx(2.66666667)
    assert float(data.best_rate) == pytest.approx(0.1)
    narrow = LearningRateSensitivity(decades=1.0).run(Runs(runs)).data
    assert narrow.included.values.tolist() == [False, True, False]
    assert float(narrow.sensitivity) == 0.0


def test_seeds_give_errors_and_labels_give_rates(tmp_path: Path) -> None:
    finals = {"lr 0.1 a": 2.0, "lr 0.1 b": 3.0, "lr=1e-2 a": 4.0, "lr=1e-2 b": 7.0, "lr 1 a": 1.0, "lr 1 b": 2.0}
    runs = {label: record(tmp_path / label, [10.0, final]) for label, final in finals.items()}
    data = LearningRateSensitivity(decades=6.0).run(Runs(runs)).data
    assert data["learning_rate"].values.tolist() == [0.01, 0.1, 1.0]
    assert data["mean"].values == pytest.approx([5.5, 2.5, 1.5])
    assert float(data.sensitivity) == pytest.approx(9.5 / 3 - 1.5)
    spread = np.sqrt((1.5 / 3) ** 2 + (0.5 / 3) ** 2 + (0.5 * 2 / 3) ** 2)
    assert float(data.sensitivity_error) == pytest.approx(spread)
    with pytest.raises(ValueError, match="does not tell its learning rate"):
        LearningRateSensitivity().run(Runs({"a": runs["lr 1 a"]}))
    with pytest.raises(ValueError, match="it has: train_loss"):
        LearningRateSensitivity(loss="other").run(Runs(runs))


@settings(max_examples=30, deadline=None)
@given(st.floats(10, 1e5), st.floats(0.05, 20))
def test_a_hyperbola_comes_back(fewest: float, corner: float) -> None:
    sizes = 64 * 2.0 ** np.arange(-5, 6)
    found = fit_hyperbola(sizes, fewest * (1 + 64 * corner / sizes))
    assert found["fewest_steps"] == pytest.approx(fewest, rel=1e-4)
    assert found["critical_batch"] == pytest.approx(64 * corner, rel=1e-4)


def test_intervals_cover_the_critical_batch() -> None:
    inside, sizes = 0, np.repeat(2.0 ** np.arange(2, 10), 2)
    for seed in range(200):
        noise = np.exp(0.1 * np.random.default_rng(seed).normal(size=len(sizes)))
        found = fit_hyperbola(sizes, 1000 * (1 + 50 / sizes) * noise)
        inside += found["critical_batch_low"] <= 50 <= found["critical_batch_high"]
    assert 0.9 <= inside / 200 <= 0.99


def test_one_batch_size_fits_nothing_and_targets_must_last() -> None:
    assert fit_hyperbola(np.array([8.0, 8.0]), np.array([3.0, 4.0])) == {}
    steps, values = np.arange(1.0, 7), np.array([5.0, 1.0, 4.0, 1.0, 1.0, 9.0])
    assert first_reached(steps, values, 2.0, 1) == 2
    assert first_reached(steps, values, 2.0, 2) == 4
    assert math.isnan(first_reached(steps, values, 2.0, 3))


def test_steps_and_examples_of_recorded_runs(tmp_path: Path) -> None:
    runs: dict[str, Trajectory] = {}
    for size in (2, 8, 32):
        need = 4 + 64 // size
        losses = [1.0] * (need - 1) + [0.1] * 3
        runs[f"batch {size}"] = record(tmp_path / str(size), losses)
    runs["other"] = record(tmp_path / "other", [1.0] * 7 + [0.1], batch_size=16.0)
    data = CriticalBatch(target=0.5).run(Runs(runs)).data
    assert data.steps.values.tolist() == [36, 12, 6, 8]
    assert data.examples.values.tolist() == [72, 96, 192, 128]
    assert float(data.critical_batch) == pytest.approx(16.0)
    assert float(data.fewest_steps) == pytest.approx(4.0)


def test_only_the_quickest_learning_rate_of_a_batch_size_counts(tmp_path: Path) -> None:
    """At rate 0.1 steps lie on 4 + 64/B; other rates are slower, get stuck, or get there with one of two seeds."""
    steps = {
        "batch 2 lr 0.1": 36, "batch 2 lr 0.2": 50, "batch 4 lr 0.1 a": 10, "batch 4 lr 0.1 b": 40, "batch 4 lr 1 a": 2,
        "batch 4 lr 1 b": None, "batch 8 lr 0.1": 12, "batch 8 lr 0.01": None, "batch 32 lr 0.1": 6,
    }  # fmt: skip
    runs = {
        label: record(tmp_path / label, [1.0] * 60 if need is None else [1.0] * (need - 1) + [0.1])
        for label, need in steps.items()
    }
    data = CriticalBatch().run(Runs(runs)).data
    assert float(data.target_value) == pytest.approx(0.1), "runs that get stuck do not decide the target"
    assert [label for label, kept in zip(steps, data.counted.values, strict=True) if kept] == [
        label for label in steps if "lr 0.1" in label
    ]
    assert float(data.critical_batch) == pytest.approx(16.0, rel=1e-3)
    assert float(data.fewest_steps) == pytest.approx(4.0, rel=1e-3)
    every = CriticalBatch(target=0.5, best_rate=False).run(Runs(runs)).data
    assert every.counted.values.all()
    assert float(every.critical_batch) != pytest.approx(16.0, rel=0.1)
