"""Tangent kernels against loops of plain backward passes in float64, and closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from architectures import SMALL, small
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.numerics.krylov import lanczos
from workbench.numerics.sampling import Draw
from workbench.operators import tangent_layers
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.tangent_kernel import TangentKernel
from workbench.subject import Subject


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """J (n, C, P), a batch of one and one backward pass for each row."""
    model = copy.deepcopy(model).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    examples = []
    for one in x.split(1):
        with sdpa_kernel(SDPBackend.MATH):
            z = model(one).reshape(-1)
        rows = [
            torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            for entry in z
        ]
        examples.append(torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]))
    return torch.stack(examples)


def subject_of(model: nn.Module, x: Tensor, parameters: str | None = None) -> Subject:
    with torch.no_grad():
        z = model.eval()(x)
    return Subject(model, (x, torch.zeros_like(z)), loss="half_mse", parameters=parameters)


def check(model: nn.Module, x: Tensor, structured: bool = True, budget: int | None = None) -> TangentKernel:
    """All three forms, a rectangle and a product against the loop, to 1e-10."""
    j, subject = jacobian(model, x), subject_of(model, x)
    kernel = TangentKernel(subject, structured=structured, budget=budget)
    wanted = torch.einsum("icp,jdp->icjd", j, j)
    scale, outputs, some = wanted.abs().max(), kernel.outputs, [0, 2]
    assert scale > 0
    same = torch.einsum("icjc->cij", wanted)
    v = torch.linspace(-1, 2, kernel.size, dtype=torch.float64)
    other = TangentKernel(subject.selected(some), structured=structured, budget=budget)
    pairs = (
        (kernel.full(), wanted),
        (kernel.trace(), same.sum(0) / outputs),
        (kernel.each(), same),
        (kernel.full(other), wanted[:, :, some]),
        (other.trace(kernel), same[:, some].sum(0) / outputs),
        (kernel @ v, wanted.reshape(kernel.size, -1) @ v),
    )
    for found, truth in pairs:
        assert found.shape == truth.shape
        assert float((found - truth).abs().max() / scale) < 1e-10
    assert not structured or kernel.check() < 1e-10
    return kernel


# ------------------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("budget", [None, 20_000])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_kernels_of_trained_nets_are_those_of_a_loop(name: str, structured: bool, budget: int | None) -> None:
    net = small(name)
    kernel = check(net.model, net.data[0][: 3 if "tied" in name else 5], structured, budget)
    loose = kernel.layers().loose
    if structured and budget is None:
        assert all("body.weight" in n or "body.bias" in n for n in loose) if name == "LSTM" else not loose
    assert structured or set(loose) == set(kernel.leaves)


class Twice(nn.Module):
    """A layer used twice, in between on a doubled sequence, and its bias used once more alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x), inplace=True)
        h = self.a(torch.cat([h, h.sin()], 1)).tanh()
        return self.out(h.mean(1) * 2 + self.a.bias)


class Bare(nn.Module):
    """Parameters in formulas: a gain, an offset by position, a matrix, a temperature, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.place = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(3, 4))
        self.mix, self.heat = nn.Parameter(torch.rand(4, 5)), nn.Parameter(torch.rand(()))
        self.idle, self.table = nn.Parameter(torch.rand(2)), nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        h = (self.gain * x + self.place) @ self.mix
        return h.mean(1).div(self.heat.exp()) + self.table.tanh()


class SequenceFirst(nn.Module):
    """Attention with the sequence in the first dimension, and keys from elsewhere; frames folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.conv, self.norm = nn.Conv1d(1, 2, 2), nn.GroupNorm(2, 2)
        self.keys = nn.Parameter(torch.rand(5, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        h = self.own(h, h, h)[0]
        keys = self.keys.expand(-1, x.shape[0], -1)
        h = self.cross(h, keys, keys)[0].transpose(0, 1)
        frames = self.norm(self.conv(h.reshape(-1, 1, 4)))
        return frames.reshape(x.shape[0], -1).sin()[:, :3]


class Words(nn.Module):
    """A table with a row that is skipped, positions by a second table, norms, and the table again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(5, 4)
        self.one, self.two = nn.LayerNorm(4), nn.RMSNorm(4)
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        return self.last(self.two(self.one(h).tanh() + self.table(ids.flip(1))).mean(1))


class Tower(nn.Module):
    """Convolutions of one, two and three dimensions, grouped and strided, between normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, padding_mode="circular")
        self.b = nn.Conv2d(4, 4, 2, padding="same", dilation=2, bias=False)
        self.c, self.d = nn.Conv3d(1, 2, (2, 1, 2)), nn.Conv1d(2, 3, 2, groups=1)
        self.norms = nn.ModuleList((nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.a(x)).tanh()
        h = self.norms[1](self.b(h)) + F.max_pool2d(self.up(h), 2)
        return self.d(self.c(h.unsqueeze(1)).tanh().flatten(2)).mean(2)


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2))


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.3


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "used twice": (Twice, random(4, 3, 4), 0),
    "bare": (Bare, random(4, 3, 4), 2),
    "attention, sequence first": (SequenceFirst, random(4, 3, 4), 2),
    "words": (Words, torch.tensor([[1, 0, 3], [3, 3, 6], [0, 1, 3], [2, 0, 0]]), 1),
    "tower": (Tower, random(4, 2, 6, 8), 2),
    "weight norm": (normed, random(4, 4), 2),
}
"""Each with inputs, and how many of its parameters have no formula."""


