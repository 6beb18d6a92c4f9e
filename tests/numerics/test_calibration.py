"""Calibration measures against plain loops, closed forms and torchmetrics; the temperature against laws that hold."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scipy.stats import binomtest

from workbench.numerics.calibration import (
    MEASURES,
    Predictions,
    clopper_pearson,
    fit_temperature,
    log_probabilities,
    resampled,
    slopes,
    spread_of,
)


def binary(confidence: list[float], right: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of two classes, class 0 predicted with these confidences, and labels that make them right or wrong."""
    q = np.array(confidence)
    return np.stack([np.log(q), np.log1p(-q)], 1), 1 - np.array(right)


def sample(seed: int, n: int = 300, classes: int = 4, sharp: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that follow softmax(logits / sharp)."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n, classes))
    p = np.exp(log_probabilities(z))
    return sharp * z, (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, classes - 1)


def bin_of(value: float, bins: int) -> int:
    return next(b for b in range(bins) if value <= (b + 1) / bins + 1e-12)


def ece(q: np.ndarray, a: np.ndarray, groups: list) -> tuple[float, float, float, float]:
    """ECE, largest gap, root mean square and its debiased square, bin by bin in loops."""
    total = largest = squares = debiased = 0.0
    for g in set(groups):
        held = [i for i in range(len(q)) if groups[i] == g]
        accuracy, n = np.mean(a[held]), len(held)
        gap = accuracy - np.mean(q[held])
        total += n / len(q) * abs(gap)
        largest = max(largest, abs(gap))
        squares += n / len(q) * gap**2
        if n > 1:
            debiased += n / len(q) * (gap**2 - accuracy * (1 - accuracy) / (n - 1))
    return total, largest, math.sqrt(squares), debiased


def plainly(z: np.ndarray, y: np.ndarray, bins: int, width: float) -> dict[str, float]:
    """Every measure in the plainest way."""
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    q, chosen, n = p.max(1), p.argmax(1), len(y)
    a = (chosen == y).astype(float)
    found = dict(
        zip(("ece", "ece_max", "rms", "rms_squared_debiased"), ece(q, a, [bin_of(x, bins) for x in q]), strict=True)
    )
    ranks = np.argsort(np.argsort(q))
    found["ece_equal_mass"] = ece(q, a, [int(r * bins // n) for r in ranks])[0]
    found["ece_top_label"] = ece(q, a, [(c, bin_of(x, bins)) for c, x in zip(chosen, q, strict=True)])[0]
    each = [ece(p[:, c], (y == c) * 1.0, [bin_of(x, bins) for x in p[:, c]])[0] for c in range(z.shape[1])]
    pairs = [
        (a[i] - q[i]) * (a[j] - q[j]) * math.exp(-abs(q[i] - q[j]) / width)
        for i in range(n)
        for j in range(n)
        if i != j
    ]
    return found | {
        "ece_classwise": np.mean(each),
        "kernel_squared": sum(pairs) / n / (n - 1),
        "overconfidence": np.mean(q) - np.mean(a),
        "ks": max(abs(sum((a - q)[q <= x])) / n for x in q),
        "brier": np.mean([sum((p[i, c] - (y[i] == c)) ** 2 for c in range(z.shape[1])) for i in range(n)]),
        "nll": np.mean([-math.log(p[i, y[i]]) for i in range(n)]),
        "accuracy": np.mean(a),
    }


@pytest.mark.parametrize(("n", "bins"), [(60, 15), (60, 4), (90, 10)])
def test_every_measure_equals_plain_loops(n: int, bins: int) -> None:
    z, y = sample(n + bins, n)
    found, want = Predictions(z, y, bins, width=0.3).measure(), plainly(z, y, bins, 0.3)
    assert set(found) == set(want) == set(MEASURES)
    assert found == approx(want, rel=1e-9, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 3), min_size=20, max_size=20).filter(lambda c: sum(c) > 2))
def test_weights_count_a_prediction_as_often(counts: list[int]) -> None:
    z, y = sample(3, 20)
    often = np.repeat(np.arange(20), counts)
    weighed = Predictions(z, y, 5).measure(np.array(counts, float))
    repeated = Predictions(z[often], y[often], 5).measure()
    for name in set(MEASURES) - {"kernel_squared", "ece_equal_mass"}:  # pairs are of different rows; bins stay fixed
        assert weighed[name] == approx(repeated[name], abs=1e-12)


def test_closed_forms() -> None:
    found = Predictions(*binary([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1])).measure()
    assert (found["ece"], found["ece_max"], found["rms"]) == approx((0.4, 0.4, 0.4))
    assert found["rms_squared_debiased"] == approx(0.035)
    assert found["overconfidence"] == approx(0)
    edges = Predictions(np.log([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4], [0.6, 0.4]]), np.array([1, 1, 0, 0]), 2)
    assert edges.measure()["ece"] == approx(0.45), "bins are (l, u]: 0.5 belongs to the lower one"
    certain = Predictions(np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0])).measure()
    assert (certain["ece"], certain["nll"], certain["brier"]) == approx((0.5, 5e3, 1.0))


