"""Directions: the worked example of filter normalisation, every layer kind, and rescaling invariance."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from torch import nn

from workbench.landscape.axes import PlaneAxes, Span, plane_axes
from workbench.landscape.directions import cosine, random_direction
from workbench.landscape.kinds import Kind, Second
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


def test_weight_and_unit_modes_and_what_biases_do():
    subject = every()
    draw = Draw(0, "t", subject.size)
    raw = random_direction(subject, draw, 0, "none")
    by_weight = random_direction(subject, draw, 0, "weight")
    torch.testing.assert_close(by_weight["conv.weight"], raw["conv.weight"] * subject.params["conv.weight"].abs())
    units = random_direction(subject, draw, 0, "dfilter", "copy")
    assert units["up.weight"].movedim(1, 0).flatten(1).norm(dim=1).tolist() == approx([1, 1])
    assert units["linear.weight"].norm(dim=1).tolist() == approx([1] * 4)
    assert float(random_direction(subject, draw, 0, "dlayer")["linear.weight"].norm()) == approx(1)
    for name in ("conv.bias", "norm.weight", "gain"):
        torch.testing.assert_close(units[name], subject.params[name])
        assert not by_weight[name].any()


def exact_matrix(of: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.hessian(of, at)


def small() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return net, (torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3)


def axes_of(subject: Subject, first: Kind, second: Second = "same", **settings: object) -> tuple[PlaneAxes, Draw]:
    draw = Draw(0, "Plane", subject.size, subject.dtype)
    return plane_axes(subject, draw, first, "filter", 1.0, 5, Span(second, **settings)), draw


def test_axes_of_two_kinds_are_each_what_they_are_called():
    net, (x, y) = small()
    subject = Subject(net, (x, y))
    names = [name for name, _ in net.named_parameters()]
    here = subject.flatten(subject.params)

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, split(flat), strict=True)), (x,))

    def split(flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [p.numel() for p in net.parameters()]
        return [part.view(p.shape) for part, p in zip(flat.split(sizes), net.parameters(), strict=True)]

    hessian = exact_matrix(lambda flat: nn.functional.cross_entropy(outputs(flat), y), here)
    jacobian = torch.autograd.functional.jacobian(outputs, here)
    p = outputs(here).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    ggn = torch.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian) / len(x)
    axes, _ = axes_of(subject, "hessian", "ggn")
    for found, matrix in ((axes.first, hessian), (axes.second, ggn)):
        vector = subject.flatten(found)
        assert float(vector @ matrix @ vector) == approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-3)
        assert float(vector.norm()) == approx(1)
    gradient, draw = axes_of(subject, "gradient")
    slope = torch.autograd.functional.jacobian(lambda flat: nn.functional.cross_entropy(outputs(flat), y), here)
    torch.testing.assert_close(subject.flatten(gradient.first), slope / slope.norm())
    other = random_direction(subject, draw, 1, "filter")
    torch.testing.assert_close(subject.flatten(gradient.second), subject.flatten(other))
    assert gradient.values["cosine"] == approx(cosine(gradient.first, other))


def test_adams_direction_is_the_step_that_it_took():
    net, (x, y) = small()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        before = torch.cat([p.detach().flatten() for p in net.parameters()]).clone()
        optimizer.step()
    step = torch.cat([p.detach().flatten() for p in net.parameters()]) - before
    for subject in (s := Subject(net, (x, y), optimizer=optimizer), s.snapshot()):
        axes, _ = axes_of(subject, "adam", "hessian")
        torch.testing.assert_close(subject.flatten(axes.first), -step / step.norm())
    with pytest.raises(ValueError, match="needs the optimizer"):
        axes_of(Subject(net, (x, y)), "adam")
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD keeps no average"):
        axes_of(Subject(net, (x, y), optimizer=sgd), "adam")
    other = Plane(points=3, directions="adam")
    contexts = {other.context(Subject(net, (x, y), optimizer=optimizer))}
    optimizer.step()
    contexts.add(other.context(Subject(net, (x, y), optimizer=optimizer)))
    assert len(contexts) == 2, "readings depend on the optimizer's state"


class Walked:
    """A path of three steps ending at the given net, as a trajectory offers it."""

    def __init__(self, net: nn.Module, moves: torch.Tensor) -> None:
        self.steps = (0, 1, 2)
        self._moves, self._end = moves, {name: p.detach().clone() for name, p in net.named_parameters()}

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        sizes = [p.numel() for p in self._end.values()]
        parts = self._moves[step].split(sizes)
        return {name: p + m.view(p.shape) for (name, p), m in zip(self._end.items(), parts, strict=True)}

    def fingerprint(self) -> str:
        return "path"


def test_a_component_beside_a_random_direction_and_the_angle_to_the_way_here():
    net, data = small()
    subject = Subject(net, data)
    moves = torch.randn(3, subject.size, dtype=torch.float64)
    moves[2] = 0
    subject.path = Walked(net, moves)
    found = Plane(points=5, directions="pca", second="random").run(subject).data
    axes = plane_axes(subject, Draw(0, "Plane", subject.size), "pca", "filter", 1.0, 5, Span("random"))
    rows = torch.stack([subject.flatten(axes.first), subject.flatten(axes.second)])
    wanted = torch.linalg.lstsq(rows.T, moves.T).solution
    assert np.array([found.path_u.values, found.path_v.values]) == approx(wanted.numpy(), abs=1e-9)
    assert found.path_distance.values == approx((moves - wanted.T @ rows).norm(dim=1).numpy(), abs=1e-9)
    way = -moves[0]
    cosines = [float(row @ way / row.norm() / way.norm()) for row in rows]
    assert found.cosine_displacement.values == approx(cosines)
    assert np.isnan(found.explained_variance.values[1])
    assert found.v.values == approx([-1, -0.5, 0, 0.5, 1])
    assert found.u.values[0] < wanted[0].min()
    assert wanted[0].max() < found.u.values[-1]


def test_two_directions_that_span_no_plane_are_refused():
    net, data = small()
    with pytest.raises(ValueError, match="parallel"):
        axes_of(Subject(net, data), "gradient", "gradient")
    with pytest.raises(ValueError, match="one_dim='copy'"):
        axes_of(Subject(net, data, parameters="*.bias"), "random")
    net.requires_grad_(True)
    flat = Subject(net, data, objective=lambda model, batch: model(batch[0]).square().mean(), reduction="mean")
    with pytest.raises(ValueError, match="choose 'hessian'"):
        axes_of(flat, "ggn")
