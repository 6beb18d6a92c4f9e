"""A bent path around a hill whose shape is known, and its length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from landscape.test_path import nets, toy
from torch import nn

from workbench.landscape.connectivity import ModeConnectivity
from workbench.numerics.sampling import Draw
from workbench.several import Pair
from workbench.subject import Subject


def test_the_curve_and_its_length_are_those_of_the_formula() -> None:
    """θ_a = (0, 0), θ_b = (2, 0), θ_m = (1, 1): φ(½) = (1, ½) and a length of √2 + asinh 1."""
    from workbench.landscape.connectivity import _Bent

    probe = ModeConnectivity(points=201)
    bent = _Bent(probe, Pair(toy([0.0, 0.0]), toy([2.0, 0.0])), Draw(0, "x", 2))
    bent.middle = {"w": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    assert bent.at(0.5)["w"].tolist() == [1.0, 0.5]
    for i in range(201):
        reading = bent.measure(i)
    assert 2 * float(reading.data.length_ratio) == pytest.approx(math.sqrt(2) + math.asinh(1), rel=1e-4)
    kinked = _Bent(ModeConnectivity(curve="polygon"), bent.pair, bent.draw)
    kinked.middle = bent.middle
    assert kinked.at(0.25)["w"].tolist() == [0.5, 0.5]
    assert kinked.at(1.0)["w"].tolist() == [2.0, 0.0]


def valley(model: nn.Module, batch: object) -> torch.Tensor:
    """(|w|² - 1)²: a ring of minima around a hill of height 1."""
    return ((model.w**2).sum() - 1) ** 2


@pytest.mark.parametrize(("curve", "most"), [("bezier", 0.25), ("polygon", 0.35)])
def test_around_the_hill_instead_of_over_it(curve: str, most: float) -> None:
    from landscape.test_plane import Weights

    ends = [
        Subject(Weights(w), [torch.zeros(1, 1)], objective=valley, reduction="mean") for w in ([1.0, 0.01], [-1.0, 0.0])
    ]
    reading = ModeConnectivity(steps=400, curve=curve, learning_rate=0.05).run(Pair(*ends), seed=1)
    found = reading.summary
    assert found["line_barrier"] == pytest.approx(1.0, abs=0.01)
    assert 0 <= float(found["barrier"]) < most
    assert 1.1 < float(found["length_ratio"]) < math.pi / 2
    middle = reading.data.middle_loss.values
    assert middle[0] == pytest.approx(1.0, abs=0.01)
    assert middle[-1] < 0.3 * middle[0] or curve == "polygon"


def test_two_nets_with_batchnorm_are_joined_and_their_ends_are_themselves() -> None:
    a, b, x, y = nets()
    pair = Pair(Subject(a, (x, y)), Subject(b, (x, y)))
    reading = ModeConnectivity(steps=60, batch=12, points=7).run(pair)
    data = reading.data
    for place, subject in ((0, pair.first), (-1, pair.second)):
        assert float(data.loss[place]) == pytest.approx(subject.under("recompute").loss())
    assert data.line_loss.values[[0, -1]] == pytest.approx(data.loss.values[[0, -1]])
    assert float(data.loss_max) <= float(data.line_loss.max()) + 0.05
    assert np.isfinite(data.loss_integral.values)
    assert reading.converged
