"""A tangent kernel's rows projected at random, with the error that this makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sketch:
    """Features (n C, k) whose inner products estimate the kernel without bias; good for cosines and single entries.

    A kernel of few large eigenvalues keeps its entries but not its small eigenvalues: take products for spectra.
    """

    features: Tensor

    def kernel(self) -> Tensor:
        """The estimate, (n C, n C)."""
        return self.features @ self.features.T

    @property
    def norms(self) -> tuple[float, float]:
        """Unbiased trace and Frobenius norm (that, squared) of the kernel."""
        gram = self.features.T.double() @ self.features.double()
        k, trace = len(gram), float(gram.trace())
        square = float(gram.square().sum())
        # E‖K̂‖² = (1 + 1/k) ‖K‖² + (tr K)²/k, and E(tr K̂)² = (tr K)² + 2 ‖K‖²/k
        found = (square - trace**2 / k) / (1 + 1 / k - 2 / k**2)
        return trace, max(found, 0.0) ** 0.5

    @property
    def relative_error(self) -> float:
        """Expected ‖K̂ - K‖ / ‖K‖ = √((‖K‖² + (tr K)²)/k) / ‖K‖ (Frobenius norms), from the estimate's own norms."""
        trace, norm = self.norms
        k = self.features.shape[1]
        return ((norm**2 + trace**2) / k) ** 0.5 / norm if norm > 0 else float("inf")
