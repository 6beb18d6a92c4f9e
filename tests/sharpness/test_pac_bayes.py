"""The noise that costs accuracy, against the normal distribution and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm as normal
from surfaces import double, last, point, quadratic
from torch import Tensor, nn

from workbench.sharpness.found import NotDefined
from workbench.sharpness.pac_bayes import FIRST, pac_bayes
from workbench.sharpness.scales import moved
from workbench.subject import Subject


class Signs(nn.Module):
    """Example i (one-hot) is decided by the sign of its own weight: as many independent noises as examples."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.double()[None])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def signs(weights: Tensor, targets: Tensor) -> Subject:
    data = (torch.eye(len(weights), dtype=torch.float64), targets.double()[:, None])
    return Subject(Signs(weights), data, loss="binary_cross_entropy_with_logits", max_examples=None)


def test_sigma_is_a_standard_deviation() -> None:
    """sign(w x) at w = x = 1 has accuracy Φ(1/σ), so σ* = 1/Φ⁻¹(0.9) = 0.78030415."""
    here = point(signs(torch.ones(1500), torch.ones(1500)))
    found = last(pac_bayes(here, 16, 0.1, aware=False))
    sigma, error = found.extra["pac_bayes_sigma"], found.extra["pac_bayes_sigma_error"]
    assert sigma == pytest.approx(1 / normal.ppf(0.9), rel=0.03)
    assert abs(sigma - 0.78030415) < 4 * error
    assert error < 0.05
    assert found.value == pytest.approx(1 / sigma**2, rel=1e-12)
    assert found.extra["pac_bayes_bound"] == pytest.approx(
        1500 / (4 * sigma**2) + math.log(1500 / sigma) + 10, rel=1e-12
    )


def test_noise_in_proportion_to_the_weights() -> None:
    """Noise of deviation √(σ² θ² + 1e-6) at θ = 0.002: P(wrong) = 0.1 where the deviation is θ/Φ⁻¹(0.9)."""
    here = point(signs(torch.full((1500,), 0.002), torch.ones(1500)))
    found = last(pac_bayes(here, 16, 0.1, aware=True))
    wanted = math.sqrt(0.78030415**2 - (1e-3 / 0.002) ** 2)
    assert found.radius == pytest.approx(wanted, rel=0.06)


def test_a_gain_in_accuracy_is_no_drop() -> None:
    """Nearly all examples are wrong by a hair: noise makes the accuracy grow by 0.4 at σ = 1."""
    weights = torch.cat([torch.ones(20), torch.full((380,), -0.1)])
    with pytest.raises(NotDefined, match=r"costs -0\.[34]"):
        last(pac_bayes(point(signs(weights, torch.ones(400))), 4, 0.1, aware=False))


def test_noise_that_always_costs_too_much_is_outside() -> None:
    with pytest.raises(NotDefined, match="1e-05"):
        last(pac_bayes(point(signs(torch.full((300,), 1e-9), torch.ones(300))), 4, 0.1, aware=False))


def test_the_drop_found_is_the_drop_of_the_same_draws_in_plain_pytorch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    x = double(90, 4)
    y = net(x).argmax(1)
    subject = Subject(net, (x, y), batch_size=32)
    here = point(subject)
    found = last(pac_bayes(here, 6, 0.1, aware=False))
    kept = [not name.startswith("1.") for name, _ in net.named_parameters()]
    assert moved(subject).sum() == sum(p.numel() for p, k in zip(net.parameters(), kept, strict=True) if k)
    drops = []
    for i in range(6):
        noise = found.radius * here.draw(FIRST + i)
        pieces = noise.split([p.numel() for p in net.parameters()])
        moved_weights = {
            name: p.detach() + piece.view_as(p) * k
            for (name, p), piece, k in zip(net.named_parameters(), pieces, kept, strict=True)
        }
        drops.append(1 - float((torch.func.functional_call(net, moved_weights, x).argmax(1) == y).double().mean()))
    assert sum(drops) / 6 == pytest.approx(0.1, abs=0.0051)


def test_only_classifiers_have_it() -> None:
    with pytest.raises(NotDefined, match="classes"):
        next(pac_bayes(point(quadratic(torch.eye(2, dtype=torch.float64), 1.0, 1.0)), 4, 0.1, aware=False))
