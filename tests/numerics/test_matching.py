"""Matching of units against the definition's numbers, planted permutations and every permutation there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.numerics.factors import Factors
from workbench.numerics.matching import match, permuted


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_rows_of_a_matrix_that_were_turned_round() -> None:
    a = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    b = a[[2, 0, 1]]
    assert (a @ b.T).tolist() == [[17, 5, 11], [39, 11, 25], [61, 17, 39]]
    for found in match({"w": a}, {"w": b}, {"w": (0, None)}, rng()):
        assert found.permutations[0].tolist() == [1, 2, 0]
        assert (found.unaligned**2, found.distance) == pytest.approx((48, 0))
        assert found.settled


def three_layers(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = {"in": (7, 3), "mid": (6, 7), "loop": (6, 6), "shift": (6,), "out": (2, 6)}
    return {n: torch.randn(s, generator=made, dtype=torch.float64) for n, s in shapes.items()}


LABELS = {"in": (0, None), "mid": (1, 0), "loop": (1, 1), "shift": (1,), "out": (None, 1)}


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_planted_permutations_are_found_also_where_one_acts_on_both_sides(seed: int) -> None:
    a, order = three_layers(seed), {0: rng(seed).permutation(7), 1: rng(seed + 1).permutation(6)}
    b = {n: permuted(t, LABELS[n], order) for n, t in a.items()}
    found = next(match(a, b, LABELS, rng()))
    assert found.distance == pytest.approx(0, abs=1e-6)
    for label, p in order.items():
        assert (p[found.permutations[label]] == np.arange(len(p))).all()


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_more_starts_are_never_worse_and_the_distance_is_that_of_the_arrays(seed: int) -> None:
    a, b = three_layers(seed), three_layers(seed + 1)
    found = list(match(a, b, LABELS, rng(), starts=4))
    distances = [f.distance for f in found]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == pytest.approx(min(found[-1].starts))
    assert distances[-1] <= found[-1].unaligned
    moved = {n: permuted(t, LABELS[n], found[-1].permutations) for n, t in b.items()}
    assert distances[-1] ** 2 == pytest.approx(sum(float(((a[n] - moved[n]) ** 2).sum()) for n in a))


def test_one_hidden_layer_is_matched_as_well_as_any_permutation_can() -> None:
    made = torch.Generator().manual_seed(1)
    a, b = ({"w": torch.randn(5, 3, generator=made), "v": torch.randn(2, 5, generator=made)} for _ in range(2))
    labels = {"w": (0, None), "v": (None, 0)}
    *_, found = match(a, b, labels, rng())
    every = [
        sum(float(((a[n] - permuted(b[n], labels[n], {0: np.array(p)})) ** 2).sum()) for n in a)
        for p in itertools.permutations(range(5))
    ]
    assert found.distance**2 == pytest.approx(min(every), rel=1e-5)


def test_what_is_not_finite_is_refused() -> None:
    bad = {"w": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(ValueError, match="w has entries that are not finite"):
        next(match(bad, bad, {"w": (None, 0)}, rng()))


def test_axes_are_cut_joined_and_fixed() -> None:
    f = Factors()
    long, heads = f.new(12), f.new(3)
    views = f.regroup([f.new(5, fixed=True), long], (5, 3, 4))
    assert [f.length(axis) for axis in views] == [5, 3, 4]
    f.unite(views[1], heads)
    assert f.leaves(long) == (*f.leaves(heads), *f.leaves(views[2]))
    assert f.regroup(views, (15, 4)) == [(*f.leaves(views[0]), *f.leaves(heads)), f.leaves(views[2])]
    other = f.new(12)
    f.unite(other, long)
    assert f.leaves(other) == f.leaves(long)
    assert not any(map(f.is_fixed, f.leaves(long)))
    f.regroup([long], (4, 3))
    assert all(map(f.is_fixed, f.leaves(other))), "3 × 4 and 4 × 3 do not agree"


def test_equal_pieces_of_an_axis_share_its_inner_factor() -> None:
    f = Factors()
    gates = f.new(8)
    piece = f.inner(gates, 2)
    outer, inner = f.leaves(gates)
    assert (f.is_fixed(outer), f.is_fixed(inner), (inner,)) == (True, False, f.leaves(piece))
    ragged = f.new(7)
    assert all(map(f.is_fixed, f.leaves(f.inner(ragged, 3))))
    assert all(map(f.is_fixed, f.leaves(ragged)))
