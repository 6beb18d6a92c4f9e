"""Ridge regression against scikit-learn and plain loops that leave each row out, wide and narrow, streamed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest import approx
from scipy import stats
from sklearn.linear_model import Ridge as Peer
from sklearn.linear_model import RidgeCV

from workbench.numerics.ridge import Ridge, RidgeSums, Scores, wilson

RATIOS = torch.logspace(-3, 2, 6, dtype=torch.float64)
SIZES = [(40, 6), (25, 60)]


def sample(count: int, width: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng([count, width])
    x = rng.normal(size=(count, width)) * np.geomspace(1, 0.1, width) + offset
    y = x[:, :2] @ rng.normal(size=(2, 3)) + rng.normal(size=(count, 3)) + 5
    return torch.from_numpy(x), torch.from_numpy(y)


def solved(x: torch.Tensor, y: torch.Tensor, step: int = 7) -> Ridge:
    sums = RidgeSums(x.shape[1], len(x))
    for start in range(0, len(x), step):
        sums.add(x[start : start + step], y[start : start + step])
    found = sums.solve(RATIOS)
    assert found is not None
    return found


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_predictions_are_those_of_scikit_learn(count: int, width: int) -> None:
    (x, y), (new, _) = sample(count, width), sample(count + 1, width)
    found = solved(x, y)
    for i, strength in enumerate(found.strengths.tolist()):
        theirs = Peer(alpha=strength).fit(x.numpy(), y.numpy()).predict(new.numpy())
        assert found.predicted(found.coordinates(new), i).numpy() == approx(theirs, abs=1e-8)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_left_out_predictions_are_those_of_a_loop(count: int, width: int) -> None:
    x, y = sample(count, width)
    found = solved(x, y)
    scores = Scores.empty(len(RATIOS), x.device)
    for i, strength in enumerate(found.strengths.tolist()):
        ours = found.left_out(found.coordinates(x), y, i)
        for row in range(count):
            rest = np.delete(np.arange(count), row)
            theirs = Peer(alpha=strength).fit(x[rest].numpy(), y[rest].numpy()).predict(x[row : row + 1].numpy())
            assert ours[row].numpy() == approx(theirs[0], abs=1e-7)
        scores.add(i, ours, y, found.target_mean)
    peer = RidgeCV(alphas=found.strengths.numpy()).fit(x.numpy(), y.numpy())
    assert float(found.strengths[scores.best()]) == approx(float(peer.alpha_), rel=1e-12)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_neither_batches_nor_order_nor_a_large_mean_matter(count: int, width: int) -> None:
    x, y = sample(count, width)
    turned = torch.from_numpy(np.random.default_rng(0).permutation(count))
    one, two = solved(x, y, count), solved(x[turned] + 1e6, y[turned], 3)
    assert two.strengths.numpy() == approx(one.strengths.numpy(), rel=1e-6)
    ours, theirs = (r.predicted(r.coordinates(z), 2).numpy() for r, z in ((one, x), (two, x + 1e6)))
    assert theirs == approx(ours, abs=1e-5)


def test_features_that_say_nothing_predict_the_mean_and_unknown_ones_nothing() -> None:
    x, y = sample(12, 4)
    found = solved(torch.ones_like(x), y)
    assert found.predicted(found.coordinates(x), 0).numpy() == approx(np.tile(y.mean(0), (12, 1)))
    rest = (y.sum(0) - y) / 11
    assert found.left_out(found.coordinates(torch.ones_like(x)), y, 0).numpy() == approx(rest.numpy())
    for width in (4, 40):
        sums = RidgeSums(width, 12)
        sums.add(torch.full((12, width), torch.nan), y)
        assert sums.solve(RATIOS) is None


@pytest.mark.parametrize(("right", "count"), [(0, 9), (7, 9), (50, 50)])
def test_the_interval_is_scipys(right: int, count: int) -> None:
    ends = stats.binomtest(right, count).proportion_ci(method="wilson")
    middle, half = wilson(right / count, count, stats.norm.ppf(0.975))
    assert (middle - half, middle + half) == approx((ends.low, ends.high), abs=1e-12)


def test_the_error_of_determination_is_its_spread_over_samples() -> None:
    rng, values, errors = np.random.default_rng(0), list[float](), list[float]()
    for _ in range(300):
        y = torch.from_numpy(rng.normal(size=(200, 1)))
        scores = Scores.empty(1, y.device)
        scores.add(0, y + 0.5 * torch.from_numpy(rng.normal(size=(200, 1))), y, torch.zeros(1, dtype=torch.float64))
        share, error, low, high = scores.determination(0)
        assert (low + high) / 2 == approx(share)
        values.append(share)
        errors.append(error)
    assert np.mean(values) == approx(0.75, abs=0.01)
    assert np.mean(errors) == approx(np.std(values), rel=0.15)
