"""How much the loss rises on average at random steps: plain Gaussian, in units of the weights, or filter by filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from workbench.numerics.stats import Moments
from workbench.sharpness.found import FRACTIONS, Found
from workbench.sharpness.point import Point

FIRST = 1_000
"""Number of the first random vector: the same for every kind and size of step, and for every checkpoint."""
RESOLVED = 0.5
"""Standard error over value from which on an average is said to be hardly told from zero."""
EACH = 4
"""Pairs between two values that are passed on."""
FEWER = 10
"""Pairs at most at fractions of the step: enough to see how the rise grows."""


def average(
    point: Point, shape: Callable[[Tensor], Tensor], sigma: float, pairs: int, protocol: str
) -> Iterator[Found]:
    """E[L(θ + δ)] - L(θ) for δ = σ shape(ξ), ξ ~ N(0, I), by antithetic pairs ±δ, and at fractions of σ.

    A pair's mean has no odd orders: ½ δᵀHδ + O(δ⁴). Every δ is drawn once and held for all examples; the same ξ serve
    every σ and every checkpoint, so that differences between them are far more exact than the values. Error: the
    standard error over pairs. Cost: two forward passes a pair, and up to 40 for the two fractions.
    Source: Neyshabur et al. 2017; Andriushchenko et al. 2023.
    """
    known: dict[float, Moments] = {}
    notes = point.unmoved(sigma * shape(point.draw(FIRST)))
    counts = [pairs if share == 1 else min(pairs, FEWER) for share in FRACTIONS]
    taken = 0
    for share, count in reversed(list(zip(FRACTIONS, counts, strict=True))):
        for pair in range(count):
            step = share * sigma * shape(point.draw(FIRST + pair))
            sample = [(point.rise(step) + point.rise(-step)) / 2]
            known[share] = known[share].add(sample) if share in known else Moments.of(sample)
            taken += 1
            last = taken == sum(counts)
            if last or pair % EACH == 0:
                yield _report(known, point.rounding, sigma, protocol, taken / sum(counts), notes if last else ())


def _report(
    known: dict[float, Moments], rounding: float, sigma: float, protocol: str, done: float, notes: tuple[str, ...]
) -> Found:
    rise = tuple(float(known[f].mean) if f in known else math.nan for f in FRACTIONS)
    errors = tuple(_error(known[f], rounding) if f in known else math.nan for f in FRACTIONS)
    if done == 1 and not errors[-1] <= RESOLVED * abs(rise[-1]):
        notes = ("hardly told from zero: more draws, or larger steps, would tell", *notes)
    return Found(
        rise[-1],
        errors[-1],
        converged=done == 1,
        done=done,
        protocol=f"{protocol}; {known[1.0].count} antithetic pairs, the error is the standard error over them",
        radius=sigma,
        rise=rise,
        rise_error=errors,
        notes=notes,
    )


def _error(moments: Moments, rounding: float) -> float:
    """The standard error over pairs, and not less than rounding leaves."""
    error = float(moments.standard_error)
    return error if math.isnan(error) else max(error, rounding / math.sqrt(moments.count))
