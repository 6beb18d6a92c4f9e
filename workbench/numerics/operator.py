"""Symmetric linear maps known only by their products, and the algebra that combines them without forming a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class Operator(ABC):
    """A real symmetric map of vectors with ``size`` entries, of one ``dtype``, on one ``device``.

    A subclass sets the three attributes and writes :meth:`matvec`; :meth:`matmat` may be overridden where several
    products at once are cheaper. Operators add, subtract, negate and scale by numbers; the cost of such a combination
    is the sum of its parts.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    __array_ufunc__ = None  # NumPy scalars on the left then leave the multiplication to __rmul__

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector: (size,) to (size,)."""

    def matmat(self, block: Tensor) -> Tensor:
        """The product with every column of ``block``: (size, k) to (size, k)."""
        if block.shape[1] == 0:
            return block.clone()
        return torch.stack([self.matvec(column) for column in block.unbind(1)], dim=1)

    def __matmul__(self, other: Tensor) -> Tensor:
        """``A @ v`` for a vector (size,) or a block of columns (size, k)."""
        if other.ndim not in (1, 2) or other.shape[0] != self.size:
            raise ValueError(
                f"{type(self).__name__} multiplies tensors of shape ({self.size},) or ({self.size}, k); "
                f"got {tuple(other.shape)}."
            )
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def dense(self, block: int = 256) -> Tensor:
        """The matrix itself, (size, size), from ``size`` products: for tests and small operators."""
        columns = [self.matmat(coordinate_block(self, i, block)) for i in range(0, self.size, block)]
        return torch.cat(columns, dim=1) if columns else torch.empty(0, 0, dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """The same map for SciPy's sparse solvers: NumPy vectors in and out, cast to the operator's dtype."""
        from scipy.sparse.linalg import aslinearoperator

        return aslinearoperator(_Arrays(self))

    def __add__(self, other: Operator) -> Operator:
        return Sum(self, other)

    def __sub__(self, other: Operator) -> Operator:
        return Sum(self, Scaled(other, -1.0))

    def __mul__(self, factor: float) -> Operator:
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return Scaled(self, -1.0)


class _Arrays:
    """What SciPy asks of an object to take it for a linear operator."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.shape = (operator.size, operator.size)
        self.dtype = torch.empty(0, dtype=operator.dtype).numpy().dtype

    def matvec(self, array: NDArray[Any]) -> NDArray[Any]:
        value = torch.from_numpy(np.ascontiguousarray(array)).to(self.operator.device, self.operator.dtype)
        return (self.operator @ value).detach().cpu().numpy()

    matmat = rmatvec = matvec


