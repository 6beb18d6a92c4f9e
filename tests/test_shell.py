"""The shell computes the user's function, exactly and repeatably, without the user's module noticing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from workbench.shell import Shell
from workbench.twin import twin


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else first(found[0])


# --- the same function ------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """nn.MultiheadAttention with its own defaults, weights returned or not, with padding."""

    def __init__(self, need_weights: bool, average: bool = True) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=not average)
        self.need_weights, self.average = need_weights, average

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -2:] = True
        words = {"need_weights": self.need_weights, "average_attn_weights": self.average}
        out, weights = self.inner(x, x, x, key_padding_mask=padding, **words)
        return out if weights is None else out + weights.sum()


def encoder(**words: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.3, **words)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "attention": (lambda: Attends(False), double(3, 5, 8)),
    "attention with weights": (lambda: Attends(True, average=False), double(3, 5, 8)),
    "encoder": (encoder, double(3, 5, 8)),
    "encoder, norm first, gelu": (lambda: encoder(norm_first=True, activation="gelu"), double(3, 5, 8)),
    "lstm": (lambda: nn.LSTM(3, 4, 2, batch_first=True, dropout=0.5), double(3, 5, 3)),
    "gru, both ways": (lambda: nn.GRU(3, 4, bidirectional=True), double(3, 5, 3)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Dropout(), nn.Tanh()),
        double(6, 3, 5),
    ),
    "old weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh()), double(6, 3)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh()),
        double(6, 3),
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh()),
        double(6, 3),
    ),
    "old spectral norm": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh()), double(6, 3)),
    "pruned": (
        lambda: nn.Sequential(prune.random_unstructured(nn.Linear(3, 4), "weight", 0.5), nn.Tanh()),
        double(6, 3),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_the_shell_is_the_module_in_eval_mode_and_twice_differentiable(name: str, training: bool) -> None:
    make, x = NETS[name]
    net = built(make).train(training)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = first(built(make).eval()(x))
    shell = Shell(net)
    assert torch.equal(first(shell.run(lambda m: m(x))), first(shell.run(lambda m: m(x))))
    torch.testing.assert_close(first(shell.run(lambda m: m(x))), wanted.detach(), rtol=1e-12, atol=1e-12)

    point = {k: p.detach() for k, p in shell.parameters.items()}
    ways = {k: double(*p.shape, seed=i) for i, (k, p) in enumerate(point.items())}

    def slope(t: float) -> Tensor:
        moved = {k: (p + t * ways[k]).requires_grad_() for k, p in point.items()}
        value = first(shell.run(lambda m: m(x), moved)).pow(2).sum()
        return torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(value, list(moved.values()), materialize_grads=True)]
        )

    leaves = {k: p.clone().requires_grad_() for k, p in point.items()}
    value = first(shell.run(lambda m: m(x), leaves)).pow(2).sum()
    gradient = torch.autograd.grad(value, list(leaves.values()), create_graph=True, materialize_grads=True)
    along = sum((g * ways[k]).sum() for k, g in zip(point, gradient, strict=True))
    product = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
    numeric = (8 * (slope(1e-4) - slope(-1e-4)) - (slope(2e-4) - slope(-2e-4))) / 12e-4
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in product]), numeric, rtol=1e-6, atol=1e-6)


# --- randomness, state, modes ---------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws and drops in every way, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        noise = (
            torch.randn(4)
            + torch.rand_like(x) * torch.randint_like(x, 5)
            + torch.randn_like(x)
            + torch.empty(4).normal_()
            + torch.bernoulli(torch.full((4,), 0.5))
        )
        noise = noise + torch.normal(torch.zeros(4), torch.ones(4)) + F.gumbel_softmax(torch.zeros(2, 4), dim=-1).sum(0)
        noise = noise + torch.distributions.Normal(torch.zeros(4), torch.ones(4)).rsample() + torch.randint(0, 9, (4,))
        return F.dropout(self.w * x) + F.rrelu(noise, training=True) + torch.dropout(noise, 0.5, True)


def test_random_numbers_are_held_fixed_and_the_global_state_is_not_used() -> None:
    shell = Shell(Noisy(), seed=5)
    before = torch.get_rng_state()
    one, two = (shell.run(lambda m: m(torch.ones(4))) for _ in range(2))
    other = Shell(Noisy(), seed=6).run(lambda m: m(torch.ones(4)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert "random" in shell.seen


class Stateful(nn.Module):
    """Remembers, counts and flips: everything that makes a second call differ from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.calls = 0
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.hidden = self.layer(x) if self.hidden is None else self.layer(x) + self.hidden
        self.train()
        return self.hidden + self.mean + self.calls


def test_a_stateful_module_becomes_a_fixed_function_and_keeps_its_state() -> None:
    net, x = Stateful(), torch.ones(2, 3)
    shell = Shell(net)
    one, two = (shell.run(lambda m: m(x)) for _ in range(2))
    assert torch.equal(one, two)
    assert (net.calls, net.hidden) == (0, None)
    assert not net.mean.any()
    assert not shell.module.training


