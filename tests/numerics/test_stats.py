"""Merged statistics against those of the whole."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.numerics.stats import ClassMoments, Moments, bootstrap, error_of_mean, known_mean


@given(
    seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 39), max_size=5, unique=True), offset=st.floats(-1e6, 1e6)
)
def test_moments_of_any_split_equal_those_of_one_pass(seed: int, cuts: list[int], offset: float) -> None:
    values = np.random.default_rng(seed).normal(size=(40, 3)) + offset
    parts = [Moments.of(part) for part in np.split(values, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.count == 40
    np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.variance(), values.var(0, ddof=1), rtol=1e-7)
    np.testing.assert_allclose(merged.standard_error, values.std(0, ddof=1) / np.sqrt(40), rtol=1e-7)


def test_moments_of_one_observation_have_no_spread() -> None:
    one = Moments.of([3.0])
    assert one.mean == 3
    assert np.isnan(one.standard_error)
    assert one.add([5.0]).variance() == pytest.approx(2)
    with pytest.raises(ValueError, match="at least one"):
        Moments.of([])


@given(seed=st.integers(0, 10**6), size=st.integers(1, 17))
def test_class_moments_of_any_batches_equal_those_of_one_pass(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 3], size=60)  # class 2 is absent
    features = rng.normal(size=(60, 5)) + 100 * labels[:, None]
    merged = ClassMoments.empty(4, 5)
    for first in range(0, 60, size):
        batch = slice(first, first + size)
        merged = merged.add(torch.from_numpy(features[batch]), torch.from_numpy(labels[batch]))
    for c in range(4):
        own = features[labels == c]
        assert int(merged.counts[c]) == len(own)
        if len(own):
            np.testing.assert_allclose(merged.means[c], own.mean(0), rtol=1e-12, atol=1e-12)
            assert float(merged.scatter[c]) == pytest.approx(((own - own.mean(0)) ** 2).sum(), rel=1e-9)
    assert float(merged.scatter[2]) == 0
    total = sum(((features[labels == c] - features[labels == c].mean(0)) ** 2).sum() for c in (set(labels)))
    assert float(merged.within()) == pytest.approx(total / 60, rel=1e-9)


def test_tight_classes_far_from_zero_survive_float32_features() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator) + 100
    labels = torch.arange(3000) % 3
    features = (centres[labels] + 0.01 * torch.randn(3000, 8, generator=generator)).float()
    merged = ClassMoments.empty(3, 8)
    for batch in range(0, 3000, 100):
        merged = merged.add(features[batch : batch + 100], labels[batch : batch + 100])
    whole = features.double()
    exact = sum(float(((whole[labels == c] - whole[labels == c].mean(0)) ** 2).sum()) for c in range(3))
    assert float(merged.scatter.sum()) == pytest.approx(exact, rel=1e-9)


def test_wrong_labels_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[0, 3\); got 0 to 3"):
        ClassMoments.of(torch.ones(2, 2), torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="labels"):
        ClassMoments.of(torch.ones(2, 2), torch.tensor([0]), 3)


def test_bootstrap_intervals_cover_the_mean() -> None:
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        interval = bootstrap(rng.exponential(size=60), lambda x: float(x.mean()), rng, resamples=300)
        held += interval.low <= 1 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_bootstrap_keeps_nan_and_refuses_too_little() -> None:
    rng = np.random.default_rng(0)
    interval = bootstrap([1.0, np.nan, 2.0], lambda x: float(x.mean()), rng)
    assert np.isnan(interval.low)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap([1.0], lambda x: float(x.mean()), rng)
    with pytest.raises(ValueError, match="level"):
        bootstrap([1.0, 2.0], lambda x: float(x.mean()), rng, level=95)


def test_the_error_of_a_mean_is_that_of_independent_observations() -> None:
    rows = [[1.0, 2.0, np.nan], [4.0, 2.0, 1.0], [9.0, 2.5, 1.0]]
    columns = [[row[k] for row in rows] for k in range(2)]
    expected = [statistics.stdev(column) / 3**0.5 for column in columns]
    np.testing.assert_allclose(error_of_mean(rows), [*expected, np.nan], rtol=1e-14)
    assert np.isnan(error_of_mean(rows[:1])).tolist() == [True] * 3
    assert np.isnan(error_of_mean([]))


def test_the_known_mean_is_of_finite_values() -> None:
    assert known_mean([1.0, np.nan, 4.0, np.inf]) == 2.5
    assert np.isnan(known_mean([np.nan]))
    assert np.isnan(known_mean([]))
