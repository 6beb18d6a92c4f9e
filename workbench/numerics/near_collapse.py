"""Features that stay near where they were: how far one more minimisation pulls each class together."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def contraction(weight: Tensor, decay: float, proximity: float) -> Tensor:
    """Factors β/(σ_k² + λ + β) by which deviations within classes shrink, (c + 1,), along W's singular directions.

    min over H of ½‖WH - Y‖² + λ/2 ‖H‖² + β/2 ‖H - H_0‖² is at H = (WᵀW + (λ+β)I)⁻¹ (WᵀY + βH_0), whose deviations from
    class means are those of H_0 times β(WᵀW + (λ+β)I)⁻¹, exactly. ``weight`` W is (c, d), ``decay`` λ, ``proximity`` β;
    σ_k descends, and the last factor is that outside of W's rows, β/(λ + β). nan where d leaves no such direction.
    Float64; cost one singular value decomposition. Source: Tirer, Huang and Niles-Weed 2023 (arXiv:2210.16658).

    Raises:
        ValueError: a ``proximity`` that is not positive, or a negative ``decay``.
    """
    if not (proximity > 0 and decay >= 0):
        raise ValueError(f"contraction needs proximity > 0 and decay >= 0; got {proximity!r} and {decay!r}.")
    rows, width = weight.shape
    squares = torch.full((rows + 1,), math.nan, dtype=torch.float64)
    values = torch.linalg.svdvals(weight.detach().double()).cpu()
    squares[: len(values)] = values**2
    squares[-1] = 0.0 if width > rows else math.nan
    return proximity / (squares + decay + proximity)
