"""When a curve crosses a threshold and stays there, known to the interval between two evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIRM = 3
"""Evaluations after a crossing that must hold it."""
SLACK = 0.01
"""How far below the threshold those may fall, as a share of one (an accuracy's unit)."""


@dataclass(frozen=True)
class Crossing:
    """A crossing at ``step``, the first evaluation that shows it; ``earliest`` is the first step it may have been at.

    ``confirmed`` counts later evaluations that hold it, at most those asked for. nan where nothing crossed.
    """

    step: float = math.nan
    earliest: float = math.nan
    confirmed: int = 0

    @property
    def error(self) -> float:
        """How much earlier it may have been: 0 where every step was evaluated."""
        return self.step - self.earliest


def sustained(
    steps: ArrayLike, values: ArrayLike, threshold: float, slack: float = SLACK, confirm: int = CONFIRM
) -> Crossing:
    """The first evaluation with value >= ``threshold`` whose ``confirm`` next ones stay >= ``threshold - slack``.

    Fewer follow a crossing near the end; those that do must hold it. Values that are nan were not evaluated. A curve
    that never crosses gives nan, never its last step: it is censored there.

    Args:
        steps: of the evaluations, ascending, (n,).
        values: at these steps, (n,).
        threshold: what is to be reached.
        slack: how far below the threshold the evaluations that confirm may lie.
        confirm: how many evaluations confirm.
    """
    at, seen = known(steps, values)
    reached, holds = seen >= threshold, seen >= threshold - slack
    for i in np.flatnonzero(reached):
        after = holds[i + 1 : i + 1 + confirm]
        if after.all():
            # A crossing at the first evaluation may have been at any step from the first one on.
            before = at[i - 1] + 1 if i else min(1.0, at[i])
            return Crossing(float(at[i]), float(before), len(after))
    return Crossing()


def known(steps: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of those evaluations whose value is a number.

    Raises:
        ValueError: steps and values of different lengths, or steps that do not ascend.
    """
    at, seen = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if at.shape != seen.shape or at.ndim != 1 or (np.diff(at) <= 0).any():
        raise ValueError(f"ascending steps (n,) and values (n,) are wanted; got shapes {at.shape} and {seen.shape}.")
    there = ~np.isnan(seen)
    return at[there], seen[there]


def below_geometric_mean(steps: ArrayLike, losses: ArrayLike) -> Crossing:
    """Where a positive loss is first below the geometric mean of its first and last value: half-way on a log axis.

    nan for a loss that did not fall, or that is not positive and finite at both ends.
    """
    at, seen = known(steps, losses)
    if not seen.size or not (0 < seen[-1] < seen[0] < math.inf):
        return Crossing()
    return sustained(at, -seen, -math.sqrt(seen[0] * seen[-1]), slack=0.0, confirm=0)


def between(first: Crossing, second: Crossing) -> tuple[float, float]:
    """second.step - first.step, and the largest distance to one that the evaluations permit; nan where unknown."""
    value = second.step - first.step
    return value, max(first.error, second.error) if math.isfinite(value) else math.nan


def ratio(first: Crossing, second: Crossing) -> tuple[float, float]:
    """second.step / first.step, and the largest distance to a ratio that the evaluations permit; nan where unknown."""
    if not first.step > 0 or not second.step > 0:
        return math.nan, math.nan
    value = second.step / first.step
    low, high = second.earliest / first.step, second.step / max(first.earliest, 1.0)
    return value, max(value - low, high - value)
