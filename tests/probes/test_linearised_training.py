"""Linearised training: ordinary gradient descent on tangent features, models that are linear already, and laziness."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from workbench.probe import Reading
from workbench.probes.linearised_training import LinearisedTraining
from workbench.subject import Subject
from workbench.zoo.scaled import Scaled

GENERATOR = torch.Generator().manual_seed(0)
X, HELD = (torch.randn(n, 4, generator=GENERATOR).double() for n in (30, 20))
Y, HELD_Y = torch.arange(30) % 3, torch.arange(20) % 3


def build(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def trained(net: nn.Module, loss: str = "cross_entropy", y: Tensor = Y, **settings: float) -> Reading:
    return LinearisedTraining(**settings).run(Subject(net, (X, y), loss=loss, held_out=(HELD, HELD_Y)))  # type: ignore[arg-type]


def test_both_are_gradient_descent_on_the_network_and_on_its_tangent_features() -> None:
    net, rate, steps = build(), 0.3, 12
    data = trained(net, rate=rate, steps=steps, evaluations=4).data
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    features = jacrev(lambda p: functional_call(net, p, (torch.cat([X, HELD]),)))(params)
    flat = torch.cat([features[n].reshape(50, 3, -1) for n in params], dim=2)
    start, move = net(torch.cat([X, HELD])).detach(), torch.zeros(flat.shape[2], dtype=torch.float64)
    theta = {n: p.clone().requires_grad_() for n, p in params.items()}
    for _ in range(steps):
        z = start + flat @ move
        force = (z[:30].softmax(1) - nn.functional.one_hot(Y, 3)) / 30
        move = move - rate * torch.einsum("nc,ncp->p", force, flat[:30])
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(functional_call(net, theta, (X,)), Y), list(theta.values())
        )
        theta = {n: (p - rate * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), grads, strict=True)}
    linear, own = start + flat @ move, functional_call(net, theta, (torch.cat([X, HELD]),)).detach()
    for model, z in (("network", own), ("linearised", linear)):
        last = data.sel(model=model).isel(update=-1)
        assert float(last.train_loss) == pytest.approx(nn.functional.cross_entropy(z[:30], Y).item(), rel=1e-9)
        assert float(last.held_out_loss) == pytest.approx(nn.functional.cross_entropy(z[30:], HELD_Y).item(), rel=1e-9)
        right = (z[30:].argmax(1) == HELD_Y).double().mean().item()
        assert float(last.held_out_accuracy) == pytest.approx(right)
    wanted = float((own[:30] - linear[:30]).square().sum() / (own[:30] - start[:30]).square().sum())
    assert float(data.gap[-1]) == pytest.approx(wanted, rel=1e-8)
    assert float(data.displacement.sel(model="linearised")[-1]) == pytest.approx(float(move.norm()), rel=1e-9)


@pytest.mark.parametrize("batch", [0, 7])
def test_a_linear_model_is_its_own_linearisation(batch: int) -> None:
    torch.manual_seed(0)
    data = trained(nn.Linear(4, 3).double(), steps=20, batch=batch, rate=0.2).data
    both = data.train_loss.values
    assert both[0] == pytest.approx(both[1], rel=1e-10)
    assert both[0, -1] < both[0, 0]
    assert data.gap.values[1:] == pytest.approx(0, abs=1e-20)


def test_a_large_output_scale_is_lazy() -> None:
    y = nn.functional.one_hot(Y, 3).double()
    gaps = []
    for alpha in (0.3, 30.0):
        model = Scaled(build(32), alpha)
        found = LinearisedTraining(steps=40).run(Subject(model, (X, y), loss="half_mse"))
        gaps.append(float(found.data.gap[-1]))
        assert math.isnan(float(found.data.held_out_loss[0, 0]))
    assert gaps[1] < 1e-2 < gaps[0]


def test_the_rate_that_is_chosen_lets_the_linear_loss_fall_at_every_step() -> None:
    data = trained(build(), steps=60, evaluations=20).data
    losses = data.train_loss.sel(model="linearised").values
    assert (np.diff(losses) <= 1e-12).all()
    assert float(data.learning_rate) > 0
