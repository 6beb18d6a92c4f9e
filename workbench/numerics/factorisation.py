"""A growing Lanczos factorisation: an orthonormal basis, the operator's matrix in it, and what leads out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.basis import Basis, Store, norm
from workbench.numerics.operator import Operator

Floats = NDArray[np.float64]
Fresh = Callable[[int], Tensor]


@dataclass(frozen=True)
class Precision:
    """What a dtype resolves relative to the largest |eigenvalue|: ``unit`` is rounding, under ``floor`` counts as 0."""

    unit: float
    floor: float

    @property
    def noise(self) -> float:
        """Up to this, a residual may be all rounding, of the products too, whatever Lanczos makes of it."""
        return min(8 * self.unit, self.floor)

    @classmethod
    def of(cls, dtype: torch.dtype, store: Store = "operator") -> Precision:
        """Precision of products in ``dtype`` with a basis kept as ``store``."""
        if dtype in (torch.bfloat16, torch.float16) or store == "bfloat16":
            return cls(unit=1e-3, floor=4e-3)
        if dtype == torch.float64 and store == "operator":
            return cls(unit=float(np.finfo(np.float64).eps), floor=1e-12)
        return cls(unit=float(np.finfo(np.float32).eps), floor=1e-6)


@dataclass(frozen=True)
class Step:
    """What one product told: T's new diagonal entry, and the length of what was new in it (0: nothing was)."""

    alpha: float
    beta: float


