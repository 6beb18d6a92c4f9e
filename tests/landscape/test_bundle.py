"""Many lines against moved copies, the expected rise of a quadratic, and how often the interval holds it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from landscape.test_plane import Weights, broken, net_and_data
from torch import nn

from workbench.landscape.bundle import Bundle, summarised
from workbench.landscape.directions import random_direction
from workbench.numerics.sampling import Draw
from workbench.subject import Subject


def test_every_point_of_every_line_is_the_loss_of_a_moved_copy() -> None:
    net, (x, y) = net_and_data()
    subject = Subject(net, (x, y), batch_size=7)
    data = Bundle(lines=3, points=5, extent=0.4).run(subject, seed=6).data
    draw = Draw(6, "Bundle", subject.size)
    for k in range(3):
        direction = random_direction(subject, draw, k, "filter")
        for i, alpha in enumerate(data["alpha"].values):
            moved = copy.deepcopy(net)
            for name, p in moved.named_parameters():
                p.data += alpha * direction[name]
            assert float(data.loss[k, i]) == pytest.approx(nn.functional.cross_entropy(moved(x), y).item(), rel=1e-12)
    assert (data.loss[:, 2] == subject.loss()).all()
    assert data.loss_low.values == pytest.approx(data.loss.values.min(0))
    assert data.loss_mean.values == pytest.approx(data.loss.values.mean(0))


def test_the_interval_holds_the_mean_over_all_directions_as_often_as_it_says() -> None:
    """On ½ Σ a_i w_i² the mean rise along N(0, I) at α is ½ α² Σ a_i."""
    curvature = torch.arange(1, 101, dtype=torch.float64)

    def bowl(model: nn.Module, batch: object) -> torch.Tensor:
        return (curvature * model.w**2).sum() / 2

    subject = Subject(Weights([0.0] * 100), [torch.zeros(1, 1)], objective=bowl, reduction="mean")
    exact, probe = 0.25 * float(curvature.sum()) / 2, Bundle(lines=12, points=3, extent=0.5, normalization="none")
    found = [probe.run(subject, seed=s).summary for s in range(150)]
    hits = sum(abs(float(f["rise"]) - exact) <= float(f["rise_error"]) for f in found)
    assert hits / 150 >= 0.9
    assert np.mean([float(f["rise"]) for f in found]) == pytest.approx(exact, rel=0.03)
    wanted = math.sqrt(2 * float((curvature**2).sum())) / float(curvature.sum())
    assert np.mean([float(f["spread"]) for f in found]) == pytest.approx(wanted, rel=0.1)


def test_what_one_line_lacks_has_no_mean() -> None:
    subject = Subject(Weights([0.0, 0.0]), [torch.zeros(1, 1)], objective=broken, reduction="mean")
    data = Bundle(lines=4, points=5, normalization="none").run(subject, seed=0).data
    lost = ~np.isfinite(data.loss.values).all(axis=0)
    assert lost.any()
    assert np.isnan(data.loss_mean_error.values[lost]).all()
    assert np.isfinite(data.loss_mean_error.values[~lost]).all()
    half = summarised(np.array([[1.0, np.nan, 3.0], [1.0, 0.0, 2.0]]), 0.0)
    assert np.isnan(half["loss_low"][1])
    assert half["loss_low"][2] == 2
