"""Minima of a sampled function and how deep they are: sublevel-set persistence, merge tree, roughness."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Persistence:
    """Every minimum of a sampled function, deepest first, with the level at which it stops being a basin of its own.

    ``birth`` (k,) are the minima's values, ``death`` (k,) the saddle at which each one's basin runs into a deeper one:
    the largest finite value for the deepest of a connected domain, which never dies. ``place`` (k, dims) are the
    minima's indices. ``saddle`` (k,) is the first level at which a minimum's basin meets any other (nan where there is
    none): the merge tree's edge from that minimum. ``holes`` counts samples that were not finite and are no part of
    the domain.
    """

    birth: Floats
    death: Floats
    place: NDArray[np.int64]
    saddle: Floats
    holes: int

    @property
    def lifetime(self) -> Floats:
        """Depth of each basin, death - birth, (k,)."""
        return self.death - self.birth

    def count(self, threshold: float) -> int:
        """How many basins are at least ``threshold`` deep; the deepest of each connected domain always counts."""
        return int((self.lifetime >= threshold).sum() if self.birth.size else 0)

    @property
    def saddle_minimum_distance(self) -> float:
        """Mean of |saddle - minimum| over the merge tree's edges from its minima; nan for a single basin."""
        edges = (self.saddle - self.birth)[np.isfinite(self.saddle)]
        return float(edges.mean()) if edges.size else math.nan


class _Basins:
    """A union-find forest over samples that are added by increasing value."""

    def __init__(self, values: Floats) -> None:
        self.values = values
        self.parent = np.full(values.size, -1, dtype=np.int64)
        self.death: dict[int, float] = {}
        self.saddle: dict[int, float] = {}

    def find(self, i: int) -> int:
        """The minimum of the basin that sample i lies in."""
        root = i
        while self.parent[root] != root:
            root = int(self.parent[root])
        while self.parent[i] != root:
            self.parent[i], i = root, int(self.parent[i])
        return root

    def add(self, i: int, near: list[int], rank: NDArray[np.int64]) -> None:
        """Add the next sample: a new minimum, or a part of one basin, or the saddle between several."""
        roots = sorted({self.find(j) for j in near if self.parent[j] >= 0}, key=lambda r: rank[r])
        if not roots:
            self.parent[i], self.death[i], self.saddle[i] = i, math.inf, math.nan
            return
        level = float(self.values[i])
        self.parent[i] = roots[0]
        for root in roots[1:]:  # the elder stays: the basin whose minimum is lower
            self.parent[root], self.death[root] = roots[0], level
        for root in roots if len(roots) > 1 else ():
            if math.isnan(self.saddle[root]):
                self.saddle[root] = level


def persistence(values: ArrayLike, *, diagonal: bool = True) -> Persistence:
    """Zero-dimensional persistence of the sublevel sets of a function sampled on a line or a grid.

    Samples join by increasing value, equal ones in index order; neighbours are next to one another on an axis, and
    with ``diagonal`` also corner to corner (on a grid 8 instead of 4). NaN and Inf are left out of the domain. Cost:
    n log n for n samples.

    Args:
        values: (n,) or (n, m) samples.
        diagonal: whether cells that touch at a corner are neighbours.

    Raises:
        ValueError: more than two axes, or no sample.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim not in (1, 2) or found.size == 0:
        raise ValueError(f"persistence wants samples of shape (n,) or (n, m); got {found.shape}.")
    flat, steps = found.ravel(), _steps(found.ndim, diagonal)
    order = np.argsort(flat, kind="stable")
    order = order[np.isfinite(flat[order])]
    rank = np.full(flat.size, flat.size, dtype=np.int64)
    rank[order] = np.arange(order.size)
    basins = _Basins(flat)
    for i in order.tolist():
        basins.add(i, _neighbours(i, found.shape, steps), rank)
    return _collected(basins, found.shape, order)


def _steps(dims: int, diagonal: bool) -> list[tuple[int, ...]]:
    around = itertools.product((-1, 0, 1), repeat=dims)
    return [s for s in around if any(s) and (diagonal or sum(map(abs, s)) == 1)]


def _neighbours(i: int, shape: tuple[int, ...], steps: list[tuple[int, ...]]) -> list[int]:
    place = np.unravel_index(i, shape)
    near = (tuple(int(p) + s for p, s in zip(place, step, strict=True)) for step in steps)
    return [
        int(np.ravel_multi_index(at, shape)) for at in near if all(0 <= p < n for p, n in zip(at, shape, strict=True))
    ]


def _collected(basins: _Basins, shape: tuple[int, ...], order: NDArray[np.int64]) -> Persistence:
    minima = sorted(basins.death, key=lambda i: (basins.values[i], i))
    top = float(basins.values[order[-1]]) if order.size else math.nan
    death = np.array([basins.death[i] for i in minima])
    place = np.stack(np.unravel_index(np.array(minima, dtype=np.int64), shape), axis=1)
    return Persistence(
        birth=basins.values[minima],
        death=np.where(np.isinf(death), top, death),
        place=place.astype(np.int64),
        saddle=np.array([basins.saddle[i] for i in minima]),
        holes=basins.values.size - order.size,
    )


def excess_variation(values: ArrayLike) -> float:
    """Roughness of a curve: (Σ|Δf| - (f_first + f_last - 2 min f)) / (max f - min f), (n,) to a number.

    0 exactly for a curve that falls to one minimum and rises again; nan where a sample is not finite, or the curve is
    constant. Depends on how finely the curve is sampled.
    """
    f = np.asarray(values, dtype=np.float64)
    span = f.max() - f.min() if f.size else 0.0
    if not np.isfinite(f).all() or span == 0:
        return math.nan
    valley = f[0] + f[-1] - 2 * f.min()
    return float((np.abs(np.diff(f)).sum() - valley) / span)


def second_difference_spread(values: ArrayLike) -> float:
    """Roughness of a curve sampled at even steps: the standard deviation of its second differences over its range.

    0 for a parabola; nan where a sample is not finite, the curve is constant, or there are fewer than four samples.
    For a smooth curve it falls with the square of the step.
    """
    f = np.asarray(values, dtype=np.float64)
    span = f.max() - f.min() if f.size > 3 else 0.0
    if not np.isfinite(f).all() or span == 0:
        return math.nan
    return float(np.diff(f, 2).std(ddof=1) / span)
