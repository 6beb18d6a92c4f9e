"""A quadratic polynomial of many inputs, and a two-layer net whose output scale decides whether it learns features."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

Examples = tuple[Tensor, Tensor]


def polynomial(dimension: int = 30, train: int = 300, test: int = 1000, seed: int = 0) -> tuple[Examples, Examples]:
    """(train, test) of y = (β·x)² / (2 D), x ~ N(0, I_D), |β|² = D; inputs (n, D), targets (n, 1), float32.

    The teacher β and all examples come from ``seed``.
    """
    if min(dimension, train, test) < 1:
        raise ValueError(f"polynomial needs sizes of at least 1; got {dimension}, {train}, {test}.")
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(dimension, generator=generator)
    teacher *= math.sqrt(dimension) / teacher.norm()
    inputs = torch.randn(train + test, dimension, generator=generator)
    targets = ((inputs @ teacher) ** 2 / (2 * dimension))[:, None]
    return (inputs[:train], targets[:train]), (inputs[train:], targets[train:])


class ScaledSum(nn.Module):
    """f(x) = (α/N) Σ_i φ(w_i·x / √D) minus its value at the initial weights, φ(h) = h + ε h²/2.

    The output scale α decides how far weights must move to fit: large α is lazy (the tangent kernel stays), small α
    learns features. ε is how much of a quadratic the initial features see (Kumar et al. 2024, arXiv:2310.06110).
    """

    hidden: nn.Linear
    start: Tensor

    def __init__(self, dimension: int, width: int, alpha: float, curvature: float) -> None:
        super().__init__()
        self.alpha, self.curvature = alpha, curvature
        self.hidden = cast("nn.Linear", nn.utils.skip_init(nn.Linear, dimension, width, bias=False))
        self.register_buffer("start", torch.empty(width, dimension))

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (n, 1) of inputs (n, D)."""
        scaled = inputs / math.sqrt(inputs.shape[1])
        return self._sum(self.hidden(scaled)) - self._sum(scaled @ self.start.T)

    def _sum(self, h: Tensor) -> Tensor:
        return self.alpha * (h + self.curvature / 2 * h * h).mean(1, keepdim=True)


def scaled_sum(
    dimension: int = 30, width: int = 300, alpha: float = 1.0, curvature: float = 0.5, seed: int = 0
) -> ScaledSum:
    """A :class:`ScaledSum` net with weights N(0, 1) of its own seed.

    Args:
        dimension: of the inputs.
        width: number of hidden units N.
        alpha: output scale, > 0.
        curvature: ε, the quadratic part of φ.
        seed: of the initial weights.
    """
    if alpha <= 0 or min(dimension, width) < 1:
        raise ValueError(f"scaled_sum needs alpha > 0 and sizes >= 1; got {alpha}, {dimension}, {width}.")
    net = ScaledSum(dimension, width, alpha, curvature)
    nn.init.normal_(net.hidden.weight, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        net.start.copy_(net.hidden.weight)
    return net
