"""The output scale: one dial from lazy to rich, for any model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from torch import Tensor, nn

from workbench.zoo.nets import Activation, dense


class Scaled(nn.Module):
    """α (f(x; θ) - f(x; θ_0)): a model whose outputs are scaled, less what it gave when it was made.

    ``start`` is a frozen copy at θ_0. Large α is lazy: weights need to move by 1/α only, and the tangent kernel stays.
    The loss is (1/α²) ℓ(α ·, y), which for gradient descent is ℓ with a learning rate of lr / α²
    (:func:`workbench.zoo.scaled.rate`); without that factor α would only be another learning rate.

    Source: Chizat, Oyallon and Bach 2019.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"the output scale must be positive and finite; got alpha={alpha}.")
        super().__init__()
        self.alpha, self.model, self.start = alpha, model, copy.deepcopy(model).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scaled outputs, zero when the model is new."""
        return self.alpha * (self.model(inputs) - self.start(inputs))


def scaled(
    alpha: float,
    widths: Sequence[int] = (64, 64, 10),
    activation: Activation = "relu",
    bias: bool = True,
    seed: int = 0,
) -> Scaled:
    """A :func:`workbench.zoo.nets.dense` net under an output scale, from plain arguments that a record can hold."""
    return Scaled(dense(widths, activation, bias, seed), alpha)


def rate(lr: float, alpha: float) -> float:
    """The learning rate lr / α² that gives the loss (1/α²) ℓ(α ·, y) its gradient steps."""
    return lr / alpha**2
