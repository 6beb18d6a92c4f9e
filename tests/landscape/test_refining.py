"""Planes sampled where they are known least: against whole grids of the same plane, and with planted NaN and Inf."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

from workbench.figure import Contour, Points
from workbench.landscape.plane import Plane
from workbench.numerics.sampling import Draw
from workbench.subject import Subject


class Weights(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def bowl(model, batch):
    """0.01 + 30 w_0² + 3 w_1²: a sharp minimum in logarithms."""
    return 0.01 + 30 * model.w[0] ** 2 + 3 * model.w[1] ** 2


def broken(model, batch):
    bad = torch.where(model.w[0] > 0.5, torch.tensor(float("nan")), torch.tensor(0.0))
    return bowl(model, batch) + bad


def subject(objective=bowl, **settings) -> Subject:
    return Subject(Weights([0.0, 0.0]), [torch.zeros(1, 1)], objective=objective, reduction="mean", **settings)


def plane(**settings) -> Plane:
    return Plane(points=33, directions="hessian", sampling="adaptive", **settings)


def truth(objective=bowl) -> np.ndarray:
    return Plane(points=33, directions="hessian", sampling="grid").run(subject(objective)).data.loss.values


def test_the_surface_is_the_whole_grid_to_the_stated_error_with_far_fewer_points():
    reading, exact = plane(tolerance=0.02, most=300).run(subject()), truth()
    data = reading.data
    seen = data.evaluated.values
    missed = np.log(data.surface.values / exact)
    assert 49 <= seen.sum() < exact.size / 6
    assert np.isfinite(data.sample_u.values).sum() == seen.sum() == reading.summary["points"]
    assert data.loss.values[seen] == approx(exact[seen], rel=1e-12)
    assert np.isnan(data.loss.values[~seen]).all()
    assert (data.surface.values[seen] == data.loss.values[seen]).all()
    assert (data.surface_error.values[seen] == 0).all()
    assert (data.surface_error.values[~seen] > 0).all()
    assert np.sqrt(np.mean(missed**2)) / np.log(exact).std() < float(data.relative_error) <= 0.02
    assert reading.converged
    assert bool(data.surface_log)


def test_it_stops_at_the_most_points_unconverged_and_may_end_with_all_of_them():
    short = plane(most=50, tolerance=1e-4).run(subject())
    assert int(short.data.evaluated.sum()) == 50
    assert not short.converged
    assert short.done == 1
    whole = Plane(points=5, directions="hessian", sampling="adaptive").run(subject())
    grid = Plane(points=5, directions="hessian").run(subject())
    assert whole.converged
    assert whole.data.loss.values == approx(grid.data.loss.values, rel=1e-12)


def test_a_rough_picture_comes_after_nine_points_and_sharpens():
    stream = list(plane(tolerance=0.02, most=300).stream(subject(), Draw(0, "Plane", 2)))
    assert not np.isfinite(stream[0].data.surface.values).any()
    rough = next(r for r in stream if r.data.evaluated.sum() >= 9)
    assert rough.data.evaluated.values[::16, ::16].all()
    assert np.isfinite(rough.data.surface.values).all()
    assert "from 9 samples" in rough.figure().note
    assert all(later.done >= sooner.done for sooner, later in itertools.pairwise(stream))
    errors = [float(r.data.relative_error) for r in stream if r.data.evaluated.sum() in (25, 49, 65)]
    assert errors == sorted(errors, reverse=True)


def test_the_figure_draws_the_surface_with_its_samples_and_the_error():
    reading = plane(tolerance=0.02, most=300, metric="loss").run(subject())
    figure = reading.figure()
    marks = figure.panels[0].marks
    contour = next(m for m in marks if isinstance(m, Contour))
    samples = next(m for m in marks if isinstance(m, Points) and m.label == "samples")
    assert np.asarray(contour.z).T == approx(reading.data.surface.values)
    assert len(np.asarray(samples.x)) == int(reading.data.evaluated.sum())
    assert "of its spread" in figure.note
    grid = Plane(points=5, directions="hessian").run(subject())
    assert not any(isinstance(m, Points) and m.label == "samples" for m in grid.figure().panels[0].marks)
    assert np.isnan(grid.data.surface.values).all()
    assert "interpolated_within" not in grid.summary


def test_what_is_not_finite_stays_unknown_and_costs_little():
    reading = plane(tolerance=0.02, most=150).run(subject(broken))
    data, exact = reading.data, truth(broken)
    hole = np.isnan(exact)
    known = np.isfinite(data.surface.values)
    assert (known == hole).mean() < 0.06
    both = known & ~hole
    assert np.log(data.surface.values[both] / exact[both]).std() < 0.05 * np.log(exact[~hole]).std()
    assert reading.summary["not_finite"] == int(np.isnan(data.loss.values[data.evaluated.values]).sum()) > 0
    assert "not finite" in reading.figure().note
    assert reading.summary["not_finite"] < 0.4 * reading.summary["points"]


def test_other_values_are_interpolated_for_the_picture_within_what_was_seen():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3)).double()
    data = (torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,)))
    far = {"metrics": {"length": lambda model: sum(float(p.norm()) for p in model.parameters())}}
    settings = {"points": 17, "sampling": "adaptive", "most": 60, "tolerance": 1e-4}
    reading = Plane(metric="error_rate", **settings).run(Subject(net, data))
    drawn = np.asarray(next(m for m in reading.figure().panels[0].marks if isinstance(m, Contour)).z)
    seen = reading.data.error_rate.values[reading.data.evaluated.values]
    assert np.isfinite(drawn).all()
    assert seen.min() <= drawn.min() <= drawn.max() <= seen.max()
    own = Plane(metric="own", **settings).run(Subject(net, data, **far))
    exact = Plane(points=17, sampling="grid").run(Subject(net, data, **far)).data.own_metric.values[0]
    drawn = np.asarray(own.figure().panels[0].marks[0].z).T
    assert drawn == approx(exact, rel=0.02)


@pytest.mark.parametrize("objective", [bowl, broken])
def test_the_same_seed_asks_for_the_same_points(objective):
    first, again = (plane(most=70).run(subject(objective)).data for _ in range(2))
    assert first.sample_u.values.tolist()[:70] == again.sample_u.values.tolist()[:70]
    assert first.surface.identical(again.surface)


def test_the_price_is_that_of_the_points_evaluated_at_most():
    assert plane(most=100).estimate(subject()).products == 101
    assert Plane(points=5, sampling="adaptive").estimate(subject()).products == 26
