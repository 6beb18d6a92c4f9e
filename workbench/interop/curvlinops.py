"""A subject's matrices as curvlinops' operators, their eigenvalues by ARPACK, and its operators for our probes."""

from __future__ import annotations

import importlib
import time
from typing import Any

import numpy as np
from torch import Tensor, nn

from workbench.interop.pyhessian import Copied
from workbench.operators.given import given
from workbench.shell import precise
from workbench.subject import Subject

NAME = "curvlinops"


def hessian(subject: Subject) -> Any:
    """curvlinops' HessianLinearOperator of the subject's mean loss, (size, size), in the subject's own order.

    It acts on copies of the weights, over the same frozen examples, chunks of any sizes weighted rightly. Cost: each
    product is a forward-over-reverse derivative, built anew.

    Raises:
        ImportError: curvlinops is not installed.
    """
    package = _package()
    model = _Sum(Copied(subject.snapshot()))
    return _made(package.HessianLinearOperator, model, _Total(subject.total_weight), model.inner)


def ggn(subject: Subject) -> Any:
    """curvlinops' GGNLinearOperator of the subject's mean loss; the Fisher matrix for cross-entropy and squared error.

    Raises:
        ImportError: curvlinops is not installed. ValueError: the subject was made with ``objective=``.
    """
    package = _package()
    model = _Outputs(Copied(subject.snapshot()))
    return _made(package.GGNLinearOperator, model, _OfOutputs(model.inner), model.inner)


def adopt(linear_operator: Any, name: str = "curvlinops operator") -> Subject:
    """A Subject whose Hessian is a symmetric operator of curvlinops, for all probes that look at curvature.

    Raises:
        TypeError, ValueError: as :func:`workbench.operators.given.given`.
    """
    return given(linear_operator, name)


def largest(subject: Subject, top: int, seconds: float, seed: int = 0) -> tuple[float, ...]:
    """The ``top`` algebraically largest eigenvalues, fewer where the matrix is smaller, by ARPACK's own stop rule.

    Cost: ARPACK takes at least 20 products.

    Raises:
        ImportError: curvlinops is not installed.
        TimeoutError: not done within ``seconds``, looked at before each product.
    """
    linalg: Any = importlib.import_module("scipy.sparse.linalg")
    wanted, deadline = min(top, subject.size - 1), time.monotonic() + seconds
    made: Any = hessian(subject).to_scipy()

    def product(vector: Any) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError("time was up")
        return made @ np.ravel(vector)

    with precise(subject.device):
        operator = linalg.LinearOperator(made.shape, matvec=product, dtype=made.dtype)
        start = np.random.default_rng(seed).standard_normal(subject.size).astype(made.dtype)
        found = linalg.eigsh(operator, k=wanted, which="LA", v0=start, return_eigenvectors=False)
    return tuple(sorted((float(v) for v in found), reverse=True))


def trap(subject: Subject) -> str:
    """What to say where its Hessian is known to be wrong: in LayerNorm's weights, with PyTorch 2.13; else nothing."""
    if not any(isinstance(m, nn.LayerNorm) and m.elementwise_affine for m in subject.module.modules()):
        return ""
    return (
        "curvlinops' Hessian products are forward-over-reverse, which PyTorch gets wrong in LayerNorm's weights: "
        "differences of up to a per cent are theirs"
    )


def _package() -> Any:
    try:
        return importlib.import_module("curvlinops")
    except ImportError as error:
        raise ImportError("curvlinops is not installed; pip install 'workbench[peers]' brings it.") from error


def _made(kind: Any, model: nn.Module, loss: nn.Module, batches: Copied) -> Any:
    # Its own check of determinism is ours, made by the self-test.
    return kind(model, loss, list(batches.parameters()), batches, check_deterministic=False)


class _Sum(nn.Module):
    """The present batch's contribution to the loss, as an output of one entry."""

    def __init__(self, inner: Copied) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """One entry, so that it looks like a batch of one."""
        return self.inner(inputs).reshape(1)


class _Total(nn.Module):
    """A loss that adds up what it is given, as shares of the whole weight."""

    reduction = "sum"

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum over the weight."""
        return outputs.sum() / self.weight


class _Outputs(nn.Module):
    """The present batch's outputs."""

    def __init__(self, inner: Copied) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        """The model at the copied weights."""
        return self.inner.subject.batch_outputs(self.inner.point, self.inner.batch)


class _OfOutputs(nn.Module):
    """The present batch's share of the mean loss as a function of its outputs; it has the targets itself."""

    reduction = "sum"

    def __init__(self, inner: Copied) -> None:
        super().__init__()
        self.held = (inner,)  # in a tuple, so that its parameters are not this module's

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Σ ℓ over the whole weight."""
        subject = self.held[0].subject
        return subject.output_loss(outputs, self.held[0].batch) / subject.total_weight
