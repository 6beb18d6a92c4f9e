"""The self-test passes on every sound net, kinks included, and names the leg that an unsound one fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import SMALL, small
from torch import Tensor, nn

from workbench.operators.curvature import Curvature
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.hessian import Hessian
from workbench.probes.spectrum import HessianSpectrum
from workbench.selftest import NotAHessian, SelfTest, self_test
from workbench.subject import Subject


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Detached(torch.autograd.Function):
    """sin, whose backward multiplies by a cosine that knows nothing of where it came from: right once, wrong twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.slope


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Any, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 12), nn.Linear(12, 3), between
        for seed, p in enumerate(self.parameters()):
            p.data = double(*p.shape, seed=seed).to(dtype) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def subject(between: Any, dtype: torch.dtype = torch.float64) -> Subject:
    return Subject(Net(between, dtype), (double(40, 6).to(dtype), torch.arange(40) % 3))


NOISE = np.random.default_rng(0)


def noisy(x: Tensor) -> Tensor:
    return x.tanh() * torch.from_numpy(NOISE.random(x.shape) > 0.1)


def straight_through(x: Tensor) -> Tensor:
    return x.tanh() + (x.tanh().round() - x.tanh()).detach()


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
@pytest.mark.parametrize("name", SMALL)
def test_sound_nets_pass(name: str, kind: type[Curvature]) -> None:
    net = small(name)
    for dtype in (torch.float32, torch.float64):
        found = self_test(kind(Subject(net.model, net.data, dtype=dtype)))
        assert found.repeatability == 0
        assert found.derivative < 1e-4
        assert "confirm" in found.words


@pytest.mark.parametrize(
    ("between", "leg", "words"),
    [
        (Detached.apply, "derivative", "ctx.save_for_backward"),
        (lambda x: Detached.apply(x.relu()), "derivative", "float64"),
        (straight_through, "derivative", "straight-through"),
        (noisy, "repeatable", "dropout or noise"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unsound_nets_fail_by_name(between: Any, leg: str, words: str, dtype: torch.dtype) -> None:
    with pytest.raises(NotAHessian, match=words) as caught:
        HessianSpectrum(top=2, trace=False).run(subject(between, dtype))
    assert caught.value.leg == leg


def test_a_detached_context_leaves_the_jacobian_right() -> None:
    assert self_test(GaussNewton(subject(Detached.apply))).derivative < 1e-4


def test_dropout_in_training_mode_is_off_so_that_the_loss_is_a_function() -> None:
    vector = double(Net(torch.tanh).last.weight.numel() + 12 * 7 + 3)
    plain, dropped = subject(torch.tanh), subject(lambda x: F.dropout(x.tanh(), 0.5, training=True))
    assert "confirm" in self_test(Hessian(dropped)).words
    assert torch.equal(Hessian(dropped) @ vector, Hessian(plain) @ vector)


def test_a_model_without_a_float64_form_is_said_to_be_undecided() -> None:
    table = torch.ones(12)
    only = subject(lambda x: (x @ torch.diag(table)).tanh(), torch.float32)
    found = self_test(Hessian(only))
    assert np.isnan(found.derivative)
    assert "does not run in float64" in found.words
    inside = subject(lambda x: x.float().tanh().to(x.dtype), torch.float32)
    assert "did not settle" in self_test(Hessian(inside)).words


def test_it_runs_once_a_subject() -> None:
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.tanh()

    probed = subject(counted)
    calls.clear()
    first = self_test(Hessian(probed))
    assert max(calls) <= 32  # 16 examples, and the tries of a new subject
    assert len(calls) <= 12
    calls.clear()
    assert self_test(Hessian(probed)) is first
    assert not calls


class Lopsided(Hessian):
    """Products with a matrix that is not symmetric."""

    def matvec(self, vector: Tensor) -> Tensor:
        return super().matvec(vector) + 0.1 * vector.roll(1)


def test_an_asymmetric_operator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAHessian) as caught:
        self_test(Lopsided(subject(torch.tanh)))
    assert caught.value.leg == "symmetric"
    monkeypatch.setattr("workbench.operators.table.OPERATORS", {"hessian": Lopsided})
    monkeypatch.setattr("workbench.spectra.run.self_test", lambda _: SelfTest(0.0, 0.0, 0.0, ""))
    with pytest.raises(NotAHessian, match=r"dtype=torch\.float64") as caught:
        HessianSpectrum(top=2).run(subject(torch.tanh))
    assert caught.value.leg == "symmetric"


def test_rounding_of_a_loss_near_zero_is_said_and_enters_the_residuals() -> None:
    model, x = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), double(60, 6).float()
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(3 * double(*p.shape, seed=seed))
        keep = model(x).softmax(1).amax(1) > 1 - 1e-5
    data = (x[keep], model(x[keep]).argmax(1))
    exact = torch.linalg.eigvalsh(Hessian(Subject(model, data, dtype=torch.float64)).dense()).flip(0).numpy()
    for dtype in (torch.float32, torch.float64):
        reading = HessianSpectrum(top=5, trace=False).run(Subject(model, data, dtype=dtype))
        found = reading.data.eigenvalue.values
        assert np.all(np.abs(found[:, None] - exact).min(axis=1) <= reading.data.residual.values)
        assert any("products are rounded" in note for note in reading.notes) == (dtype == torch.float32)
