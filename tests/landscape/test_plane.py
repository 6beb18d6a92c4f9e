"""The plane against losses of moved copies, exact quadratics, and planted NaN and Inf."""

import copy

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

from workbench.draw.screen import describe
from workbench.draw.sheet import sheet
from workbench.figure import Contour, Surface
from workbench.landscape.axes import plane_axes
from workbench.landscape.plane import Plane
from workbench.numerics.sampling import Draw
from workbench.subject import Subject


class Weights(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def steep(model: nn.Module, batch: object) -> torch.Tensor:
    """50 w_0² + ½ w_1²: curvatures 100 and 1."""
    return 50 * model.w[0] ** 2 + 0.5 * model.w[1] ** 2


def quadratic() -> Subject:
    return Subject(Weights([0.0, 0.0]), [torch.zeros(1, 1)], objective=steep, reduction="mean")


def net_and_data() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return net, (torch.randn(23, 5, dtype=torch.float64), torch.randint(0, 3, (23,)))


@pytest.mark.parametrize("points", [5, 6])
@pytest.mark.parametrize("normalization", ["filter", "layer", "none"])
def test_every_point_is_the_loss_of_a_moved_copy(points, normalization):
    net, data = net_and_data()
    subject = Subject(net, data, batch_size=7)
    reading = Plane(points=points, extent=0.5, normalization=normalization).run(subject, seed=4)
    draw = Draw(4, "Plane", subject.size)
    axes = plane_axes(subject, draw, "random", normalization, 0.5, points)
    for i in range(points):
        for j in range(points):
            moved = copy.deepcopy(net)
            for name, p in moved.named_parameters():
                p.data += axes.u[i] * axes.first[name] + axes.v[j] * axes.second[name]
            out = moved(data[0])
            assert float(reading.data.loss[i, j]) == approx(nn.functional.cross_entropy(out, data[1]).item(), rel=1e-12)
            assert float(reading.data.error_rate[i, j]) == approx(float((out.argmax(1) != data[1]).double().mean()))


@pytest.mark.parametrize("points", [4, 5, 24, 25])
def test_a_steep_quadratic_keeps_its_geometry(points):
    plane = Plane(points=points, extent=1.0, directions="hessian", sampling="grid")
    data = plane.run(quadratic()).data
    u, v, z = data.u.values, data.v.values, data.loss.values
    assert z == approx(50 * u[:, None] ** 2 + 0.5 * v[None, :] ** 2, abs=1e-9)
    assert z == approx(z[::-1, ::-1])
    assert u == approx(-u[::-1])
    assert float(data.loss_here) == 0
    contour = next(m for m in plane.figure(data).panels[0].marks if isinstance(m, Contour))
    assert contour.z == approx(50 * contour.x[None, :] ** 2 + 0.5 * contour.y[:, None] ** 2, abs=1e-9), (
        "the drawn x axis must be direction 1"
    )


def broken(model: nn.Module, batch: object) -> torch.Tensor:
    w = model.w
    bad = torch.where(w[0] > 0.4, torch.tensor(float("nan")), torch.tensor(0.0))
    return steep(model, batch) + torch.where(w[1] > 0.4, torch.tensor(float("inf")), bad)


def test_nan_and_inf_stay_where_they_are():
    subject = Subject(Weights([0.0, 0.0]), [torch.zeros(1, 1)], objective=broken, reduction="mean")
    whole = Plane(points=5, normalization="none").run(subject)
    clean = Plane(points=5, normalization="none").run(quadratic())
    z, exact = whole.data.loss.values, clean.data.loss.values
    assert np.isnan(z).any()
    assert np.isinf(z).any()
    good = np.isfinite(z)
    assert z[good] == approx(exact[good])
    assert whole.summary["not_finite"] == int((~good).sum())
    assert "not finite" in whole.figure().note


def test_the_first_reading_knows_the_model_and_a_rough_map_comes_early():
    net, data = net_and_data()
    seen = list(Plane(points=17, sampling="grid").stream(Subject(net, data), Draw(0, "Plane", 66)))
    assert np.isfinite(float(seen[0].data.loss_here))
    assert not seen[0].data.evaluated.values.any()
    rough = next(r for r in seen if r.data.evaluated.sum() >= 9).figure()  # as many as go together may be more
    assert "of 17 × 17 points" in rough.note
    assert isinstance(rough.panels[1].marks[0], Surface)
    assert np.isfinite(rough.panels[1].marks[0].z).all()
    assert seen[-1].converged
    assert not seen[-2].converged


def test_eigenvector_axes_are_unit_orthogonal_and_curve_as_their_eigenvalues_say():
    net, data = net_and_data()
    subject = Subject(net, data)
    found = Plane(points=5, extent=1e-3, directions="hessian").run(subject).data
    params = dict(net.named_parameters())
    loss = nn.functional.cross_entropy(net(data[0]), data[1])
    grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(params.values()), create_graph=True)])
    rows = [
        torch.cat([r.flatten() for r in torch.autograd.grad(g, list(params.values()), retain_graph=True)])
        for g in grads
    ]
    exact = torch.linalg.eigvalsh(torch.stack(rows)).flip(0)
    z, h = found.loss.values, found.u.values[3]
    assert found.direction_norm.values == approx([1, 1])
    assert float(found.cosine) == approx(0, abs=1e-6)
    assert (z[3, 2] - 2 * z[2, 2] + z[1, 2]) / h**2 == approx(float(exact[0]), rel=1e-3)
    assert (z[2, 3] - 2 * z[2, 2] + z[2, 1]) / h**2 == approx(float(exact[1]), rel=2e-2)


