"""How much of a direction's length lies along leading eigenvectors, and how far unconverged vectors put that off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.basis import norm
from workbench.numerics.overlap import cosines, span_sines, vector_sines

Floats = NDArray[np.float64]
ROUNDING = 16
"""By how many units of the working precision a share may be off."""


@dataclass(frozen=True)
class Energies:
    """Parts of ‖g‖², each (k,): along each eigenvector, within the span of the first 1, 2, ..., k, and their errors.

    An error is nan where no gap tells the vector, or the span, from its neighbours.
    """

    energy: Floats
    energy_error: Floats
    share: Floats
    share_error: Floats


def energies(vectors: Tensor, direction: Tensor, values: Floats, residuals: Floats) -> Energies:
    """Squared cosines of a direction with orthonormal rows; all nan for one of no length.

    Args:
        vectors: Ritz vectors, largest value first, (k, size).
        direction: of any length, such as a gradient, (size,).
        values: at least k + 1 Ritz values, descending: the one after the last ends the gap. nan where there are none.
        residuals: of these.

    Cost: one pass over the vectors. Source of the errors: Davis and Kahan 1970.
    """
    k, size = vectors.shape
    values, residuals = values[: k + 1].copy(), residuals[: k + 1].copy()
    values[size:], residuals[size:] = -np.inf, 0.0  # nothing lies below the last eigenvalue of all
    length = norm(direction)
    inner = cosines(vectors, (direction / length).to(vectors.dtype)[None])[:, 0]
    energy = np.where(np.isfinite(inner), inner**2, np.nan)
    share = np.minimum(np.cumsum(energy), 1.0)
    slack = ROUNDING * torch.finfo(vectors.dtype).eps
    with np.errstate(invalid="ignore"):
        off = vector_sines(values, residuals), span_sines(values, residuals)
    return Energies(energy, turned(energy, off[0]) + slack, share, turned(share, off[1]) + slack)


def turned(shares: Floats, sines: Floats) -> Floats:
    """How far cos²φ can get when the angle φ changes by θ at most, given as sin θ: both (k,).

    A span that turns by θ at most changes the angle between itself and a direction by θ at most.
    """
    angle, turn = np.arccos(np.sqrt(np.clip(shares, 0.0, 1.0))), np.arcsin(np.clip(sines, 0.0, 1.0))
    nearest = np.cos(np.maximum(angle - turn, 0.0)) ** 2
    farthest = np.cos(np.minimum(angle + turn, np.pi / 2)) ** 2
    return np.maximum(nearest - shares, shares - farthest)
