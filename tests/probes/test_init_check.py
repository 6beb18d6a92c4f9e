"""Checks of initialisations: orthonormal nets on whitened data, Fixup nets, and a first update against a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.probes.init_check import InitCheck
from workbench.subject import Subject


def test_an_orthonormal_linear_net_on_whitened_data_passes_lsuv_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))).double()
    for layer in net:
        nn.init.orthogonal_(layer.weight)
    x = torch.randn(64, 8).double()
    x = torch.linalg.qr(x - x.mean(0))[0] * 8
    data = InitCheck().run(Subject(net, (x, torch.arange(64) % 8))).data
    assert data.output_std.values == pytest.approx(np.ones(3))
    assert data.lsuv.values.all()
    assert data.orthogonality.values == pytest.approx(np.zeros(3), abs=1e-12)
    assert data.gain.values == pytest.approx(np.ones(3))
    with torch.no_grad():
        net[1].weight.mul_(1.5)
    again = InitCheck().run(Subject(net, (x, torch.arange(64) % 8))).data
    assert again.output_std.values == pytest.approx([1.0, 1.5, 1.5])
    assert again.lsuv.values.tolist() == [True, False, False]


class Block(nn.Module):
    """x plus two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


def fixup(branches: int, width: int = 60) -> Subject:
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(width) for _ in range(branches)), nn.Linear(width, 3)).double()
    for name, p in net.named_parameters():
        if name.endswith("one.weight"):
            nn.init.normal_(p, std=math.sqrt(2 / width) / math.sqrt(branches))
        else:
            nn.init.zeros_(p)
    return Subject(net, (torch.randn(12, width).double(), torch.arange(12) % 3))


@pytest.mark.parametrize(("branches", "scale"), [(9, 1 / 3), (16, 1 / 4)])
def test_a_fixup_net_passes_and_gives_zero(branches: int, scale: float) -> None:
    data = InitCheck(residual="*.two").run(fixup(branches)).data
    assert data.fixup.values.all()
    assert data.fixup_scale.values[0] == pytest.approx(math.sqrt(2) * scale)
    assert data.zero.values.sum() == branches + 1
    assert float(data.output_rms) == 0
    assert float(data.branch_share) == 0


def test_branches_that_count_and_names_that_do_not_exist() -> None:
    subject = fixup(4)
    nn.init.normal_(dict(subject.module.named_parameters())["4.weight"].data)
    nn.init.normal_(dict(subject.module.named_parameters())["0.two.weight"].data)
    data = InitCheck(residual="*.two").run(subject).data
    assert float(data.branch_share) > 0
    assert data.fixup.sel(layer="0.two").item() is False
    assert data.fixup.sel(layer="1.two").item() is True
    with pytest.raises(ValueError, match="names no layer"):
        InitCheck(residual="nothing").run(subject)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_the_first_update_against_torchs_optimizers(rule: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(10, 4).double(), torch.arange(10) % 3
    data = InitCheck(rule=rule, learning_rate=0.05).run(Subject(net, (x, y))).data
    before, start = [p.detach().clone() for p in net.parameters()], net(x).detach()
    optimizer = (torch.optim.SGD if rule == "sgd" else torch.optim.Adam)(net.parameters(), lr=0.05)
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    sizes = [float((p - b).norm() / b.norm()) for p, b in zip(net.parameters(), before, strict=True) if p.ndim == 2]
    assert data["update"].values == pytest.approx(sizes, rel=1e-6)
    assert float(data.output_change) == pytest.approx((net(x) - start).square().mean().sqrt().item(), rel=1e-6)
    assert float(data.loss_after) == pytest.approx(float(nn.functional.cross_entropy(net(x), y)), rel=1e-9)
