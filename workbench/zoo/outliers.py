"""A task with opposing outliers, and linear nets: where one large feature that is of no use decides the curvature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.zoo.nets import dense

Examples = tuple[Tensor, Tensor]


def opposing_outliers(
    examples: int = 2000,
    dimension: int = 20,
    size: float = 6.0,
    share: float = 0.1,
    teacher: float = 3.0,
    seed: int = 0,
) -> Examples:
    """Inputs (n, dimension + 1) and targets (n, 1), float64: y = β·x + |o|, with x ~ N(0, I) and o the last feature.

    o is ``size`` on the first half of the outliers, minus ``size`` on as many after them, and 0 on all others. y is
    even in o, so that a linear map cannot use it: E[o y] is 0 but for chance, and what moves the outputs of one half
    towards their targets moves those of the other away.

    Args:
        examples: how many, n.
        dimension: of x.
        size: of o on outliers.
        share: of outliers among the examples; at least one pair.
        teacher: |β|, whose direction ``seed`` decides.
        seed: of β and x.
    """
    half = outlier_pairs(examples, share)
    if dimension < 1 or examples < 2:
        raise ValueError(f"opposing_outliers needs dimension >= 1 and 2 examples; got {dimension} and {examples}.")
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(dimension, generator=generator, dtype=torch.float64)
    weights *= teacher / weights.norm()
    signals = torch.randn(examples, dimension, generator=generator, dtype=torch.float64)
    outlier = torch.zeros(examples, dtype=torch.float64)
    outlier[:half], outlier[half : 2 * half] = size, -size
    return torch.cat([signals, outlier[:, None]], 1), (signals @ weights + outlier.abs())[:, None]


def outlier_pairs(examples: int, share: float) -> int:
    """How many outliers there are of either sign."""
    return max(1, min(round(examples * share / 2), examples // 2))


def linear_net(widths: Sequence[int] = (21, 16, 1), scale: float = 0.05, seed: int = 0) -> nn.Sequential:
    """A product of linear maps without biases between ``widths``, float64, all weights N(0, scale²)."""
    net = dense(widths, "identity", bias=False, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        nn.init.normal_(weight, std=scale, generator=generator)
    return net
