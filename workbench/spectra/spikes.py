"""Which eigenvalues stand out of a run's spectrum: three ways of counting, none of which is claimed to be right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from workbench.numerics.bulk import QUANTILE, Bulk, bulk_of_run, gap_count, tail_count
from workbench.numerics.krylov import Krylov
from workbench.numerics.quadrature import gauss

FEWEST = 50
"""Eigenvalues below which there is no bulk to speak of."""


def spikes(
    state: Krylov, size: int, classes: int | None, deep: bool, floor: float
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(variables, notes): outliers_gap, gap_ratio, outliers_edge, bulk_edge, bulk_misfit, outliers_tail and errors.

    The gap is looked for among twice as many eigenvalues as there are classes; ``deep`` says that the run's quadrature
    may be read for the bulk, ``floor`` what counts as zero beside the largest. Only converged eigenvalues before the
    first unconverged one are counted.
    """
    known = state.top_values[: int(np.argmin(np.append(state.top_converged, False)))]
    known = known[np.isfinite(known)]
    most = 2 * classes if classes else None
    count, ratio = gap_count(known, most, floor)
    found: dict[str, Any] = {"outliers_gap": count if known.size > 1 else math.nan, "gap_ratio": ratio}
    notes = _cut_off(state.top_values.size, most, size)
    bulk, error = _bulk(state, size, classes) if deep and size >= FEWEST else (None, math.nan)
    if bulk is None:
        return found, notes
    tail, tail_error = tail_count(gauss(state.alpha, state.beta), bulk.edge, size)
    above = int((known > bulk.edge).sum())
    found |= {
        "bulk_edge": bulk.edge,
        "bulk_edge_error": error,
        "bulk_misfit": bulk.misfit,
        "outliers_edge": above,
        "outliers_edge_error": math.nan if math.isnan(error) else int((np.abs(known - bulk.edge) <= error).sum()),
        "outliers_tail": tail,
        "outliers_tail_error": tail_error,
    }
    said = (
        f"the bulk's edge is that of a {bulk.law} law, fitted with a misfit of {bulk.misfit:.0%} of the bulk's spread"
    )
    return found, (*notes, said, *_disagreement(above, known.size, state.top_values.size, tail, tail_error))


def _bulk(state: Krylov, size: int, classes: int | None) -> tuple[Bulk | None, float]:
    """The bulk, without the share of the eigenvalues that may be outliers: 1 %, or two for each class if that is more.

    In a small model twice the number of classes is more than 1 % of all eigenvalues.
    """
    return bulk_of_run(state.alpha, state.beta, size, min(QUANTILE, 1 - 2 * (classes or 0) / size))


def _cut_off(top: int, most: int | None, size: int) -> tuple[str, ...]:
    if most is None or top >= min(most, size):
        return ()
    asked = f"outliers were looked for among {top} eigenvalues, fewer than two for each class ({most})"
    return (f"{asked}: their numbers may be cut off",)


def _disagreement(above: int, known: int, top: int, tail: float, error: float) -> tuple[str, ...]:
    if above and above == known == top:
        return ("every eigenvalue that was sought lies above the bulk's edge, so there may be more: raise top",)
    if abs(tail - above) > error:
        mass = f"the density has a mass of {tail:.3g} ± {error:.2g} eigenvalues above the bulk's edge"
        return (f"{mass}, and {above} were found there: count with care",)
    return ()
