"""Directions: the worked example of filter normalisation, every layer kind, and rescaling invariance."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from torch import nn

from workbench.landscape.directions import cosine, random_direction
from workbench.landscape.plane import Plane
from workbench.numerics.sampling import Draw
from workbench.subject import Subject


def given_draw(values: torch.Tensor):
    """A Draw that returns these values."""
    return lambda vector, chunk=None, **_: values


def linear(weight: list[list[float]]) -> Subject:
    net = nn.Linear(2, 2, bias=False).double()
    net.weight.data = torch.tensor(weight, dtype=torch.float64)
    return Subject(net, (torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])))


def test_the_worked_example():
    subject = linear([[3, 4], [0, 2]])
    draw = given_draw(torch.tensor([1.0, 0, 1, 1], dtype=torch.float64))
    by_filter = random_direction(subject, draw, 0, "filter")["weight"]
    by_layer = random_direction(subject, draw, 0, "layer")["weight"]
    assert by_filter.flatten().tolist() == approx([5, 0, 1.41421356, 1.41421356])
    assert by_layer.flatten().tolist() == approx([3.10912635, 0, 3.10912635, 3.10912635])


def test_a_zero_filter_gets_a_zero_direction():
    subject = linear([[3, 4], [0, 0]])
    found = random_direction(subject, given_draw(torch.ones(4, dtype=torch.float64)), 0, "filter")["weight"]
    assert found[1].tolist() == [0, 0]


class Every(nn.Module):
    """One of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.up = nn.ConvTranspose2d(3, 2, 2)
        self.linear = nn.Linear(50, 4)
        self.embed = nn.Embedding(6, 4)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.conv(x)).flatten(1)
        return self.norm(self.linear(hidden)) * self.gain + self.embed.weight.sum(0)


def every() -> Subject:
    torch.manual_seed(0)
    return Subject(Every().double(), (torch.randn(7, 1, 4, 4, dtype=torch.float64), torch.arange(7) % 4))


def test_each_filter_of_the_direction_has_the_length_of_the_models():
    subject = every()
    direction = random_direction(subject, Draw(0, "t", subject.size), 0, "filter")
    axes = {"conv.weight": 0, "up.weight": 1, "linear.weight": 0, "embed.weight": 0}
    for name, axis in axes.items():
        rows, wanted = (t.movedim(axis, 0).flatten(1).norm(dim=1) for t in (direction[name], subject.params[name]))
        assert rows.tolist() == approx(wanted.tolist(), rel=1e-9)
    for name in ("conv.bias", "norm.weight", "norm.bias", "up.bias", "linear.bias", "gain"):
        assert not direction[name].any()
    assert set(direction) == set(subject.params)


def test_directions_are_gaussian_not_uniform():
    subject = every()
    first, second = (random_direction(subject, Draw(0, "t", subject.size), k, "none") for k in (0, 1))
    values = torch.cat([v.flatten() for v in first.values()])
    assert abs(float(values.mean())) < 4 / len(values) ** 0.5
    assert float((values < 0).double().mean()) == approx(0.5, abs=0.1)
    assert abs(cosine(first, second)) < 4 / len(values) ** 0.5


@settings(max_examples=10)
@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_the_picture_is_the_same_after_a_relu_rescaling(factor: float, seed: int):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    other = copy.deepcopy(net)
    other[0].weight.data *= factor
    other[2].weight.data /= factor
    data = (torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,)))
    first, second = (Plane(points=5).run(Subject(n, data), seed=seed).data.loss.values for n in (net, other))
    assert second == approx(first, rel=1e-6)


def test_without_normalisation_the_rescaled_picture_differs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    other = copy.deepcopy(net)
    other[0].weight.data *= 10
    other[2].weight.data /= 10
    data = (torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,)))
    first, second = (Plane(points=5, normalization="none").run(Subject(n, data)).data.loss.values for n in (net, other))
    assert abs(second / first - 1).max() > 0.1


@pytest.mark.parametrize("points", [3, 4, 9, 24, 25])
def test_coarse_to_fine_visits_every_point_once(points):
    from workbench.landscape.grid import coarse_to_fine, levels

    order = list(coarse_to_fine(points))
    assert sorted(order) == [(i, j) for i in range(points) for j in range(points)]
    rough = {(int(i), int(j)) for i in levels(points)[0] for j in levels(points)[0]}
    assert set(order[: len(rough)]) == rough
