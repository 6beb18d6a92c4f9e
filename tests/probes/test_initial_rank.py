"""Initial rank: numpy's singular values, planted ranks, and initial weights cut to low rank at an unchanged norm."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.probe import Reading
from workbench.probes.initial_rank import InitialRank
from workbench.several import Pair
from workbench.subject import Subject
from workbench.zoo.low_rank import low_rank

X, Y = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)).double()


def ranks(one: nn.Module, two: nn.Module) -> Reading:
    return InitialRank().run(Pair(Subject(one, (X, Y)), Subject(two, (X, Y))))


def test_ranks_are_those_of_numpys_singular_values() -> None:
    one, two = build(0), build(1)
    found = ranks(one, two).data
    w, other = (m[0].weight.detach().numpy() for m in (one, two))
    for whose, matrix in (("initial", w), ("change", other - w)):
        s = np.linalg.svd(matrix, compute_uv=False)
        p = s / s.sum()
        assert float(found.effective_rank.sel(whose=whose)[0]) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
        assert float(found.stable_rank.sel(whose=whose)[0]) == pytest.approx((s**2).sum() / s[0] ** 2)
    assert float(found.relative_change[0]) == pytest.approx(np.linalg.norm(other - w) / np.linalg.norm(w))
    assert list(found.full_rank.values) == [12, 3]


def test_a_change_inside_the_leading_directions_is_captured_and_one_outside_is_not() -> None:
    one = low_rank(build(), 2)
    left = torch.linalg.svd(one[0].weight.detach())[0]
    for column, wanted in ((0, 1.0), (5, 0.0)):
        two = copy.deepcopy(one)
        with torch.no_grad():
            two[0].weight.add_(torch.outer(left[:, column], torch.ones(12).double()))
        found = ranks(one, two).data
        assert float(found.captured[0]) == pytest.approx(wanted, abs=1e-12)
        assert float(found.stable_rank.sel(whose="change")[0]) == pytest.approx(1)
        assert float(found.captured_by_chance[0]) == pytest.approx(2 / 20)


def test_no_change_has_no_rank() -> None:
    one = build()
    found = ranks(one, copy.deepcopy(one)).data
    assert np.isnan(found.stable_rank.sel(whose="change").values).all()
    assert found.relative_change.values == pytest.approx(0)


def test_low_rank_of_known_singular_values() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    assert torch.linalg.svdvals(low_rank(net, 1)[0].weight).tolist() == pytest.approx([math.sqrt(10), 0], abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(0, 100))
def test_low_rank_keeps_the_norm_and_the_directions(rank: int, seed: int) -> None:
    before, after = build(seed), low_rank(build(seed), rank, ("0",))
    old, new = before[0].weight.detach(), after[0].weight.detach()
    assert float(new.norm()) == pytest.approx(float(old.norm()))
    assert int(torch.linalg.matrix_rank(new, rtol=1e-9)) == rank
    left = torch.linalg.svd(old)[0][:, :rank]
    assert torch.allclose(left @ (left.T @ new), new)
    assert torch.equal(before[2].weight, after[2].weight)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one singular value"):
        low_rank(build(), 0)
    with pytest.raises(ValueError, match="no weight matrix in 1; there are 0, 2"):
        low_rank(build(), 1, ("1",))
