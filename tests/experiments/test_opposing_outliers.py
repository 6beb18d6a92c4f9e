"""Opposing outliers: a small run against plain loops and dense Hessians, verdicts on data written down, one seed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import xarray as xr

from workbench.experiments import opposing_outliers as module
from workbench.experiments.experiment import judge
from workbench.experiments.opposing_outliers import OpposingOutliers

SMALL = OpposingOutliers(examples=40, dimension=3, width=2, steps=60, every=20, watched=12, initial_scale=0.2)


def descent(seed: int, rate: float, layers: int) -> list[list[torch.Tensor]]:
    """The weights before each step, by plain loops over matrices."""
    x, y = module.opposing_outliers(40, 3, seed=seed)
    widths = (4, 2, 1) if layers == 2 else (4, 1)
    weights = [p.detach().clone() for p in module.linear_net(widths, 0.2, seed + 1_000_003).parameters()]
    path = []
    for _ in range(61):
        path.append(weights)
        if layers == 1:
            slopes = [(x @ weights[0].T - y).T @ x / 40]
        else:
            off = x @ (weights[1] @ weights[0]).T - y
            slopes = [weights[1].T @ off.T @ x / 40, off.T @ x @ weights[0].T / 40]
        weights = [w - rate * g for w, g in zip(weights, slopes, strict=True)]
    return path


def top(weights: list[torch.Tensor], seed: int) -> tuple[float, torch.Tensor]:
    """The largest eigenvalue of the dense Hessian, and the first layer's part of its eigenvector."""
    x, y = module.opposing_outliers(40, 3, seed=seed)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        first, *rest = (p.view(w.shape) for p, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True))
        outputs = x @ first.T
        return ((outputs @ rest[0].T if rest else outputs) - y).square().mean() / 2

    values, vectors = torch.linalg.eigh(
        torch.autograd.functional.hessian(loss, torch.cat([w.flatten() for w in weights]))
    )
    return float(values[-1]), vectors[: weights[0].numel(), -1].view(weights[0].shape)


def test_a_small_run_is_what_plain_loops_say() -> None:
    data = SMALL.run(seed=3).data
    for arm, (rate, layers) in enumerate([(0.1, 2), (0.2, 2), (0.1, 1)]):
        path, row = descent(3, rate, layers), data.isel(arm=arm)
        for place in (0, 7, -1):
            value, _ = top(path[int(data.checkpoint[place])], 3)
            assert float(row.sharpness[place]) == pytest.approx(value, rel=1e-3)
        vector = top(path[-1], 3)[1]
        assert float(row.outlier_share) == pytest.approx(
            float(vector[:, -1].square().sum() / vector.square().sum()), rel=1e-4
        )
        assert row.stability_threshold.values == pytest.approx(2 / rate)


def test_groups_are_watched_around_the_crossing() -> None:
    data = SMALL.run(seed=3).data
    x, y = module.opposing_outliers(40, 3, seed=3)
    path, steps = descent(3, 0.2, 2), data.watched_step.values
    crossing, steps = float(data.step_crossing[1]), steps[np.isfinite(steps)].astype(int)
    assert np.diff(steps) == pytest.approx(1)
    assert (steps[0], steps[-1]) == (max(0, crossing - 6), crossing + 12)
    losses = np.array([((x @ (path[s][1] @ path[s][0]).T - y) ** 2 / 2)[:, 0].numpy() for s in steps])
    halves = np.stack([losses[:, :2].mean(1), losses[:, 2:4].mean(1)], 1)
    found = data.group_loss.values[: len(steps)]
    assert float(data.found) == 1
    # Which half was rising where the groups were picked is of no account.
    assert np.sort(found, 1) == pytest.approx(np.sort(halves, 1))
    changes = np.diff(halves, axis=0)
    after, before = steps[:-1] >= crossing, steps[:-1] < np.argmax(data.stability_ratio.values[1] >= 0.5)
    for name, there in (("after", after), ("before", before)):
        assert float(data[f"opposition_{name}"]) == pytest.approx(np.corrcoef(changes[there].T)[0, 1])
        one = max(changes[there].T.tolist(), key=lambda column: sum(map(abs, column)))
        turned = [(a < 0) != (b < 0) for a, b in itertools.pairwise(one)]
        assert float(data[f"turns_{name}"]) == pytest.approx(sum(turned) / len(turned))


GOOD = {"growth": 5.0, "control": 1.0, "share": 0.99, "cosine": -0.99, "after": -0.99, "ratio": 0.5}
GOOD |= {"turns_before": 0.0, "turns_after": 1.0}


def written(**told: float) -> xr.Dataset:
    one = GOOD | told
    sharpness = [[2.0, 2 * one["growth"]], [2.0, 9.0], [3.0, 3 * one["control"]]]
    held = {"sharpness": (("arm", "checkpoint"), sharpness), "outlier_share": ("arm", [one["share"], 0.9, 1.0])}
    held["stability_ratio"] = (("arm", "checkpoint"), [[0.1, one["ratio"]], [0.2, 1.1], [0.3, 0.3]])
    signals = {"opposition_before": 0.9, "opposition_after": one["after"], "cosine": one["cosine"]}
    signals |= {name: one[name] for name in ("turns_before", "turns_after")}
    return xr.Dataset(held | signals | {"found": 1.0})


@pytest.mark.parametrize(
    ("told", "passed"),
    [
        ({}, True),
        ({"growth": 2.9}, False),
        ({"control": 1.25}, False),
        ({"share": 0.9}, False),
        ({"cosine": -0.8}, False),
        ({"after": -0.8}, False),
        ({"turns_before": 0.6}, False),
        ({"turns_after": 0.8}, False),
        ({"ratio": 1.1}, False),
        *(({name: math.nan}, False) for name in GOOD if name != "ratio"),
    ],
)
def test_growth_outlier_and_opposition_must_all_show(told: dict[str, float], passed: bool) -> None:
    verdict = SMALL.verdict(written(**told))
    assert verdict.passed is passed
    assert verdict.statistic == pytest.approx(told.get("growth", 5.0), nan_ok=True)


def test_training_that_diverges_or_is_not_over_does_not_pass() -> None:
    seen: list[bool] = []
    SMALL.run(seed=0, on_reading=lambda r: seen.append(SMALL.verdict(r.data).passed))
    assert not any(seen[:-1])
    wild = OpposingOutliers(examples=40, dimension=3, width=2, steps=60, every=20, learning_rate=5, large_rate=10)
    data = wild.run(seed=0).data
    assert data.cosine.isnull()
    assert data.outlier_share[:2].isnull().all()
    assert not wild.verdict(data).passed


def test_rates_must_ascend_and_seeds_differ() -> None:
    with pytest.raises(ValueError, match="below large_rate"):
        OpposingOutliers(learning_rate=0.3)
    one, two = (found.reading.data for found in judge(SMALL, (0, 1)))
    assert not np.allclose(one.train_loss[:, 0], two.train_loss[:, 0])


def test_the_effect_shows_on_one_seed() -> None:
    (found,) = judge(OpposingOutliers(steps=300), [0])
    assert found.verdict.passed, str(found.verdict)
    assert float(found.reading.data.found) == 1, "the groups are the outliers, which OpposingSignals was not told of"
