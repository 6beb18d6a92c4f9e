"""How high the loss rises between two models: barriers of a curve sampled from one to the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Barriers:
    """Heights above three references, and where the linear one is met.

    ``linear`` = max_α E(α) - ((1-α) E(0) + α E(1)) (Entezari et al. 2022), 0 for every convex curve; ``mean`` =
    max_α E(α) - (E(0) + E(1))/2 (Frankle et al. 2020); ``maximum`` = max_α E(α) - max(E(0), E(1)), negative never but
    for rounding. ``place`` is the index of the linear one. All over 0 <= α <= 1; nan where a sample there is nan.
    """

    linear: float
    mean: float
    maximum: float
    place: int


def barriers(alpha: ArrayLike, values: ArrayLike) -> Barriers:
    """The barriers of E(α), (n,) each; α must hold 0 and 1.

    Raises:
        ValueError: no sample at an end.
    """
    a, e = np.asarray(alpha, dtype=np.float64), np.asarray(values, dtype=np.float64)
    ends = [np.flatnonzero(a == end) for end in (0.0, 1.0)]
    if not all(at.size for at in ends):
        raise ValueError("a barrier needs samples at α = 0 and α = 1, the two models themselves.")
    inside = np.flatnonzero((a >= 0) & (a <= 1))
    if np.isnan(e[inside]).any():
        return Barriers(math.nan, math.nan, math.nan, int(inside[0]))
    first, second = (float(e[at[0]]) for at in ends)
    chord = e[inside] - ((1 - a[inside]) * first + a[inside] * second)
    top = float(e[inside].max())
    return Barriers(
        linear=float(chord.max()),
        mean=top - (first + second) / 2,
        maximum=top - max(first, second),
        place=int(inside[int(chord.argmax())]),
    )


def greatest_rise(alpha: ArrayLike, values: ArrayLike) -> float:
    """The largest rise above an earlier value on the way from α = 0 to α = 1: 0 for a curve that only falls."""
    a, e = np.asarray(alpha, dtype=np.float64), np.asarray(values, dtype=np.float64)
    on_the_way = e[(a >= 0) & (a <= 1)]
    return float((on_the_way - np.minimum.accumulate(on_the_way)).max())
