"""Pitfall 11: "filter" means each filter; Gaussian means both signs; nothing is divided by a length of zero."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from surfaces import double
from torch import Tensor, nn

from workbench.landscape.directions import Direction, cosine, mover, random_direction
from workbench.numerics.sampling import Draw
from workbench.subject import Subject

Drawn = Callable[[int], Tensor]
Way = Callable[[Subject, Drawn, int], Direction]
FILTERS = {"conv.weight": 0, "up.weight": 1, "dense.weight": 0, "embed.weight": 0}
"""Axis of the filters: output channels, output channels of a transposed convolution, rows, words."""


class Every(nn.Module):
    """One of each kind of weight, and one filter of each that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.dense = nn.Linear(27, 5)
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.gain = nn.Parameter(torch.tensor(1.5))
        with torch.no_grad():
            for name, axis in FILTERS.items():
                self.get_parameter(name).select(axis, 1).zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.norm(self.dense(self.up(self.conv(x)).flatten(1)) + self.embed.weight[0])


def every() -> Subject:
    torch.manual_seed(0)
    return Subject(Every().double(), (double(6, 2, 4, 4), torch.arange(6) % 5))


def gaussian(subject: Subject) -> Draw:
    return Draw(3, "pitfall", subject.size, subject.dtype)


# ----------------------------------------------------------------------------------------- what normalisation must do


def filters(values: Tensor, axis: int) -> list[list[float]]:
    return [values.select(axis, k).flatten().tolist() for k in range(values.shape[axis])]


def length(values: list[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in values))


def has_the_lengths(way: Way) -> None:
    """Each filter of the direction is as long as the model's, zero ones zero; what has no filters does not move."""
    subject = every()
    direction = way(subject, gaussian(subject), 0)
    for name, weight in subject.params.items():
        if name not in FILTERS:
            assert not direction[name].any(), name
            continue
        axis = FILTERS[name]
        found, wanted = ([length(f) for f in filters(t, axis)] for t in (direction[name], weight))
        assert wanted[1] == 0
        assert found[1] == 0, name
        assert found == pytest.approx(wanted, rel=1e-6), name


def has_both_signs(way: Way) -> None:
    """As many entries below zero as above, and two directions that are nearly orthogonal: within five deviations."""
    subject = every()
    one, two = (way(subject, gaussian(subject), k) for k in (0, 1))
    moved = torch.cat([one[name].flatten() for name in FILTERS])
    moved = moved[moved != 0]
    assert abs(float((moved < 0).double().mean()) - 0.5) < 2.5 / moved.numel() ** 0.5
    filters_moved = sum(subject.params[name].shape[axis] - 1 for name, axis in FILTERS.items())
    assert abs(cosine(one, two)) < 5 / (moved.numel() - filters_moved) ** 0.5


def survives_a_filter_of_zeros(way: Way) -> None:
    """A drawn filter of length zero has no direction: it stays zero, and everything else as it was."""
    subject = every()
    draw = gaussian(subject)

    def planted(vector: int) -> Tensor:
        values = subject.unflatten(draw(vector).clone())
        for name, axis in FILTERS.items():
            values[name].select(axis, 2).zero_()
        return subject.flatten(values)

    usual, found = way(subject, draw, 0), way(subject, planted, 0)
    for name, axis in FILTERS.items():
        for k, (a, b) in enumerate(zip(filters(found[name], axis), filters(usual[name], axis), strict=True)):
            assert a == pytest.approx([0.0] * len(b) if k == 2 else b, rel=1e-9), name


def shows_a_rescaled_network_alike(way: Way) -> None:
    """ReLU(a W1 x) W2 / a is the same function: its slice is the same too."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 4, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3, bias=False)).double()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter("0.weight").mul_(20.0)
        other.get_parameter("3.weight").div_(20.0)
    data = (double(12, 1, 4, 4), torch.arange(12) % 3)
    assert slice_of(Subject(other, data), way) == pytest.approx(slice_of(Subject(net, data), way), rel=1e-6)


def slice_of(subject: Subject, way: Way) -> list[float]:
    direction = way(subject, gaussian(subject), 0)
    at = mover(subject, direction, {name: torch.zeros_like(d) for name, d in direction.items()})
    return [float(subject.loss(at(a, 0.0))) for a in (-1.0, -0.3, 0.2, 0.7, 1.0)]


# ----------------------------------------------------------------------------------------------- ours, and the faults


def ours(subject: Subject, draw: Drawn, vector: int) -> Direction:
    return random_direction(subject, draw, vector, "filter")  # type: ignore[arg-type]


def per_tensor(subject: Subject, draw: Drawn, vector: int) -> Direction:
    """The fault, as published: whole tensors, called filters."""
    return random_direction(subject, draw, vector, "layer")  # type: ignore[arg-type]


def first_axis(subject: Subject, draw: Drawn, vector: int) -> Direction:
    """Another: input channels of a transposed convolution taken for filters."""
    return by_hand(subject, draw(vector), dict.fromkeys(FILTERS, 0))


def uniform(subject: Subject, draw: Drawn, vector: int) -> Direction:
    """Another, as published: numbers between 0 and 1, never negative."""
    generator = torch.Generator().manual_seed(vector)
    return by_hand(subject, torch.rand(subject.size, dtype=subject.dtype, generator=generator), FILTERS)


def undivided(subject: Subject, draw: Drawn, vector: int) -> Direction:
    """Another: a length of zero that is divided by."""
    return by_hand(subject, draw(vector), FILTERS)


def unscaled(subject: Subject, draw: Drawn, vector: int) -> Direction:
    """Another: no normalisation."""
    return random_direction(subject, draw, vector, "none")  # type: ignore[arg-type]


def by_hand(subject: Subject, raw: Tensor, axes: dict[str, int]) -> Direction:
    """d_f ‖θ_f‖ / ‖d_f‖ as it stands there."""
    made = {name: torch.zeros_like(weight) for name, weight in subject.params.items()}
    for name, d in subject.unflatten(raw).items():
        for k in range(d.shape[axes[name]] if name in axes else 0):
            part, weight = d.select(axes[name], k), subject.params[name].select(axes[name], k)
            made[name].select(axes[name], k).copy_(part * (weight.norm() / part.norm()))
    return made


CHECKS = (has_the_lengths, has_both_signs, survives_a_filter_of_zeros, shows_a_rescaled_network_alike)


@pytest.mark.parametrize("check", CHECKS)
def test_ours_is_right(check: Callable[[Way], None]) -> None:
    check(ours)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (per_tensor, has_the_lengths),
        (first_axis, has_the_lengths),
        (unscaled, has_the_lengths),
        (uniform, has_both_signs),
        (undivided, survives_a_filter_of_zeros),
        (unscaled, shows_a_rescaled_network_alike),
    ],
)
def test_a_fault_would_be_seen(fault: Way, check: Callable[[Way], None]) -> None:
    with pytest.raises(AssertionError):
        check(fault)
