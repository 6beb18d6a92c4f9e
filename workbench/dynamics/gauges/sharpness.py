"""Sharpness beside the edge of stability, by Lanczos that begins where it ended the last time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from workbench.dynamics.gauges.gauge import Gauge, Meter, Training, Values
from workbench.dynamics.schedules import Schedule
from workbench.numerics.sampling import Draw
from workbench.operators.preconditioned import Preconditioner, preconditioner
from workbench.operators.table import OperatorName, curvature
from workbench.subject import Subject

_MIXED, _SECOND = 0.02, 0.3  # of a random direction and of the second eigenvector, beside the first one


@dataclass(frozen=True)
class Sharpness(Gauge):
    """λ₁ of the (preconditioned) Hessian, and the value at which the optimizer in use stops being stable.

    ``sharpness`` is the largest eigenvalue of P⁻¹H, P the preconditioner of the optimizer as it is now (1 for SGD,
    roughly √v for Adam); an eigenvalue lies within ``sharpness_error`` of it. ``stability_threshold`` is c / η with
    c = 2 for gradient descent, 2 (1 + β) for heavy ball, 2 (1 + β) / (1 - β) for Adam, and ``stability`` the ratio of
    the two: the edge is at 1. Where parameter groups differ in learning rate, η is folded into P and the threshold is
    c. Under an optimizer that is not known (or without one) P is 1 and the threshold nan. Everything is nan where the
    loss or its curvature is not finite.

    The loss is that of the recorder's ``data`` in evaluation mode: give it the training set (or a fixed part of it).
    For mini-batch SGD λ₁ alone does not tell how near the edge is (see ``BatchCurvature``).
    Source: Cohen et al. 2021, 2022.

    Args:
        every: steps between readings.
        examples: at most so many of the recorder's; None: all. On few examples λ₁ is biased
            upwards; the default is for watching, not for quoting.
        operator: whose eigenvalue.
        tolerance: residual over eigenvalue at which Lanczos stops.
        limit: Hessian products at most; two to four are usual once warm.
    """

    cost: ClassVar[str] = (
        "2 to 4 Hessian products (3 gradients each) on the examples, more at first; as many copies of the weights"
    )

    every: Schedule | int = 50
    examples: int | None = 128
    operator: OperatorName = "hessian"
    tolerance: float = 0.05
    limit: int = 30

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without data and loss."""
        return _SharpnessMeter(self, training.subject(self, self.examples))


class _SharpnessMeter(Meter):
    def __init__(self, gauge: Sharpness, subject: Subject) -> None:
        self.gauge, self.subject = gauge, subject
        self.draw = Draw(0, "gauges.Sharpness", subject.size, subject.dtype, subject.device)
        self.last: Tensor | None = None
        self.count = 0

    def read(self) -> Values:
        held = self._preconditioner()
        try:
            value, error = self._largest(held)
        except (ArithmeticError, ValueError):  # NaN in the loss or its curvature: training may well go on
            self.last, value, error = None, math.nan, math.nan
        limit = held.threshold if held is not None else math.nan
        return {
            "sharpness": value,
            "sharpness_error": error,
            "stability_threshold": limit,
            "stability": value / limit if limit else math.nan,
        }

    def _preconditioner(self) -> Preconditioner | None:
        """That of the optimizer; None where there is none to speak of."""
        if self.subject.optimizer is None:
            return None
        try:
            plain = preconditioner(self.subject, rates=False)
            return plain if not math.isnan(plain.threshold) else preconditioner(self.subject)
        except ValueError:  # an optimizer that is not known, or holds other parameters
            return None

    def _largest(self, held: Preconditioner | None) -> tuple[float, float]:
        with torch.enable_grad(), curvature(self.subject, self.gauge.operator) as matrix:
            operator = matrix if held is None else held.of(matrix)
            run = _Lanczos(self._start())
            while True:
                run.advance(operator.matvec(run.rows[-1]))
                value, error = run.top()
                if run.ended or error <= self.gauge.tolerance * abs(value) or len(run.alpha) >= self.gauge.limit:
                    self.last = run.lead()
                    return value, error

    def _start(self) -> Tensor:
        """Where the last reading ended, the second eigenvector too, so that one that overtook the first is seen."""
        self.count += 1
        fresh = self.draw(self.count)
        return fresh if self.last is None else self.last + _MIXED * fresh / fresh.norm()


class _Lanczos:
    """A dozen products at most, and nothing around them: for nets where a product costs a millisecond.

    ``rows`` are orthonormal, ``alpha`` and ``beta`` the tridiagonal matrix; ``ended`` where the space is exhausted.
    """

    def __init__(self, start: Tensor) -> None:
        self.rows = [start / start.norm()]
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.ended = False
        self.vectors = np.ones((1, 1))

    def advance(self, product: Tensor) -> None:
        """Take A times the last row."""
        basis = torch.stack(self.rows)
        along = basis @ product
        rest = product - along @ basis
        rest = rest - (basis @ rest) @ basis  # twice, as the first leaves rounding behind
        size, alpha = torch.stack([rest.norm(), along[-1]]).tolist()
        if not (math.isfinite(size) and math.isfinite(alpha)):
            raise ArithmeticError("a product is not finite.")
        self.alpha.append(alpha)
        self.beta.append(size)
        scale = max(abs(alpha), *self.beta)
        self.ended = len(self.alpha) == len(product) or size <= 1e-7 * scale
        if not self.ended:
            self.rows.append(rest / size)

    def top(self) -> tuple[float, float]:
        """The largest Ritz value and its residual; the residual of one product says nothing, so it is infinite."""
        k = len(self.alpha)
        matrix = np.diag(self.alpha) + np.diag(self.beta[: k - 1], 1) + np.diag(self.beta[: k - 1], -1)
        values, self.vectors = np.linalg.eigh(matrix)
        error = 0.0 if self.ended else self.beta[-1] * abs(float(self.vectors[-1, -1]))
        return float(values[-1]), math.inf if k == 1 and not self.ended else error

    def lead(self) -> Tensor:
        """The top Ritz vector and a part of the second."""
        weights = self.vectors[:, -1] + (_SECOND * self.vectors[:, -2] if len(self.alpha) > 1 else 0.0)
        rows = torch.stack(self.rows[: len(self.alpha)])
        return torch.from_numpy(weights).to(rows) @ rows
