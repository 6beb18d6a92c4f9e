"""How close a set of class means (and classifier rows) is to a simplex equiangular tight frame.

Shapes: means (C, d) with C ≥ 2 classes that are present; all in float64. Each function is exact for its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_FLOOR = 1e-10
"""Relative size of a squared singular value of the centred means under which its direction counts as absent."""


@dataclass(frozen=True, eq=False)
class Centred:
    """Class means minus their unweighted mean: rows M_c, and the thin SVD restricted to the directions that exist.

    ``axes`` is (r, d) orthonormal, ``strengths`` the r singular values, with r ≤ C - 1; fewer when means coincide.
    """

    mean: Tensor
    rows: Tensor
    axes: Tensor
    strengths: Tensor


def centre(means: Tensor) -> Centred:
    """Centre class means by their unweighted mean and find the subspace they span.

    Through the C × C Gram matrix, O(C² d): the null direction that centring leaves is dropped because the rank is at
    most C - 1 by construction, not by a tolerance.
    """
    mean = means.mean(0)
    rows = means - mean
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0)[:-1], vectors.flip(1)[:, :-1]
    kept = values > RANK_FLOOR * values[:1].clamp_min(torch.finfo(values.dtype).tiny)
    spread = rows.T @ vectors[:, kept]
    axes, _ = torch.linalg.qr(spread)
    return Centred(mean, rows, axes.T, torch.linalg.vector_norm(spread, dim=0))


def equinorm(rows: Tensor) -> float:
    """NC2, lengths: population standard deviation of ‖M_c‖ over its mean; 0 for equal lengths."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return float(lengths.std(correction=0) / lengths.mean())


def cosines(rows: Tensor) -> Tensor:
    """(C, C) cosines between rows; nan where a row is zero."""
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (unit @ unit.T).clamp(-1.0, 1.0)


def equiangle(rows: Tensor) -> float:
    """NC2, angles: mean over pairs of |cos(M_c, M_c') + 1/(C-1)|; 0 for a simplex frame."""
    return float(_off_diagonal(cosines(rows) + 1 / (len(rows) - 1)).abs().mean())


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine over pairs: 0 for an orthogonal frame, -1/(C-1) for a simplex frame around zero."""
    return float(_off_diagonal(cosines(rows)).mean())


def _off_diagonal(square: Tensor) -> Tensor:
    return square[~torch.eye(len(square), dtype=torch.bool, device=square.device)]


def simplex_distance(rows: Tensor) -> float:
    """‖G/‖G‖_F - (I - 11ᵀ/C)/√(C-1)‖_F with G = rows rowsᵀ; 0 for a simplex frame."""
    gram = rows @ rows.T
    classes = len(rows)
    ideal = torch.eye(classes, dtype=rows.dtype, device=rows.device) - 1 / classes
    return float(torch.linalg.matrix_norm(gram / torch.linalg.matrix_norm(gram) - ideal / (classes - 1) ** 0.5))


def self_duality(weight: Tensor, rows: Tensor) -> float:
    """NC3: ‖W/‖W‖_F - M/‖M‖_F‖²_F in [0, 4] for W and M both (C, d); 0 when classifier and means are parallel."""
    return float(((weight / torch.linalg.matrix_norm(weight) - rows / torch.linalg.matrix_norm(rows)) ** 2).sum())


def class_distance_variance(variances: Tensor, means: Tensor) -> float:
    """CDNV, mean over pairs of (σ_c² + σ_c'²) / (2 ‖μ_c - μ_c'‖²), with σ_c² = E‖h - μ_c‖² over the class."""
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return float(_off_diagonal((variances[:, None] + variances[None, :]) / (2 * apart)).mean())
