"""A plane whose points are chosen one after another, and the surface interpolated from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Points
from workbench.landscape.filling import Filling, half_widths
from workbench.landscape.quadratic import agreement_radius, inner_difference
from workbench.numerics.adaptive import Interpolation, Sampler
from workbench.probe import Variable

Array = NDArray[np.float64]
COARSE = 7
"""Points on each side of the grid that adaptive sampling begins with."""
ROUGH = 9
"""Points of its first batch: corners, middles of the sides and the centre."""
BATCH = 4
"""Points of each later batch: the surface is interpolated anew after it."""
SURFACE: tuple[Variable, ...] = (
    Variable("surface", ("u", "v"), "loss interpolated from all samples", "loss per example", "surface_error"),
    Variable("surface_error", ("u", "v"), "disagreement of two interpolations, calibrated", "loss per example"),
    Variable("relative_error", (), "stated RMS error of the surface over its standard deviation, in its scale"),
    Variable("surface_log", (), "whether the surface is interpolated in logarithms of the loss", kind="bool"),
)
"""What is known of a plane that was sampled adaptively, and unknown of a grid."""


@dataclass(eq=False)
class Refining(Filling):
    """A plane of which at most ``most`` points are evaluated, until the stated error is at most ``tolerance``."""

    tolerance: float = 0.01
    most: int = 81

    def __post_init__(self) -> None:
        side = len(self.axes.u)
        self.sampler = Sampler(
            coarse=min(COARSE, side), lattice=side, tolerance=self.tolerance, limit=min(self.most, side**2)
        )
        super().__post_init__()
        self.finished = False
        self._interpolated: dict[str, Any] = {}
        self._compared_surface: dict[str, Any] = {}

    @property
    def total(self) -> int:
        """Points that are evaluated at most."""
        return self.sampler.limit

    @property
    def share(self) -> float:
        """Share of the work that is done."""
        return 1.0 if self.finished else super().share

    @property
    def settled(self) -> bool:
        """Whether the stated error is small enough, or every point of the grid is known."""
        return self.seen == self.evaluated.size or (self.finished and self.sampler.error <= self.tolerance)

    def explore(self) -> Iterator[None]:
        """Evaluate batch after batch; pauses after as many points as go together."""
        while not self.finished:
            points = self._asked()
            left = [at for at in self._indices(points) if not self.evaluated[at]]
            for _ in self.visit(left):
                if self.evaluated[left[-1]]:
                    self._tell(points)
                yield

    def _asked(self) -> Array:
        known = len(self.sampler)
        return self.sampler.ask(min(BATCH if known else ROUGH, self.total - known))

    def _tell(self, points: Array) -> None:
        self.sampler.tell(points, [self.arrays["loss"][at] for at in self._indices(points)])
        self.finished = self.sampler.done
        self._interpolate()

    def restore(self, data: xr.Dataset) -> None:
        """As for a grid; the questions that are answered already are asked again, so that the next one is the same."""
        super().restore(data)
        points = self._asked()
        while not self.finished and all(self.evaluated[at] for at in self._indices(points)):
            self._tell(points)
            points = self._asked()

    def _indices(self, points: Array) -> list[tuple[int, int]]:
        found = np.round((points + 1) / 2 * (self.sampler.lattice - 1)).astype(int)
        return [(int(i), int(j)) for i, j in found]

    def _interpolate(self) -> None:
        """The surface and its stated error; exact where the loss was evaluated."""
        ticks = np.linspace(-1, 1, self.sampler.lattice)
        surface, apart = self.sampler.surface(ticks, ticks)
        error = self.sampler.calibration * apart * (np.abs(surface) if self.sampler.scale == "log" else 1.0)
        exact = self.evaluated & np.isfinite(self.arrays["loss"])
        surface[exact], error[exact] = self.arrays["loss"][exact], 0.0
        self._interpolated = {
            "surface": surface,
            "surface_error": error,
            "relative_error": self.sampler.error,
            "surface_log": self.sampler.scale == "log",
        }
        self._compared_surface = {}

    def values(self) -> dict[str, Any]:
        """Everything that is known now, by name."""
        return dict(super().values()) | self._interpolated

    def _quadratic(self) -> dict[str, Any]:
        """The quadratic, and how well it agrees with the interpolated surface (compared once for each)."""
        q = self.predicted
        assert q is not None
        if not self.preview and not self._compared_surface and self._interpolated:
            u, v = np.meshgrid(self.axes.u, self.axes.v, indexing="ij")
            points = (u.ravel(), v.ravel(), self._interpolated["surface"].ravel(), self.here["loss"], q)
            self._compared_surface = {
                "inner_difference": inner_difference(*points, half_widths(self.axes.u, self.axes.v)),
                "agreement_radius": agreement_radius(*points),
            }
        fixed = {"slope": q.slope, "curvature": q.curvature, "curvature_error": q.asymmetry}
        return fixed | self._compared_surface


def refined(data: xr.Dataset) -> bool:
    """Whether the data of a plane have an interpolated surface; readings stored before there was one have none."""
    return "surface" in data and bool(np.isfinite(data.surface.values).any())


def filled(data: xr.Dataset) -> xr.Dataset:
    """The plane to draw: with interpolated losses and other values in place of those not evaluated; grids as they are.

    Shares of wrong decisions and the subject's own metrics are interpolated as they are, without a stated error.
    """
    if not refined(data):
        return data
    changed: dict[str, Any] = {"loss": data.surface, "evaluated": xr.ones_like(data.evaluated)}
    changed["error_rate"] = (("u", "v"), _spread(data, data.error_rate.values))
    own = [_spread(data, values) for values in data.own_metric.values]
    changed["own_metric"] = (("own", "u", "v"), np.reshape(own, data.own_metric.shape))
    return data.assign(changed)


def _spread(data: xr.Dataset, values: Array) -> Array:
    """Values (u, v) of the evaluated points, interpolated; within what was seen, and unknown where the surface is."""
    axes = (np.linspace(-1, 1, n) for n in values.shape)
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    seen = data.evaluated.values & np.isfinite(values)
    through = Interpolation(places[seen], values[seen])
    if not through.possible:
        return values
    smooth = through.at(places.reshape(-1, 2))[0].reshape(values.shape)
    held = np.clip(smooth, values[seen].min(), values[seen].max())
    return cast("Array", np.where(np.isfinite(data.surface.values), held, np.nan))


def sample_marks(data: xr.Dataset) -> tuple[AnyMark, ...]:
    """The points that were evaluated, where they were chosen adaptively."""
    if not refined(data):
        return ()
    seen = np.isfinite(data.sample_u.values)
    # Hollow and grey: many of them must not hide the colours beneath.
    return (Points(data.sample_u.values[seen], data.sample_v.values[seen], label="samples", role="unconverged"),)


def refined_note(data: xr.Dataset, *said: str) -> str:
    """How many points were evaluated, how well that makes the surface known, and what is unknown."""
    seen, error = int(data.evaluated.sum()), float(data.relative_error)
    scale = "log of the loss" if bool(data.surface_log) else "loss"
    known = f"{scale} to {error:.1%} of its spread" if math.isfinite(error) else ""
    lost = int((data.evaluated & ~np.isfinite(data.loss)).sum())
    hatched = f"{lost} samples are not finite (their surroundings hatched)" if lost else ""
    return " · ".join(part for part in (f"interpolated from {seen} samples", known, hatched, *said) if part)
