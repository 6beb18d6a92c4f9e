"""Displacement: against numpy on the flat weights, known motions, and what a normalisation's gains may not change."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.probe import Reading
from workbench.probes.displacement import Displacement
from workbench.several import Pair
from workbench.subject import Subject

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def moved(change: Callable[[str, Tensor], Tensor], first: nn.Module | None = None) -> Reading:
    """The displacement from a net to the same net with each parameter changed."""
    one, two = first or build(), build()
    with torch.no_grad():
        for (name, p), q in zip(two.named_parameters(), one.parameters(), strict=True):
            p.copy_(change(name, q))
    return Displacement().run(Pair(Subject(one, (X, Y)), Subject(two, (X, Y))))


def test_distances_and_angles_are_numpys() -> None:
    one, two = build(0), build(7)
    found = Displacement().run(Pair(Subject(one, (X, Y)), Subject(two, (X, Y)))).data
    flat = [
        np.concatenate([p.detach().numpy().ravel() for n, p in m.named_parameters() if n[0] != "1"]) for m in (one, two)
    ]
    apart = np.linalg.norm(flat[1] - flat[0])
    cosine = flat[0] @ flat[1] / np.prod([np.linalg.norm(f) for f in flat])
    assert float(found.total_displacement) == pytest.approx(apart, rel=1e-12)
    assert float(found.total_relative) == pytest.approx(apart / np.linalg.norm(flat[0]), rel=1e-12)
    assert float(found.total_cosine) == pytest.approx(cosine, rel=1e-12)
    assert float(found.total_angle) == pytest.approx(math.acos(cosine), rel=1e-9)
    layer = torch.cat([one[3].weight.flatten(), one[3].bias]), torch.cat([two[3].weight.flatten(), two[3].bias])
    assert float(found.displacement.sel(layer="3")) == pytest.approx(float((layer[1] - layer[0]).norm()), rel=1e-12)
    assert float(found.share.sum()) == pytest.approx(1)
    assert list(found.normalisation.values) == [False, True, False]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10))
def test_a_change_of_length_is_no_turn(factor: float) -> None:
    found = moved(lambda name, p: p * factor).data
    assert float(found.total_relative) == pytest.approx(abs(factor - 1), abs=1e-12)
    assert float(found.total_angle) == pytest.approx(0, abs=1e-7)
    assert float(found.total_cosine) == pytest.approx(1)


def test_small_turns_are_seen() -> None:
    """Where the arc cosine has lost all digits: an angle of 1e-6 between unit vectors."""
    quarter = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
    across = quarter.flip(1) - quarter.flip(1).mul(quarter).sum() / quarter.square().sum() * quarter
    first = build()
    with torch.no_grad():
        first[0].weight.copy_(quarter)
        first[0].bias.zero_()
    turn = 1e-6 * quarter.norm() / across.norm() * across
    found = moved(lambda name, p: p + turn if name == "0.weight" else p, first).data
    assert float(found.angle.sel(layer="0")) == pytest.approx(1e-6, rel=1e-6)


def test_gains_of_a_normalisation_do_not_count_and_what_began_at_zero_has_no_relative_distance() -> None:
    first = build()
    with torch.no_grad():
        for p in first[3].parameters():
            p.zero_()
    found = moved(lambda name, p: p + 1 if name[0] in "13" else p, first)
    data = found.data
    assert float(data.displacement.sel(layer="1")) == pytest.approx(math.sqrt(12))
    assert float(data.total_displacement) == pytest.approx(math.sqrt(21))
    assert math.isnan(float(data.relative.sel(layer="3")))
    assert math.isnan(float(data.cosine.sel(layer="3")))
    assert any("without the 1 layers that normalise" in note for note in found.notes)


def test_networks_that_do_not_correspond_are_refused() -> None:
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"0\.weight is \(6, 4\) in the first"):
        Displacement().run(Pair(Subject(build(), (X, Y)), Subject(other, (X, Y))))
