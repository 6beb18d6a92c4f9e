"""Local complexity: a neuron's border by hand, plain loops over vertices, and nets whose neurons never change sign."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from workbench.numerics.sampling import Draw
from workbench.probes.local_complexity import LocalComplexity, directions
from workbench.subject import Subject
from workbench.zoo.modular import added_embeddings, pairs
from workbench.zoo.nets import dense


def neuron(weight: list[float], bias: float, inputs: torch.Tensor) -> Subject:
    net = nn.Sequential(nn.Linear(len(weight), 1), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([weight]))
        net[0].bias.fill_(bias)
    return Subject(net, (inputs, torch.zeros(len(inputs)).long()))


@pytest.mark.parametrize("radius", [0.3, 0.45, 0.55, 1.0])
def test_a_border_on_a_line_is_crossed_within_the_radius(radius: float) -> None:
    """A neuron 2x - 1 bends at 1/2; of the inputs 0 and 1 (median norm of these: the lower, so all are shifted)."""
    x = torch.tensor([[1.0], [1.2], [-1.0], [0.9], [-1.0]], dtype=torch.float64)
    data = LocalComplexity(radius=radius).run(neuron([2.0], -1.0, x)).data
    assert data.input_radius == pytest.approx(radius)
    near = np.abs(x.numpy()[:, 0] - 0.5) < radius
    assert data.fraction.sel(place="train").item() == pytest.approx(near.mean())


@pytest.mark.parametrize(("radius", "crossed"), [(0.3, 0.0), (0.8, 1.0)])
def test_vertices_are_no_ball(radius: float, crossed: float) -> None:
    """Two orthonormal directions reach a border at distance .4 along the better one: r·max|cos| against .4."""
    x = torch.zeros(2, 2, dtype=torch.float64)
    shifted = x + torch.tensor([[0.6, 0.8]])  # norm 1, so that the radius is that given; the border is .4 away
    subject = neuron([3.0, 4.0], -7.0, shifted)  # 3·0.6 + 4·0.8 = 5, less 7: 2 below zero, over ‖w‖ = 5
    data = LocalComplexity(radius=radius, directions=2).run(subject).data
    units = directions(Draw(0, "LocalComplexity", subject.size), 2, 2)
    reach = radius * float((units @ torch.tensor([0.6, 0.8], dtype=torch.float64)).abs().max())
    assert data.changing.sel(place="train").item() == float(reach > 0.4) == crossed


def test_counts_are_those_of_plain_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    x, held = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (9, 4))
    net = dense((5, 6, 4, 3), "relu", seed=2).double()
    subject = Subject(net, (x, torch.arange(9) % 3), held_out=(held, torch.arange(4) % 3))
    probe = LocalComplexity(radius=0.4, directions=3)
    data = probe.run(subject, seed=6).data
    units = directions(Draw(6, "LocalComplexity", subject.size), 5, 3)
    radius = 0.4 * x.norm(dim=1).median()
    for place, inputs in (("train", x), ("test", held)):
        counts = []
        for one in inputs:
            vertices = [one + s * radius * u for u in units for s in (1, -1)]
            first = torch.stack([net.linear1(v) for v in vertices])
            second = torch.stack([net.linear2(net.linear1(v).relu()) for v in vertices])
            counts.append([int(((z > 0).any(0) & (z <= 0).any(0)).sum()) for z in (first, second)])
        assert data.changing.sel(place=place).values == pytest.approx(np.mean(counts, 0))
        assert data.fraction.sel(place=place).values == pytest.approx(np.mean(counts, 0) / (6, 4))
        totals = np.sum(counts, 1)
        assert data.total.sel(place=place).item() == pytest.approx(totals.mean())
        assert data.total_error.sel(place=place).item() == pytest.approx(totals.std(ddof=1) / len(totals) ** 0.5)
    assert 0 < data.total.sel(place="random").item() < 10


def test_directions_are_orthonormal_and_never_more_than_there_are() -> None:
    units = directions(Draw(3, "any", 10), 4, 20)
    torch.testing.assert_close(units @ units.T, torch.eye(4, dtype=torch.float64))
    assert len(directions(Draw(3, "any", 10), 9, 2)) == 2


def test_pre_activations_are_read_before_an_activation_in_place() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nets = [nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=flag), nn.Linear(5, 2)).double() for flag in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    one, two = (LocalComplexity(radius=0.7).run(Subject(n, (x, torch.zeros(8).long()))).data for n in nets)
    assert one.total.values == pytest.approx(two.total.values, nan_ok=True)
    assert one.total.sel(place="train") > 0


def test_what_has_no_borders_is_said_or_refused() -> None:
    x, y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(6).long()
    assert "Tanh has no borders" in " ".join(LocalComplexity().run(Subject(dense((3, 4, 2)), (x, y))).notes)
    linear = LocalComplexity().run(Subject(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (x, y)))
    assert linear.data["layer"].values.tolist() == ["0"]
    with pytest.raises(ValueError, match="got tokens"):
        LocalComplexity().run(Subject(added_embeddings(5, 4), pairs(5)))
