"""Operators whose spectra are known without computing them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.operator import Diagonal, Matrix, Operator

Floats = NDArray[np.float64]

D4 = np.arange(4.0)
T5 = 2 - 2 * np.cos(np.arange(1, 6) * np.pi / 6)
S2 = np.array([1.0, 3.0])
LR4 = np.array([0.75, 2.25])


def path_laplacian(size: int) -> Operator:
    """Tridiagonal (-1, 2, -1): eigenvalues 2 - 2 cos(kπ / (size + 1))."""
    matrix = 2 * torch.eye(size, dtype=torch.float64)
    matrix.diagonal(1).fill_(-1.0)
    matrix.diagonal(-1).fill_(-1.0)
    return Matrix(matrix)


def rotated(eigenvalues: Floats, seed: int = 0) -> Operator:
    """A dense matrix of the given spectrum in a random orthogonal frame."""
    rng = np.random.default_rng(seed)
    frame, triangle = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    frame = frame * np.sign(np.diag(triangle))
    return Matrix(torch.from_numpy((frame * eigenvalues) @ frame.T))


def diagonal(eigenvalues: Floats, dtype: torch.dtype = torch.float64) -> Operator:
    """A diagonal matrix of the given spectrum."""
    return Diagonal(torch.from_numpy(np.array(eigenvalues, dtype=np.float64)).to(dtype))


def normal(size: int, seed: int) -> Tensor:
    """A random vector."""
    return torch.from_numpy(np.random.default_rng([size, seed]).normal(size=size))


def fresh(size: int, seed: int) -> Callable[[int], Tensor]:
    """Random vectors by number."""
    return lambda number: torch.from_numpy(np.random.default_rng([seed, number, 7]).normal(size=size))


def clustered(bulk: int = 290, seed: int = 0) -> Floats:
    """The top eigenvalues of a small trained net, two of them close, over a bulk around zero; descending."""
    top = [0.803, 0.730, 0.632, 0.621, 0.597, 0.443, 0.402, 0.361, 0.3, 0.28]
    return np.sort(np.r_[top, np.random.default_rng(seed).normal(0, 0.03, bulk)])[::-1].copy()


def marchenko_pastur(size: int, ratio: float = 0.5) -> Floats:
    """Quantiles of the Marchenko-Pastur law of unit variance, ratio <= 1: ``size`` eigenvalues."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angle = (np.arange(200_000) + 0.5) * np.pi / 200_000  # t = middle - half cos(angle): no singular edges
    t = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    mass = np.sqrt((high - t) * (t - low)) / t * np.sin(angle)
    cumulative = np.cumsum(mass) / mass.sum()
    return np.interp((np.arange(size) + 0.5) / size, cumulative, t)
