"""Where to look next on a surface, and how well it is known: two interpolations that disagree show the way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import LinearNDInterpolator, RBFInterpolator
from scipy.spatial import KDTree

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Scale = Literal["log", "linear"]
SAFETY = 2.5
"""Times the disagreement, calibrated on the newest samples, is stated as the error; benchmarks/adaptive.py counts how
often that covers the truth. Samples are taken where the disagreement is largest, and elsewhere it is more truthful, so
that the plain product would be too small."""
REMEMBERED = 16
"""Newest predictions that calibrate the disagreement; all older ones are about a surface that was known less well."""
LEAST = 8
"""Predictions before which no error is stated."""
SPREAD = 0.5
"""Power of the distance to the nearest sample in the score of a candidate: 0 lets clusters form at a kink."""

FLAT = 1e-9
"""Share of the largest value below which the standard deviation of a surface is taken for rounding."""


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Two interpolants through the same samples, and the samples that are not finite, in units of the square [-1, 1]².

    The surface is the polyharmonic spline with the kernel r³ and a linear part, which is exact on planes and in trials
    needs a tenth fewer samples than the thin plate r² log r. The second opinion is linear on Delaunay's triangles, and
    outside of them the value of the nearest sample. Both need three samples that are not on one line.
    """

    places: Array
    values: Array

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        """Which samples are finite."""
        return np.isfinite(self.values)

    @cached_property
    def possible(self) -> bool:
        """Whether at least three finite samples span the plane."""
        seen = self.places[self.finite]
        return len(seen) > 2 and np.linalg.matrix_rank(seen - seen[0], tol=1e-9) == 2

    @cached_property
    def _smooth(self) -> RBFInterpolator:
        return RBFInterpolator(self.places[self.finite], self.values[self.finite], kernel="cubic", degree=1)

    @cached_property
    def _linear(self) -> LinearNDInterpolator:
        return LinearNDInterpolator(self.places[self.finite], self.values[self.finite])

    @cached_property
    def _tree(self) -> KDTree:
        return KDTree(self.places)

    def at(self, where: Array) -> tuple[Array, Array]:
        """The spline and its distance from the linear interpolation at (n, 2) places; NaN where neither is possible."""
        if not self.possible:
            return np.full(len(where), np.nan), np.full(len(where), np.nan)
        smooth, linear = self._smooth(where), self._linear(where)
        outside = np.isnan(linear)
        if outside.any():
            seen = self.finite
            nearest = KDTree(self.places[seen]).query(where[outside])[1]
            linear[outside] = self.values[seen][nearest]
        return smooth, np.abs(smooth - linear)

    def unknown(self, where: Array) -> NDArray[np.bool_]:
        """Whether the nearest sample is not finite."""
        if self.finite.all():
            return np.zeros(len(where), dtype=bool)
        return ~self.finite[self._tree.query(where)[1]]

    def distance(self, where: Array) -> Array:
        """To the nearest sample."""
        return self._tree.query(where)[0]


