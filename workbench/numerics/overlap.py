"""How alike two leading eigenspaces are, and how sure that is: overlaps, angles, and bounds from residuals and gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def cosines(first: Tensor, second: Tensor) -> Floats:
    """Inner products (k, l) between orthonormal rows (k, size) and (l, size), summed in float64 slab by slab."""
    total = np.zeros((first.shape[0], second.shape[0]))
    for a, b in zip(first.split(1 << 18, dim=1), second.split(1 << 18, dim=1), strict=True):
        total += (a.double() @ b.to(a.device).double().T).cpu().numpy()
    return total


def overlaps(inner: Floats) -> Floats:
    """(1/k) ‖V_k W_kᵀ‖_F² for k = 1, 2, ... from inner products (k, k): 1 for equal spans, k / size by chance."""
    squares = inner**2
    corner = np.cumsum(np.cumsum(squares, axis=0), axis=1).diagonal()
    return corner / np.arange(1, len(corner) + 1)


def angles(inner: Floats) -> Floats:
    """Principal angles in radians, ascending, of spans with orthonormal rows and these inner products (k, k).

    From cosines alone: absolute accuracy 1e-8 in float64, far below what residuals leave.
    """
    return np.arccos(np.clip(np.linalg.svd(inner, compute_uv=False), 0.0, 1.0))


def span_sines(values: Floats, residuals: Floats) -> Floats:
    """Bounds on ‖sin Θ‖_F between the span of the first k Ritz vectors and of the first k eigenvectors, k = 1, 2, ...

    ``values`` (m,) descending with ``residuals`` (m,) give m - 1 bounds: √(Σ r²) over the first k, divided by the gap
    from the kth value to the (k+1)th with its residual. nan where that says nothing (no gap, or a bound of 1 and more):
    the span is then not determined. Valid if no eigenvalue was missed. Source: Davis and Kahan 1970.
    """
    return _resolved(np.sqrt(np.cumsum(residuals[:-1] ** 2)), values[:-1] - (values[1:] + residuals[1:]))


def vector_sines(values: Floats, residuals: Floats) -> Floats:
    """Bounds (m - 1,) on the sine of the angle between each Ritz vector but the last and its eigenvector.

    Its residual over the gap to the nearer neighbour, less that one's residual; nan where that is not resolved, as in
    a cluster of close eigenvalues, whose span may be determined although none of its vectors is.
    """
    below = values[:-1] - (values[1:] + residuals[1:])
    above = np.append(np.inf, (values[:-2] - residuals[:-2]) - values[1:-1])
    return _resolved(residuals[:-1], np.minimum(below, above))


def _resolved(length: Floats, gap: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((gap > 0) & (length < gap), length / gap, np.nan)
