"""Ritz values with their residuals: the errors that they suggest, and arrays of them that never change."""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Judged = Literal["residual", "estimate"]
"""By what a pair counts as converged: its residual, a bound, or the error that :func:`estimated_errors` gives."""

_Entry = TypeVar("_Entry", np.float64, np.bool_)


def estimated_errors(values: Floats, residuals: Floats) -> Floats:
    """Estimates of |value - eigenvalue| for Ritz values in descending order, (n,): min(residual, residual² / gap).

    By Kato and Temple an eigenvalue that is alone within ``gap`` of its Ritz value is within residual² / gap of it,
    which for a pair half resolved is tens of times less than the residual. The gap is the distance to the next Ritz
    value, less the residual; where that leaves nothing, the residual stands. No bound: a Ritz value may be far from the
    eigenvalue that it will come to, and an eigenvalue that the run has not met yet may lie closer. Source: Kato 1949;
    Parlett 1998, section 10.5.
    """
    away = -np.diff(values)
    gap = np.minimum(np.append(np.inf, away), np.append(away, np.inf)) - residuals
    known = np.isfinite(gap) & (gap > 0)
    return np.minimum(residuals, np.divide(residuals**2, gap, out=np.full(values.size, np.inf), where=known))


def padded(array: NDArray[_Entry], count: int) -> NDArray[_Entry]:
    """The first ``count`` entries, padded with nan (booleans with False), read-only."""
    out = np.full(count, False if array.dtype == bool else np.nan, dtype=array.dtype)
    out[: min(count, array.size)] = array[:count]
    return frozen(out)


def frozen(array: NDArray[_Entry]) -> NDArray[_Entry]:
    """A copy that is read-only."""
    array = np.array(array)
    array.setflags(write=False)
    return array
