"""A loss in which examples meet has no value apart from its batches: they are kept, and said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pitfalls.exact import X, Y, built, dense, derivatives, double, gap
from torch import Tensor, nn

from workbench.operators.hessian import Hessian
from workbench.plan import Plan
from workbench.subject import Subject

SIZE = 35
Product = Callable[[nn.Module, int, Tensor], Tensor]


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example against all others of its batch."""
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="sum")


def of_batches(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What is wanted: the sum over batches of 35, for each example."""
    return sum((contrastive(net(part), part) for part in x.split(SIZE)), torch.zeros(())) / len(x)


def keeps_its_batches(product: Product) -> None:
    """However the work is cut up, a product is that of the loss over batches of 35."""
    net = built(dense)
    wanted = derivatives(net, X, Y, of_batches)[2]
    v = double(len(wanted))
    for chunk in (70, 35, 7):
        assert gap(product(net, chunk, v), wanted @ v) < 1e-9, f"in chunks of {chunk}"


def ours(net: nn.Module, chunk: int, v: Tensor) -> Tensor:
    subject = Subject(net, (X, Y), contrastive, reduction="sum", batch_size=SIZE).with_plan(Plan(chunk=chunk))
    return Hessian(subject) @ v


def as_if_apart(net: nn.Module, chunk: int, v: Tensor) -> Tensor:
    """The fault: whatever fits into memory is a batch."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return sum((contrastive(model(part), part) for part in x.split(chunk)), torch.zeros(())) / len(x)

    return derivatives(net, X, Y, loss)[2] @ v


def test_batches_are_part_of_what_a_coupled_loss_is() -> None:
    keeps_its_batches(ours)
    with pytest.raises(AssertionError, match="in chunks of 70"):
        keeps_its_batches(as_if_apart)


def says_so(subject: Subject) -> None:
    """In the notes; and no standard error over examples, which are not independent terms."""
    assert any(f"batches of {SIZE} are part of what it is" in note for note in subject.notes)
    assert np.isnan(subject.evaluate()["loss_error"])
    assert subject.losses() is None


def test_the_coupling_is_noticed_and_said() -> None:
    says_so(Subject(built(dense), (X, Y), contrastive, reduction="sum", batch_size=SIZE))
    with pytest.raises(AssertionError):
        says_so(Subject(built(dense), (X, Y), F.cross_entropy, batch_size=SIZE))
