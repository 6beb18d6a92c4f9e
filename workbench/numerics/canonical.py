"""Canonical correlations (SVCCA, PWCCA) and orthogonal Procrustes between layers, with errors from groups left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from workbench.numerics.similarity import Estimate, centre, centred

Measure = Literal["svcca", "pwcca", "procrustes"]

GROUPS = 10
"""Groups of examples, every tenth in one, of which one at a time is left out."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """Features (n, d) of a layer as ``rows`` (n, k) times ``axes`` (k, d), whose rows are orthonormal."""

    rows: Tensor
    axes: Tensor

    @classmethod
    def of(cls, features: Tensor, variance: float = 1.0) -> Reduced:
        """Centred features on their leading singular vectors that carry a share ``variance`` of Σσ².

        With 1 all of them that rounding does not make up. No columns where the features are constant; nan stays nan.
        """
        every = centred(features, centre(features))
        if not bool(every.isfinite().all()):
            return cls(every[:, :1] * float("nan"), torch.eye(1, every.shape[1], dtype=every.dtype).to(every.device))
        left, strengths, axes = torch.linalg.svd(every, full_matrices=False)
        kept = _kept(strengths, variance, features.dtype)
        return cls(left[:, :kept] * strengths[:kept], axes[:kept])


def _kept(strengths: Tensor, variance: float, dtype: torch.dtype) -> int:
    """How many singular values (descending) carry the share of Σσ², and are no rounding."""
    squares = strengths**2
    if not float(squares.sum()):
        return 0
    rounding = len(strengths) * torch.finfo(dtype).eps * strengths[0]
    solid = int((strengths > rounding).sum())
    if variance >= 1:
        return solid
    shares = squares.cumsum(0) / squares.sum()
    return min(int((shares < variance - 1e-12).sum()) + 1, solid)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A layer on some of the examples: a basis (n, k), and what turns it into the features there, (k, d)."""

    basis: Tensor
    mix: Tensor


def _ready(layer: Reduced, kept: Tensor, measure: Measure) -> _Ready:
    rows = layer.rows[kept]
    rows = rows - rows.mean(0)
    if measure == "procrustes":
        return _Ready(rows / torch.linalg.vector_norm(rows), layer.axes)
    basis, factor = torch.linalg.qr(rows)
    return _Ready(basis, factor @ layer.axes if measure == "pwcca" else layer.axes)


def _compare(one: _Ready, two: _Ready, measure: Measure) -> float:
    """One similarity in [0, 1]; nan where a layer is constant."""
    if not one.basis.shape[1] or not two.basis.shape[1]:
        return float("nan")
    inner = one.basis.T @ two.basis
    if not bool(inner.isfinite().all()):
        return float("nan")
    if measure == "pwcca":
        left, values, _ = torch.linalg.svd(inner, full_matrices=False)
        weights = (left.T @ one.mix).abs().sum(1)
        return float((weights * values.clamp_max(1)).sum() / weights.sum())
    values = torch.linalg.svdvals(inner)
    return float(values.clamp_max(1).mean() if measure == "svcca" else values.sum())


def compare(
    first: Sequence[Reduced], second: Sequence[Reduced], measure: Measure, groups: int = GROUPS
) -> Iterator[tuple[float, Estimate]]:
    """All pairs of layers of two models on the same n examples: the share done, and what is known.

    ``svcca``: the mean of the canonical correlations ρ of features on their leading directions, min(k_x, k_y) of them.
    ``pwcca``: their mean weighted by α_i = Σ_j |⟨h_i, x_j⟩|, with the first's canonical variates h_i and neurons x_j:
    not symmetric. ``procrustes``: ‖XᵀY‖_* of centred features of unit Frobenius norm, which is 1 - d²/2 of the squared
    distance d² = min_Q ‖X - YQ‖². Errors: all anew without each of ``groups`` groups of examples, directions fixed.

    Cost: (groups + 1) p q singular value decompositions of k x k, and as many QR of n x k for each layer.
    Source: Raghu et al. 2017; Morcos et al. 2018; Ding et al. 2021.
    """
    n = len(first[0].rows)
    groups = groups if n >= 2 * groups else 0
    number = torch.arange(n, device=first[0].rows.device) % max(groups, 1)
    shape = (len(first), len(second))
    found = np.full((groups + 1, *shape), np.nan)
    for g in range(groups + 1):
        kept = number != g - 1
        one, two = ([_ready(layer, kept, measure) for layer in side] for side in (first, second))
        for i, a in enumerate(one):
            found[g, i] = [_compare(a, b, measure) for b in two]
            known = found[1:] if g == groups and i + 1 == len(one) else found[:0]
            yield (g + (i + 1) / len(one)) / (groups + 1), Estimate(found[0].copy(), known)