class Sampler:
    """Chooses points on a rectangle one batch after another, and interpolates what was found there.

    The first points are a coarse × coarse grid, each the farthest from all before it, so that the centre, the corners
    and the middles of the sides come first and nine points already make a picture. Each later point is the one of a
    fine lattice with the largest ``disagreement · distance^½``: where a smooth and a piecewise linear interpolation
    part, and not right beside a sample. Nothing is random: the same answers lead to the same questions.

    Values are interpolated as logarithms as long as every finite value is positive (``scale="log"``), and as they are
    for good from the first that is not (``"linear"``). NaN and Inf are remembered and never interpolated from: where
    the nearest sample is one of them the surface is unknown (NaN), and no further point is asked for.

    ``error`` states the root mean square error of the surface over the lattice, over the standard deviation of the
    surface, both in that scale. Before a value is added it was predicted; the last such misses over the disagreement
    that was seen there calibrate the disagreement everywhere (``calibration``). It is an estimate, not a bound:
    benchmarks/adaptive.py counts how often it covers the truth, and a feature that falls between all samples is missed.

    Cost: O(n³ + n · lattice²) for each batch after n samples, about 10 ms for 100 samples on 65 × 65.
    Source: polyharmonic splines after Duchon (1977); the rule for the next point is this project's own, measured in
    benchmarks/adaptive.py.

    Args:
        u_range, v_range: the rectangle, low before high.
        coarse: points on each side of the first grid, at least 2.
        lattice: points on each side of the lattice that all points lie on.
        tolerance: stated error at which ``done`` becomes true once the coarse grid is known.
        limit: number of points at which ``done`` becomes true in any case.
    """

    def __init__(
        self,
        u_range: tuple[float, float] = (-1.0, 1.0),
        v_range: tuple[float, float] = (-1.0, 1.0),
        coarse: int = 7,
        lattice: int = 65,
        tolerance: float = 0.01,
        limit: int = 81,
    ) -> None:
        if not 2 <= coarse <= lattice:
            raise ValueError(
                f"Sampler needs 2 <= coarse <= lattice; got coarse={coarse}, lattice={lattice}: choose a finer lattice."
            )
        for name, (low, high) in (("u_range", u_range), ("v_range", v_range)):
            if not (low < high and math.isfinite(high - low)):
                raise ValueError(f"Sampler({name}=...) needs two finite numbers, low before high; got {(low, high)}.")
        self.lattice, self.tolerance, self.limit = lattice, tolerance, limit
        self._ticks = np.linspace(*u_range, lattice), np.linspace(*v_range, lattice)
        unit = np.linspace(-1.0, 1.0, lattice)
        self._places = np.stack(np.meshgrid(unit, unit, indexing="ij"), axis=-1).reshape(-1, 2)
        self._first = farthest_first(np.round(np.linspace(0, lattice - 1, coarse)).astype(np.int64), lattice)
        self._values: dict[int, float] = {}
        self._misses: list[tuple[float, float]] = []
        self.scale: Scale = "log"
        self._refit()

    def __len__(self) -> int:
        """Number of different points whose values are known, finite or not."""
        return len(self._values)

    @property
    def done(self) -> bool:
        """Whether the stated error is small enough, the points are used up, or none is left to ask for."""
        if len(self) >= self.limit:
            return True
        return self._coarse_known() and (self.error <= self.tolerance or not len(self.ask()))

    @property
    def calibration(self) -> float:
        """Stated error over disagreement: SAFETY times how far the newest values missed; nan while they are few."""
        if len(self._misses) < LEAST:
            return float("nan")
        miss, disagreement = np.square(self._misses[-REMEMBERED:]).mean(axis=0)
        return SAFETY * math.sqrt(miss / disagreement) if disagreement > 0 else SAFETY

    @property
    def error(self) -> float:
        """Stated root mean square error over the standard deviation of the surface; nan while it cannot be stated."""
        smooth, apart = (x[self._here] for x in self._seen)
        if not smooth.size or math.isnan(self.calibration):
            return float("nan")
        # Where the surface is flat, its deviation is rounding, and an error relative to that says nothing.
        spread = max(float(np.std(smooth)), FLAT * float(np.abs(smooth).max()))
        rms = self.calibration * math.sqrt(float(np.mean(apart**2)))
        return rms / spread if spread > 0 else 0.0 if rms == 0 else float("inf")

    def ask(self, count: int = 1) -> Array:
        """The next points, (at most ``count``, 2); the same until something new is told, fewer when none is left."""
        wanted = [i for i in self._first if i not in self._values][:count]
        if len(wanted) < count:
            wanted += self._refining(count - len(wanted), wanted)
        return self._points(wanted)

    def tell(self, points: ArrayLike, values: ArrayLike) -> None:
        """Take in ``values`` (n,) at ``points`` (n, 2) of the lattice; a point told again gets the newer value."""
        indices, found = self._indices(np.asarray(points, float)), np.asarray(values, float).reshape(-1)
        if len(indices) != len(found):
            raise ValueError(f"tell needs one value for each point; got {len(indices)} points, {len(found)} values.")
        if self.scale == "log" and (found[np.isfinite(found)] <= 0).any():
            self.scale, self._misses = "linear", []
            self._refit()
        self._compare(indices, found)
        self._values.update(zip(indices.tolist(), found.tolist(), strict=True))
        self._refit()

    def surface(self, u: ArrayLike, v: ArrayLike) -> tuple[Array, Array]:
        """The interpolated values and the disagreement on the grid of ``u`` (n,) and ``v`` (m,), both (n, m).

        Values are in the units told, the disagreement is in those of ``scale``: times ``calibration`` it is the stated
        local error, for ``"log"`` relative to the value. NaN where the surface is unknown.
        """
        ticks = (self._unit(np.asarray(x, float), t) for x, t in zip((u, v), self._ticks, strict=True))
        grid = np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1)
        smooth, apart = self._masked(grid.reshape(-1, 2))
        values = np.exp(smooth) if self.scale == "log" else smooth
        return values.reshape(grid.shape[:2]), apart.reshape(grid.shape[:2])

    def _coarse_known(self) -> bool:
        return all(i in self._values for i in self._first)

    def _points(self, indices: Iterable[int]) -> Array:
        rows, columns = np.divmod(np.array(list(indices), dtype=np.int64), self.lattice)
        return np.stack([self._ticks[0][rows], self._ticks[1][columns]], axis=-1)

    def _indices(self, points: Array) -> Indices:
        """Of (n, 2) points of the lattice."""
        if points.size == 0:
            return np.zeros(0, np.int64)
        unit = np.stack([self._unit(points[:, k], self._ticks[k]) for k in (0, 1)], axis=-1)
        exact = (unit + 1) / 2 * (self.lattice - 1)
        at = np.round(exact)
        if not (np.abs(exact - at) < 1e-6).all() or (at < 0).any() or (at >= self.lattice).any():
            raise ValueError(
                f"tell takes points of the {self.lattice} × {self.lattice} lattice; got {points.tolist()[:4]}: tell "
                "the points that ask returned, or choose a lattice that holds yours."
            )
        return at[:, 0].astype(np.int64) * self.lattice + at[:, 1].astype(np.int64)

    def _unit(self, x: Array, ticks: Array) -> Array:
        return 2 * (x - ticks[0]) / (ticks[-1] - ticks[0]) - 1

    def _scaled(self, values: Array) -> Array:
        """In the scale of interpolation, NaN where not finite."""
        finite = np.where(np.isfinite(values), values, np.nan)
        return np.log(finite) if self.scale == "log" else finite

    def _refit(self) -> None:
        """Interpolate on the whole lattice from all that is known."""
        known = np.array(list(self._values), dtype=np.int64)
        self._fit = Interpolation(self._places[known], self._scaled(np.array(list(self._values.values()))))
        self._seen = self._masked(self._places)
        self._here = np.isfinite(self._seen[1])

    def _masked(self, where: Array) -> tuple[Array, Array]:
        if not self._fit.possible:
            return self._fit.at(where)
        unknown = self._fit.unknown(where)
        smooth, apart = (np.where(unknown, np.nan, x) for x in self._fit.at(where))
        return smooth, apart

    def _compare(self, indices: Indices, found: Array) -> None:
        """Remember how far new values lie from the surface so far, and the disagreement there."""
        new = np.array([int(i) not in self._values for i in indices], dtype=bool)
        miss = np.abs(self._scaled(found) - self._seen[0][indices])
        usable = new & np.isfinite(miss)
        self._misses += zip(miss[usable].tolist(), self._seen[1][indices][usable].tolist(), strict=True)
        del self._misses[:-REMEMBERED]

    def _refining(self, count: int, pending: list[int]) -> list[int]:
        """Points of the lattice with the best scores, each lowering the score of its own neighbourhood."""
        if not self._here.any():
            return []
        distance = self._fit.distance(self._places)
        score = np.where(self._here, self._seen[1] * distance**SPREAD, 0.0)
        # A surface that fits to the last digit still has places that nobody looked at.
        score = score + np.where(self._here, 1e-12 * float(np.ptp(self._seen[0][self._here])) * distance, 0.0)
        for i in pending:
            score *= self._apart_from(i, distance)
        chosen: list[int] = []
        while len(chosen) < count and (best := int(np.argmax(score))) not in self._values and score[best] > 0:
            chosen.append(best)
            score *= self._apart_from(best, distance)
        return chosen

    def _apart_from(self, index: int, distance: Array) -> Array:
        """1 far from a point that was just chosen, 0 at it; the reach is the point's own distance from the samples."""
        square = ((self._places - self._places[index]) ** 2).sum(axis=1)
        return -np.expm1(-square / max(distance[index] ** 2, 1e-12))


def farthest_first(ticks: Indices, lattice: int) -> list[int]:
    """The grid of ``ticks`` × ``ticks`` as flat indices of a lattice: the most central, then always the farthest."""
    grid = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)
    order = [int(np.argmin(np.abs(grid - (lattice - 1) / 2).max(axis=1)))]
    distance = np.square(grid - grid[order[0]]).sum(axis=1)
    while len(order) < len(grid):
        order.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.square(grid - grid[order[-1]]).sum(axis=1))
    return [int(i * lattice + j) for i, j in grid[order]]
