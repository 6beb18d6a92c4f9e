"""Nets trained side by side: step for step those of a loop with PyTorch's own optimizer and loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from workbench.zoo.nets import conv, dense
from workbench.zoo.stacked import TOGETHER, Stack

RATES = [0.3 * 0.8**k for k in range(TOGETHER + 2)]


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_each_net_takes_the_steps_that_it_takes_alone(kind: str) -> None:
    torch.manual_seed(0)
    build = {"dense": lambda s: dense((64, 6, 5), seed=s), "conv": lambda s: conv((2, 3), 5, seed=s)}[kind]
    nets = [build(seed).double() for seed in range(len(RATES))]
    alone, x = [copy.deepcopy(net) for net in nets], torch.randn(30, 1, 8, 8).double()
    y = torch.randint(5, (30,))
    before = [p.clone() for net in nets for p in net.parameters()]
    stack, loops = (
        Stack(nets, RATES),
        [torch.optim.SGD(n.parameters(), lr=r) for n, r in zip(alone, RATES, strict=True)],
    )
    for _ in range(5):
        rows = torch.randint(30, (len(nets), 4))
        stack.descend(x[rows], y[rows])
        for net, optimizer, own in zip(alone, loops, rows, strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[own]), y[own]).backward()
            optimizer.step()
    wanted = [functional.cross_entropy(net(x), y).item() for net in alone]
    assert stack.losses(x, y).tolist() == pytest.approx(wanted, rel=1e-12)
    for k, net in enumerate(alone):
        for p, q in zip(stack.net(k).parameters(), net.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(before, (p for net in nets for p in net.parameters()), strict=True))


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(ValueError, match="2 nets, 1 rates"):
        Stack([dense(), dense()], [0.1])
    with pytest.raises(ValueError, match="buffers"):
        Stack([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))], [0.1])
