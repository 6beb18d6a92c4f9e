"""Kernel ridge regression at many strengths from one decomposition, each example left out exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KernelRidge:
    """f(x) = K(x, X) (K + δ I)⁻¹ Y for a kernel of n examples and each strength δ, without an offset.

    The kernel has ``outputs`` C' rows for each example: 1 where all columns of Y (n, q) share an n x n kernel, else q,
    and the rows of Y are then one vector. All in float64. Cost: one decomposition, (n C')³; then (n C')² a strength.
    """

    values: Tensor
    basis: Tensor
    crossed: Tensor
    examples: int
    outputs: int
    width: int

    @classmethod
    def of(cls, kernel: Tensor, targets: Tensor) -> KernelRidge:
        """Of a kernel (n, C', n, C') and targets (n, q), C' = 1 or q."""
        n, outputs = kernel.shape[:2]
        values, basis = torch.linalg.eigh(kernel.reshape(n * outputs, n * outputs).double())
        crossed = basis.T @ targets.double().reshape(n * outputs, -1)
        return cls(values.clamp_min(0), basis, crossed, n, outputs, targets.shape[1])

    @property
    def scale(self) -> float:
        """The mean eigenvalue: what strengths are measured in."""
        return float(self.values.mean())

    def coefficients(self, strength: float) -> Tensor:
        """(K + δ I)⁻¹ Y, (n C', q / C')."""
        return self.basis @ (self.crossed / (self.values + strength)[:, None])

    def predicted(self, across: Tensor, strength: float) -> Tensor:
        """The predictions (m, q) for examples with kernel (m, C', n, C') to those fitted."""
        m = len(across)
        rows = across.reshape(m * self.outputs, self.examples * self.outputs).double()
        return (rows @ self.coefficients(strength)).reshape(m, self.width)

    def residuals(self, strength: float) -> Tensor:
        """y - ŷ (n, q) of each example, where ŷ is fitted to all the others, exactly.

        With A = (K + δ I)⁻¹ and its C' x C' blocks on the diagonal: A_ii⁻¹ (A Y)_i. An example is left out with all of
        its outputs. Source: Craven and Wahba 1978.
        """
        rows = self.basis.view(self.examples, self.outputs, -1)
        blocks = torch.einsum("icr,r,idr->icd", rows, 1 / (self.values + strength), rows)
        own = self.coefficients(strength).view(self.examples, self.outputs, -1)
        return torch.linalg.solve(blocks, own).reshape(self.examples, self.width)
