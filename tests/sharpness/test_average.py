"""Average rises against moments of the normal distribution, and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import small
from surfaces import Q2, double, last, point, quadratic, surface
from torch import Tensor

from workbench.sharpness.average import FIRST, average
from workbench.sharpness.found import Found
from workbench.sharpness.point import Point
from workbench.sharpness.scales import elementwise, filterwise
from workbench.subject import Subject


def plain(here: Point, sigma: float, pairs: int) -> Found:
    return last(average(here, lambda noise: noise, sigma, pairs, "plain"))


@pytest.mark.parametrize("at", [(1.0, 1.0), (-3.0, 0.2)])
def test_half_the_trace_wherever_a_quadratic_is_looked_at(at: tuple[float, float]) -> None:
    found = plain(point(quadratic(Q2, *at)), 0.1, 400)
    assert abs(found.value - 0.015) < 4 * found.error
    truth = 0.005 * math.sqrt(2 * 5 / 400)  # the spread of ½ σ² ξᵀHξ over pairs is ½ σ² √(2 ‖H‖²)
    assert truth / 1.3 < found.error < 1.3 * truth


def test_a_quartic() -> None:
    found = plain(point(surface(lambda w: (w**4).sum(), 1.0)), 0.1, 400)
    assert abs(found.value - 0.0603) < 4 * found.error
    assert found.rise is not None
    assert found.rise_error is not None
    for share, rise, error in zip((0.1, 0.3, 1.0), found.rise, found.rise_error, strict=True):
        assert abs(rise - (6 * (0.1 * share) ** 2 + 3 * (0.1 * share) ** 4)) < 4 * error


def test_in_units_of_the_weights() -> None:
    subject = quadratic(Q2, 1.0, 3.0)
    scale = elementwise(subject, False)
    found = last(average(point(subject), lambda noise: scale * noise, 0.1, 400, ""))
    assert abs(found.value - 0.055) < 4 * found.error


def test_the_standard_error_is_that_of_repeated_runs() -> None:
    subject = quadratic(Q2, 1.0, 1.0)
    runs = [plain(point(subject, seed), 0.1, 10) for seed in range(40)]
    spread = float(torch.tensor([r.value for r in runs]).double().std())
    said = float(torch.tensor([r.error for r in runs]).double().mean())
    assert said / 2 < spread < 2 * said
    mean = sum(r.value for r in runs) / len(runs)
    assert abs(mean - 0.015) < 4 * spread / math.sqrt(len(runs))


def test_each_step_is_drawn_once_and_held_for_all_examples() -> None:
    """The same pairs in plain PyTorch on all 70 examples at once; the subject goes through them by 32."""
    net = small("dense GELU")
    subject = Subject(net.model, net.data, batch_size=32)
    here, params = point(subject), list(net.model.parameters())
    rises = []
    with torch.no_grad():
        base = net.loss(net.model)
        for pair in range(3):
            noise = 0.05 * here.draw(FIRST + pair)
            moved = []
            for sign in (1, -1):
                shifts = noise.split([p.numel() for p in params])
                for p, s in zip(params, shifts, strict=True):
                    p.add_(sign * s.view_as(p))
                moved.append(net.loss(net.model))
                for p, s in zip(params, shifts, strict=True):
                    p.sub_(sign * s.view_as(p))
            rises.append(float((moved[0] + moved[1]) / 2 - base))
    found = last(average(point(subject), lambda noise: noise, 0.05, 3, ""))
    assert found.value == pytest.approx(sum(rises) / 3, rel=1e-9)


def test_what_is_not_told_from_zero_is_said() -> None:
    saddle = quadratic(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), 0.5, 0.5)
    notes = plain(point(saddle), 0.1, 10).notes
    assert any("zero" in note for note in notes)
    assert plain(point(quadratic(Q2, 1.0, 1.0)), 0.1, 200).notes == ()


def test_a_filter_moves_by_its_own_length() -> None:
    """Rows of dense weights, output channels of convolutions (axis 1 where transposed); nothing of one dim moves."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ConvTranspose2d(4, 3, 2),
        torch.nn.Flatten(),
        torch.nn.LayerNorm([147]),
        torch.nn.Linear(147, 5),
    ).double()
    subject = Subject(layers, (double(6, 1, 8, 8), torch.arange(6) % 5))
    step = subject.unflatten(filterwise(subject)(double(subject.size, seed=1)))
    for name, weight in subject.params.items():
        if weight.ndim == 1:
            assert not step[name].any()
            continue
        axis = 1 if name.startswith("2.") else 0
        found, wanted = (_lengths(t, axis) for t in (step[name], weight))
        torch.testing.assert_close(found, wanted)


def _lengths(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).flatten(1).norm(dim=1)
