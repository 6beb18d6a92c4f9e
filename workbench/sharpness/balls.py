"""The sets that worst cases are searched in: ball, box and ellipsoid, with their projections and steepest points."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-12
"""Added to lengths in denominators, so that a gradient of zero gives a step of zero."""
ROUNDS = 60
"""Newton steps of the projection on an ellipsoid: they rise monotonically, some five for each scale that matters."""


DEAD = 1e-12
"""Share of the largest scale below which a coordinate of an ellipsoid does not move."""


class Ball(ABC):
    """A convex set around zero that steps δ (size,) must stay in. ``words`` describes it, radius and norm included."""

    words: str
    radius: float

    @abstractmethod
    def project(self, step: Tensor) -> Tensor:
        """The nearest point of the set, in the Euclidean sense."""

    @abstractmethod
    def steepest(self, slope: Tensor) -> Tensor:
        """The point of the set with the largest inner product with ``slope``: the first-order maximiser."""

    def uphill(self, slope: Tensor) -> Tensor:
        """A step along which :meth:`project` does no harm, as long as :meth:`steepest` is."""
        return self.steepest(slope)

    @abstractmethod
    def random(self, noise: Tensor) -> Tensor:
        """A point of the set from N(0, 1) entries: on its boundary for balls, uniform in it for boxes."""


def _unit(vector: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return vector / (length + TINY).to(vector.dtype)


@dataclass(frozen=True, eq=False)
class Euclidean(Ball):
    """‖δ‖₂ <= radius, over all parameters jointly."""

    radius: float

    @property
    def words(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Radius and norm."""
        return f"‖δ‖₂ <= {self.radius:g} over all chosen parameters"

    def project(self, step: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(step, dtype=torch.float64)
        return step * (self.radius / length.clamp_min(self.radius)).to(step.dtype)

    def steepest(self, slope: Tensor) -> Tensor:
        return self.radius * _unit(slope)

    def random(self, noise: Tensor) -> Tensor:
        return self.radius * _unit(noise)


@dataclass(frozen=True, eq=False)
class Box(Ball):
    """|δ_i| <= reach_i, with ``reach`` (size,) or one number; ``radius`` is what the box is named by."""

    radius: float
    reach: Tensor
    words: str = ""

    def project(self, step: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(step, -self.reach), self.reach)

    def steepest(self, slope: Tensor) -> Tensor:
        return self.reach * slope.sign()

    def random(self, noise: Tensor) -> Tensor:
        return self.reach * torch.erf(noise / math.sqrt(2))


@dataclass(frozen=True, eq=False)
class Ellipsoid(Ball):
    """‖δ ⊘ scale‖₂ <= radius, with ``scale`` (size,) >= 0; where it is 0 nothing moves."""

    radius: float
    scale: Tensor
    words: str = ""

    def project(self, step: Tensor) -> Tensor:
        """δ_i = z_i T_i² / (T_i² + μ), with the one μ >= 0 that puts it on the boundary; inside points stay.

        1/‖δ ⊘ T‖ is concave in μ, so Newton's method from μ = 0 rises to the root without overshooting. The last
        rescaling only removes what rounding left outside.
        """
        square, inside = self.scale.double() ** 2, self.scale > DEAD * self.scale.max()
        relative = torch.where(inside, step.double() * self.scale, 0.0)
        shift = torch.zeros((), dtype=torch.float64, device=step.device)
        for _ in range(ROUNDS):
            below = torch.where(inside, square + shift, 1.0)
            found = relative / below
            length = torch.linalg.vector_norm(found)
            bend = (found**2 / below).sum()
            grow = length**2 / bend.clamp_min(torch.finfo(torch.float64).tiny) * (length - self.radius) / self.radius
            shift = shift + grow.clamp_min(0.0)
        below = torch.where(inside, square + shift, 1.0)
        length = torch.linalg.vector_norm(relative / below)
        return (relative * self.scale / below * (self.radius / length.clamp_min(self.radius))).to(step.dtype)

    def steepest(self, slope: Tensor) -> Tensor:
        return self.radius * self.scale * _unit(self.scale * slope)

    def uphill(self, slope: Tensor) -> Tensor:
        # A Euclidean projection wants steps along the gradient itself: steps towards the steepest point would come to
        # rest elsewhere than at a maximum.
        steepest = self.steepest(slope)
        return _unit(slope) * torch.linalg.vector_norm(steepest, dtype=torch.float64).to(slope.dtype)

    def random(self, noise: Tensor) -> Tensor:
        return self.radius * self.scale * _unit(torch.where(self.scale > 0, noise, 0.0))
