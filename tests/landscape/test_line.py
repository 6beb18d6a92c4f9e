"""The line against moved copies, exact parabolas, known eigenvectors and planted NaN."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from landscape.test_plane import Weights, broken, net_and_data, steep
from torch import nn

from workbench.figure import Line as Curve
from workbench.landscape.line import Line, agreement_radius
from workbench.subject import Subject


def bowl(values: list[float]) -> Subject:
    """50 w_0² + ½ w_1² at a point."""
    return Subject(Weights(values), [torch.zeros(1, 1)], objective=steep, reduction="mean")


@pytest.mark.parametrize("direction", ["random", "gradient", "sharpest", "negative"])
def test_every_point_is_the_loss_of_a_moved_copy(direction: str) -> None:
    net, (x, y) = net_and_data()
    subject = Subject(net, (x, y), batch_size=7)
    data = Line(points=8, extent=0.3, direction=direction).run(subject, seed=2).data
    assert bool(data.evaluated.all())
    # The direction itself is seen from outside: two losses and their slope at the model fix which one it is.
    flat = torch.cat([g.flatten() for g in subject.gradient().values()])
    if direction == "gradient":
        unit = subject.unflatten(flat / flat.norm())
        for alpha, loss in zip(data["alpha"].values, data.loss.values, strict=True):
            moved = copy.deepcopy(net)
            for name, p in moved.named_parameters():
                p.data += alpha * unit[name]
            assert loss == pytest.approx(nn.functional.cross_entropy(moved(x), y).item(), rel=1e-12)
        assert float(data.slope) == pytest.approx(float(flat.norm()), rel=1e-9)
    else:
        exact = torch.autograd.functional.hessian(
            lambda w: nn.functional.cross_entropy(torch.func.functional_call(net, subject.unflatten(w), (x,)), y),
            subject.flatten(subject.params),
        )
        ends = torch.linalg.eigvalsh(exact)
        wanted = {"sharpest": float(ends[-1]), "negative": float(ends[0])}.get(direction)
        if wanted is not None:
            assert float(data.curvature) == pytest.approx(wanted, abs=0.02 * float(ends[-1]))
            assert float(data.slope) >= 0
            assert float(data.direction_norm) == pytest.approx(1)
    small = Line(points=3, extent=1e-3, direction=direction).run(subject, seed=2).data
    low, here, high = small.loss.values
    assert here == subject.loss()
    assert (high - low) / 2e-3 == pytest.approx(float(small.slope), rel=1e-4, abs=1e-7)
    assert (high - 2 * here + low) / 1e-6 == pytest.approx(float(small.curvature), rel=1e-2, abs=1e-4)


def test_on_a_quadratic_the_parabola_is_the_loss() -> None:
    reading = Line(points=21, extent=2.0, direction="sharpest").run(bowl([0.0, 1.0]))
    data = reading.data
    assert data.predicted.values == pytest.approx(data.loss.values)
    assert (float(data.agreement_radius), float(data.roughness), float(data.minima)) == (2.0, 0.0, 1.0)
    assert float(data.curvature) == pytest.approx(100)
    drawn = [m for m in reading.figure().panels[0].marks if isinstance(m, Curve)]
    assert np.array_equal(drawn[0].y, data.loss.values)
    assert np.nanmax(np.abs(drawn[1].y - data.loss.values)) < 1e-9
    flat = Line(points=5, direction="negative").run(bowl([0.0, 1.0])).data
    assert float(flat.curvature) == pytest.approx(1)


def test_agreement_ends_where_the_curve_first_leaves_the_parabola() -> None:
    alpha = np.linspace(-1, 1, 201)
    quartic = alpha**2 / 2 + alpha**4  # misses by a tenth of its change where α⁴ = 0.1 (α²/2 + α⁴)
    assert agreement_radius(alpha, quartic, alpha**2 / 2, 0.0) == pytest.approx(math.sqrt(0.05 / 0.9), abs=0.01)
    broken_off = np.where(alpha > 0.5, np.nan, alpha**2 / 2)
    assert agreement_radius(alpha, broken_off, alpha**2 / 2, 0.0) == pytest.approx(0.5)
    assert agreement_radius(alpha, alpha + 1, np.ones(201), 1.0) == 0.0


def test_nan_and_inf_stay_and_the_shape_is_unknown_then() -> None:
    subject = Subject(Weights([0.0, 0.0]), [torch.zeros(1, 1)], objective=broken, reduction="mean")
    data = Line(points=5, normalization="none").run(subject, seed=1).data
    assert not np.isfinite(data.loss.values).all()
    assert math.isnan(float(data.roughness))
    assert np.isfinite(float(data.loss_here))


def test_no_gradient_no_direction() -> None:
    with pytest.raises(ValueError, match="the gradient is zero here"):
        Line(direction="gradient").run(bowl([0.0, 0.0]))