def test_recomputing_checkpoints_are_refused_with_what_to_do() -> None:
    class Saves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    shell = Shell(Saves(3, 2))
    with pytest.raises(RuntimeError, match="gradient checkpointing off"):
        shell.run(lambda m: m(torch.ones(2, 3)), {k: p.detach().requires_grad_() for k, p in shell.parameters.items()})


def test_autocast_and_inference_mode_around_the_call_change_nothing() -> None:
    net, x = nn.Linear(64, 64), torch.randn(8, 64)
    shell = Shell(net)
    plain = shell.run(lambda m: m(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shell.run(lambda m: m(x)), plain)
    with torch.inference_mode():
        made = nn.Linear(3, 3)
        found = shell.run(lambda m: m(x))
        inside = Shell(made)
    assert torch.equal(found, plain)
    leaves = {k: p.requires_grad_() for k, p in inside.tensors().items()}
    assert torch.autograd.grad(inside.run(lambda m: m(torch.ones(1, 3)), leaves).sum(), list(leaves.values()))


def test_an_objective_may_differentiate_inside_no_grad() -> None:
    shell, x = Shell(nn.Linear(3, 1)), torch.ones(2, 3)

    def slope(m: nn.Module) -> Tensor:
        at = x.clone().requires_grad_()
        return torch.autograd.grad(m(at).sum(), at)[0]

    with torch.no_grad():
        assert torch.equal(shell.run(slope), shell.parameters["weight"].detach().expand(2, 3))


# --- the twin -------------------------------------------------------------------------------------------------------


class Tangled(nn.Module):
    """Leads back to itself by a method, a partial, a list, a dictionary and a helper object."""

    class Helper:
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.layer.weight
        self.again = self.layer
        self.method = self.twice
        self.listed = [self.layer, {"deep": (self.layer,)}]
        self.helper = Tangled.Helper(self.layer)
        self.scale = torch.full((2,), 3.0)

    def twice(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.listed[1]["deep"][0]
        return (
            self.method(x)
            + self.tied(x)
            + self.again(x)
            + self.listed[0](x)
            + deep(x)
            + self.helper.layer(x) * self.scale
        )


def test_every_way_to_a_layer_leads_to_the_twin() -> None:
    net, x = built(Tangled), double(4, 2)
    made: Any = twin(net)
    assert made.layer.weight is net.layer.weight
    assert made.scale is net.scale
    inside = (made.again, made.listed[0], made.listed[1]["deep"][0], made.helper.layer, made.method.__self__.layer)
    assert all(layer is made.layer for layer in inside)
    assert made.layer is not net.layer

    shell = Shell(net)
    assert list(shell.parameters) == ["layer.weight", "layer.bias", "tied.bias"]
    other = {k: double(*p.shape, seed=9) for k, p in shell.parameters.items()}
    moved = copy.deepcopy(net)
    moved.load_state_dict(other, strict=False)
    torch.testing.assert_close(shell.run(lambda m: m(x), other), moved(x).detach(), rtol=1e-12, atol=1e-12)


def test_the_users_hooks_are_left_behind_and_counted() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    calls: list[int] = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    shell = Shell(net)
    shell.run(lambda m: m(torch.ones(1, 2)))
    assert not calls
    assert shell.hooked == 1
    assert len(net[0]._forward_hooks) == 1
    handle = shell.module[0].register_forward_hook(lambda *_: calls.append(2))  # type: ignore[index]
    shell.run(lambda m: m(torch.ones(1, 2)))
    handle.remove()
    net(torch.ones(1, 2))
    assert calls == [2, 1]


def test_wrappers_are_looked_through_also_inside() -> None:
    inner = nn.Linear(2, 2)
    net = nn.Sequential(torch.compile(inner), nn.DataParallel(nn.Tanh()))
    assert list(Shell(torch.compile(net)).parameters) == ["0.weight", "0.bias"]


def test_torchscript_is_refused_with_what_to_do() -> None:
    with pytest.raises(TypeError, match="eager"):
        Shell(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="wieght"):
        Shell(nn.Linear(2, 2)).run(lambda m: m(torch.ones(1, 2)), {"wieght": torch.ones(2, 2)})


# --- versions and copies --------------------------------------------------------------------------------------------


def _fused(net: nn.Module) -> None:
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda net: net[0].weight.detach().add_(1e-3),
    ".data": lambda net: net[0].weight.data.add_(1e-3),
    ".data replaced": lambda net: setattr(net[0].weight, "data", net[0].weight.data + 1),
    "fused optimizer": _fused,
    "running statistics": lambda net: net.train()(torch.ones(4, 3) * 5),
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
}


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["live", "copy"])
@pytest.mark.parametrize("way", WRITES)
def test_every_way_of_writing_is_noticed(way: str, dtype: torch.dtype | None) -> None:
    net = nn.Sequential(nn.Linear(3, 40), nn.BatchNorm1d(40))
    shell = Shell(net, dtype=dtype)
    still = shell.snapshot()
    before, held = shell.version(), still.tensors()
    shell.run(lambda m: m(torch.ones(4, 3, dtype=dtype)))
    assert shell.version() == before
    WRITES[way](net)
    assert shell.version() != before
    now = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, tensor in shell.tensors(deep=True).items():
        assert torch.equal(tensor, now[name].detach().to(tensor.dtype)), name
    assert all(torch.equal(still.tensors()[k], t) for k, t in held.items())
