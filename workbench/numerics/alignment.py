"""How far two symmetric operators act along the same directions: sums over both, and how sure ratios of them are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.basis import dot
from workbench.numerics.operator import Operator
from workbench.numerics.stats import jackknife_error
from workbench.numerics.trace import reach

Floats = NDArray[np.float64]
SUMS = 5
"""Numbers that one vector gives: parts of tr A, tr B, ‖A‖², ‖B‖² and tr(AB)."""
SAME = 1e-4
"""A singular value of joined directions below which one of them adds nothing to the others."""


def forms(first: Operator, second: Operator, vector: Tensor) -> Floats:
    """vᵀAv, vᵀBv, ‖Av‖², ‖Bv‖² and Av · Bv, (5,): one product with each.

    Summed over an orthonormal basis, or averaged over random v with E[vvᵀ] = I, they are tr A, tr B, ‖A‖_F², ‖B‖_F²
    and tr(AB). Over a basis of a span and over random vectors projected off it they add up to the same.
    """
    a, b = first.matvec(vector), second.matvec(vector)
    pairs = ((vector, a), (vector, b), (a, a), (b, b), (a, b))
    return torch.stack([dot(x, y) for x, y in pairs]).cpu().numpy()


def ratios(sums: Floats, size: int) -> dict[str, float]:
    """From the five sums: traces, norms, and the two ratios, nan where what they are divided by is zero.

    ``alignment`` = tr(AB) / (‖A‖ ‖B‖); ``relative_alignment`` = size · tr(AB) / (tr A tr B).
    """
    first, second, square, other, product = (float(s) for s in sums)
    lengths = math.sqrt(max(square, 0.0)), math.sqrt(max(other, 0.0))
    return {
        "first_trace": first,
        "second_trace": second,
        "first_norm": lengths[0],
        "second_norm": lengths[1],
        "product_trace": product,
        "alignment": product / (lengths[0] * lengths[1]) if all(lengths) else math.nan,
        "relative_alignment": size * product / (first * second) if first and second else math.nan,
    }


def jackknife(
    function: Callable[[Floats], Mapping[str, float]], inside: Floats, samples: Floats | None
) -> tuple[dict[str, float], dict[str, float]]:
    """``function(inside + mean of the samples)`` and half-widths of 95 % intervals, by leaving out one sample each.

    Of a mean itself this is the interval that plain traces have, inflated alike for optional stopping; of smooth
    functions it is right to first order in the spread. Without samples (None) all is exact; nan for a single one.
    Source: Tukey 1958; Efron 1982.
    """
    if samples is None:
        value = dict(function(inside))
        return value, dict.fromkeys(value, 0.0)
    count, total = len(samples), samples.sum(axis=0)
    value = dict(function(inside + total / count))
    if count < 2:
        return value, dict.fromkeys(value, math.nan)
    without = [function(inside + (total - one) / (count - 1)) for one in samples]
    spread = {name: float(jackknife_error(np.array([w[name] for w in without]))) for name in value}
    return value, {name: reach(count) * one for name, one in spread.items()}


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Orthonormal rows that span the rows of both; a direction that both have comes once."""
    stacked = torch.cat([first, second]).double()
    values, vectors = torch.linalg.eigh(stacked @ stacked.T)
    kept = values > SAME**2
    rows = (vectors[:, kept] / values[kept].sqrt()).T @ stacked
    return torch.linalg.qr(rows.T)[0].T.to(first.dtype)


def variance_spread(values: Floats, resampled: Floats) -> float:
    """Standard error of the variance (divisor n - 1) of ``values`` (n,), by the bootstrap.

    ``resampled`` (resamples, n) counts how often each is drawn, so that many variances can share it.
    """
    n, off = len(values), values - values.mean()
    means = resampled @ off / n
    return float(((resampled @ off**2 - n * means**2) / (n - 1)).std(ddof=1))