class Matrix(Operator):
    """A dense symmetric matrix, (size, size), as an operator. Products cost size² multiplications."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Matrix wants a square tensor of two dimensions; got shape {tuple(matrix.shape)}.")
        if not matrix.is_floating_point():
            raise ValueError(
                f"Matrix wants floating-point entries; got {matrix.dtype}. Convert it with .double() first."
            )
        self.matrix = matrix
        self.size, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def matmat(self, block: Tensor) -> Tensor:
        return self.matrix @ block


class Diagonal(Operator):
    """A diagonal matrix given by its entries, (size,): a known spectrum of any size."""

    def __init__(self, entries: Tensor) -> None:
        if entries.ndim != 1:
            raise ValueError(f"Diagonal wants the entries as one vector; got shape {tuple(entries.shape)}.")
        self.entries = entries
        self.size, self.dtype, self.device = entries.shape[0], entries.dtype, entries.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self.entries * vector

    def matmat(self, block: Tensor) -> Tensor:
        return self.entries[:, None] * block


class _Wrapper(Operator):
    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device


class Scaled(_Wrapper):
    """``factor`` times an operator."""

    def __init__(self, operator: Operator, factor: float) -> None:
        super().__init__(operator)
        self.factor = factor

    def matvec(self, vector: Tensor) -> Tensor:
        return self.factor * self.operator.matvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self.factor * self.operator.matmat(block)


class Shifted(_Wrapper):
    """An operator plus ``shift`` times the identity: every eigenvalue moves by it (as by coupled weight decay)."""

    def __init__(self, operator: Operator, shift: float) -> None:
        super().__init__(operator)
        self.shift = shift

    def matvec(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector) + self.shift * vector

    def matmat(self, block: Tensor) -> Tensor:
        return self.operator.matmat(block) + self.shift * block


class Sum(_Wrapper):
    """The sum of two operators of one size, dtype and device."""

    def __init__(self, first: Operator, second: Operator) -> None:
        super().__init__(first)
        kinds = [(o.size, o.dtype, o.device) for o in (first, second)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"Only operators of one size, dtype and device add up; got {kinds[0]} and {kinds[1]}.")
        self.second = second

    def matvec(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector) + self.second.matvec(vector)

    def matmat(self, block: Tensor) -> Tensor:
        return self.operator.matmat(block) + self.second.matmat(block)


class Projected(_Wrapper):
    """(I - VᵀV) A (I - VᵀV) for orthonormal rows V (k, size): the operator with those directions taken out.

    The projected directions become eigenvectors of eigenvalue 0; if the rows were eigenvectors, every other eigenpair
    stays. A product costs one of the operator and 4 k size multiplications.
    """

    def __init__(self, operator: Operator, vectors: Tensor) -> None:
        super().__init__(operator)
        if vectors.ndim != 2 or vectors.shape[1] != operator.size:
            raise ValueError(f"Projected wants rows of shape (k, {operator.size}); got {tuple(vectors.shape)}.")
        self.vectors = vectors.to(device=operator.device, dtype=operator.dtype)

    def complement(self, block: Tensor) -> Tensor:
        """The part of a vector, or of each column, that is orthogonal to the rows."""
        return block - self.vectors.T @ (self.vectors @ block)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.complement(self.operator.matvec(self.complement(vector)))

    def matmat(self, block: Tensor) -> Tensor:
        return self.complement(self.operator.matmat(self.complement(block)))


class Restricted(_Wrapper):
    """The diagonal block of an operator at some coordinates: rows and columns ``index`` (k,), of ``k`` entries.

    A product costs one of the whole operator, on a vector that is zero elsewhere. Its eigenvalues interlace those of
    the whole: the largest is never above, the smallest never below the whole's.

    Raises:
        ValueError: places that are not distinct integers within the operator.
    """

    def __init__(self, operator: Operator, index: Tensor) -> None:
        super().__init__(operator)
        places = index.to(operator.device)
        outside = places.is_floating_point() or places.ndim != 1 or not places.numel()
        if outside or int(places.min()) < 0 or int(places.max()) >= operator.size:
            raise ValueError(
                f"index must be integers in [0, {operator.size}), as one vector; got {tuple(index.shape)}."
            )
        if places.unique().numel() != places.numel():
            raise ValueError("index names some coordinate twice; a block has each of them once.")
        self.index, self.size = places, places.numel()

    def matvec(self, vector: Tensor) -> Tensor:
        whole = torch.zeros(self.operator.size, dtype=vector.dtype, device=vector.device)
        return self.operator.matvec(whole.index_copy_(0, self.index, vector))[self.index]

    def matmat(self, block: Tensor) -> Tensor:
        whole = torch.zeros(self.operator.size, block.shape[1], dtype=block.dtype, device=block.device)
        return self.operator.matmat(whole.index_copy_(0, self.index, block))[self.index]


def coordinate_block(operator: Operator, first: int, width: int) -> Tensor:
    """Columns ``first`` up to ``first + width`` (or the last) of the identity: (size, <= width)."""
    count = min(width, operator.size - first)
    block = torch.zeros(operator.size, count, dtype=operator.dtype, device=operator.device)
    index = torch.arange(count, device=operator.device)
    block[first + index, index] = 1.0
    return block
