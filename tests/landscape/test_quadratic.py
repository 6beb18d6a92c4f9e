"""The predicted quadratic against closed forms and exact Hessians, and the range chosen by it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape.test_plane import Weights, steep
from pytest import approx
from torch import nn

from workbench.figure import Line
from workbench.landscape.axes import plane_axes
from workbench.landscape.plane import Plane
from workbench.landscape.quadratic import Quadratic, agreement_radius, inner_difference, measured_line, quadratic
from workbench.numerics.sampling import Draw
from workbench.subject import Subject


def at(values: list[float], objective: object = steep) -> Subject:
    return Subject(Weights(values), [torch.zeros(1, 1)], objective=objective, reduction="mean")


def relu_net() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    return net, (torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,)))


def test_a_steep_quadratic_is_its_own_prediction():
    plane = Plane(points=9, extent=0.5, directions="hessian")
    reading = plane.run(at([0.3, 1.0]))
    data = reading.data
    assert data.slope.values == approx([30, 1])
    assert data.curvature.values == approx(np.diag([100.0, 1.0]), abs=1e-9)
    assert float(data.curvature_error) == approx(0, abs=1e-9)
    assert float(data.inner_difference) == approx(0, abs=1e-9)
    assert float(data.agreement_radius) == approx(0.5 * 2**0.5)
    predicted, measured = (
        next(m for m in reading.figure().panels[0].marks if isinstance(m, Line) and m.label.startswith(word))
        for word in ("predicted", "measured")
    )
    x, y = predicted.x, predicted.y
    rise = 30 * x + y + 50 * x**2 + 0.5 * y**2
    assert rise == approx(np.full(rise.shape, rise[0])), "the ellipse is one level of the loss"
    assert rise[0] > 0
    assert len(measured.x) == len(x)
    bare = Plane(points=9, extent=0.5, directions="hessian", ellipse=False)
    assert not any(isinstance(m, Line) for m in bare.figure(data).panels[0].marks)


def test_slopes_and_curvatures_are_those_of_the_exact_derivatives():
    net, (x, y) = relu_net()
    net[1] = nn.Tanh()
    subject = Subject(net, (x, y), batch_size=7)
    axes = plane_axes(subject, Draw(2, "Plane", subject.size), "random", "filter", 1.0, 3)
    rows = torch.stack([subject.flatten(axes.first), subject.flatten(axes.second)])

    def loss(at: torch.Tensor) -> torch.Tensor:
        flat = subject.flatten(subject.params) + at @ rows
        return nn.functional.cross_entropy(torch.func.functional_call(net, subject.unflatten(flat), (x,)), y)

    zero = torch.zeros(2, dtype=torch.float64)
    found = quadratic(subject, axes.first, axes.second)
    assert found.slope == approx(torch.autograd.functional.jacobian(loss, zero).numpy())
    assert found.curvature == approx(torch.autograd.functional.hessian(loss, zero).numpy())


def test_the_automatic_range_ends_where_the_prediction_has_risen_by_one():
    data = Plane(points=5, directions="hessian", reach="auto").run(at([0.3, 1.0])).data
    widths = [float(data[name].values[-1]) for name in ("u", "v")]
    assert [30 * widths[0] + 50 * widths[0] ** 2, widths[1] + widths[1] ** 2 / 2] == approx([1, 1 * 1.0], rel=0.5)
    assert 30 * widths[0] + 50 * widths[0] ** 2 == approx(1)
    assert widths[1] == approx(min(3**0.5 - 1, math.hypot(0.3, 1.0)))
    wide = Plane(points=5, directions="hessian", reach="auto", extent=3.0).run(at([0.3, 1.0])).data
    assert wide.u.values == approx(3 * data.u.values)


def test_flat_and_downward_curvature_end_at_the_weights_own_length():
    flat = Quadratic(np.zeros(2), np.diag([0.0, -5.0]))
    assert flat.half_width(0, 1.0, 7.0) == 7.0
    assert flat.half_width(1, 1.0, 7.0) == 7.0
    falling = Quadratic(np.array([0.5, -2.0]), np.diag([-5.0, 0.0]))
    assert falling.half_width(0, 1.0, 7.0) == 2.0
    assert falling.half_width(1, 1.0, 7.0) == 0.5

    def hill(model: nn.Module, batch: object) -> torch.Tensor:
        return 10 - model.w[0] ** 2 - 2 * model.w[1] ** 2

    reading = Plane(points=3, normalization="none", reach="auto").run(at([0.0, 0.0], hill))
    assert np.isfinite(reading.data.u.values).all()
    assert any("own length" in note for note in reading.notes)
    assert float(reading.data.u.values[-1] * reading.data.direction_norm.values[0]) == approx(1)


@settings(max_examples=5)
@given(st.floats(0.05, 20))
def test_range_and_agreement_are_the_same_after_a_relu_rescaling(factor: float):
    net, data = relu_net()
    other = copy.deepcopy(net)
    other[0].weight.data *= factor
    other[2].weight.data /= factor
    one, two = (Plane(points=5, reach="auto").run(Subject(n, data), seed=3).data for n in (net, other))
    for name in ("u", "v", "loss", "slope", "curvature", "inner_difference", "agreement_radius"):
        assert two[name].values == approx(one[name].values, rel=1e-6), name


curvatures = st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(-20, 20), st.floats(-5, 5), st.floats(-5, 5))


@settings(max_examples=50)
@given(curvatures, st.floats(0.01, 5))
def test_level_lines_lie_on_their_level_and_nothing_reaches_it_before(parts: tuple[float, ...], level: float):
    a, b, c, s, t = parts
    q = Quadratic(np.array([s, t]), np.array([[a, b], [b, c]]))
    x, y = q.level_line(level, (1.0, 2.0))
    known = np.isfinite(x)
    assert q.rise(x[known], y[known]) == approx(np.full(known.sum(), level), rel=1e-6, abs=1e-6)
    for share in (0.2, 0.6, 0.95):
        assert (q.rise(share * x[known], share * y[known]) < level * (1 + 1e-6) + 1e-6).all()
    angle = np.linspace(0, 2 * np.pi, len(x))[~known]
    far = np.geomspace(1e-3, 99, 50)[:, None]
    assert (q.rise(far * np.cos(angle), far * 2 * np.sin(angle)) <= level * (1 + 1e-6)).all()


def test_agreement_by_plain_loops():
    ticks = np.linspace(-1, 1, 21)
    u, v = (a.ravel() for a in np.meshgrid(ticks, ticks, indexing="ij"))
    r = np.hypot(u, v)
    loss = 3 + r**2 + r**4
    q = Quadratic(np.zeros(2), 2 * np.eye(2))
    held = 0.0
    for radius in sorted(set(np.round(r, 9)) - {0.0}):
        inside = r <= radius + 1e-8
        if math.sqrt((r[inside] ** 8).sum() / ((r[inside] ** 2 + r[inside] ** 4) ** 2).sum()) > 0.1:
            break
        held = radius
    assert 0.2 < held < 0.6
    assert agreement_radius(u, v, loss, 3.0, q) == approx(held)
    inside = r <= 0.5 + 1e-9
    wanted = math.sqrt((r[inside] ** 8).sum() / ((r[inside] ** 2 + r[inside] ** 4) ** 2).sum())
    assert inner_difference(u, v, loss, 3.0, q, (1.0, 1.0)) == approx(wanted, rel=1e-5)
    loss[np.argmin(np.abs(r - 0.1))] = math.nan
    assert agreement_radius(u, v, loss, 3.0, q) == 0
    assert math.isnan(inner_difference(u, v, loss, 3.0, q, (1.0, 1.0)))


def test_the_measured_line_is_where_the_loss_reaches_the_level():
    ticks = np.linspace(-1, 1, 41)
    rise = ticks[:, None] ** 2 + 4 * ticks[None, :] ** 2
    x, y = measured_line(ticks, ticks, rise, 0.25)
    assert x**2 + 4 * y**2 == approx(np.full(x.shape, 0.25), abs=0.01)
    rise[:, 30:] = np.nan
    x, y = measured_line(ticks, ticks, rise, 4.5)
    assert np.isnan(x).any()
    assert np.isnan(measured_line(ticks + 5, ticks, rise, 0.25)[0]).all()


class Missing(torch.autograd.Function):
    """The identity, whose derivative is missing, as those of some backward kernels are."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the derivative for 'missing_backward' is not implemented.")


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return Missing.apply(2 * ctx.saved_tensors[0] * grad)


@pytest.mark.parametrize(
    ("objective", "why"),
    [
        (lambda model, batch: Once.apply(model.w).sum() + 1, "differentiated twice"),
        (lambda model, batch: (model.w > 0.25).double().sum() + 1, "are zero at the model"),
        (lambda model, batch: torch.tensor(float(np.sum(model.w.detach().numpy() ** 2)) + 1), "at the model"),
    ],
    ids=["once", "steps", "no graph, as rewards"],
)
def test_a_loss_without_derivatives_still_has_its_picture(objective: object, why: str):
    reading = Plane(points=5, normalization="none").run(at([0.3, 1.0], objective))
    assert reading.converged
    assert np.isfinite(reading.data.loss.values).all()
    assert np.ptp(reading.data.loss.values) > 0
    assert np.isnan(reading.data.slope.values).all()
    assert any(why in note for note in reading.notes)
    assert not any(isinstance(m, Line) for m in reading.figure().panels[0].marks)
