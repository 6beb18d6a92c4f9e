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
    kept = values > (RANK_FLOOR * values[:1]).clamp_min(_rounding(means) ** 2)
    spread = rows.T @ vectors[:, kept]
    axes, _ = torch.linalg.qr(spread)
    return Centred(mean, rows, axes.T, torch.linalg.vector_norm(spread, dim=0))


def _rounding(means: Tensor) -> float:
    """The distance under which means of this size differ by rounding alone."""
    largest = float(torch.linalg.vector_norm(means, dim=1).max())
    return max(16 * torch.finfo(means.dtype).eps * largest, torch.finfo(means.dtype).tiny ** 0.5)


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


def mean_cosine(rows: Tensor, *, absolute: bool = False) -> float:
    """Mean cosine over pairs (or its size): 0 for an orthogonal frame, -1/(C-1) for a simplex frame around zero."""
    found = _off_diagonal(cosines(rows))
    return float((found.abs() if absolute else found).mean())


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


def product_distance(weight: Tensor, rows: Tensor) -> float:
    """NC3 as a product: ‖W Mᵀ/‖W Mᵀ‖_F - (I - 11ᵀ/C)/√(C-1)‖_F; 0 asks for a simplex frame as well as for duality."""
    product = weight @ rows.T
    classes = len(rows)
    ideal = torch.eye(classes, dtype=rows.dtype, device=rows.device) - 1 / classes
    return float(torch.linalg.matrix_norm(product / torch.linalg.matrix_norm(product) - ideal / (classes - 1) ** 0.5))


def row_cosine(weight: Tensor, rows: Tensor) -> float:
    """NC3 as angles: the mean over classes of the cosine between the classifier's row and the class mean."""
    lengths = torch.linalg.vector_norm(weight, dim=1) * torch.linalg.vector_norm(rows, dim=1)
    return float(((weight * rows).sum(1) / lengths).mean())


def orthogonal_distance(means: Tensor, lengths: Tensor | None = None) -> float:
    """‖G/‖G‖_F - D/‖D‖_F‖_F, G = means meansᵀ and D = diag(lengths²), uncentred; the means' own lengths if None."""
    gram = means @ means.T
    ideal = torch.diag(gram.diagonal() if lengths is None else lengths**2)
    return float(torch.linalg.matrix_norm(gram / torch.linalg.matrix_norm(gram) - ideal / torch.linalg.norm(ideal)))


def outside_cosine(means: Tensor, outside: Tensor) -> float:
    """NC5: mean over classes of |cos(μ_c, μ_outside)|, the latter the mean feature of examples of no class."""
    lengths = torch.linalg.vector_norm(means, dim=1) * torch.linalg.vector_norm(outside)
    return float(((means @ outside).abs() / lengths).mean())


def distance_to_collapse(means: Tensor, counts: Tensor, scatter: Tensor) -> float:
    """How far features are from collapsed ones, min ‖H - 1μᵀ - α S R‖_F / ‖H - 1μᵀ‖_F: 0 if collapsed, at most 1.

    S gives each example its class's row of a simplex frame; shift μ, scale α and rotation R fit best, so this is the
    least perturbation, relative to the features' own spread. From class means (C, d), ``counts`` (C,) and ``scatter``
    (C,), Σ‖h - μ_c‖² of each class. Cost O(C² d). Where d < C - 1 rotations are partial ones, and 0 is out of reach.
    """
    sizes = counts.double()
    ideal = torch.eye(len(means), dtype=means.dtype, device=means.device) - 1 / len(means)
    apart, frame = (x - (sizes @ x) / sizes.sum() for x in (means, ideal))
    within, square = scatter.sum(), (sizes * (apart**2).sum(1)).sum()
    nuclear = torch.linalg.svdvals(frame.T @ (sizes[:, None] * apart)).sum()
    fitted = nuclear**2 / (sizes * (frame**2).sum(1)).sum()
    return float(((within + (square - fitted).clamp_min(0)) / (within + square)).sqrt())


def merged(means: Tensor, tolerance: float = 1e-5) -> list[tuple[int, int]]:
    """Pairs of classes whose means lie closer than ``tolerance`` times their spread, or differ by rounding alone."""
    spread = float(((means - means.mean(0)) ** 2).sum(1).mean().sqrt())
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    near = apart <= max(tolerance * spread, _rounding(means))
    return [(int(i), int(j)) for i, j in near.triu(1).nonzero().tolist()]
