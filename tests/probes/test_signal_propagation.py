"""Signal propagation: moments of a rectified normal, growth through identity skips, wide nets against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.probes.signal_propagation import SignalPropagation
from workbench.subject import Subject


def wide(depth: int, gain: float, width: int = 300, activation: type[nn.Module] = nn.Tanh) -> Subject:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(depth):
        parts += [nn.Linear(width, width), activation()]
    net = nn.Sequential(*parts, nn.Linear(width, 3)).double()
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            nn.init.normal_(module.bias, std=0.1)
    return Subject(net, (torch.randn(40, width).double(), torch.arange(40) % 3))


@pytest.mark.parametrize("gain", [0.7, 1.3])
def test_a_wide_net_follows_mean_field_theory(gain: float) -> None:
    data = SignalPropagation().run(wide(6, gain)).data
    assert data.predicted_second_moment.values[:-1] == pytest.approx(data.second_moment.values[:-1], rel=0.12)
    assert data.predicted_gradient.values == pytest.approx(data.gradient_second_moment.values, rel=0.25)
    flow = data.gradient_second_moment.values[0:-1:2]
    assert data.chi.values[2:-1:2] == pytest.approx(flow[:-1] / flow[1:], rel=0.2)


def test_a_rectified_normal() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(50, 2)).double()
    x = torch.randn(4000, 50).double()
    data = SignalPropagation(layers="1", examples=4000).run(
        Subject(net, (x, torch.arange(4000) % 2), max_examples=None)
    )
    found = data.data.isel(layer=0)
    assert float(found.channel_mean_square) == pytest.approx(1 / (2 * math.pi), abs=0.005)
    assert float(found.channel_variance) == pytest.approx(0.5 - 1 / (2 * math.pi), abs=0.005)
    assert float(found.second_moment) == pytest.approx(0.5, abs=5 * float(found.second_moment_error))
    assert float(found.correlation) == pytest.approx(1 / math.pi, abs=0.01)
    assert float(found.zeros) == pytest.approx(0.5, abs=0.01)


def test_examples_without_a_signal_have_no_cosine() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4, 3))
        net[0].bias.fill_(0.0)
    x = torch.tensor([[1.0, 0, 0], [1, 1, 0], [-1, -1, -1], [0, 0, 2]]).double()  # the third is silenced by the ReLU
    data = SignalPropagation(layers="1").run(Subject(net, (x, torch.arange(4) % 2))).data
    assert float(data.correlation[0]) == pytest.approx((math.sqrt(0.5) + 0 + 0) / 3)
    with torch.no_grad():
        net[0].bias.fill_(-9.0)
    data = SignalPropagation(layers="1").run(Subject(net, (x, torch.arange(4) % 2))).data
    assert np.isnan(data.correlation[0])
    assert data.second_moment[0] == 0


class Residual(nn.Module):
    """x plus a branch that is independent noise of variance one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        unit = x / x.square().mean().sqrt()
        return x + self.branch(unit)


def test_variance_after_l_identity_skips_is_l_plus_one_and_images_have_channels() -> None:
    torch.manual_seed(0)
    blocks = [Residual(200) for _ in range(4)]
    for block in blocks:
        nn.init.normal_(block.branch.weight, std=1 / math.sqrt(200))
    net = nn.Sequential(*blocks, nn.Linear(200, 2)).double()
    subject = Subject(net, (torch.randn(200, 200).double(), torch.arange(200) % 2))
    data = SignalPropagation(layers="0,1,2,3").run(subject).data
    assert data.channel_variance.values == pytest.approx(np.arange(2, 6), rel=0.1)
    assert np.isnan(data.predicted_second_moment.values).all()


def test_channels_and_gradients_against_loops() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2)).double()
    x, y = torch.randn(7, 2, 5, 5).double(), torch.arange(7) % 2
    data = SignalPropagation(layers="0,3").run(Subject(net, (x, y), batch_size=3)).data
    out = net[0](x).detach()
    mean, variance = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
    assert float(data.channel_mean_square[0]) == pytest.approx(float(mean.square().mean()))
    assert float(data.channel_variance[0]) == pytest.approx(float(variance.mean()))
    logits = net(x).detach()
    slope = logits.softmax(1) - nn.functional.one_hot(y, 2)
    assert float(data.gradient_second_moment[1]) == pytest.approx(float(slope.square().mean()))


def test_batch_statistics_have_no_gradients_of_examples() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    subject = Subject(net, (torch.randn(12, 3).double(), torch.arange(12) % 2), norm="batch", batch_size=6)
    reading = SignalPropagation().run(subject)
    assert np.isnan(reading.data.gradient_second_moment.values).all()
    assert float(reading.data.channel_variance[1]) == pytest.approx(1.0, rel=1e-3)
    assert np.isfinite(reading.data.predicted_second_moment.values[:1]).all()
