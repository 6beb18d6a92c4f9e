"""Ways to push a direction of the parameters through a chunk's outputs: J v, with J the Jacobian of the outputs.

``"graph"``: twice reverse, as the derivative of w ↦ Jᵀw along v; works wherever the Hessian does, needs a kept graph.
``"forward"``: forward-mode differentiation anew for each product; no graph at all. ``"linearised"``: the outputs'
derivative traced once, so that a product computes only what depends on v. ``"compiled"``: that, compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from workbench.operators.graphs import nodes, pull, zeros_like

Way = Literal["graph", "forward", "linearised", "compiled"]
Outputs = Callable[[Sequence[Tensor]], Tensor]
"""A chunk's outputs as a function of the parameters."""
SEED = 20
"""Of the direction on which two ways are compared."""


class Push:
    """J v for the directions v of a chunk, given as tensors in the parameters' shapes."""

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """J v, in the shape of the outputs."""
        raise NotImplementedError

    def roots(self) -> Iterable[Tensor]:
        """The tensors that are held, or whose graphs are."""
        return ()


class Graphed(Push):
    """The derivative of w ↦ Jᵀw along v, on a graph that is kept."""

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor]) -> None:
        self.weights = torch.zeros_like(outputs, requires_grad=True)
        self.pulled = pull([outputs], leaves, [self.weights], differentiable=True) or zeros_like(leaves)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        moved = pull(self.pulled, [self.weights], parts)
        return moved[0] if moved else torch.zeros_like(self.weights)

    def roots(self) -> Iterable[Tensor]:
        return self.pulled


class Forward(Push):
    """Forward-mode differentiation of the outputs: two to three forward passes each time."""

    def __init__(self, outputs: Outputs, leaves: Sequence[Tensor]) -> None:
        self.outputs, self.here = outputs, [p.detach() for p in leaves]

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, part) for p, part in zip(self.here, parts, strict=True)]
            found: Any = forward_ad.unpack_dual(self.outputs(duals))
            return torch.zeros_like(found.primal) if found.tangent is None else found.tangent


class Linearised(Push):
    """The outputs' derivative as a program of its own, traced once (the cost of 20 to 400 products)."""

    def __init__(self, outputs: Outputs, leaves: Sequence[Tensor], compiled: bool = False) -> None:
        with warnings.catch_warnings():  # PyTorch's constant folding speaks to its own developers
            warnings.simplefilter("ignore", UserWarning)
            _, self._push = torch.func.linearize(lambda *here: outputs(here), *(p.detach() for p in leaves))
        self._held = self._constants()
        if compiled:
            self._push = torch.compile(self._push)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return self._push(*parts)

    def roots(self) -> Iterable[Tensor]:
        return self._held

    def _constants(self) -> list[Tensor]:
        cells = [cell.cell_contents for cell in getattr(self._push, "__closure__", None) or ()]
        programs = [held for held in cells if isinstance(held, nn.Module)]
        return [t for program in programs for t in (*program.parameters(), *program.buffers())]


def made(way: Way, outputs: Outputs, leaves: Sequence[Tensor]) -> Push:
    """The push of a chunk, unchecked."""
    if way == "graph":
        return Graphed(outputs(leaves), leaves)
    return Forward(outputs, leaves) if way == "forward" else Linearised(outputs, leaves, way == "compiled")


def suggested(outputs: Tensor) -> Way:
    """Forward mode where the outputs come through a convolution, whose second derivative on a graph wastes a third.

    PyTorch's double backward of a convolution computes the derivatives in input and weights even where nobody asks.
    """
    return "forward" if any(node.name().startswith("Convolution") for node in nodes([outputs])) else "graph"


def checked(way: Way, outputs: Outputs, leaves: Sequence[Tensor], graphed: Push) -> Push:
    """The push of a chunk, compared with the one on a graph along one direction.

    Raises:
        RuntimeError: an operation without forward mode, or a derivative that differs by more than √ε.
    """
    try:
        push = made(way, outputs, leaves)
        push(_directions(leaves))
        found = push(_directions(leaves))  # a traced LSTM is right once: later calls find its constants overwritten
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as problem:
        raise RuntimeError(
            f'the outputs cannot be differentiated the way "{way}"; use Plan(push=None): {str(problem).splitlines()[0]}'
        ) from problem
    wanted = graphed(_directions(leaves))
    error = float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))
    if not error <= torch.finfo(wanted.dtype).eps ** 0.5:
        raise RuntimeError(
            f'differentiating the outputs the way "{way}" gives a derivative that differs by {error:.1e} from reverse '
            "mode's: an operation here has a wrong forward-mode formula, or cannot be traced: use Plan(push=None)."
        )
    return push


def _directions(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Normal numbers from a generator of their own, drawn on the CPU so that devices agree."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in leaves]
