"""Pitfall 7: second derivatives through attention and recurrent layers, whose fused kernels have none."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pitfalls.exact import IDS, Y, built, cross_entropy, derivatives, double, flat, gap
from torch import Tensor, nn

from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.hessian import Hessian
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

Product = Callable[[nn.Module, Tensor], Tensor]


class Attention(nn.Module):
    """Scaled dot-product attention of the embedding with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unsqueeze(1) for part in self.mix(x).chunk(3, -1))
        return F.scaled_dot_product_attention(*heads).squeeze(1)


class Sequence(nn.Module):
    """An embedding, a body, a mean over time, three classes."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 8), body, nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.body(self.embed(ids))
        return self.head((found if isinstance(found, Tensor) else found[0]).mean(1))


def encoder() -> nn.Module:
    return Sequence(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.2, batch_first=True, activation="gelu"), 8)


NETS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Sequence(Attention(), 8),
    "encoder": encoder,
    "lstm": lambda: Sequence(nn.LSTM(8, 4, 2, batch_first=True), 4),
    "gru": lambda: Sequence(nn.GRU(8, 4, batch_first=True), 4),
}


@functools.cache
def exact(name: str) -> Tensor:
    return derivatives(built(NETS[name]).eval(), IDS, Y)[2]


def equals_exact(name: str, product: Product, training: bool = False) -> None:
    """A product is that of the exact Hessian of the net in eval mode, whatever mode it is in."""
    net, wanted = built(NETS[name]), exact(name)
    v = double(len(wanted))
    assert gap(product(net.train(training), v), wanted @ v) < 1e-9


def ours(net: nn.Module, v: Tensor) -> Tensor:
    return Hessian(Subject(net, (IDS, Y), batch_size=32)) @ v


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_products_through_attention_and_recurrence_are_exact(name: str, training: bool) -> None:
    equals_exact(name, ours, training)


def plain(net: nn.Module, v: Tensor) -> Tensor:
    """The fault: whatever kernel PyTorch prefers."""
    params = list(net.parameters())
    slope = flat(torch.autograd.grad(cross_entropy(net, IDS, Y), params, create_graph=True))
    return flat(torch.autograd.grad(slope @ v, params))


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_the_fused_kernel_has_no_second_derivative(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product\w* is not implemented"):
        equals_exact(name, plain)


@pytest.mark.parametrize("name", NETS)
def test_the_gauss_newton_matrix_in_its_place_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        equals_exact(name, lambda net, v: GaussNewton(Subject(net, (IDS, Y))) @ v)


def says_which_kernel(name: str) -> None:
    """The reading names the kernel that stood in."""
    reading = HessianSpectrum(top=1, minimum=False, trace=False, density=False).run(
        Subject(built(NETS[name]), (IDS, Y))
    )
    assert any("attention" in note for note in reading.notes), reading.notes


def test_the_reading_says_that_attention_was_computed_explicitly() -> None:
    says_which_kernel("attention")
    says_which_kernel("encoder")
    with pytest.raises(AssertionError):
        says_which_kernel("gru")
