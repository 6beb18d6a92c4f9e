"""The linearised gap: a closed form, functorch's jvp, linear models, and statistics that move on their own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from workbench.probe import Reading
from workbench.probes.linearised_gap import LinearisedGap
from workbench.several import Pair
from workbench.subject import Subject

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(40) % 3


class Square(nn.Module):
    """f(w) = α (w² - 1), whatever the input."""

    def __init__(self, alpha: float, w: float) -> None:
        super().__init__()
        self.w, self.alpha = nn.Parameter(torch.tensor([w], dtype=torch.float64)), alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (self.w**2 - 1) * torch.ones_like(x[:, :1])


def build(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def near(net: nn.Module, size: float = 0.2) -> nn.Module:
    """The same net a random step away."""
    generator, other = torch.Generator().manual_seed(5), copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return other


def gap(one: nn.Module, two: nn.Module, y: Tensor = Y, loss: str = "cross_entropy", points: int = 4) -> Reading:
    return LinearisedGap(points=points).run(Pair(Subject(one, (X, y), loss=loss), Subject(two, (X, y), loss=loss)))


@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_of_a_square_it_is_the_closed_form(alpha: float) -> None:
    w = math.sqrt(1 + 1 / alpha)
    found = gap(Square(alpha, 1.0), Square(alpha, w), torch.ones(40, 1).double(), "half_mse")
    assert float(found.data.gap) == pytest.approx(((w - 1) / (w + 1)) ** 2, rel=1e-10)
    assert float(found.data.gap_error) == pytest.approx(0, abs=1e-12)
    ways = 1 + found.data.part.values * (w - 1)
    assert found.data.curve.values == pytest.approx(((ways - 1) / (ways + 1)) ** 2, rel=1e-9)
    linear = alpha * 2 * (w - 1)
    assert float(found.data.loss_gap) == pytest.approx(0.5 * (linear - 1) ** 2, rel=1e-9, abs=1e-20)


def test_of_a_network_it_is_functorchs_jvp() -> None:
    one, two = build(), near(build())
    start, end = ({n: p.detach() for n, p in m.named_parameters()} for m in (one, two))
    f0, push = jvp(lambda p: functional_call(one, p, (X,)), (start,), ({n: end[n] - start[n] for n in start},))
    f, linear = two(X).detach(), f0 + push
    found = gap(one, two).data
    assert float(found.gap) == pytest.approx(float((f - linear).square().sum() / (f - f0).square().sum()), rel=1e-10)
    wanted = [nn.functional.cross_entropy(z, Y).item() for z in (linear, f, f0)]
    assert [float(found[n]) for n in ("linearised_loss", "train_loss", "start_loss")] == pytest.approx(
        wanted, rel=1e-10
    )
    assert float(found.agreement) == pytest.approx((f.argmax(1) == linear.argmax(1)).double().mean().item())
    halves = [(float(found.curve[-1]), float(found.gap))]
    assert halves[0][0] == pytest.approx(halves[0][1])


def test_a_model_that_is_linear_in_what_moved_has_no_gap() -> None:
    one = build()
    two = copy.deepcopy(one)
    with torch.no_grad():
        two[2].weight.add_(1.0)
        two[2].bias.sub_(0.5)
    found = gap(one, two).data
    assert float(found.gap) < 1e-25
    assert float(found.tangent_share) == pytest.approx(1)
    assert float(found.loss_gap) == pytest.approx(0, abs=1e-12)
    assert float(found.agreement) == 1


def test_the_gap_grows_with_the_square_of_a_small_step() -> None:
    found = gap(build(), near(build(), 0.01), points=4).data
    assert found.curve.values / found.part.values**2 == pytest.approx(np.full(4, float(found.gap)), rel=0.1)


def test_the_error_covers_what_other_examples_give() -> None:
    one, two = build(), near(build(), 0.5)
    x = torch.randn(20000, 4, generator=torch.Generator().manual_seed(3)).double()
    y = torch.arange(20000) % 3
    truth = LinearisedGap(points=2).run(Pair(*(Subject(m, (x, y), max_examples=None) for m in (one, two))))
    inside = []
    for rows in x[:16000].split(400):
        few = LinearisedGap(points=2).run(Pair(*(Subject(m, (rows, y[:400])) for m in (one, two)))).data
        inside.append(abs(float(few.gap) - float(truth.data.gap)) <= 2 * float(few.gap_error))
    assert np.mean(inside) > 0.8


def test_running_statistics_that_moved_are_told() -> None:
    one, two = build(norm=True), near(build(norm=True))
    with torch.no_grad():
        two[1].running_mean.add_(0.3)
    found = gap(one, two)
    assert any("1.running_mean" in note for note in found.notes)
    assert not any("1.running_mean" in note for note in gap(one, near(one)).notes)


def test_two_functions_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="different examples"):
        LinearisedGap().run(Pair(Subject(build(), (X, Y)), Subject(build(1), (X.flip(0), Y))))