def test_a_path_is_asked_for_when_there_is_none():
    net, data = net_and_data()
    with pytest.raises(ValueError, match=r"trajectory\.subject"):
        Plane(points=3, directions="pca").run(Subject(net, data))


def test_standard_errors_are_those_of_the_examples():
    net, data = net_and_data()
    reading = Plane(points=3, extent=0.1).run(Subject(net, data))
    losses = nn.functional.cross_entropy(net(data[0]), data[1], reduction="none")
    assert float(reading.data.loss_here_error) == approx(float(losses.std() / len(losses) ** 0.5), rel=1e-9)


@pytest.mark.parametrize("reach", ["given", "auto"])
def test_zooming_samples_the_range_that_was_seen(reach):
    net, data = net_and_data()
    subject = Subject(net, data)
    plane = Plane(points=5, extent=0.5, reach=reach)
    first = plane.run(subject).data
    u, v = first.u.values, first.v.values
    closer = plane.zoomed(first, (u[2], u[3]), (v[3], v[4]))
    found = closer.run(subject)
    assert found.data.u.values[[0, -1]] == approx(u[[2, 3]])
    assert found.data.v.values[[0, -1]] == approx(v[[3, 4]])
    corners = found.data.loss.values[np.ix_([0, -1], [0, -1])]
    assert corners == approx(first.loss.values[np.ix_([2, 3], [3, 4])])
    again = closer.zoomed(found.data, (u[0], u[4]), (v[0], v[4]))
    assert again.run(subject).data.u.values == approx(u)
    assert found.figure().panels[0].x.limits == approx((u[2], u[3]))


@pytest.mark.parametrize("policy", ["batch", "recompute"])
def test_each_point_has_its_own_statistics_when_asked(policy):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double().eval()
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.arange(24) % 3
    subject = Subject(net, (x, y), batch_size=24)
    found = Plane(points=3, extent=0.5, norm=policy).run(subject, seed=2)
    axes = plane_axes(subject, Draw(2, "Plane", subject.size), "random", "filter", 0.5, 3)
    for i in range(3):
        for j in range(3):
            moved = copy.deepcopy(net)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p += axes.u[i] * axes.first[name] + axes.v[j] * axes.second[name]
                moved[1].momentum = None
                moved[1].reset_running_stats()
                out = moved.train()(x)
                out = out if policy == "batch" else moved.eval()(x)
            assert float(found.data.loss[i, j]) == approx(nn.functional.cross_entropy(out, y).item(), rel=1e-9)
    assert not np.allclose(found.data.loss.values, Plane(points=3, extent=0.5).run(subject, seed=2).data.loss.values)


def test_large_grids_are_whole_and_say_so_less_often():
    fine = list(Plane(points=51, directions="hessian", sampling="grid").stream(quadratic(), Draw(0, "Plane", 2)))
    assert len(fine) < 1400
    assert fine[-1].converged
    assert fine[-1].data.evaluated.values.all()


def reward(model: nn.Module) -> float:
    """A number of the model alone, as a reward is."""
    return float(model(torch.ones(1, 5, dtype=torch.float64)).max())


