"""Keskar's sharpness, kept for replication: the largest loss in a box that grows with the weights, in percent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.basis import Basis, norm
from workbench.sharpness.found import Found, NotDefined
from workbench.sharpness.point import Point, value_and_slope

ITERATIONS, EVALUATIONS = 10, 30
"""Of L-BFGS-B, as published, and the gradients that its line searches may take in all."""
SUBSPACES, FIRST = 3, 1_000_000
"""Random subspaces whose maxima are averaged, and the number of their first random vector: away from other draws."""

Array = NDArray[np.float64]
_ONLY = "Keskar's box depends on the scale of the weights: for replication only"


def keskar(point: Point, size: float, dimension: int = 0) -> Iterator[Found]:
    """φ = 100 (max L(θ + A y) - L) / (1 + L) over |y_i| <= ε (|(A⁺θ)_i| + 1), by 10 iterations of L-BFGS-B from 0.

    A (P, p) is the identity for ``dimension`` 0, else p = ``dimension`` random orthonormal directions, so that A⁺ = Aᵀ:
    the paper draws A at random with p = 100 and leaves its columns' lengths open, on which φ depends, as the "+ 1" does
    not scale with them. Orthonormal ones are as long as the identity's. The "+ 1" also makes φ depend on the weights'
    scale. The best of all evaluations counts, so φ is a lower bound.

    Cost: at most 30 gradients, in subspaces for each of three; memory: the vectors of L-BFGS-B in float64 on the host,
    or p vectors beside the model. Error: rounding; in subspaces the standard error of the mean over the three, with
    rounding. Source: Keskar et al. 2017 (arXiv:1609.04836), metric 2.1.

    Raises:
        NotDefined: ``dimension`` exceeds the number of parameters.
    """
    if dimension > point.subject.size:
        raise NotDefined(
            f"a subspace of {dimension} dimensions does not fit into {point.subject.size} parameters; "
            "choose a smaller one, or 0 for all of them"
        )
    yield from _within(point, size, dimension) if dimension else _whole(point, size)


def _whole(point: Point, size: float) -> Iterator[Found]:
    search = _Search(point, _Everything(point))
    iterations = search.run(size)
    yield Found(
        search.sharpness,
        abs(_scale(point)) * point.rounding,
        converged=True,
        protocol=(
            f"100 (max L - L) / (1 + L) in the box |δ_i| <= {size:g} (|θ_i| + 1): {iterations} iterations of L-BFGS-B "
            f"from the weights, {search.taken} gradients; a lower bound; the error is rounding"
        ),
        radius=size,
        lower_bound=True,
        notes=(_ONLY,),
    )


def _within(point: Point, size: float, dimension: int) -> Iterator[Found]:
    values: list[float] = []
    taken = 0
    for number in range(SUBSPACES):
        found, gradients = _one(point, size, dimension, number)
        values, taken = [*values, found], taken + gradients
        spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        yield Found(
            float(np.mean(values)),
            math.hypot(spread, _scale(point) * point.rounding),
            converged=len(values) == SUBSPACES,
            done=len(values) / SUBSPACES,
            protocol=(
                f"100 (max L - L) / (1 + L) over steps A y in the box |y_i| <= {size:g} (|(Aᵀθ)_i| + 1), A {dimension} "
                f"random orthonormal directions of {point.subject.size} parameters: {ITERATIONS} iterations of "
                f"L-BFGS-B from the weights at most, {taken} gradients; the mean over {len(values)} subspaces of the "
                "seed, each a lower bound in its own; the error is the standard error of that mean, and rounding"
            ),
            radius=size,
            lower_bound=True,
            notes=(_ONLY,),
        )


def _one(point: Point, size: float, dimension: int, number: int) -> tuple[float, int]:
    """φ in one subspace and the gradients that it took; the directions are freed before those of the next."""
    search = _Search(point, _Subspace(point, dimension, number))
    search.run(size)
    return search.sharpness, search.taken


def _scale(point: Point) -> float:
    return 100 / (1 + point.loss)


class _Directions(Protocol):
    """A: the coordinates A⁺θ of the weights, steps A y, and slopes Aᵀ g."""

    coordinates: Tensor

    def step(self, y: Tensor) -> Tensor: ...
    def slope(self, gradient: Tensor) -> Tensor: ...


class _Everything:
    """A = 1."""

    def __init__(self, point: Point) -> None:
        self.coordinates, self.point = point.weights, point

    def step(self, y: Tensor) -> Tensor:
        """The coordinates themselves, in the subject's precision and place."""
        return y.to(self.point.weights)

    def slope(self, gradient: Tensor) -> Tensor:
        """The gradient itself."""
        return gradient


class _Subspace:
    """A = random orthonormal columns, held as rows: Gaussian vectors, each freed of those before it."""

    def __init__(self, point: Point, dimension: int, number: int) -> None:
        weights = point.weights
        self.basis = Basis(dimension, weights.numel(), weights.dtype, weights.device)
        for row in range(dimension):
            vector = point.draw(FIRST + number * dimension + row).to(weights)
            for _ in range(2):  # the second time for what is left in the last of as many directions as there are
                vector, _ = self.basis.remove(vector / norm(vector).to(vector.dtype), row)
            self.basis.put(row, vector / norm(vector).to(vector.dtype))
        self.coordinates = self.slope(weights)

    def step(self, y: Tensor) -> Tensor:
        """A y, (P,)."""
        return self.basis.combine(y.to(self.basis.device)[:, None])[0]

    def slope(self, gradient: Tensor) -> Tensor:
        """Aᵀ g, (p,), float64."""
        return self.basis.project(gradient, len(self.basis.rows))


class _Search:
    """The negated loss and gradient as L-BFGS-B asks for them; remembers the largest loss it met."""

    def __init__(self, point: Point, directions: _Directions) -> None:
        self.point, self.directions = point, directions
        self.best, self.taken = point.loss, 0

    def run(self, size: float) -> int:
        """Search the box; how many iterations it took."""
        from scipy.optimize import minimize

        reach = (size * (self.directions.coordinates.abs() + 1)).double().cpu().numpy()
        options = {"maxiter": ITERATIONS, "maxfun": EVALUATIONS}
        bounds = np.stack([-reach, reach], 1)
        ended = minimize(self, np.zeros_like(reach), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return ended.nit

    def __call__(self, y: Array) -> tuple[float, Array]:
        step = self.directions.step(torch.from_numpy(y))
        loss, slope = value_and_slope(self.point.subject, self.point.weights + step)
        self.best, self.taken = max(self.best, float(loss)), self.taken + 1
        return -float(loss), -self.directions.slope(slope).double().cpu().numpy()

    @property
    def sharpness(self) -> float:
        """φ by the largest loss so far."""
        return _scale(self.point) * (self.best - self.point.loss)
