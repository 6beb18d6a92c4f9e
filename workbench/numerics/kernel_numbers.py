"""Numbers that describe a positive semi-definite kernel of examples by outputs, with errors over examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.kernels import effective_rank

Floats = NDArray[np.float64]
FOLDS = 10
"""Parts of the examples, each left out once, for errors."""
SIZES = (8, 4, 2)
"""A power law is looked for in sub-samples of one in so many examples, and in all."""
SINGULAR = 1e-13
"""A smallest eigenvalue below this share of the largest is rounding: the kernel then has no inverse."""


def centred(kernel: Tensor) -> Tensor:
    """(H ⊗ I) K (H ⊗ I) with H = I - 11ᵀ/n over the examples of a kernel (n, C, n, C)."""
    rows = kernel - kernel.mean(0, keepdim=True)
    return rows - rows.mean(2, keepdim=True)


def alignment(kernel: Tensor, targets: Tensor) -> float:
    """⟨K, yyᵀ⟩ / (‖K‖ ‖yyᵀ‖) with y all targets (n, C); for a kernel (n, 1, n, 1), ⟨K, YYᵀ⟩ / (‖K‖ ‖YYᵀ‖).

    Centre both for the centred alignment. nan where either is zero. Source: Cristianini et al. 2001; Cortes et al.
    2012.
    """
    if kernel.shape[1] == 1:
        cross = float((targets * (kernel[:, 0, :, 0] @ targets)).sum())
        size = float(torch.linalg.matrix_norm(targets.T @ targets))
    else:
        cross, size = float(torch.einsum("ic,icjd,jd->", targets, kernel, targets)), float(targets.square().sum())
    scale = float(torch.linalg.vector_norm(kernel)) * size
    return cross / scale if scale > 0 else math.nan


@dataclass(frozen=True)
class Numbers:
    """What all examples together say: entropy rank, and alignments with targets, centred and not."""

    effective_rank: float
    alignment: float
    alignment_uncentred: float

    @staticmethod
    def of(kernel: Tensor, values: Floats, targets: Tensor | None) -> Numbers:
        """From a kernel (n, C, n, C), not centred, and the eigenvalues to take the rank of."""
        rank = effective_rank(np.maximum(values, 0.0))
        if targets is None:
            return Numbers(rank, math.nan, math.nan)
        own = alignment(centred(kernel), targets - targets.mean(0))
        return Numbers(rank, own, alignment(kernel, targets))


def eigenvalues(kernel: Tensor) -> Floats:
    """All of a kernel (n, C, n, C), largest first."""
    size = kernel.shape[0] * kernel.shape[1]
    return torch.linalg.eigvalsh(kernel.reshape(size, size)).flip(0).cpu().numpy()


def left_out(kernel: Tensor, targets: Tensor | None, centre: bool) -> Iterator[Numbers]:
    """The numbers without each tenth of the examples (without each of fewer than ten)."""
    n = len(kernel)
    folds = min(FOLDS, n)
    place = torch.arange(n, device=kernel.device) % folds
    for fold in range(folds):
        kept = (place != fold).nonzero()[:, 0]
        part = kernel[kept][:, :, kept]
        values = eigenvalues(centred(part) if centre else part)
        yield Numbers.of(part, values, None if targets is None else targets[kept])


def power(vectors: Tensor, targets: Tensor) -> Floats:
    """Share of ‖y‖² in the first k eigenvectors (size, k): cumulative; averaged over columns of ``targets``."""
    shares = (vectors.T @ targets).square().sum(1) / targets.square().sum()
    return shares.cumsum(0).cpu().numpy()


def slope(x: Floats, y: Floats) -> tuple[float, float]:
    """Least-squares slope of y on x with its standard error; nan for fewer than three points."""
    if len(x) < 3 or not np.all(np.isfinite(y)):
        return math.nan, math.nan
    dx, dy = x - x.mean(), y - y.mean()
    found = float(dx @ dy / (dx @ dx))
    rest = dy - found * dx
    return found, float(np.sqrt(rest @ rest / (len(x) - 2) / (dx @ dx)))


def exponent(kernel: Tensor, values: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """α of λ_i ~ i^-α from κ_m = 1/tr(K_m⁻¹) ~ m^-α over sub-samples of m examples, with the fit's standard error.

    A straight line through sorted eigenvalues is bent by their finite number; κ is not. Two sub-samples of n/2, four
    of n/4 and eight of n/8 examples, and all n with ``values``. nan below 16 examples or without an inverse.
    Source: Simon et al. 2024.
    """
    n, points = len(kernel), list[tuple[float, float]]()
    if n < 2 * SIZES[0]:
        return math.nan, math.nan
    points.append((math.log(n), _log_kappa(values)))
    for parts in SIZES:
        order = rng.permutation(n)
        for part in range(parts):
            chosen = torch.from_numpy(order[part : n // parts * parts : parts].copy()).to(kernel.device)
            points.append((math.log(n // parts), _log_kappa(eigenvalues(kernel[chosen][:, :, chosen]))))
    found, error = slope(*np.array(points).T)
    return -found, error


def _log_kappa(values: Floats) -> float:
    return -math.log(float((1 / values).sum())) if values[-1] > SINGULAR * values[0] else math.nan


def direct_exponent(values: Floats) -> tuple[float, float]:
    """α by a straight line through ln λ over ln rank, ranks 10 to a tenth of all; nan where those are fewer than 8.

    The error is that of the line's slope, as if eigenvalues were independent: too small.
    """
    last = len(values) // 10
    ranks = np.arange(10, last + 1)
    if len(ranks) < 8 or values[last - 1] <= SINGULAR * values[0]:
        return math.nan, math.nan
    found, error = slope(np.log(ranks), np.log(values[ranks - 1]))
    return -found, error