@pytest.fixture
def calibration_error(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function of torchmetrics, whose import looks for torchvision by its files, also where one is hidden."""
    cache = pytest.importorskip("lightning_utilities.core.imports").RequirementCache
    if sys.modules.get("torchvision", sys) is None:
        found = cache.__bool__
        monkeypatch.setattr(cache, "__bool__", lambda self: self.requirement != "torchvision" and found(self))
    return pytest.importorskip("torchmetrics.functional.classification").calibration_error


@pytest.mark.parametrize("classes", [2, 5])
def test_torchmetrics_agrees(calibration_error: Any, classes: int) -> None:
    z, y = sample(1, 500, classes, sharp=2.0)
    p = torch.softmax(torch.from_numpy(z), 1)
    for bins in (7, 15):
        found = Predictions(z, y, bins).measure()
        for norm, name in (("l1", "ece"), ("l2", "rms"), ("max", "ece_max")):
            theirs = calibration_error(
                p, torch.from_numpy(y), task="multiclass", n_bins=bins, norm=norm, num_classes=classes
            )
            assert found[name] == approx(float(theirs), rel=1e-5), "torchmetrics works in float32"


def test_the_exact_interval_is_scipys() -> None:
    right, counts = np.array([0, 3, 8, 8, 0]), np.array([5, 8, 8, 20, 0])
    low, high = clopper_pearson(right.astype(float), counts.astype(float))
    for i in range(4):
        want = binomtest(int(right[i]), int(counts[i])).proportion_ci(method="exact")
        assert (low[i], high[i]) == approx((want.low, want.high))
    assert np.isnan(low[4])
    assert np.isnan(high[4])


def test_of_calibrated_predictions_the_debiased_measures_are_zero_and_the_floor_is_the_bias() -> None:
    zero, bias, kernel, floors = 0, [], [], []
    for seed in range(200):
        held = Predictions(*sample(seed, 250))
        found, rng = held.measure(), np.random.default_rng(1000 + seed)
        error = spread_of([held.measure(resampled(250, rng)) for _ in range(40)])["rms_squared_debiased"]
        zero += abs(found["rms_squared_debiased"]) <= 1.96 * error
        bias.append(found["ece"])
        kernel.append(found["kernel_squared"])
        floors.append(held.floor(15))
    assert zero >= 186
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / math.sqrt(200)
    assert np.mean(floors) == approx(np.mean(bias), rel=0.05)
    assert np.mean(bias) > 0.05, "a binned ECE is far from zero there"


def test_the_bootstrap_is_the_spread_over_samples() -> None:
    many = [Predictions(*sample(seed, 400, sharp=2.0)).measure() for seed in range(150)]
    one, rng = Predictions(*sample(999, 400, sharp=2.0)), np.random.default_rng(0)
    errors = spread_of([one.measure(resampled(400, rng)) for _ in range(150)])
    for name in ("ece", "ece_classwise", "ks", "overconfidence", "brier", "nll", "accuracy"):
        assert errors[name] == approx(np.std([m[name] for m in many]), rel=0.35), name


def test_temperature_has_its_closed_form_and_undoes_any_scale() -> None:
    z, y = np.array([[2.0, -2.0]] * 4), np.array([0, 0, 0, 1])
    assert fit_temperature(z, y).value == approx(3.64095691, rel=1e-8)
    z, y = sample(5)
    plain = fit_temperature(z, y)
    for scale in (0.2, 1.0, 10.0):
        found = fit_temperature(scale * z, y)
        assert (found.value, found.error) == approx((scale * plain.value, scale * plain.error), rel=1e-10)
        assert abs(slopes(scale * z, y, 1 / found.value)[0].sum()) < 1e-9 * np.abs(scale * z).sum()


def test_temperature_is_found_and_its_interval_holds_it() -> None:
    held = [fit_temperature(*sample(seed, sharp=3.0)) for seed in range(200)]
    assert np.mean([t.value for t in held]) == approx(3.0, rel=0.02)
    assert sum(t.low <= 3.0 <= t.high for t in held) >= 186
    z, y = sample(0)
    twice = fit_temperature(np.repeat(z, 2, 0), np.repeat(y, 2), np.repeat(np.arange(len(y)), 2))
    assert twice.error == approx(fit_temperature(z, y).error), "rows of one example are no more than one"


def test_where_there_is_no_best_temperature_it_says_so() -> None:
    z = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert fit_temperature(z, np.array([1, 0])).at_bound
    assert fit_temperature(z, np.array([1, 0])).value == approx(math.exp(5))
    assert fit_temperature(z, np.array([0, 1])).value == approx(math.exp(-5))
