"""Any symmetric matrix as a Subject: the quadratic that has it as its Hessian, for probes that look at curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.numerics.basis import dot, norm
from workbench.numerics.operator import Operator
from workbench.numerics.sampling import Draw
from workbench.subject import Subject

ASYMMETRIC = 1e-4
"""The largest |u·Av - v·Au| over the larger product's length at which a matrix counts as symmetric."""
Apply = Callable[[Tensor], Tensor]


def given(matrix: Any, name: str = "matrix") -> Subject:
    """A Subject with the loss ½ θᵀAθ at θ = 0, whose Hessian is the matrix A, whatever it is known by.

    ``HessianSpectrum().run(given(A))`` then measures A; a Hessian product costs one product with A. Loss and gradient
    are zero.

    Args:
        matrix: a Workbench Operator, a square tensor or array, SciPy's or curvlinops' linear operator: anything with a
            ``shape`` that multiplies vectors by ``@``. It must be symmetric.
        name: what readings call it.

    Raises:
        TypeError: nothing that multiplies vectors.
        ValueError: not square, or not symmetric beyond rounding. Cost: two products.
    """
    size, dtype, device = _form(matrix)
    apply = _applied(matrix, dtype, device)
    first, second = (Draw(0, "given", size, dtype, device)(i) for i in (0, 1))
    images = apply(first), apply(second)
    apart = abs(float(dot(second, images[0])) - float(dot(first, images[1])))
    scale = max(float(norm(second) * norm(images[0])), float(norm(first) * norm(images[1])))
    if apart > ASYMMETRIC * scale:
        raise ValueError(
            f"{name} is not symmetric: u·Av and v·Au differ by {apart / scale:.1e} of their size for random vectors; "
            "look at AᵀA, or at (A + Aᵀ)/2."
        )
    point = _Point(size, dtype, device, images[0], name)
    return Subject(point, [torch.zeros(1, 1, dtype=dtype, device=device)], objective=_Bowl(apply), reduction="mean")


class _Point(nn.Module):
    """θ = 0; the image of one vector tells matrices apart in fingerprints."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, image: Tensor, name: str) -> None:
        super().__init__()
        self.name = name
        self.theta = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self.register_buffer("image", image.clone())

    def extra_repr(self) -> str:
        return self.name


class _Bowl:
    """½ θᵀAθ as an objective."""

    def __init__(self, apply: Apply) -> None:
        self.apply, self.__name__ = apply, "quadratic"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return _Half.apply(model.theta, self.apply)  # type: ignore[no-any-return]


class _Half(torch.autograd.Function):
    """½ θ·Aθ with the gradient Aθ, so that a second derivative takes one product."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, apply: Apply) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.operator = apply
        return torch.dot(theta, _times(apply, theta)) / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors
        return grads[0] * _Product.apply(theta, ctx.operator), None  # type: ignore[operator]


class _Product(torch.autograd.Function):
    """A v, whose derivative is A again."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, apply: Apply) -> Tensor:
        ctx.operator = apply
        return _times(apply, vector)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Product.apply(grads[0], ctx.operator), None  # type: ignore[return-value]


def _times(apply: Apply, vector: Tensor) -> Tensor:
    """A v; nothing is asked of a foreign matrix at v = 0, where the subject stands and memory is measured."""
    return apply(vector) if bool(vector.any()) else torch.zeros_like(vector)


def _form(matrix: Any) -> tuple[int, torch.dtype, torch.device]:
    """Size, precision and place of what may be NumPy's or PyTorch's."""
    if isinstance(matrix, Operator):
        return matrix.size, matrix.dtype, torch.device(matrix.device)
    shape = tuple(getattr(matrix, "shape", ()))
    if not hasattr(matrix, "__matmul__") or len(shape) != 2:
        raise TypeError(f"given() wants something that multiplies vectors by @; got {type(matrix).__name__}.")
    if shape[0] != shape[1]:
        raise ValueError(f"given() wants a square matrix; got one of shape {shape}.")
    dtype = getattr(matrix, "dtype", torch.float64)
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32 if np.dtype(dtype) == np.float32 else torch.float64
    device = getattr(matrix, "device", torch.device("cpu"))
    return int(shape[0]), dtype, device if isinstance(device, torch.device) else torch.device("cpu")


def _applied(matrix: Any, dtype: torch.dtype, device: torch.device) -> Apply:
    """Products in the matrix's own precision, given back in the vector's."""
    if isinstance(matrix, Operator | Tensor) or hasattr(matrix, "to_scipy"):  # the last is curvlinops'
        return lambda v: (matrix @ v.detach().to(device, dtype)).to(v)
    return lambda v: torch.from_numpy(np.asarray(matrix @ v.detach().cpu().to(dtype).numpy())).to(v)
