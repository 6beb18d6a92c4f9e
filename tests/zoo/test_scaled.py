"""The output scale: the closed form of a squared weight, and distances that shrink with 1/α."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.zoo.scaled import Scaled, rate, scaled


class Square(nn.Module):
    """w², which scaled is α (w² - 1) from w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w**2 * torch.ones_like(x)


@pytest.mark.parametrize(("alpha", "moved"), [(0.5, 0.73205081), (1.0, 0.41421356), (10.0, 0.04880885)])
def test_gradient_descent_on_a_square_ends_where_the_flow_does(alpha: float, moved: float) -> None:
    model = Scaled(Square(), alpha)
    optimizer = torch.optim.SGD(model.model.parameters(), lr=rate(0.05, alpha))
    for _ in range(2000):
        optimizer.zero_grad()
        (0.5 * (model(torch.ones(1, 1, dtype=torch.float64)) - 1) ** 2).sum().backward()
        optimizer.step()
    assert model.model.w.item() - 1 == pytest.approx(moved, rel=1e-6)
    assert model.model.w.item() == pytest.approx(math.sqrt(1 + 1 / alpha), rel=1e-6)


def test_outputs_begin_at_zero_and_weights_move_by_one_over_alpha() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 1, generator=generator)
    distances, alphas = [], (4.0, 16.0, 64.0)
    for alpha in alphas:
        model = scaled(alpha, (6, 64, 1), "tanh")
        assert torch.equal(model(x), torch.zeros(32, 1))
        optimizer = torch.optim.SGD(model.model.parameters(), lr=rate(0.2, alpha))
        for _ in range(300):
            optimizer.zero_grad()
            (0.5 * (model(x) - y) ** 2).mean().backward()
            optimizer.step()
        pairs = zip(model.model.parameters(), model.start.parameters(), strict=True)
        distances.append(math.sqrt(sum(float((p - q).square().sum()) for p, q in pairs)))
    assert np.polyfit(np.log(alphas), np.log(distances), 1)[0] == pytest.approx(-1, abs=0.1)
    assert all(not p.requires_grad for p in model.start.parameters())


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        scaled(alpha)
