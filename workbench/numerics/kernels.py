"""How alike two representations are, and how many dimensions a set of singular values fills."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def _spectrum(singular_values: ArrayLike) -> Floats:
    values = np.asarray(singular_values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.all(values >= 0):
        raise ValueError("One vector of singular values, all >= 0, is wanted.")
    return np.sort(values)[::-1]


def effective_rank(singular_values: ArrayLike) -> float:
    """exp(entropy of σ / Σσ), from 1 to the number of values; nan when all are 0. Source: Roy and Vetterli 2007."""
    values = _spectrum(singular_values)
    total = values.sum()
    if total == 0:
        return math.nan
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(singular_values: ArrayLike) -> float:
    """Σσ² / σ₁²: squared Frobenius over squared spectral norm; nan when all are 0."""
    values = _spectrum(singular_values)
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else math.nan


def participation_ratio(eigenvalues: ArrayLike) -> float:
    """(Σλ)² / Σλ²: the number of dimensions that an even spread would fill; nan when all are 0."""
    values = _spectrum(eigenvalues)
    return float(values.sum() ** 2 / (values**2).sum()) if values[0] > 0 else math.nan


def threshold_rank(singular_values: ArrayLike, delta: float = 0.01) -> int:
    """Smallest k whose k largest values carry 1 - ``delta`` of Σσ (not squared); 0 when all are 0.

    Source: Kumar et al. 2021.
    """
    values = _spectrum(singular_values)
    total = values.sum()
    if total == 0:
        return 0
    return int(np.searchsorted(np.cumsum(values) / total, 1 - delta - 1e-12) + 1)


def numerical_rank(singular_values: ArrayLike, relative: float = 1e-3) -> int:
    """Number of values above ``relative`` times the largest."""
    values = _spectrum(singular_values)
    return int((values > relative * values[0]).sum())


def gram(features: Tensor) -> Tensor:
    """X Xᵀ in float64, (n, n), of features (n, d)."""
    rows = features.detach().double()
    return rows @ rows.T


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased estimate HSIC₁ of the dependence behind two (n, n) Gram matrices, n >= 4, 0-d; can be negative.

    It is a U-statistic: averages over mini-batches estimate the same quantity. Source: Song et al. 2012.
    """
    n = first.shape[0]
    if n < 4 or tuple(first.shape) != (n, n) or first.shape != second.shape:
        raise ValueError(
            f"Two Gram matrices of one shape (n, n), n >= 4, are wanted; got {first.shape}, {second.shape}."
        )
    k, h = first.double().clone(), second.double().clone()
    k.fill_diagonal_(0.0)
    h.fill_diagonal_(0.0)
    sums_k, sums_h = k.sum(0), h.sum(0)
    value = (k * h).sum() + sums_k.sum() * sums_h.sum() / ((n - 1) * (n - 2)) - 2 * (sums_k @ sums_h) / (n - 2)
    return value / (n * (n - 3))


def linear_cka(first: Tensor, second: Tensor, *, debiased: bool = True) -> float:
    """Linear CKA of features (n, p) and (n, q) of the same n examples: 1 for equal up to rotation and scale.

    ``debiased`` uses HSIC₁ (n >= 4), which can be slightly negative; without, independent features of p dimensions
    give about p / (p + n) instead of 0. nan when a representation is constant. Source: Kornblith et al. 2019; Nguyen
    et al. 2021.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[0]:
        raise ValueError(f"Features (n, p) and (n, q) are wanted; got {tuple(first.shape)} and {tuple(second.shape)}.")
    x, y = (_centred(features) for features in (first, second))
    if debiased:
        k, h = gram(x), gram(y)
        return _ratio(hsic(k, h), hsic(k, k), hsic(h, h))
    cross, own_x, own_y = (torch.linalg.matrix_norm(m) for m in (x.T @ y, x.T @ x, y.T @ y))
    return _ratio(cross**2, own_x**2, own_y**2)


def _centred(features: Tensor) -> Tensor:
    rows = features.detach().double()
    return rows - rows.mean(0)


def _ratio(cross: Tensor, first: Tensor, second: Tensor) -> float:
    scale = float(first) * float(second)
    return float(cross) / math.sqrt(scale) if scale > 0 else math.nan


def alignment(first: Tensor, second: Tensor) -> float:
    """Cosine ⟨K, L⟩ / (‖K‖ ‖L‖) of two kernels (n, n), not centred: 1 for proportional ones; nan for a zero one."""
    k, h = first.double(), second.double()
    return _ratio((k * h).sum(), (k * k).sum(), (h * h).sum())
