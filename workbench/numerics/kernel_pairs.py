"""Inner products, cosines and distances of two kernels of examples by outputs, with each example left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.kernel_numbers import centred
from workbench.numerics.stats import jackknife_error

Floats = NDArray[np.float64]
ROUNDING = 16
"""A centred kernel whose norm is below so many roundings of the kernel's own is rounding: nothing is left of it."""
TILE = 2**22
"""Entries that are multiplied at once."""


@dataclass(frozen=True, eq=False)
class Inner:
    """⟨K, L⟩ of all examples, and without each of them (n,)."""

    whole: Tensor
    without: Tensor

    def joined(self) -> Tensor:
        """First of all examples, then without each, (1 + n,)."""
        return torch.cat([self.whole.reshape(1), self.without])


def inner(first: Tensor, second: Tensor) -> Inner:
    """Σ of the entries' products of two kernels (n, C, n, C). Memory: a tile; cost: (n C)² multiplications."""
    pairs = _pairs(first, second)
    return Inner(pairs.sum(), pairs.sum() - 2 * pairs.sum(1) + pairs.diagonal())


def centred_inner(first: Tensor, second: Tensor) -> Inner:
    """⟨HKH, HLH⟩ of kernels that are centred over all n examples; where one is left out, the others are centred anew.

    With k_i the blocks' sum over row i, without example a and H' over the m = n - 1 others:
    ⟨H'K'H', L'⟩ = ⟨K', L'⟩ - (2/m) Σ_i ⟨k'_i, l'_i⟩ + ⟨k', l'⟩ / m², all from sums over rows: (n C)² multiplications.
    """
    pairs, m = _pairs(first, second), max(len(first) - 1, 1)
    rows = [k.sum(2) for k in (first, second)]  # (n, C, C): zero up to rounding, since the kernels are centred
    every = torch.arange(len(first), device=first.device)
    own = [k[every, :, every] for k in (first, second)]
    across = torch.einsum("icd,icjd->ij", rows[0], second) + torch.einsum("icd,icjd->ij", rows[1], first)
    apart = across - pairs
    of_rows = (rows[0] * rows[1]).sum((1, 2))
    sums = of_rows.sum() - of_rows - (apart.sum(0) - apart.diagonal())
    left = [r.sum(0) - r - r.mT + o for r, o in zip(rows, own, strict=True)]
    plain = pairs.sum() - 2 * pairs.sum(1) + pairs.diagonal()
    return Inner(pairs.sum(), plain - 2 / m * sums + (left[0] * left[1]).sum((1, 2)) / m**2)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """Products summed over outputs, (n, n)."""
    n, outputs = first.shape[:2]
    step = max(1, TILE // (n * outputs**2))
    parts = [(first[at : at + step] * second[at : at + step]).sum((1, 3)) for at in range(0, n, step)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over examples, by the jackknife."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From (1 + n,): that of all examples, then without each."""
        host = values.cpu().numpy()
        return cls(float(host[0]), float(jackknife_error(host[1:])) if np.isfinite(host[1:]).all() else float("nan"))


@dataclass(frozen=True)
class KernelDistances:
    """How a kernel Θ differs from Θ₀; see :func:`kernel_distances`."""

    relative_change: Estimate
    distance: Estimate
    centred_distance: Estimate
    norm_ratio: Estimate


def kernel_distances(first: Tensor, second: Tensor, rounding: float = 2.0**-52) -> KernelDistances:
    """‖Θ - Θ₀‖ / ‖Θ₀‖, 1 - cosine, 1 - cosine of the centred ones, and ‖Θ‖ / ‖Θ₀‖, for kernels (n, C, n, C), float64.

    Args:
        first: Θ₀.
        second: Θ of the same examples.
        rounding: relative, of the precision that the kernels were computed in. What centring leaves that is no more
            than a few roundings is nothing, and its cosine nan.

    Errors: by the jackknife, each example left out. Source: Fort et al. 2020.
    """
    moved = second - first
    own, change, other = (inner(*pair).joined() for pair in ((first, first), (moved, moved), (second, second)))
    return KernelDistances(
        Estimate.of(_root(change, own)),
        Estimate.of(one_less_cosine(first, second)),
        Estimate.of(one_less_cosine(first, second, True, rounding)),
        Estimate.of(_root(other, own)),
    )


def _root(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top.clamp_min(0) / bottom, torch.nan).sqrt()


def one_less_cosine(first: Tensor, second: Tensor, centre: bool = False, rounding: float = 2.0**-52) -> Tensor:
    """1 - ⟨K, L⟩ / (‖K‖ ‖L‖) of all examples, then without each, (1 + n,); nan where one has nothing in it.

    Kernels that are nearly parallel lose no digits: with M = L - c K for c = ⟨K, L⟩ / ‖K‖²,
    ‖K‖² ‖L‖² - ⟨K, L⟩² = ‖K‖² ‖M‖² - ⟨K, M⟩², whose terms are small where the difference is.
    """
    least = [ROUNDING * rounding * torch.linalg.vector_norm(k) for k in (first, second)]
    one, two = (centred(k) if centre else k for k in (first, second))
    product = centred_inner if centre else inner
    own, other = product(one, one).joined(), product(two, two).joined()
    cross = product(one, two).joined()
    rest = two - cross[0] / own[0].clamp_min(torch.finfo(own.dtype).tiny) * one
    apart = own * product(rest, rest).joined() - product(one, rest).joined() ** 2
    scale = (own.clamp_min(0) * other.clamp_min(0)).sqrt()
    there = (own > least[0] ** 2) & (other > least[1] ** 2) if centre else scale > 0
    return torch.where(there, apart.clamp_min(0) / (scale * (scale + cross)), torch.nan)


def blank_alignment(targets: Tensor, together: bool) -> tuple[float, float]:
    """(centred, uncentred) alignment of the identity with targets (n, C): what a kernel that knows nothing has.

    ``together`` for the n x n kernel that all outputs share: of balanced classes √((C-1)/(n-1)) and √(C/n).
    """
    n, outputs = targets.shape
    found = list[float]()
    for y, size in ((targets - targets.mean(0), n - 1), (targets, n)):
        if not together:
            found.append((size * outputs) ** -0.5 if size and bool(y.any()) else float("nan"))
            continue
        whole, norm = float(y.square().sum()), float(torch.linalg.matrix_norm(y.T @ y))
        found.append(whole / (norm * size**0.5) if norm > 0 and size else float("nan"))
    return found[0], found[1]


def target_kernel(targets: Tensor, together: bool) -> Tensor:
    """Y Yᵀ as a kernel (n, 1, n, 1), or y yᵀ of all targets in a row as one (n, C, n, C)."""
    if together:
        return (targets @ targets.T)[:, None, :, None]
    return targets[:, :, None, None] * targets[None, None]
