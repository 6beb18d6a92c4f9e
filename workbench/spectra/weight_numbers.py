"""What is computed of one weight's singular values: norms and ranks, the bulk of random entries, the power-law tail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics import power_law as tails
from workbench.numerics.kernels import effective_rank, stable_rank
from workbench.numerics.marchenko_pastur import fit_random_bulk
from workbench.spectra.weights import WeightMatrix

Floats = NDArray[np.float64]
SHARES = np.linspace(1.0, 0.05, 20)
"""Shares of the eigenvalues that the profile takes for the tail."""
DOUBT, BETTER, VALID = 0.1, 0.05, (2.0, 6.0)
"""Goodness below which, chance below which, and exponents outside of which nothing is called a power law."""


@dataclass(frozen=True)
class Spectrum:
    """``sigma``: the singular values of a weight, largest first; ``rounded``: how many of them are zero by rounding."""

    matrix: WeightMatrix
    sigma: Floats
    rounded: int
    entry_std: float

    @property
    def known(self) -> bool:
        """Whether all are finite."""
        return bool(np.isfinite(self.sigma).all())

    @property
    def positive(self) -> Floats:
        """The eigenvalues σ² that are not zero."""
        return self.sigma[: self.sigma.size - self.rounded] ** 2


def decompose(matrix: WeightMatrix, stack: Tensor, stored: torch.dtype) -> Spectrum:
    """The singular values of all of a weight's matrices (blocks, rows, columns) together, by LAPACK in float64.

    nan where an entry is not finite. Values at or below ε √max(rows, columns) times the largest count as zero, ε the
    precision the weight is ``stored`` in (float32 for what is shorter): so large is what rounding leaves of a zero.
    """
    if not bool(torch.isfinite(stack).all()):
        return Spectrum(matrix, np.full(matrix.count, math.nan), 0, math.nan)
    found = torch.linalg.svdvals(stack).flatten().sort(descending=True).values
    spread = stack.abs().square().mean().sqrt()
    sigma, entry = found.cpu().numpy(), float(spread)
    precision = min(torch.finfo(stored).eps, torch.finfo(torch.float32).eps)
    floor = precision * math.sqrt(max(matrix.shape[1:])) * float(sigma[0])
    return Spectrum(matrix, sigma, int((sigma <= floor).sum()), entry)


def sizes(spectrum: Spectrum) -> dict[str, float]:
    """Shape, norms and ranks."""
    blocks, rows, columns = spectrum.matrix.shape
    found: dict[str, float] = {"blocks": blocks, "rows": rows, "columns": columns, "value_count": spectrum.sigma.size}
    if not spectrum.known:
        return found
    sigma, square = spectrum.sigma, float((spectrum.sigma**2).sum())
    with np.errstate(divide="ignore"):
        logs = {"log_norm": float(np.log10(square)), "log_spectral_norm": float(np.log10(sigma[0] ** 2))}
    return {
        **found,
        **logs,
        "zeros": spectrum.rounded,
        "spectral_norm": float(sigma[0]),
        "frobenius_norm": math.sqrt(square),
        "stable_rank": stable_rank(sigma) if square > 0 else 0.0,
        "effective_rank": effective_rank(sigma) if square > 0 else 0.0,
        "entry_std": spectrum.entry_std,
    }


def bulk(spectrum: Spectrum) -> tuple[dict[str, float], str]:
    """(What random entries would explain, why nothing is said of it)."""
    blocks, rows, columns = spectrum.matrix.shape
    found = fit_random_bulk(spectrum.sigma**2, rows, columns, blocks) if spectrum.known else None
    if found is None:
        return {}, "no Marchenko-Pastur law" if spectrum.known else ""
    return {
        "noise_std": found.std,
        "edge_low": found.low,
        "edge": found.high,
        "spike_threshold": found.threshold,
        "spikes": found.spikes,
        "bulk_mass": found.mass,
        "bulk_norm": found.norm,
        "bulk_misfit": found.misfit,
    }, ""


def tail(
    spectrum: Spectrum, rng: np.random.Generator, resamples: int, distance: tails.Distance
) -> tuple[dict[str, Any], str]:
    """(The power law, how sure, how good, against what and where the tail begins; why there is none)."""
    values = spectrum.positive
    if not spectrum.known:
        return {}, "weights that are not finite: nothing is known"
    if values.size < tails.FEWEST:
        return {}, f"{values.size} eigenvalues, fewer than the {tails.FEWEST} that a power law needs"
    law = tails.fit_power_law(values, distance)
    if law is None:
        return {}, "no power law: the largest eigenvalues are equal"
    low, high = tails.interval(values, law, rng, resamples, distance)
    good = tails.goodness(values, law, rng, resamples, distance)
    return {**_law_values(values, law, low, high, resamples, good), **_profile(values, distance)}, ""


def _law_values(
    values: Floats, law: tails.PowerLaw, low: float, high: float, resamples: int, good: float
) -> dict[str, Any]:
    rivals = {
        "exponential": tails.against_exponential(values, law),
        "lognormal": tails.against_lognormal(values, law),
    }
    error, top = max(high - law.alpha, law.alpha - low), math.log10(values[0])
    kept = good >= DOUBT and VALID[0] <= law.alpha <= VALID[1] and not any(r.better(BETTER) for r in rivals.values())
    # Σ x^α overflows for large α; relative to the largest it does not.
    log_alpha_norm = law.alpha * top + math.log10(float(((values / values[0]) ** law.alpha).sum()))
    return {
        "alpha": law.alpha,
        "alpha_low": low,
        "alpha_high": high,
        "alpha_error": error,
        "x_min": law.x_min,
        "tail_size": law.tail,
        "distance": law.distance,
        "p_value": good,
        "p_value_error": 1.96 * math.sqrt(good * (1 - good) / resamples) if resamples else math.nan,
        **{f"{name}_ratio": rival.ratio for name, rival in rivals.items()},
        **{f"{name}_p_value": rival.p_value for name, rival in rivals.items()},
        "power_law": kept,
        "alpha_weighted": law.alpha * top,
        "alpha_weighted_error": abs(top) * error,
        "log_alpha_norm": log_alpha_norm,
    }


def _profile(values: Floats, distance: tails.Distance) -> dict[str, Floats]:
    alpha, apart = tails.profile(values, SHARES, distance)
    return {"profile_alpha": alpha, "profile_distance": apart}
