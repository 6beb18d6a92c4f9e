"""Ridge regression of many targets at many strengths from streamed sums, with exact leave-one-out residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EMPTY = 1e-12
"""Directions whose share of the largest variance is no more than this carry nothing."""


@dataclass(eq=False)
class RidgeSums:
    """What ridge regression needs of features (n, ``width``) and targets (n, q): centred sums of products, in float64.

    For width <= ``examples`` the covariance is streamed; else the rows are kept, which are fewer numbers.
    Memory: width · (min(width, examples) + q).
    """

    width: int
    examples: int
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    products: Tensor = field(default_factory=lambda: torch.zeros(0))
    kept: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in rows, merged by the rule of Chan, Golub and LeVeque, so that a large mean cancels nothing."""
        joint = torch.cat([features.double(), targets.double()], 1)
        if self.width > self.examples:
            self.kept.append(joint)
        elif len(joint):
            self._merge(joint)

    def _merge(self, joint: Tensor) -> None:
        mean = joint.mean(0)
        centred = joint - mean
        products = centred[:, : self.width].T @ centred
        if not self.count:
            self.mean, self.products, self.count = mean, products, len(joint)
            return
        off, total = mean - self.mean, self.count + len(joint)
        self.products += products + torch.outer(off[: self.width], off) * (self.count * len(joint) / total)
        self.mean += off * (len(joint) / total)
        self.count = total

    def solve(self, ratios: Tensor) -> Ridge | None:
        """The regressions at strengths λ = ratio · mean positive eigenvalue; None where a value is not finite.

        Cost: one decomposition, min(width, n)³. What was kept is let go.
        """
        found = self._dual() if self.width > self.examples else self._primal()
        if found is None:
            return None
        values, basis, crossed = found
        scale = values.mean() if len(values) else values.new_ones(())
        means = self.mean[: self.width], self.mean[self.width :]
        return Ridge(*means, basis, values, crossed, ratios.to(values) * scale, self.count)

    def _primal(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if not bool(torch.isfinite(self.products).all()):
            return None
        values, basis = torch.linalg.eigh(self.products[:, : self.width])
        some = values > EMPTY * values[-1]
        return values[some], basis[:, some], basis[:, some].T @ self.products[:, self.width :]

    def _dual(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same directions and variances out of the n x n Gram matrix."""
        joint = torch.cat(self.kept)
        self.kept, self.count, self.mean = [], len(joint), joint.mean(0)
        if not bool(torch.isfinite(joint).all()):
            return None
        features, targets = (joint - self.mean).split([self.width, joint.shape[1] - self.width], 1)
        values, left = torch.linalg.eigh(features @ features.T)
        some = values > EMPTY * values[-1]
        values, left = values[some], left[:, some]
        return values, features.T @ (left / values.sqrt()), values.sqrt()[:, None] * (left.T @ targets)


@dataclass(frozen=True, eq=False)
class Ridge:
    """argmin_{w, b} Σ_i (y_i - w·x_i - b)² + λ‖w‖² for each of q targets and each of ``strengths`` λ (b unpenalised).

    In the eigenvectors ``basis`` (d, r) of the features' centred products, of ``values``: w = B (values + λ)⁻¹ crossed.
    """

    mean: Tensor
    target_mean: Tensor
    basis: Tensor
    values: Tensor
    crossed: Tensor
    strengths: Tensor
    count: int

    def coordinates(self, features: Tensor) -> Tensor:
        """Features (b, d) in the eigenvectors, (b, r)."""
        return (features.double() - self.mean) @ self.basis

    def predicted(self, coordinates: Tensor, strength: int) -> Tensor:
        """The predictions (b, q) at the strength of this number."""
        return coordinates @ (self.crossed / (self.values + self.strengths[strength])[:, None]) + self.target_mean

    def left_out(self, coordinates: Tensor, targets: Tensor, strength: int) -> Tensor:
        """The predictions (b, q) for rows that were fitted, each by the regression on all the others, exactly.

        y - (y - ŷ)/(1 - h) with the leverage h = 1/n + Σ_r z_r²/(values_r + λ). Source: Cook 1977.
        """
        leverage = 1 / self.count + (coordinates**2) @ (1 / (self.values + self.strengths[strength]))
        return targets - (targets - self.predicted(coordinates, strength)) / (1 - leverage)[:, None]


@dataclass(eq=False)
class Scores:
    """Sums over rows that say how good the predictions at each of some strengths are: of classes, or of values.

    ``right`` counts rows whose largest prediction is at the largest target; ``sums`` holds, for e = ‖ŷ - y‖² and
    t = ‖y - ȳ‖², Σe, Σt, Σe², Σet, Σt².
    """

    right: Tensor
    sums: Tensor
    count: int = 0

    @classmethod
    def empty(cls, strengths: int, device: torch.device) -> Scores:
        """No rows yet."""
        zeros = torch.zeros(strengths, 6, dtype=torch.float64, device=device)
        return cls(zeros[:, 0], zeros[:, 1:])

    def add(self, strength: int, predictions: Tensor, targets: Tensor, mean: Tensor) -> None:
        """Take in predictions and targets (b, q) at one strength; ``mean`` ȳ is that of the rows fitted."""
        self.right[strength] += (predictions.argmax(1) == targets.argmax(1)).sum()
        e, t = ((predictions - targets) ** 2).sum(1), ((targets - mean) ** 2).sum(1)
        self.sums[strength] += torch.stack([e.sum(), t.sum(), (e * e).sum(), (e * t).sum(), (t * t).sum()])
        self.count += len(targets) if strength == 0 else 0

    def best(self) -> int:
        """The strength of the least squared error."""
        return int(self.sums[:, 0].argmin())

    def accuracy(self, strength: int) -> tuple[float, float, float, float]:
        """(share right, its error, low, high) by Wilson's interval, at one and at 1.96 standard deviations."""
        share = float(self.right[strength]) / self.count
        middle, half = wilson(share, self.count, 1.96)
        return share, wilson(share, self.count, 1.0)[1], middle - half, middle + half

    def determination(self, strength: int) -> tuple[float, float, float, float]:
        """(R² = 1 - Σe/Σt, its standard error to first order, ends of the 95 % interval); nan for constant targets."""
        e, t, ee, et, tt = self.sums[strength].tolist()
        if not t > 0:
            return math.nan, math.nan, math.nan, math.nan
        share = e / t
        error = max(ee - 2 * share * et + share**2 * tt, 0.0) ** 0.5 / t
        return 1 - share, error, 1 - share - 1.96 * error, 1 - share + 1.96 * error


def wilson(share: float, count: int, deviations: float) -> tuple[float, float]:
    """(middle, half-width) of the interval of a probability, of which ``count`` trials gave this share. Wilson 1927."""
    z = deviations**2 / count
    return (share + z / 2) / (1 + z), (z * share * (1 - share) + z * z / 4) ** 0.5 / (1 + z)
