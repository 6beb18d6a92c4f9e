"""Eigenvalues of a subject's Hessian by curvlinops' products and ARPACK: exact to rounding where they finish."""

from __future__ import annotations

import importlib
import time
from typing import Any

import numpy as np
from torch import Tensor, nn

from workbench.interop.pyhessian import Copied
from workbench.shell import precise
from workbench.subject import Subject

NAME = "curvlinops"


def largest(subject: Subject, top: int, seconds: float, seed: int = 0) -> tuple[float, ...]:
    """The ``top`` algebraically largest eigenvalues, fewer where the matrix is smaller, by ARPACK's own stop rule.

    Cost: each product is a forward-over-reverse derivative, built anew; ARPACK takes at least 20 of them.

    Raises:
        ImportError: curvlinops is not installed.
        TimeoutError: not done within ``seconds``, looked at before each product.
    """
    package, linalg = importlib.import_module("curvlinops"), importlib.import_module("scipy.sparse.linalg")
    wanted, deadline = min(top, subject.size - 1), time.monotonic() + seconds
    model = _Sum(Copied(subject.snapshot()))
    made: Any = package.HessianLinearOperator(
        model, _Total(), list(model.parameters()), model.inner, check_deterministic=False
    ).to_scipy()

    def product(vector: Any) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError("time was up")
        return made @ np.ravel(vector)

    with precise(subject.device):
        operator = linalg.LinearOperator(made.shape, matvec=product, dtype=made.dtype)
        start = np.random.default_rng(seed).standard_normal(subject.size).astype(made.dtype)
        found = linalg.eigsh(operator, k=wanted, which="LA", v0=start, return_eigenvectors=False)
    return tuple(sorted((float(v) / subject.total_weight for v in found), reverse=True))


class _Sum(nn.Module):
    """The present batch's contribution to the loss, as an output of one entry."""

    def __init__(self, inner: Copied) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """One entry, so that it looks like a batch of one."""
        return self.inner(inputs).reshape(1)


class _Total(nn.Module):
    """A loss that adds up what it is given."""

    reduction = "sum"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum."""
        return outputs.sum()
