"""The algebra of operators against the algebra of matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import rotated
from torch import Tensor

from workbench.numerics.operator import Diagonal, Matrix, Operator, Projected, Shifted


class Columnwise(Operator):
    """An operator that knows only single products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device
        self.products = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


@given(seed=st.integers(0, 10**6), factor=st.floats(-3, 3), shift=st.floats(-3, 3))
def test_combinations_equal_those_of_matrices(seed: int, factor: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rotated(rng.normal(size=7), seed), Diagonal(torch.from_numpy(rng.normal(size=7)))
    x, y = a.dense(), b.dense()
    rows = torch.linalg.qr(torch.from_numpy(rng.normal(size=(7, 2))))[0].T
    outside = torch.eye(7, dtype=torch.float64) - rows.T @ rows
    block = torch.from_numpy(rng.normal(size=(7, 3)))
    for operator, matrix in [
        (a + b, x + y),
        (a - b, x - y),
        (-a, -x),
        (factor * a, factor * x),
        (a * np.float64(factor), factor * x),
        (np.float64(factor) * a, factor * x),
        (Shifted(a, shift), x + shift * torch.eye(7, dtype=torch.float64)),
        (Projected(a, rows), outside @ x @ outside),
        (2 * (a + b) - Shifted(b, shift), 2 * x + y - shift * torch.eye(7, dtype=torch.float64)),
    ]:
        torch.testing.assert_close(operator @ block, matrix @ block)
        torch.testing.assert_close(operator @ block[:, 0], matrix @ block[:, 0])


def test_dense_needs_one_product_a_column() -> None:
    matrix = rotated(np.arange(5.0)).dense()
    operator = Columnwise(matrix)
    torch.testing.assert_close(operator.dense(block=2), matrix)
    assert operator.products == 5
    assert (operator @ torch.empty(5, 0, dtype=torch.float64)).shape == (5, 0)


def test_scipy_solves_the_same_problem() -> None:
    from scipy.sparse.linalg import eigsh

    values = np.linspace(-3, 5, 30)
    found = eigsh(rotated(values).to_scipy(), k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), values[-2:], rtol=1e-9)


def test_wrong_shapes_are_named() -> None:
    a = Matrix(torch.eye(3))
    with pytest.raises(ValueError, match=r"\(3,\) or \(3, k\); got \(4,\)"):
        _ = a @ torch.ones(4)
    with pytest.raises(ValueError, match="square"):
        Matrix(torch.ones(2, 3))
    with pytest.raises(ValueError, match="floating-point"):
        Matrix(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one size"):
        _ = a + Matrix(torch.eye(4))
    with pytest.raises(ValueError, match="rows of shape"):
        Projected(a, torch.ones(2, 4))
