"""Spectral densities from Lanczos runs: nodes and weights, how far they are from the truth, and how to draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.stats import wasserstein_distance

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Quadrature:
    """A discrete spectral measure: ``weights`` (n,) >= 0 that sum to 1 at ``nodes`` (n,), ascending.

    It stands for the density of eigenvalues: a mean over all eigenvalues is a weighted mean over the nodes.
    """

    nodes: Floats
    weights: Floats

    def mean(self, function: Callable[[Floats], Floats]) -> float:
        """(1/size) Σ function(eigenvalue)."""
        return float(self.weights @ function(self.nodes))

    def moment(self, order: int) -> float:
        """(1/size) Σ eigenvalue ** order: order 1 is trace / size, order 2 the squared Frobenius norm / size."""
        return self.mean(lambda nodes: nodes**order)

    def mass(self, low: float = -math.inf, high: float = math.inf) -> float:
        """Share of the eigenvalues in the open interval (low, high)."""
        return float(self.weights[(self.nodes > low) & (self.nodes < high)].sum())

    @property
    def range(self) -> float:
        """Distance from the first node to the last."""
        return float(self.nodes[-1] - self.nodes[0])


def gauss(alpha: ArrayLike, beta: ArrayLike) -> Quadrature:
    """The quadrature of a Lanczos run: Ritz values, weighted by the squared first entries of T's eigenvectors.

    ``alpha`` (m,) is T's diagonal and ``beta`` (m - 1,) or (m,) its off-diagonal; an m-th entry, which leads out of
    the basis, is not used. Exact for polynomials of degree <= 2m - 1 in the spectral measure of the start vector; for
    a random start, that measure is the density of eigenvalues up to sampling noise. Source: Golub and Welsch 1969.
    """
    diagonal, off = np.asarray(alpha, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    if diagonal.ndim != 1 or diagonal.size == 0 or off.size not in (diagonal.size - 1, diagonal.size):
        raise ValueError(
            f"alpha (m,) with m >= 1 and beta (m,) or (m - 1,) are wanted; got {diagonal.shape}, {off.shape}."
        )
    nodes, vectors = eigh_tridiagonal(diagonal, off[: diagonal.size - 1])
    return Quadrature(nodes, vectors[0] ** 2)


def mix(parts: Sequence[Quadrature], shares: Sequence[float] | None = None) -> Quadrature:
    """The average of several measures (of several start vectors), or their mixture by ``shares``."""
    if not parts:
        raise ValueError("mix wants at least one quadrature; got none.")
    shares = [1 / len(parts)] * len(parts) if shares is None else shares
    nodes = np.concatenate([part.nodes for part in parts])
    weights = np.concatenate([part.weights * share for part, share in zip(parts, shares, strict=True)])
    order = np.argsort(nodes, kind="stable")
    return Quadrature(nodes[order], weights[order])


def distance(first: Quadrature, second: Quadrature) -> float:
    """Wasserstein-1 distance, in the eigenvalues' units: the mean distance by which eigenvalues would have to move."""
    return float(wasserstein_distance(first.nodes, second.nodes, first.weights, second.weights))


Runs = Sequence[tuple[ArrayLike, ArrayLike]]
"""(alpha, beta) of the Lanczos runs of several start vectors."""