@pytest.mark.parametrize("name", NETS)
def test_kernels_of_unusual_nets_are_those_of_a_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, x, loose = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
    for p in model.modules():
        if isinstance(p, nn.BatchNorm2d):
            p.running_var.mul_(3)
    kernel = check(model, x)
    assert len(kernel.layers().loose) == loose, kernel.layers().loose
    for constant, few in (("ROWS", 3), ("COLUMNS", 4), ("MIRRORED", 2)):
        monkeypatch.setattr(tangent_layers, constant, few)
    monkeypatch.setattr(tangent_layers, "TILE_BYTES", 700)
    check(model, x)
    for more, less in ((True, False), (False, True)):  # whichever is cheaper, both are right
        monkeypatch.setattr(tangent_layers.Pairs, "by_pairs", lambda *_, c=more: float(c))
        monkeypatch.setattr(tangent_layers.Pairs, "by_gradients", lambda s, *_, c=less: math.inf if s.table else c)
        check(model, x)


@pytest.mark.parametrize("outputs", [7, 10])
def test_strips_of_a_large_kernel_meet_without_gaps(outputs: int) -> None:
    """More examples than one strip and one tile hold, at sizes that do and do not divide them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    x = random(190, 3)
    assert len(x) * outputs > tangent_layers.COLUMNS
    j = jacobian(model, x)
    wanted = torch.einsum("icp,jdp->icjd", j, j)
    found = TangentKernel(subject_of(model, x)).full()
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_convolution_is_cut_into_its_patches(data: st.DataObject) -> None:
    space, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    sizes = [
        tuple(data.draw(st.integers(*bounds)) for _ in range(space)) for bounds in ((1, 3), (1, 3), (0, 2), (1, 2))
    ]
    kernel, stride, padding, dilation = sizes
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
    layer = kind(2, 2 * groups, kernel, stride, padding, dilation, groups, bias=data.draw(st.booleans())).double()
    shape = tuple(data.draw(st.integers(2, 5)) for _ in range(space))
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, k, p, d in zip(shape, kernel, padding, dilation, strict=True)))
    model, x = nn.Sequential(layer, nn.Flatten()), random(3, 2, *shape)
    j = jacobian(model, x)
    found = TangentKernel(subject_of(model, x)).full()
    torch.testing.assert_close(found, torch.einsum("icp,jdp->icjd", j, j), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ closed forms


def test_linear_and_deep_linear_models_have_known_kernels() -> None:
    x = random(5, 4)
    one, two = nn.Linear(4, 3, bias=False).double(), nn.Linear(3, 2, bias=False).double()
    eye = torch.eye(3, dtype=torch.float64)
    shallow = TangentKernel(subject_of(one, x))
    torch.testing.assert_close(shallow.full(), torch.einsum("ij,cd->icjd", x @ x.T, eye))
    torch.testing.assert_close(shallow.trace(), x @ x.T)
    deep = TangentKernel(subject_of(nn.Sequential(one, two), x)).full()
    h, w = (x @ one.weight.T).detach(), two.weight.detach()
    wanted = torch.einsum("ij,cd->icjd", x @ x.T, w @ w.T) + torch.einsum("ij,cd->icjd", h @ h.T, eye[:2, :2])
    torch.testing.assert_close(deep, wanted)


class Wide(nn.Module):
    """f = v · φ(W x) / √N with standard normal W and v: the NTK parametrisation of two layers."""

    def __init__(self, d: int, width: int, seed: int, relu: bool = True) -> None:
        super().__init__()
        rng, self.scale, self.relu = torch.Generator().manual_seed(seed), width**-0.5, relu
        self.w = nn.Parameter(torch.randn(width, d, generator=rng, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(1, width, generator=rng, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w)
        return F.linear(h.relu() if self.relu else h, self.v) * self.scale


def test_two_layers_of_two_units_have_the_kernel_of_the_formula() -> None:
    net = Wide(1, 2, 0, relu=False)
    with torch.no_grad():
        net.w.copy_(torch.tensor([[1.0], [2.0]]))
        net.v.copy_(torch.tensor([[3.0, 4.0]]))
    assert float(TangentKernel(subject_of(net, torch.ones(1, 1, dtype=torch.float64))).full()) == pytest.approx(15)


def test_a_wide_relu_net_approaches_its_infinite_kernel() -> None:
    x = F.normalize(random(6, 4)) * torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]
    norms = x.norm(dim=1)
    angle = torch.acos((x @ x.T / torch.outer(norms, norms)).clamp(-1, 1))
    zero, one = (math.pi - angle) / (2 * math.pi), (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    limit = x @ x.T * zero + torch.outer(norms, norms) * one

    def error(width: int) -> float:
        kernels = [TangentKernel(subject_of(Wide(4, width, seed), x)).trace() for seed in range(24)]
        return float(torch.stack([(k - limit).norm() / limit.norm() for k in kernels]).square().mean().sqrt())

    coarse, fine = error(64), error(64 * 16)
    assert fine < 0.08
    assert 2.7 < coarse / fine < 6  # 1/√width: 4


def test_the_ggn_of_half_squared_error_has_the_spectrum_of_the_kernel_over_n() -> None:
    net = small("dense GELU")
    x = net.data[0][:6]
    subject = Subject(net.model, (x, torch.zeros(6, 10, dtype=torch.float64)), loss="half_mse")
    kernel = TangentKernel(subject)
    mine = torch.linalg.eigvalsh(kernel.full().reshape(60, 60)).flip(0)
    ggn = torch.linalg.eigvalsh(GaussNewton(subject).dense()).flip(0)
    torch.testing.assert_close(ggn[:60], mine / 6, rtol=1e-9, atol=1e-9 * float(mine[0]))
    *_, state = lanczos(kernel, Draw(0, "test", kernel.size)(0), top=5, bottom=0, tolerance=1e-8)
    assert state.top_values == pytest.approx(mine[:5].tolist(), rel=1e-6)


# ------------------------------------------------------------------------------------------------ what it counts


def test_chosen_parameters_and_outputs_count_and_no_others() -> None:
    net = small("partly frozen")
    x = net.data[0][:5]
    j = jacobian(net.model, x)
    last = j[..., -24 * 10 - 10 :]
    subject = subject_of(copy.deepcopy(net.model), x)
    found = TangentKernel(subject.restricted("5.*")).full()
    torch.testing.assert_close(found, torch.einsum("icp,jdp->icjd", last, last))
    some = TangentKernel(subject, outputs=(7, 2))
    wanted = torch.einsum("icp,jdp->icjd", j[:, [7, 2]], j[:, [7, 2]])
    torch.testing.assert_close(some.full(), wanted)
    torch.testing.assert_close(some.dense(), wanted.reshape(10, 10))


def test_a_sketch_states_its_error() -> None:
    net = small("dense GELU")
    kernel = TangentKernel(subject_of(net.model, net.data[0][:8]))
    exact = kernel.full().reshape(80, 80)
    errors, stated, traces, norms = [], [], [], []
    for seed in range(12):
        sketch = kernel.sketch(Draw(seed, "sketch", kernel.size), 40)
        errors.append(float((sketch.kernel() - exact).norm() / exact.norm()))
        stated.append(sketch.relative_error)
        traces.append(sketch.norms[0] / float(exact.trace()))
        norms.append(sketch.norms[1] / float(exact.norm()))
    assert sum(stated) == pytest.approx(sum(errors), rel=0.15)
    assert sum(traces) / 12 == pytest.approx(1, abs=0.1)
    assert sum(norms) / 12 == pytest.approx(1, abs=0.15)


def test_what_has_no_kernel_is_refused_in_words() -> None:
    x = random(6, 4)
    batch = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    target = torch.zeros(6, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="norm='eval'"):
        TangentKernel(Subject(batch, (x, target), loss="half_mse", norm="batch"))
    with pytest.raises(ValueError, match="depend on the other examples"):
        TangentKernel(Subject(Coupled(), (x, target), loss="half_mse"))
    with pytest.raises(TypeError, match="objective="):
        TangentKernel(Subject(batch, (x, target), objective=lambda m, b: m(b[0]).square().mean()))
    subject = subject_of(nn.Linear(4, 3).double(), x)
    with pytest.raises(ValueError, match="from 0 to 2"):
        TangentKernel(subject, outputs=(3,))
    with pytest.raises(ValueError, match="same net"):
        TangentKernel(subject).full(TangentKernel(subject, outputs=(1,)))


class Coupled(nn.Module):
    """Looks at the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x - x.mean(0))


def test_memory_is_known_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = TangentKernel(subject_of(nn.Linear(4, 3).double(), random(50, 4)))
    assert kernel.expected_bytes("full") > 150**2 * 8 > kernel.expected_bytes("trace") - kernel.expected_bytes("full")
    monkeypatch.setattr(Subject, "available_memory", lambda _: kernel.expected_bytes("trace") + 1)
    assert kernel.trace().shape == (50, 50)
    with pytest.raises(MemoryError, match="fewer examples"):
        kernel.full()


def test_a_layer_that_hides_what_it_does_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.operators import tangent_uses

    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    kernel = TangentKernel(subject_of(net, random(5, 4)))
    assert kernel.check() < 1e-12
    monkeypatch.setattr(tangent_uses.Dense, "inputs", lambda s, n: 1.01 * s.given.reshape(n, 1, -1, s.given.shape[-1]))
    with pytest.raises(ArithmeticError, match="structured=False"):
        kernel.check()
