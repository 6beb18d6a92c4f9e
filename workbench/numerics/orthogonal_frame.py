"""Where squared loss without a bias leads features: an orthogonal frame whose lengths follow from class sizes.

The problem: minimise (1/2N) ‖W_M ... W_1 H - Y‖² + λ_W/2 Σ_j ‖W_j‖² + λ_H/2 ‖H‖² over M ≥ 1 matrices and free features
H (d, N), one-hot targets Y with n_k examples of class k. Its minimum comes apart by classes, in closed form.
Source: Dang, Tran, Osher, Tran-The, Ho, Nguyen 2023 (Neural Collapse in Deep Linear Networks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_HALVINGS = 200


@dataclass(frozen=True, eq=False)
class OrthogonalFrame:
    """The global minimum, class by class, as arrays (C,); C classes in the order of their counts.

    ``product_norm``: lengths of the rows of W_M ... W_1; ``row_norm``: of W_M alone; ``feature_norm``: of the free
    features; ``mean_norm``: of what enters W_M (the free features where M = 1). ``logit``: the class's own one, 1 for
    a fit without weight decay. ``collapsed``: the class is best given up, all its lengths are 0. ``stationary``: there
    is a minimum with positive lengths, local where the class is collapsed, so that training can end in it; and for
    M ≥ 2 zero is stationary for every class, so that training can be stuck there.
    """

    product_norm: Floats
    row_norm: Floats
    feature_norm: Floats
    mean_norm: Floats
    logit: Floats
    collapsed: NDArray[np.bool_]
    stationary: NDArray[np.bool_]
    loss: Floats
    """Each class's share of the objective, penalties included; their sum is the minimum."""

    @property
    def minimum(self) -> float:
        """The least value of the objective."""
        return float(self.loss.sum())


def orthogonal_frame(
    counts: ArrayLike, weight_decay: float, feature_decay: float, matrices: int = 1
) -> OrthogonalFrame:
    """The minimum for classes of these sizes: λ_W = ``weight_decay``, λ_H = ``feature_decay``, M = ``matrices``.

    With b_k = M (N/n_k)(N λ_W^M λ_H)^{1/M}, x_k is the larger root of M x^{M-1}/(x^M + 1)² = b_k and s_k = N λ_H x_k^M
    the squared length of the product's row; a class is given up where b_k ≥ (M-1)^{(M-1)/M}/M. Cost O(C).

    Raises:
        ValueError: decays that are not positive, or a class without examples.
    """
    sizes, m = np.asarray(counts, dtype=np.float64), matrices
    if not (weight_decay > 0 and feature_decay > 0 and m >= 1 and (sizes > 0).all()):
        raise ValueError(
            f"positive decays, class sizes and number of matrices are wanted; got {weight_decay}, {feature_decay}, "
            f"{sizes.tolist()}, {m}. Leave absent classes out."
        )
    n = sizes.sum()
    wanted = m * (n / sizes) * (n * weight_decay**m * feature_decay) ** (1 / m)
    collapsed = wanted >= (m - 1) ** ((m - 1) / m) / m
    root, stationary = _larger_root(wanted, m)
    strength = np.where(collapsed, 0.0, n * feature_decay * root**m)
    return _frame(sizes, strength, weight_decay, feature_decay, m, collapsed, stationary)


def _frame(
    sizes: Floats, s: Floats, weight_decay: float, feature_decay: float, m: int, collapsed: Any, stationary: Any
) -> OrthogonalFrame:
    n, shift = sizes.sum(), sizes.sum() * feature_decay
    row, features, logit = s ** (1 / (2 * m)), np.sqrt(s) / (s + shift), s / (s + shift)
    loss = sizes / (2 * n) * (1 - logit) ** 2 + m * weight_decay / 2 * row**2 + feature_decay / 2 * sizes * features**2
    entering = np.where(s > 0, row ** (m - 1), 0.0) * features
    return OrthogonalFrame(np.sqrt(s), row, features, entering, logit, collapsed, stationary, loss)


def _larger_root(wanted: Floats, m: int) -> tuple[Floats, NDArray[np.bool_]]:
    """The larger x with M x^{M-1}/(x^M + 1)² = wanted, and where there is one; by halving, in logarithms."""

    def side(x: Floats) -> Floats:
        return m * x ** (m - 1) / (x**m + 1) ** 2

    top = np.full_like(wanted, ((m - 1) / (m + 1)) ** (1 / m))
    stationary = side(top) > wanted
    low, high = np.log(np.maximum(top, 1e-300)), np.maximum(np.log(m / wanted) / (m + 1), 0.0) + 1.0
    low = np.maximum(low, -700.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = side(np.exp(middle)) > wanted
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.exp(low), stationary