def depth_error(runs: Runs) -> float:
    """Distance between the quadratures at m and at m // 2 steps: the error of ending the runs early, at no product.

    nan for runs of one step. On the spectra it was tried on it bounded the true distance within a factor 1.1, where
    sampling intervals were several times too small.
    """
    pairs = [(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)) for a, b in runs]
    if any(alpha.size < 2 for alpha, _ in pairs):
        return math.nan
    halves = [gauss(a[: a.size // 2], b[: a.size // 2]) for a, b in pairs]
    return distance(mix([gauss(*pair) for pair in pairs]), mix(halves))


def split_error(runs: Runs) -> float:
    """Distance between the averages over the two halves of the start vectors, for sampling error; nan for one."""
    if len(runs) < 2:
        return math.nan
    parts, middle = [gauss(*run) for run in runs], len(runs) // 2
    return distance(mix(parts[:middle]), mix(parts[middle:]))


def density_error(runs: Runs) -> float:
    """One error bar of a density, as a Wasserstein-1 distance: depth and sampling errors, added in squares.

    With one start vector the sampling error is not known and the depth error stands alone.
    """
    depth, split = depth_error(runs), split_error(runs)
    return depth if math.isnan(split) else math.hypot(depth, split)


def with_atoms(
    quadrature: Quadrature, size: int, top: ArrayLike = (), bottom: ArrayLike = (), *, slack: float = 0.0
) -> Quadrature:
    """The measure with known extreme eigenvalues as atoms of weight exactly 1/size each, the rest rescaled to mass 1.

    ``top`` are all eigenvalues from the largest down to ``min(top)``, ``bottom`` all from the smallest up to
    ``max(bottom)``: nodes of the quadrature in those stretches (or within ``slack`` of them) are replaced. If no node
    would be left for the other eigenvalues, all stay. Makes outliers' heights right; the Lanczos weight of an
    isolated eigenvalue is random, with a relative standard deviation of about √2.
    """
    known = np.concatenate([np.atleast_1d(np.asarray(bottom, float)), np.atleast_1d(np.asarray(top, float))])
    if known.size > size:
        raise ValueError(f"An operator of size {size} has no {known.size} eigenvalues.")
    high = np.min(top, initial=math.inf) - slack
    low = np.max(bottom, initial=-math.inf) + slack
    left = (quadrature.nodes < high) & (quadrature.nodes > low)
    if not quadrature.weights[left].sum() > 0:
        left[:] = True
    rest = quadrature.weights[left] * ((1 - known.size / size) / quadrature.weights[left].sum())
    parts = [Quadrature(quadrature.nodes[left], rest), Quadrature(known, np.full(known.size, 1 / size))]
    merged = mix(parts, [1.0, 1.0])
    return Quadrature(merged.nodes[merged.weights > 0], merged.weights[merged.weights > 0])


def default_width(quadrature: Quadrature, steps: int) -> float:
    """Standard deviation to draw with: range over the number of Lanczos steps; for a single value 1e-3 of it."""
    if quadrature.range > 0:
        return quadrature.range / steps
    return 1e-3 * abs(float(quadrature.nodes[0])) or 1e-3


def padded_grid(quadrature: Quadrature, width: float, points: int = 512) -> Floats:
    """Equally spaced values (points,) that reach 5 widths (and 5 % of the range) beyond the outer nodes."""
    pad = max(5 * width, 0.05 * quadrature.range)
    return np.linspace(quadrature.nodes[0] - pad, quadrature.nodes[-1] + pad, points)


def smooth(quadrature: Quadrature, grid: ArrayLike, width: float) -> Floats:
    """The density Σ weight · N(grid; node, width²) for display, (len(grid),), per unit of eigenvalue.

    Not rescaled to the grid: mass outside the grid is missing from it. Say the width beside the picture.
    """
    if not width > 0:
        raise ValueError(
            f"width must be positive: the standard deviation of the smoothing, in eigenvalues; got {width}."
        )
    scaled = (np.asarray(grid, dtype=np.float64)[:, None] - quadrature.nodes) / width
    return np.exp(-0.5 * scaled**2) @ quadrature.weights / (width * math.sqrt(2 * math.pi))


def cumulative(quadrature: Quadrature, grid: ArrayLike) -> Floats:
    """Share of the eigenvalues at or below each value of the grid: no smoothing, nothing to choose."""
    sums = np.concatenate([[0.0], np.cumsum(quadrature.weights)])
    return sums[np.searchsorted(quadrature.nodes, np.asarray(grid, dtype=np.float64), side="right")]
