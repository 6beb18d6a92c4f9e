"""The plane through models: their places by hand, and losses of copies moved by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from landscape.test_plane import Weights, steep
from pytest import approx
from torch import nn

from workbench.figure import Points
from workbench.landscape.models import ModelsPlane
from workbench.several import Runs
from workbench.subject import Subject


def bowl(values: list[float]) -> Subject:
    return Subject(Weights(values), [torch.zeros(1, 1)], objective=steep, reduction="mean")


def with_norm(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    net[1].running_mean.normal_()
    net[0].bias.requires_grad_(False)
    return net


DATA = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def test_three_models_on_a_known_quadratic():
    runs = Runs({"a": bowl([1.0, 1.0]), "b": bowl([1.0, 4.0]), "c": bowl([3.0, 2.0])})
    probe = ModelsPlane(points=9, margin=0.5)
    reading = probe.run(runs)
    data = reading.data
    assert data.model_u.values == approx([0, 3, 1])
    assert data.model_v.values == approx([0, 0, 2])
    assert data.distance.values == approx([0, 3, 5**0.5])
    assert float(data.angle_cosine) == approx(1 / 5**0.5)
    assert float(data.cosine) == approx(0, abs=1e-12)
    assert data.direction_norm.values == approx([1, 1])
    u, v = data.u.values[:, None], data.v.values[None, :]
    assert data.loss.values == approx(50 * (1 + v) ** 2 + (1 + u) ** 2 / 2)
    assert data.model_loss.values == approx([50.5, 58, 452])
    assert (data.u.values[0], data.u.values[-1]) == approx((-1.5, 4.5))
    assert (data.v.values[0], data.v.values[-1]) == approx((-1.5, 3.5))
    marks = [m for m in reading.figure().panels[0].marks if isinstance(m, Points)]
    assert [m.label for m in marks] == ["a", "b", "c"]
    assert [float(m.x[0]) for m in marks] == approx([0, 3, 1])
    assert reading.summary["loss (b)"] == approx(58)


@pytest.mark.parametrize("policy", ["recompute", "batch"])
def test_points_between_networks_have_statistics_and_frozen_weights_of_their_own(policy):
    nets = [with_norm(seed) for seed in (1, 2, 3)]
    runs = Runs({str(k): Subject(net, DATA, batch_size=24) for k, net in enumerate(nets)})
    reading = ModelsPlane(points=3, margin=0.2, norm=policy).run(runs)
    data = reading.data
    corner = np.stack([data.model_u.values, data.model_v.values, np.ones(3)])
    for i in range(3):
        for j in range(3):
            shares = np.linalg.solve(corner, [data.u.values[i], data.v.values[j], 1.0])
            moved = copy.deepcopy(nets[0])
            with torch.no_grad():
                for p, *own in zip(moved.parameters(), *(net.parameters() for net in nets), strict=True):
                    p.copy_(sum(share * o for share, o in zip(shares, own, strict=True)))
                moved[1].momentum = None
                moved[1].reset_running_stats()
                out = moved.train()(DATA[0])
                out = out if policy == "batch" else moved.eval()(DATA[0])
            assert float(data.loss[i, j]) == approx(nn.functional.cross_entropy(out, DATA[1]).item(), rel=1e-9)
    assert any("0.bias differ" in note for note in reading.notes)


def test_two_models_and_a_random_direction():
    nets = [nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2)]
    runs = Runs({"one": Subject(nets[0], DATA), "two": Subject(nets[1], DATA)})
    data = ModelsPlane(points=5, margin=0.0).run(runs).data
    assert float(data.cosine) == approx(0, abs=1e-12)
    assert data.u.values[-1] == approx(float(data.distance[1]))
    assert data.v.values == approx(np.linspace(-0.5, 0.5, 5) * float(data.distance[1]))
    for k, i in ((0, 0), (1, -1)):
        assert float(data.loss[i, 2]) == approx(float(data.model_loss[k]))
        assert float(data.model_loss[k]) == approx(Subject(nets[k], DATA).loss())


def test_models_that_span_no_plane_are_refused():
    a = bowl([1.0, 1.0])
    with pytest.raises(ValueError, match="two or three models; got 1"):
        ModelsPlane().run(Runs({"a": a}))
    with pytest.raises(ValueError, match="are equal"):
        ModelsPlane().run(Runs({"a": a, "b": bowl([1.0, 1.0]), "c": bowl([2.0, 1.0])}))
    with pytest.raises(ValueError, match="on one line"):
        ModelsPlane().run(Runs({"a": a, "b": bowl([2.0, 2.0]), "c": bowl([3.0, 3.0])}))
