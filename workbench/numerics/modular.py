"""Waves over tokens 0 to p-1 and their concentration; parallelograms of vectors, and how fast training closes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def frequency_power(vectors: ArrayLike) -> Floats:
    """Power of the frequencies k = 1 .. p//2 in vectors (p, d): ‖cos_kᵀ E‖² + ‖sin_kᵀ E‖², unit waves, (p//2,).

    With the power of the constant they add up to ‖E‖². At k = p/2 the sine is zero and the cosine alone counts.

    Raises:
        ValueError: fewer than two tokens.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise ValueError(f"vectors (tokens, d) of two tokens or more are wanted; got shape {rows.shape}.")
    p = rows.shape[0]
    power = (np.abs(np.fft.rfft(rows, axis=0)[1:]) ** 2).sum(1) / p
    power[: (p - 1) // 2] *= 2  # both signs of a frequency; that of p/2 is its own
    return power


def gini(values: ArrayLike) -> float:
    """Gini coefficient of values >= 0: 0 for equal ones, 1 - 1/n when one has all; nan when they are unknown or all 0.

    G = 1 - (2/n) Σ_j (x_(j) / Σx) (n - j + 1/2), x ascending.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if not x.size or not 0 < x.sum() < np.inf:
        return float("nan")
    n = x.size
    return float(1 - 2 / n * (x / x.sum() * (n - np.arange(1, n + 1) + 0.5)).sum())


def holding(power: ArrayLike, share: float) -> tuple[int, ...]:
    """The fewest frequencies (from 1) that hold ``share`` of the power, largest first; none where it is unknown."""
    values = np.asarray(power, dtype=np.float64)
    if not 0 < values.sum() < np.inf:
        return ()
    order = np.argsort(-values, kind="stable")
    count = int(np.searchsorted(np.cumsum(values[order]) / values.sum(), share - 1e-12)) + 1
    return tuple(int(k) + 1 for k in order[:count])


def standardised(vectors: ArrayLike) -> Floats:
    """Vectors (p, d) with mean 0 and standard deviation 1 (ddof 1) in each dim; dims that do not vary are left out."""
    rows = np.asarray(vectors, dtype=np.float64)
    spread = rows.std(0, ddof=1)
    return ((rows - rows.mean(0)) / np.where(spread > 0, spread, 1.0))[:, ~(spread == 0)]


def parallelograms(vectors: ArrayLike, tolerance: float, modulus: bool = False) -> tuple[int, int]:
    """(those that hold, all) of the parallelograms i + n = j + m among tokens: mean_d (E_i + E_n - E_j - E_m)² < tol.

    Two different pairs of tokens (a token may pair with itself) of one sum are one parallelogram; with ``modulus`` of
    one sum modulo p. Cost O(p³ d / 12), and twice that with ``modulus``.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    p = len(rows)
    first, second = np.triu_indices(p)
    sums = (first + second) % p if modulus else first + second
    held = total = 0
    limit = tolerance * rows.shape[1]  # of sums, so that vectors without dims close nothing
    for s in np.unique(sums):
        pairs = rows[first[sums == s]] + rows[second[sums == s]]
        for k in range(1, len(pairs)):
            held += int((((pairs[k:] - pairs[:-k]) ** 2).sum(1) < limit).sum())
            total += len(pairs) - k
    return held, total


def effective_hessian(pairs: ArrayLike, tokens: int) -> Floats:
    """Second derivative (p, p) of Σ (E_i + E_j - E_m - E_n)² / parallelograms in one dim of the vectors E of p tokens.

    The sum is over the parallelograms that training ``pairs`` (n, 2) of tokens make: any two different ones, in
    whichever order their tokens come, of the same sum i + j = m + n. Over Σ ‖E_k‖² it is the Hessian of the effective
    loss, whose flow moves each dim of E on its own. Constants and multiples of the token's number are in its kernel.
    With rows b_k = e_i + e_j of the r pairs of one sum, Σ_(k<l) (b_k - b_l)(b_k - b_l)ᵀ = r Σ b_k b_kᵀ - (Σ b_k)(Σ
    b_k)ᵀ, so that no parallelogram is visited. Cost O((n + p) p²). nan without any parallelogram.

    Source: Liu et al. 2022 (arXiv:2205.10343).
    """
    chosen = np.unique(np.sort(np.asarray(pairs, dtype=np.int64).reshape(-1, 2), axis=1), axis=0)
    sums, found, total = chosen.sum(1), np.zeros((tokens, tokens)), 0
    for one in np.unique(sums):
        rows = np.zeros((int((sums == one).sum()), tokens))
        np.add.at(rows, (np.arange(len(rows))[:, None], chosen[sums == one]), 1.0)
        found += len(rows) * rows.T @ rows - np.outer(rows.sum(0), rows.sum(0))
        total += len(rows) * (len(rows) - 1) // 2
    return 2 * found / total if total else np.full((tokens, tokens), np.nan)


def grokking_rate(pairs: ArrayLike, vectors: ArrayLike) -> float:
    """Third-smallest eigenvalue of the effective loss's Hessian: how fast vectors (p, d) fall in line, at least.

    Gradient flow on the effective loss takes them to a line in the tokens' order at this rate, each unit of time being
    one over the learning rate of the vectors; at 0, which is what is left to rounding, training pairs do not decide
    where all tokens lie. nan without parallelograms, or for vectors that are not finite or all 0.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    hessian, size = effective_hessian(pairs, len(rows)), float(np.square(rows).sum())
    if not (np.isfinite(hessian).all() and 0 < size < np.inf and len(rows) > 2):
        return float("nan")
    values = np.linalg.eigvalsh(hessian)
    return float(values[2]) / size if values[2] > 1e-12 * values[-1] else 0.0
