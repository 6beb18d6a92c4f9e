"""The loss on a plane as gradient and Hessian at the model predict it: its level lines, and how far it holds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from workbench.landscape.directions import Direction
from workbench.operators.hessian import Hessian
from workbench.subject import Subject

Array = NDArray[np.float64]
AGREES = 0.1
"""The quadratic holds as far as its RMS difference from the losses is at most this share of their RMS change."""
INNER = 0.5
"""The inner part of a picture: this share of its half-width in every direction."""
ANGLES = 181
"""Points of a level line."""
FAR = 100.0
"""Level lines end so many half-widths from the model."""
_NOT_TWICE = ("differentiate twice", "is not implemented", "does not require grad")


@dataclass(frozen=True, eq=False)
class Quadratic:
    """q(x) = sᵀx + ½ xᵀC x, the predicted change of the loss at x = (u, v).

    ``slope`` s (2,) = gᵀd_k; ``curvature`` C (2, 2) = d_jᵀ H d_k, symmetric; ``asymmetry`` = |d_1ᵀHd_2 - d_2ᵀHd_1|,
    which is zero but for rounding.
    """

    slope: Array
    curvature: Array
    asymmetry: float = 0.0

    def rise(self, u: ArrayLike, v: ArrayLike) -> Array:
        """q at arrays of coordinates, which are broadcast."""
        x, y = np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64)
        (a, b), (_, c) = self.curvature
        return self.slope[0] * x + self.slope[1] * y + (a * x * x + 2 * b * x * y + c * y * y) / 2

    def half_width(self, axis: int, rise: float, most: float) -> float:
        """How far along an axis q reaches ``rise`` on the steeper side: |s| a + ½ C a² = rise; at most ``most``.

        Negative curvature counts as none; where there is no slope either, ``most``. ``rise`` must be positive.
        """
        slope, bend = abs(float(self.slope[axis])), max(float(self.curvature[axis, axis]), 0.0)
        below = slope + math.sqrt(slope * slope + 2 * bend * rise)  # the root of a quadratic without cancellation
        found = 2 * rise / below if below > 0 else math.inf
        return min(found, most) if math.isfinite(found) else most

    def level_line(self, level: float, widths: tuple[float, float]) -> tuple[Array, Array]:
        """Where q = ``level`` > 0 first, seen from the model: an ellipse where C is positive definite, (n,) each.

        Angles are even in a picture of these half-widths; nan where q does not reach the level, or only far outside.
        """
        angle = np.linspace(0, 2 * np.pi, ANGLES)
        x, y = widths[0] * np.cos(angle), widths[1] * np.sin(angle)
        (a, b), (_, c) = self.curvature
        slope, bend = self.slope[0] * x + self.slope[1] * y, a * x * x + 2 * b * x * y + c * y * y
        root = slope**2 + 2 * bend * level
        below = slope + np.sqrt(np.where(root >= 0, root, np.nan))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(below > 0, 2 * level / below, np.nan)
        t[~(t <= FAR)] = np.nan
        return t * x, t * y

    def inner_level(self, widths: tuple[float, float]) -> float:
        """The level whose line just stays within the inner part of a picture; nan where q rises nowhere there.

        Where q does not rise everywhere around it, a middling rise, so that the level line is still seen.
        """
        angle = np.linspace(0, 2 * np.pi, ANGLES)
        rises = self.rise(INNER * widths[0] * np.cos(angle), INNER * widths[1] * np.sin(angle))
        up = rises[rises > 0]
        if not up.size:
            return math.nan
        return float(rises.min() if up.size == rises.size else np.median(up))


def quadratic(subject: Subject, first: Direction, second: Direction) -> Quadratic:
    """Two products with the Hessian and the gradient, on one graph of each chunk: no graph is kept.

    Under ``norm="recompute"`` the running statistics are held at those of the model.

    Raises:
        RuntimeError: a loss that cannot be differentiated twice.
    """
    block = torch.stack([subject.flatten(d) for d in (first, second)], dim=1)
    once = subject.with_plan(dataclasses.replace(subject.plan, retained=False))
    with Hessian(once) as hessian:
        products, gradient = hessian.matmat(block), hessian.gradient
    wide = block.double()
    found = (wide.T @ products.double()).cpu().numpy()
    slope = (wide.T @ gradient).cpu().numpy()
    return Quadratic(slope, (found + found.T) / 2, float(abs(found[0, 1] - found[1, 0])))


def differentiable_twice(problem: RuntimeError) -> bool:
    """False where an error says that the loss cannot be differentiated twice, and is of no other kind."""
    return not any(words in str(problem) for words in _NOT_TWICE)


def inner_difference(u: Array, v: Array, loss: Array, here: float, q: Quadratic, widths: tuple[float, float]) -> float:
    """RMS(loss - predicted) / RMS(loss - here) over the points of the inner part, all (n,).

    nan where fewer than three of the points lie there, or a loss there is not finite.
    """
    inside = np.hypot(u / widths[0], v / widths[1]) <= INNER * (1 + 1e-9)
    if inside.sum() < 3:
        return math.nan
    return float(_ratio(u[inside], v[inside], loss[inside], here, q)[-1])


def agreement_radius(u: Array, v: Array, loss: Array, here: float, q: Quadratic) -> float:
    """The largest hypot(u, v) of a point within which, the nearer ones too, that ratio is at most a tenth.

    All (n,). 0 where it is more at the nearest point already. A loss that is not finite counts as a miss.
    """
    reach = np.hypot(u, v)
    order = np.argsort(reach, kind="stable")
    order = order[reach[order] > 0]
    if not order.size:
        return math.nan
    rings = reach[order]
    last = np.append(rings[1:] > rings[:-1] * (1 + 1e-9), True)  # a ring counts when all of its points are in
    held = (_ratio(u[order], v[order], loss[order], here, q) <= AGREES)[last]
    good = rings[last][np.cumprod(held).astype(bool)]
    return float(good.max(initial=0.0))


def _ratio(u: Array, v: Array, loss: Array, here: float, q: Quadratic) -> Array:
    """Running RMS of the difference over running RMS of the change; rounding of the loss itself does not count."""
    with np.errstate(invalid="ignore", over="ignore"):
        change = loss - here
        missed = np.maximum(np.abs(change - q.rise(u, v)) - 1e-7 * abs(here), 0.0)
        top, bottom = np.sqrt(np.cumsum(missed**2)), np.sqrt(np.cumsum(change**2))
    return np.divide(top, bottom, out=np.where(top == 0, 0.0, np.nan), where=bottom > 0)


def measured_line(u: Array, v: Array, rise: Array, level: float) -> tuple[Array, Array]:
    """Where a measured ``rise`` (u, v) reaches ``level`` first, seen from the model, as :meth:`Quadratic.level_line`.

    Linear between the points of the grid; nan on rays that do not reach the level within it, or pass an unknown point,
    and all of them where the model lies outside the grid.
    """
    from scipy.interpolate import RegularGridInterpolator

    angle, steps = np.linspace(0, 2 * np.pi, ANGLES), np.linspace(0, 1, 4 * max(len(u), len(v)) + 1)
    if not (u[0] <= 0 <= u[-1] and v[0] <= 0 <= v[-1]):
        return np.full(ANGLES, np.nan), np.full(ANGLES, np.nan)
    x, y = np.cos(angle)[:, None] * np.abs(u).max() * 1.5, np.sin(angle)[:, None] * np.abs(v).max() * 1.5
    seen = RegularGridInterpolator((u, v), rise, bounds_error=False)((x * steps, y * steps))
    reached = ~(seen < level)  # an unknown value ends the ray
    k = np.maximum(reached.argmax(axis=1), 1)
    rays = np.arange(ANGLES)
    low, high = seen[rays, k - 1], seen[rays, k]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (level - low) / (high - low)
        t = np.where(np.isfinite(high) & (high > low), steps[k - 1] + part * (steps[1] - steps[0]), np.nan)
    return x[:, 0] * t, y[:, 0] * t
