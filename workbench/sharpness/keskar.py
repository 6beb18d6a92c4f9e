"""Keskar's sharpness, kept for replication: the largest loss in a box that grows with the weights, in percent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.sharpness.found import Found
from workbench.sharpness.point import Point, value_and_slope

ITERATIONS, EVALUATIONS = 10, 30
"""Of L-BFGS-B, as published, and the gradients that its line searches may take in all."""

Array = NDArray[np.float64]


def keskar(point: Point, size: float) -> Iterator[Found]:
    """φ = 100 (max L(θ + δ) - L) / (1 + L) over the box |δ_i| <= ε (|θ_i| + 1), by 10 iterations of L-BFGS-B from 0.

    The "+ 1" makes it depend on the weights' scale; the best of all evaluations counts. Cost: at most 30 gradients,
    the vectors of L-BFGS-B in float64 on the host. Error: rounding. Source: Keskar et al. 2017 (arXiv:1609.04836).
    """
    from scipy.optimize import minimize

    reach = (size * (point.weights.abs() + 1)).double().cpu().numpy()
    search = _Search(point)
    options = {"maxiter": ITERATIONS, "maxfun": EVALUATIONS}
    ended = minimize(
        search, np.zeros_like(reach), jac=True, method="L-BFGS-B", bounds=np.stack([-reach, reach], 1), options=options
    )
    scale = 100 / (1 + point.loss)
    yield Found(
        scale * (search.best - point.loss),
        abs(scale) * point.rounding,
        converged=True,
        protocol=(
            f"100 (max L - L) / (1 + L) in the box |δ_i| <= {size:g} (|θ_i| + 1): {ended.nit} iterations of L-BFGS-B "
            f"from the weights, {search.taken} gradients; a lower bound; the error is rounding"
        ),
        radius=size,
        lower_bound=True,
        notes=("Keskar's box depends on the scale of the weights: for replication only",),
    )


class _Search:
    """The negated loss and gradient as L-BFGS-B asks for them; remembers the largest loss it met."""

    def __init__(self, point: Point) -> None:
        self.point, self.best, self.taken = point, point.loss, 0

    def __call__(self, step: Array) -> tuple[float, Array]:
        loss, slope = value_and_slope(self.point.subject, self.point.weights + self.vector(step))
        self.best, self.taken = max(self.best, float(loss)), self.taken + 1
        return -float(loss), -slope.double().cpu().numpy()

    def vector(self, step: Array) -> Tensor:
        """A step in the subject's precision and place."""
        return torch.from_numpy(step).to(self.point.weights)
