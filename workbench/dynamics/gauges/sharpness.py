"""Sharpness beside the edge of stability, by Lanczos that begins where it ended the last time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from workbench.dynamics.gauges.gauge import Gauge, Meter, Training, Values
from workbench.dynamics.schedules import Schedule
from workbench.numerics.krylov import lanczos
from workbench.numerics.sampling import Draw
from workbench.operators.preconditioned import Preconditioner, preconditioner
from workbench.operators.table import OperatorName, curvature
from workbench.subject import Subject

_MIXED = 0.3  # of a random direction beside the last eigenvector, so that another one that overtook it is seen
_BASIS = 12


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
        examples: at most so many of the recorder's; None: all. On few examples λ₁ is biased upwards.
        operator: whose eigenvalue.
        tolerance: residual over eigenvalue at which Lanczos stops.
        limit: Hessian products at most; five to ten are usual once warm.
    """

    cost: ClassVar[str] = "5 to 10 Hessian products (3 gradients each) on the examples; a dozen copies of the weights"

    every: Schedule | int = 50
    examples: int | None = 256
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
        gauge = self.gauge
        with torch.enable_grad(), curvature(self.subject, gauge.operator) as matrix:
            operator = matrix if held is None else held.of(matrix)
            states = lanczos(
                operator, self._start(), top=1, bottom=0, tolerance=gauge.tolerance, limit=gauge.limit,
                basis=min(_BASIS, operator.size), fresh=lambda i: self.draw(10**6 + i),
            )  # fmt: skip
            for state in states:
                if state.done or state.products >= gauge.limit:
                    self.last = state.vectors([0])[0].clone()
                    return float(state.top_values[0]), float(state.top_residuals[0])
        return math.nan, math.nan

    def _start(self) -> Tensor:
        self.count += 1
        fresh = self.draw(self.count)
        if self.last is None:
            return fresh
        return self.last + _MIXED * fresh / fresh.norm()
