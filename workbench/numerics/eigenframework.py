"""Test risk of ridge regression, predicted from the kernel's eigenvalues and the target's coefficients in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
HALVINGS = 200
"""Bisections of a logarithm: more than double precision has digits."""


@dataclass(frozen=True, eq=False)
class Risk:
    """What regression on n examples is expected to do.

    ``test`` = E‖f - y‖² on new examples, noise included; ``train`` the same on those fitted; ``learnability`` L_i (m,),
    the share of each mode that is learned, whose sum is at most n; ``overfitting`` E_0, what noise is multiplied by;
    ``kappa`` the strength that regularises.
    """

    test: float
    train: float
    learnability: Floats
    overfitting: float
    kappa: float


def kernel_risk(eigenvalues: ArrayLike, power: ArrayLike, n: float, ridge: float, noise: float = 0.0) -> Risk:
    """Kernel ridge regression, f = K(x, X) (K + δ I)⁻¹ y, of n examples.

    κ > 0 solves Σ λ_i / (λ_i + κ) + δ/κ = n; L_i = λ_i / (λ_i + κ); E_0 = n / (n - Σ L_i²);
    test = E_0 (Σ (1 - L_i)² v_i² + σ²), train = (δ / (n κ))² test. Without ridge and with n modes or more to learn
    nothing is left, and κ = 0.

    Args:
        eigenvalues: λ_i >= 0 of the kernel as an operator on functions: those of K/n, not of K.
        power: v_i², squared coefficients of the target in its eigenfunctions (summed over outputs).
        n: examples fitted.
        ridge: δ, that multiplies I beside K.
        noise: σ², irreducible, part of the test risk.

    Source: Simon et al. 2021 (arXiv 2110.03922).
    """
    lam, v = _modes(eigenvalues, power)

    def excess(kappa: float) -> float:
        return float((lam / (lam + kappa)).sum()) + ridge / kappa - n

    kappa = _root(excess, float(lam.sum() + ridge) / n)
    # What no eigenvalue reaches is not learned even without ridge.
    learned = np.divide(lam, lam + kappa, out=np.zeros_like(lam), where=lam > 0)
    over = _over(n, n - float((learned**2).sum()))
    test = over * (float(((1 - learned) ** 2 * v).sum()) + noise) if math.isfinite(over) else math.inf
    train = (ridge / (n * kappa)) ** 2 * test if kappa > 0 else 0.0
    return Risk(test, train, learned, over, kappa)


def features_risk(
    eigenvalues: ArrayLike, power: ArrayLike, n: float, features: float, ridge: float, noise: float = 0.0
) -> Risk:
    """Ridge regression on k random features whose kernel is, in the mean over features, that of the eigenvalues.

    κ and γ solve Σ λ/(λ + γ) + δ/κ = n and Σ λ/(λ + γ) + k κ/γ = k; with L_i = λ_i/(λ_i + γ), z = Σ L_i and q = Σ L_i²
    test = (Σ (1 - L_i - κ L_i k / ((λ_i + γ)(k - q))) v_i² + σ²) / (1 - (q (k - 2z) + z²) / (n (k - q))). For k → ∞
    that of :func:`kernel_risk`. Source: Simon et al. 2024 (arXiv 2311.14646).

    Args:
        eigenvalues: as for :func:`kernel_risk`.
        power: the same.
        n: examples fitted.
        features: k.
        ridge: δ > 0, beside the kernel of the features, K = (1/k) Σ φ φᵀ.
        noise: σ².

    Raises:
        ValueError: no ridge.
    """
    if not ridge > 0:
        raise ValueError(f"random features want a ridge above 0 (a small one for none); got {ridge!r}.")
    lam, v = _modes(eigenvalues, power)
    k = features

    def excess(gamma: float) -> float:
        z = float((lam / (lam + gamma)).sum())
        # κ from the second equation, put into the first; where z > k the second has no solution: γ is too small.
        return math.inf if z >= k else z + ridge * k / (gamma * (k - z)) - n

    gamma = _root(excess, float(lam.sum() + 4 * ridge) * (1 / n + 1 / k))
    learned = lam / (lam + gamma)
    z, q = float(learned.sum()), float((learned**2).sum())
    kappa = gamma * (k - z) / k
    below = 1 - (q * (k - 2 * z) + z * z) / (n * (k - q))
    # (1 - L) - κ k L / ((λ + γ)(k - q)) in terms that do not cancel: 1 - L = γ/(λ + γ).
    bias = (gamma - kappa * k * learned / (k - q)) / (lam + gamma)
    test = (float((bias * v).sum()) + noise) / below
    return Risk(test, (ridge / (n * kappa)) ** 2 * test, learned, 1 / below, kappa)


def _modes(eigenvalues: ArrayLike, power: ArrayLike) -> tuple[Floats, Floats]:
    lam, v = np.asarray(eigenvalues, dtype=np.float64), np.asarray(power, dtype=np.float64)
    if lam.shape != v.shape or lam.ndim != 1 or not (lam >= 0).all() or not lam.any():
        raise ValueError(f"eigenvalues >= 0, not all 0, and as many powers are wanted; got {lam.shape} and {v.shape}.")
    return lam, v


def _over(n: float, rest: float) -> float:
    return n / rest if rest > 1e-12 * n else math.inf


def _root(excess: Callable[[float], float], high: float) -> float:
    """Where a falling function of κ > 0 crosses 0, by bisection of ln κ; 0 where it is not above 0 anywhere."""
    while excess(high) > 0:
        high *= 2
    low = high * 1e-250
    if excess(low) <= 0:
        return 0.0
    ends = [math.log(low), math.log(high)]
    for _ in range(HALVINGS):
        middle = sum(ends) / 2
        ends[excess(math.exp(middle)) <= 0] = middle
    return math.exp(sum(ends) / 2)
