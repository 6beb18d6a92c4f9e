"""The way between two models against moved copies, hand-made barriers and re-estimated BatchNorm."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from landscape.test_plane import Weights
from torch import nn

from workbench.landscape.barrier import barriers, greatest_rise
from workbench.landscape.path import Path
from workbench.several import Pair
from workbench.subject import Subject


def test_barriers_of_a_hand_made_curve() -> None:
    alpha = np.linspace(0, 1, 5)
    found = barriers(alpha, [0, 0.5, 0.9, 1.2, 1])
    assert (found.mean, found.linear, found.maximum) == pytest.approx((0.7, 0.45, 0.2))
    assert found.place == 3
    assert greatest_rise(alpha, [3.0, 2.0, 2.5, 1.0, 1.2]) == pytest.approx(0.5)
    beyond = barriers([-0.25, *alpha, 1.25], [9, 0, 0.5, 0.9, 1.2, 1, 9])
    assert (beyond.linear, beyond.place) == (pytest.approx(0.45), 4)
    assert math.isnan(barriers(alpha, [0, math.nan, 0, 0, 0]).linear)
    with pytest.raises(ValueError, match="samples at α = 0 and α = 1"):
        barriers([0.1, 0.9], [1, 1])


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 5))
def test_a_convex_curve_has_no_barrier_above_its_chord(offset: float, slope: float, bend: float) -> None:
    alpha = np.linspace(0, 1, 21)
    assert barriers(alpha, offset + slope * alpha + bend * alpha**2).linear == pytest.approx(0, abs=1e-12)


def product(model: nn.Module, batch: object) -> torch.Tensor:
    """½ (w_0 w_1 - 1)²: two minima joined through a saddle at the origin."""
    return (model.w[0] * model.w[1] - 1) ** 2 / 2


def toy(values: list[float]) -> Subject:
    return Subject(Weights(values), [torch.zeros(1, 1)], objective=product, reduction="mean")


def test_two_minima_of_a_product_and_the_same_after_a_change_of_signs() -> None:
    data = Path(points=11).run(Pair(toy([1.0, 1.0]), toy([-1.0, -1.0]))).data
    found = [float(data[n]) for n in ("barrier", "barrier_mean", "barrier_maximum", "greatest_rise")]
    assert found == pytest.approx([0.5] * 4)
    assert float(data.barrier_place) == 0.5
    assert float(data.distance) == pytest.approx(8**0.5)
    aligned = Path(points=11).run(Pair(toy([1.0, 1.0]), toy([1.0, 1.0]))).data
    assert (float(aligned.barrier), float(aligned.barrier_error)) == (0.0, 0.0)
    assert data["alpha"].values == pytest.approx(np.arange(-2, 13) / 10)


def nets() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """Two small nets with BatchNorm whose running statistics belong to their own weights."""
    torch.manual_seed(5)
    x, y = torch.randn(24, 3, dtype=torch.float64), torch.arange(24) % 3
    made = []
    for _ in range(2):
        net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
        for _ in range(60):
            net(x)
        made.append(net.eval())
    return made[0], made[1], x, y


@pytest.mark.parametrize("norm", ["recompute", "eval"])
def test_every_point_is_the_loss_of_a_mixed_copy(norm: str) -> None:
    a, b, x, y = nets()
    data = Path(points=5, overshoot=0.25, norm=norm).run(Pair(Subject(a, (x, y)), Subject(b, (x, y)))).data
    for alpha, loss, rate in zip(data["alpha"].values, data.loss.values, data.error_rate.values, strict=True):
        mixed = copy.deepcopy(a)
        for mine, hers in zip(mixed.state_dict().values(), b.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.add_(alpha * (hers - mine))
        if norm == "recompute":
            mixed[1].reset_running_stats()
            mixed[1].momentum = None
            mixed.train()(x)
        out = mixed.eval()(x)
        assert loss == pytest.approx(nn.functional.cross_entropy(out, y).item(), rel=1e-10)
        assert rate == pytest.approx(float((out.argmax(1) != y).double().mean()))
    place = int(np.flatnonzero(data["alpha"].values == float(data.barrier_place))[0])
    chord = np.interp(float(data.barrier_place), [0, 1], [float(data.loss.sel(alpha=e)) for e in (0.0, 1.0)])
    assert float(data.barrier) == pytest.approx(float(data.loss[place]) - chord, abs=1e-12)


def test_the_barriers_error_is_that_of_paired_examples() -> None:
    a, b, x, y = nets()
    data = Path(points=5, overshoot=0.0, norm="eval").run(Pair(Subject(a, (x, y)), Subject(b, (x, y)))).data
    place, losses = float(data.barrier_place), []
    for alpha in (0.0, place, 1.0):
        mixed = copy.deepcopy(a)
        for mine, hers in zip(mixed.state_dict().values(), b.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.add_(alpha * (hers - mine))
        losses.append(nn.functional.cross_entropy(mixed(x), y, reduction="none").detach())
    gap = losses[1] - (1 - place) * losses[0] - place * losses[2]
    assert float(data.barrier_error) == pytest.approx(float(gap.std() / 24**0.5) if 0 < place < 1 else 0.0)


def test_models_that_are_not_the_same_function_are_refused() -> None:
    a, b, x, y = nets()
    with pytest.raises(ValueError, match="examples"):
        Path().run(Pair(Subject(a, (x, y)), Subject(b, (x[:20], y[:20]))))
