"""Pitfall 4: BatchNorm and dropout make no product random, and no product moves their state."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pitfalls.exact import X, Y, built, cross_entropy, double, flat
from promises import globals_state, model_state
from torch import Tensor, nn

from workbench.operators.hessian import Hessian
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

Product = Callable[[nn.Module, Tensor], Tensor]


def net(dropout: float = 0.4) -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 3))
    made(torch.randn(32, 6))
    return made


def changes_nothing(product: Product, training: bool, dropout: float = 0.4) -> None:
    """Every buffer, flag and random state is as before, and two products are the same bit for bit."""
    model = built(lambda: net(dropout)).train(training)
    v = double(sum(p.numel() for p in model.parameters()))
    state, around = model_state(model), _random()
    first, second = product(model, v), product(model, v)
    assert model_state(model) == state, "the model changed"
    assert _random() == around, "a random state changed"
    assert torch.equal(first, second), "two products differ"


def _random() -> dict[str, Any]:
    return {name: state for name, state in globals_state().items() if name.startswith("random")}


def ours(norm: Any) -> Product:
    return lambda model, v: Hessian(Subject(model, (X, Y), norm=norm, batch_size=35)) @ v


def as_it_stands(model: nn.Module, v: Tensor) -> Tensor:
    """The fault: the user's own model, in whatever mode and with whatever buffers it has."""
    params = list(model.parameters())
    slope = flat(torch.autograd.grad(cross_entropy(model, X, Y), params, create_graph=True))
    return flat(torch.autograd.grad(slope @ v, params))


def seeded_as_it_stands(model: nn.Module, v: Tensor) -> Tensor:
    """A repair that is none: equal products by seeding the user's generator, buffers put back one by one but one."""
    held = {k: b.clone() for k, b in model.named_buffers() if "batches" not in k}
    torch.manual_seed(0)
    found = as_it_stands(model, v)
    for k, b in model.named_buffers():
        if k in held:
            b.copy_(held[k])
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["eval", "batch", "recompute"])
def test_products_are_fixed_and_leave_buffers_flags_and_random_states(norm: str, training: bool) -> None:
    changes_nothing(ours(norm), training)


@pytest.mark.parametrize("fault", [as_it_stands, seeded_as_it_stands])
def test_a_product_in_training_mode_is_caught(fault: Product) -> None:
    before = torch.get_rng_state()
    for dropout in (0.4, 0.0):
        with pytest.raises(AssertionError, match="the model changed"):
            changes_nothing(fault, True, dropout)
    torch.set_rng_state(before)


def on_a_copy_that_drops(model: nn.Module, v: Tensor) -> Tensor:
    """The fault: nothing of the user's is touched, but dropout is on."""
    copied = copy.deepcopy(model).train()
    copied[1].eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(next(SEEDS))
        return as_it_stands(copied, v)


SEEDS = itertools.count()


def test_dropout_alone_is_caught() -> None:
    with pytest.raises(AssertionError, match="two products differ"):
        changes_nothing(on_a_copy_that_drops, True)
    changes_nothing(on_a_copy_that_drops, True, dropout=0.0)


def states_its_policy(subject: Subject, words: str) -> None:
    """The reading says what BatchNorm did."""
    reading = HessianSpectrum(top=1, minimum=False, trace=False, density=False).run(subject)
    assert reading.provenance["subject"]["norm"] == subject.norm
    assert any(words in note for note in reading.notes), reading.notes


@pytest.mark.parametrize(
    ("norm", "words"),
    [("eval", "running statistics"), ("batch", "micro-batches of 35"), ("recompute", "estimated anew")],
)
def test_the_policy_is_recorded_in_the_reading(norm: Any, words: str) -> None:
    subject = Subject(built(net).train(), (X, Y), norm=norm, batch_size=35)
    states_its_policy(subject, words)
    with pytest.raises(AssertionError):
        states_its_policy(subject.under("recompute" if norm == "eval" else "eval"), words)