def top_two(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether the right class is among the best two, for each example."""
    return (outputs.topk(2, dim=1).indices == targets[:, None]).any(1)


def mean_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One number for a batch."""
    p = outputs.softmax(1)
    return -(p * p.log()).sum(1).mean()


def test_own_metrics_are_measured_at_each_point():
    net, data = net_and_data()
    own = {"reward": reward, "top two": top_two, "entropy": mean_entropy}
    subject = Subject(net, data, metrics=own, batch_size=7)
    reading = Plane(points=3, extent=0.5, metric="own").run(subject, seed=2)
    axes = plane_axes(subject, Draw(2, "Plane", subject.size), "random", "filter", 0.5, 3)
    assert list(reading.data.own.values) == list(own)
    for i in range(3):
        for j in range(3):
            moved = copy.deepcopy(net)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p += axes.u[i] * axes.first[name] + axes.v[j] * axes.second[name]
                out = moved(data[0])
            hits = top_two(out, data[1]).double()
            wanted = [reward(moved), float(hits.mean()), float(mean_entropy(out, data[1]))]
            found, error = (reading.data[name].values[:, i, j] for name in ("own_metric", "own_metric_error"))
            assert found == approx(wanted)
            assert np.isnan(error[0])
            assert error[1] == approx(float(hits.std() / len(hits) ** 0.5))
    figure = reading.figure()
    assert [panel.z.label for panel in figure.panels] == list(own)
    assert subject.fingerprint() != Subject(net, data, batch_size=7).fingerprint()
    assert subject.snapshot().evaluate(metrics=("reward",))["reward"] == approx(reward(net))
    assert set(subject.evaluate()) == {"loss", "loss_error", "error_rate", "error_rate_error"}


def test_metrics_that_cannot_be_are_refused():
    net, data = net_and_data()
    with pytest.raises(ValueError, match="requires 3 arguments"):
        Subject(net, data, metrics={"odd": lambda a, b, c: 0.0})
    with pytest.raises(ValueError, match="are taken"):
        Subject(net, data, metrics={"loss": reward})
    with pytest.raises(ValueError, match=r"give f\(model\) instead"):
        Subject(Weights([1.0, 0.0]), [torch.zeros(1, 1)], objective=steep, reduction="mean", metrics={"top": top_two})
    with pytest.raises(TypeError, match="got int"):
        Subject(net, data, metrics={"one": 1})
    with pytest.raises(ValueError, match="'reward'; there are 'loss', 'error_rate', 'mine'"):
        Subject(net, data, metrics={"mine": reward}).evaluate(metrics=("reward",))
    shapeless = Subject(net, data, metrics={"all": lambda outputs, targets: outputs})
    with pytest.raises(ValueError, match=r"a metric gave shape \(23, 3\)"):
        shapeless.evaluate(metrics=("all",))


def test_a_reward_alone_is_an_objective():
    def negative_reward(model: nn.Module, batch: object) -> torch.Tensor:
        return torch.tensor(10.0 - reward(model))

    net, _ = net_and_data()
    subject = Subject(net, [torch.zeros(1, 1)], objective=negative_reward, reduction="mean")
    reading = Plane(points=3).run(subject)
    assert float(reading.data.loss_here) == approx(10 - reward(net))
    assert np.ptp(reading.data.loss.values) > 0


def normed() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    return net, (torch.randn(24, 5, dtype=torch.float64) + 1, torch.randint(0, 3, (24,)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"directions": "hessian", "reach": "auto", "centre_u": 0.3},
        {"directions": "gradient", "second": "ggn", "normalization": "none"},
        {"one_dim": "copy", "normalization": "layer", "norm": "recompute", "sampling": "adaptive", "most": 9},
    ],
    ids=str,
)
def test_the_model_at_a_point_has_the_loss_of_the_plane_there(settings):
    net, data = normed()
    before = copy.deepcopy(net.state_dict())
    subject = Subject(net, data, batch_size=24)
    plane = Plane(points=5, extent=0.4, **settings)
    reading = plane.run(subject, seed=3)
    u, v = reading.data.u.values, reading.data.v.values
    seen = np.argwhere(reading.data.evaluated.values)
    for i, j in seen[[0, len(seen) // 2, -1]]:
        there = plane.subject_at(subject, u[i], v[j], seed=reading.provenance["seed"])
        assert there.loss() == approx(float(reading.data.loss[i, j]), rel=1e-9)
        assert there.loss() == approx(plane.bearings.subject_at(subject, u[i], v[j], seed=3).loss(), rel=1e-12), (
            "what part of the plane is drawn must not matter"
        )
        assert any(f"u = {u[i]:.6g}" in note for note in there.notes)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert plane.subject_at(subject, u[0], v[0], seed=4).loss() != float(reading.data.loss[0, 0]), "the seed decides"


def test_a_point_without_coordinates_is_refused():
    net, data = net_and_data()
    with pytest.raises(ValueError, match="two finite coordinates; got u = nan"):
        Plane().subject_at(Subject(net, data), float("nan"), 0.0)


@pytest.mark.parametrize("settings", [{}, {"most": 40}, {"scale": "linear"}], ids=str)
def test_map_and_surface_share_range_and_colours_and_tell_the_error(settings):
    net, data = net_and_data()
    reading = Plane(points=9, **settings).run(Subject(net, data))
    figure = reading.figure()
    traces, layout = describe(figure)
    flat, solid = (next(t for t in traces if t["type"] == kind) for kind in ("contour", "surface"))
    levels = sheet(figure.panels[0]).levels
    half = flat["contours"]["size"] / 2  # Plotly's first colour lies half a step before the first line
    ends = np.array([flat["contours"]["start"] - half, flat["contours"]["end"] + half])
    assert [solid["cmin"], solid["cmax"]] == approx(np.interp(ends, np.arange(levels.size), levels).tolist())
    assert layout["scene2"]["zaxis"]["range"] == approx(levels[[0, -1]].tolist())
    assert flat["colorscale"] == solid["colorscale"]
    assert [t["showscale"] for t in (flat, solid)] == [True, False]
    error = reading.data.surface_error if "most" in settings else reading.data.loss_error
    for trace in (flat, solid):
        assert trace["hovertemplate"].startswith("u: %{x")
        assert "<br>v: %{y" in trace["hovertemplate"]
        assert trace["hovertext"] == approx(error.values.T, rel=1e-6)
