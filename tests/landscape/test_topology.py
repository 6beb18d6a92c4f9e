"""Basins of planes whose minima and saddles are known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from landscape.test_line import bowl
from landscape.test_plane import Weights, broken, net_and_data
from torch import nn

from workbench.landscape.plane import Plane
from workbench.landscape.topology import Topology
from workbench.subject import Subject


def wells(model: nn.Module, batch: object) -> torch.Tensor:
    """(w_0² - 1)² + 0.3 w_0 + w_1²: minima near w_0 = ±1, the left one deeper, a saddle near w_0 = 0."""
    return (model.w[0] ** 2 - 1) ** 2 + 0.3 * model.w[0] + model.w[1] ** 2 + 1


def plane(objective: object, **settings: float) -> Topology:
    return Topology(points=33, extent=1.6, directions="hessian", **settings)


def test_two_wells_and_the_saddle_between_them() -> None:
    subject = Subject(Weights([0.0, 0.0]), [torch.zeros(1, 1)], objective=wells, reduction="mean")
    reading = plane(wells).run(subject)
    data = reading.data
    # The sharpest direction at the origin is along w_1 (2), the other along w_0 (-4): both axes in weight distance.
    grid = np.linspace(-1.6, 1.6, 33)
    line = (grid**2 - 1) ** 2 + 0.3 * grid + 1
    left, right = line[grid < 0].min(), line[grid > 0].min()
    saddle = line[(grid > -0.9) & (grid < 0.9)].max()
    assert float(data.basins) == 2
    assert data.birth.values[:2] == pytest.approx([left, right])
    assert float(data.death[1]) == pytest.approx(saddle)
    assert float(data.total_persistence) == pytest.approx(saddle - right)
    assert float(data.saddle_minimum_distance) == pytest.approx(saddle - (left + right) / 2)
    assert abs(float(data.basin_v[0])) == pytest.approx(abs(grid[line.argmin()]))
    assert np.isnan(data.birth.values[2:]).all()
    assert float(Topology(points=33, extent=1.6, directions="hessian", threshold=0.5).run(subject).data.basins) == 1


def test_a_bowl_has_one_basin_at_every_resolution() -> None:
    data = Topology(points=17, directions="hessian").run(bowl([0.3, 1.0])).data
    assert set(data.basins_at.values) == {1.0}
    assert float(data.total_persistence) == 0
    assert math.isnan(float(data.saddle_minimum_distance))


def test_it_is_the_plane_of_the_same_seed() -> None:
    net, data = net_and_data()
    subject = Subject(net, data)
    found = Topology(points=5, extent=0.5).run(subject, seed=7).data
    drawn = Plane(points=5, extent=0.5).run(subject, seed=7).data
    assert np.array_equal(found.loss.values, drawn.loss.values)


def test_what_is_not_finite_is_no_part_of_the_domain() -> None:
    subject = Subject(Weights([0.0, 0.0]), [torch.zeros(1, 1)], objective=broken, reduction="mean")
    data = Topology(points=5, normalization="none").run(subject).data
    assert float(data.not_finite) == (~np.isfinite(data.loss.values)).sum() > 0