class Factorisation:
    """A Qᵀ = Qᵀ T + Pᵀ F for ``n`` multiplied rows Q and ``pending`` rows P that wait for their product.

    All rows are orthonormal, kept so by full reorthogonalisation. ``matrix`` holds T and F as one symmetric array, so
    that one start vector, several, or a fresh one after a breakdown, and thick restarts, are the same few lines.
    ``scale`` is the largest ||Av|| over unit v so far, ``asymmetry`` the largest |<u, Av> - <v, Au>| over it. Memory:
    ``rows`` · size.
    """

    def __init__(
        self, operator: Operator, rows: int, fresh: Fresh | None, *, store: Store = "operator", host: bool = False
    ) -> None:
        self.operator, self.rows = operator, min(rows, operator.size + 4)
        self.basis = Basis(self.rows, operator.size, operator.dtype, operator.device, store=store, host=host)
        self.precision = Precision.of(operator.dtype, store)
        self.matrix = np.zeros((self.rows, self.rows))
        self.n = self.pending = self.products = self.drawn = 0
        self.shelf = np.zeros((0, self.rows))
        self.known = True  # whether matrix holds all couplings of pending rows; not once some were shelved
        self.scale = self.asymmetry = 0.0
        self.fresh = fresh or _default_fresh(operator)

    @property
    def used(self) -> int:
        """Rows in use."""
        return self.n + self.pending

    @property
    def complete(self) -> bool:
        """Whether the multiplied rows span the whole space."""
        return self.n == self.operator.size

    @property
    def full(self) -> bool:
        """Whether another product needs a restart first."""
        return self.used == self.capacity and self.used < self.operator.size

    @property
    def capacity(self) -> int:
        """Rows that are not taken by shelved vectors."""
        return self.rows - len(self.shelf)

    @property
    def couplings(self) -> Floats:
        """F: how each pending row is reached from each multiplied one, (pending, n)."""
        return self.matrix[self.n : self.used, : self.n]

    def ritz(self) -> tuple[Floats, Floats]:
        """Ritz values, largest first, and their coefficients as columns (n, n)."""
        values, vectors = np.linalg.eigh(self.matrix[: self.n, : self.n])
        return values[::-1].copy(), vectors[:, ::-1].copy()

    def residuals(self, vectors: Floats) -> Floats:
        """Bounds on ‖A x - value x‖ for Ritz vectors with coefficients (n, k): what leads out, shelf included."""
        shelved = np.abs(self.shelf[:, : self.n] @ vectors).sum(axis=0)
        return np.linalg.norm(self.couplings @ vectors, axis=0) + shelved

    def adopt(self, vector: Tensor) -> bool:
        """Append what a vector has that the rows lack, as a pending row; False when that is nothing."""
        vector = vector.detach().to(device=self.operator.device, dtype=self.operator.dtype)
        before = float(norm(vector))
        if not 0 < before < np.inf:
            raise ValueError(f"A start vector must be finite and not zero; its length is {before}.")
        vector, _ = self.basis.remove(vector / before, self.used)
        after = float(norm(vector))
        if after <= 10 * self.precision.unit:
            return False
        vector, _ = self.basis.remove(vector / after, self.used)
        self._append(vector / float(norm(vector)))
        return True

    def renew(self) -> None:
        """Append a fresh random direction as a pending row."""
        for _ in range(5):
            self.drawn += 1
            if self.adopt(self.fresh(self.drawn - 1)):
                return
        raise ArithmeticError("Five fresh vectors in a row lay in the span of the basis; pass a fresh that is random.")

    def shelve(self) -> None:
        """Set the pending rows aside: what comes next need not be orthogonal to them, so it can find what they hold."""
        self.known = self.known and not self.pending
        for place in reversed(range(self.pending)):
            self.shelf = np.vstack([self.shelf, np.zeros(self.rows)])
            self.shelf[-1, : self.n] = self.matrix[self.n + place, : self.n]
            self.basis.put(self.capacity, self.basis.rows[self.n + place])
        self.pending = 0

    def _settle_shelf(self) -> None:
        """Leave on the shelf only what Q does not hold: the rest is in T by now, and part of Q is about to go."""
        for i in range(len(self.shelf)):
            place = self.rows - 1 - i
            rest, _ = self.basis.remove(self.basis.row(place), self.n)
            length = float(norm(rest))
            self.shelf[i] *= length
            if length > 0:
                self.basis.put(place, rest / length)

    def reunite(self) -> None:
        """Take shelved vectors back as pending rows, as far as the basis does not hold them by now."""
        while len(self.shelf):
            vector, reached = self.basis.row(self.capacity), self.shelf[-1, : self.n].copy()
            self.shelf = self.shelf[:-1]
            rest, inside = self.basis.remove(vector, self.used)
            length = float(norm(rest))
            self._couple(slice(self.n, self.used), inside[self.n :].cpu().numpy()[:, None] * reached)
            if length > self.precision.floor:
                self._append(rest / length)
                self._couple(slice(self.used - 1, self.used), length * reached[None, :])

    def _couple(self, rows: slice, couplings: Floats) -> None:
        self.matrix[rows, : self.n] += couplings
        self.matrix[: self.n, rows] += couplings.T

    def _append(self, vector: Tensor) -> None:
        self.basis.put(self.used, vector)
        self.matrix[self.used, :] = self.matrix[:, self.used] = 0.0
        self.pending += 1

    def multiply(self, which: int) -> Step:
        """Multiply pending row ``which``: it joins Q, and what is new in its product becomes the last pending row.

        The first pending row takes the place of the multiplied one, so all others move up by one.
        """
        self._swap(self.n + which, self.n)
        n, used = self.n, self.used
        product = self.operator.matvec(self.basis.row(n)).detach()
        # Always two passes: after one, each step multiplies what is left of non-orthogonality by 1/β, and on a flat
        # spectrum residuals then promise up to six times too much.
        rest, taken = self.basis.remove(product, used)
        length = norm(rest)
        *column, beta = torch.cat([taken, length[None]]).tolist()  # the only wait for the device in a step
        self.products += 1
        self._record(np.asarray(column), beta)
        self.n, self.pending = n + 1, self.pending - 1
        if used == self.operator.size or beta <= self.precision.floor * self.scale:
            return Step(column[n], 0.0)
        self._append(rest / length.to(rest.dtype))
        self.matrix[used, n] = self.matrix[n, used] = beta
        return Step(column[n], beta)

    def _record(self, column: Floats, beta: float) -> None:
        """Note T's new column; what was known of it already measures how symmetric the operator is."""
        length = float(np.hypot(np.linalg.norm(column), beta))
        if not np.isfinite(length):
            raise ArithmeticError(
                f"Product {self.products} of {type(self.operator).__name__} has entries that are not finite; "
                "look at the loss and its gradient at this point first."
            )
        self.scale = max(self.scale, length)
        if self.n and self.scale > 0 and self.known:
            gap = float(np.abs(column[: self.n] - self.matrix[: self.n, self.n]).max())
            self.asymmetry = max(self.asymmetry, gap / self.scale)
        self.matrix[: column.size, self.n] = self.matrix[self.n, : column.size] = column

    def _swap(self, first: int, second: int) -> None:
        if first != second:
            self.basis.swap(first, second)
            self.matrix[[first, second]] = self.matrix[[second, first]]
            self.matrix[:, [first, second]] = self.matrix[:, [second, first]]

    def restart(self, top: int, bottom: int) -> None:
        """Rotate Q to its ``top`` largest and ``bottom`` smallest Ritz vectors; pending rows stay as they are."""
        if top + bottom >= self.n:
            return
        self._settle_shelf()
        values, vectors = self.ritz()
        index = np.r_[0:top, self.n - bottom : self.n]
        transform, couplings = vectors[:, index], self.couplings @ vectors[:, index]
        old, new, pending = self.n, index.size, self.pending
        self.basis.rotate(torch.from_numpy(transform).to(self.operator.device))
        for i in range(pending):
            self.basis.put(new + i, self.basis.rows[old + i])
        shelf = self.shelf[:, :old] @ transform
        self.shelf[:], self.shelf[:, :new] = 0.0, shelf
        self.matrix[:] = 0.0
        np.fill_diagonal(self.matrix[:new, :new], values[index])
        self.matrix[new : new + pending, :new] = couplings
        self.matrix[:new, new : new + pending] = couplings.T
        self.n = new

    def combine(self, coefficients: Floats) -> Tensor:
        """Vectors (m, size) from coefficients (n, m) of the multiplied rows."""
        return self.basis.combine(torch.from_numpy(coefficients).to(self.operator.device))


def _default_fresh(operator: Operator) -> Fresh:
    def fresh(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(0x5EED + index)
        return torch.randn(operator.size, generator=generator, dtype=torch.float64)

    return fresh
