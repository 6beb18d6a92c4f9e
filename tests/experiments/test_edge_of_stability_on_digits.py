"""The edge of stability on digits: a small run against plain loops and a dense Hessian, verdicts, one quick seed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.datasets import load_digits

from workbench.experiments.edge_of_stability_on_digits import EdgeOfStabilityOnDigits
from workbench.experiments.experiment import judge
from workbench.zoo.nets import dense

SMALL = EdgeOfStabilityOnDigits(examples=30, width=3, depth=1, steps=12, every=5)


def test_a_small_run_is_what_plain_loops_say() -> None:
    data = replace(SMALL, largest=0.1, smallest=0.025).run(seed=2).data
    pixels, labels = load_digits(return_X_y=True)
    spread = pixels.std(0, ddof=1)
    pixels = (pixels - pixels.mean(0)) / np.where(spread > 0, spread, 1)
    rows = torch.randperm(1797, generator=torch.Generator().manual_seed(2))[:30].numpy()
    x, y = torch.from_numpy(pixels[rows]), torch.eye(10, dtype=torch.float64)[labels[rows]]
    start = [p.detach() for p in dense((64, 3, 10), "tanh", seed=2 + 1_000_003).double().parameters()]
    sizes = [p.numel() for p in start]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        a, b, c, d = (v.view(p.shape) for v, p in zip(flat.split(sizes), start, strict=True))
        return (torch.tanh(x @ a.T + b) @ c.T + d - y).square().sum() / 60

    assert data["arm"].values == pytest.approx([0.1, 0.05, 0.025])
    for arm, rate in enumerate((0.1, 0.05, 0.025)):
        flat, row = torch.cat([p.flatten() for p in start]), data.isel(arm=arm)
        for step in range(13):
            flat.requires_grad_()
            now = loss(flat)
            assert float(row.train_loss[step]) == pytest.approx(now.item(), rel=1e-4)
            if step in (0, 5, 10, 12):
                largest = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat.detach()))[-1].item()
                assert float(row.sharpness.sel(checkpoint=step)) == pytest.approx(largest, rel=2e-3)
            flat = (flat - rate * torch.autograd.grad(now, flat)[0]).detach()
        assert row.stability_threshold.values == pytest.approx(2 / rate)


GOOD = {"late": 1.0, "crossing": 100.0, "control": 0.6, "rises": 0.0, "left": 0.01}


def written(**told: float) -> xr.Dataset:
    one = GOOD | told
    held = {"ratio_late": ("arm", [1.02, one["late"], 0.6]), "step_crossing": ("arm", [50, one["crossing"], math.nan])}
    held["stability_ratio"] = (("arm", "checkpoint"), [[0.3, 1.0], [0.2, 1.0], [0.1, one["control"]]])
    held["train_loss"] = (("arm", "step"), [[0.5, 0.01], [0.5, 0.5 * one["left"]], [0.5, 0.01]])
    return xr.Dataset(held | {"loss_rises": ("arm", [0.4, 0.3, one["rises"]])}, {"arm": [0.4, 0.2, 0.1]})


@pytest.mark.parametrize(
    ("told", "passed"),
    [
        ({}, True),
        ({"late": 0.94}, False),
        ({"late": 1.11}, False),
        ({"control": 1.01}, False),
        ({"rises": 0.001}, False),
        ({"left": 0.06}, False),
        *(({name: math.nan}, False) for name in GOOD if name != "control"),
    ],
)
def test_both_arms_must_be_at_the_edge_and_the_control_below(told: dict[str, float], passed: bool) -> None:
    verdict = SMALL.verdict(written(**told))
    assert verdict.passed is passed
    assert verdict.statistic == pytest.approx(min(told.get("late", 1.0), 1.02), nan_ok=True)


def known(data: xr.Dataset) -> bool:
    """Whether the last loss is there, some moments before the last reading."""
    return bool(np.isfinite(data.train_loss[-1, -1]))


def test_training_that_diverges_or_is_not_over_does_not_pass() -> None:
    seen: list[bool] = []
    QUICK.run(seed=1, on_reading=lambda r: seen.append(QUICK.verdict(r.data).passed and not known(r.data)))
    assert len(seen) > 3, "curves grow before one's eyes"
    assert not any(seen)
    wild = EdgeOfStabilityOnDigits(
        examples=30, width=3, depth=1, steps=400, largest=10, smallest=9, arms=2, momentum=0.9
    )
    data = wild.run().data
    assert not np.isfinite(data.train_loss[:, -1]).any()
    assert not wild.verdict(data).passed


def test_the_control_has_the_smallest_step_and_seeds_differ() -> None:
    with pytest.raises(ValueError, match="below largest"):
        EdgeOfStabilityOnDigits(smallest=0.5)
    one, two = (found.reading.data for found in judge(SMALL, (0, 1)))
    assert not np.allclose(one.train_loss[:, 0], two.train_loss[:, 0])
    assert one.train_loss[0, 0] == one.train_loss[2, 0], "arms begin with the same weights"


QUICK = EdgeOfStabilityOnDigits(examples=100, width=32, depth=2, steps=600, every=20, largest=0.8, smallest=0.2)


def test_the_effect_shows_on_one_seed_of_a_small_net() -> None:
    (found,) = judge(QUICK, [0])
    assert found.verdict.passed, str(found.verdict)
    assert float(found.reading.data.loss_rises[0]) > 0.1, "past the crossing the loss falls, though not at each step"
