"""The map against exact Hessians of moved copies and hand-made saddles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from landscape.test_line import bowl
from landscape.test_path import toy
from landscape.test_plane import net_and_data
from torch import nn

from workbench.landscape.axes import plane_axes
from workbench.landscape.convexity import ConvexityMap, negative_share
from workbench.numerics.sampling import Draw
from workbench.subject import Subject


def test_every_point_is_the_spectrum_of_a_moved_copy() -> None:
    net, (x, y) = net_and_data()
    subject = Subject(net, (x, y), batch_size=7)
    data = ConvexityMap(points=3, extent=0.7, tolerance=1e-3).run(subject, seed=1).data
    axes = plane_axes(subject, Draw(1, "ConvexityMap", subject.size), "random", "filter", 0.7, 3)
    first, second = (subject.flatten(d) for d in (axes.first, axes.second))

    def loss(w: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(net, subject.unflatten(w), (x,)), y)

    for i in range(3):
        for j in range(3):
            point = subject.flatten(subject.params) + axes.u[i] * first + axes.v[j] * second
            exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, point))
            low, high = float(exact[0]), float(exact[-1])
            assert float(data.loss[i, j]) == pytest.approx(float(loss(point)), rel=1e-12)
            assert float(data.eigenvalue_max[i, j]) == pytest.approx(high, rel=1e-3)
            assert float(data.eigenvalue_min[i, j]) == pytest.approx(low, abs=1e-3 * high)
            assert float(data.ratio[i, j]) == pytest.approx(max(-low, 0) / high, abs=3e-3)
            assert abs(float(data.ratio[i, j]) - max(-low, 0) / high) <= float(data.ratio_error[i, j]) + 1e-9
    assert bool(data.converged.all())


@pytest.mark.parametrize(("at", "wanted"), [([1.0, 1.0], 0.0), ([0.0, 0.0], 1.0), ([0.5, 0.5], 1 / 3)])
def test_saddles_of_a_product(at: list[float], wanted: float) -> None:
    """½ (w_0 w_1 - 1)² has the Hessian [[w_1², 2 w_0 w_1 - 1], [., w_0²]]: at (½, ½) eigenvalues ¾ and -¼."""
    reading = ConvexityMap(points=3, extent=1e-3, normalization="none").run(toy(at))
    assert reading.summary["ratio_here"] == pytest.approx(wanted, abs=1e-9)
    if wanted:
        assert float(reading.data.convex_share) == 0


def test_a_bowl_is_convex_everywhere() -> None:
    data = ConvexityMap(points=3, normalization="none").run(bowl([0.3, 1.0])).data
    assert float(data.convex_share) == 1
    assert data.eigenvalue_max.values == pytest.approx(np.full((3, 3), 100.0))
    assert not data.ratio.values.any()


def test_nothing_that_curves_upwards_has_no_ratio() -> None:
    ratio, error = negative_share(*(np.array([v]) for v in (-1.0, -2.0, 0.1, 0.1)))
    assert math.isnan(ratio[0])
    assert math.isnan(error[0])
