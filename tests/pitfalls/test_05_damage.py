"""Pitfall 5: whatever is measured, and however it ends, nothing of the user's is different afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import matplotlib as mpl
import pytest
import torch
from pitfalls.exact import cross_entropy
from promises import belongings
from torch import Tensor, nn
from toys import World, examples, net

from workbench.plan import Plan
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

Loss = Callable[[Tensor, Tensor], Tensor]
Measure = Callable[[nn.Module, tuple[Tensor, Tensor], Loss], None]
ENDINGS = {"a whole run": None, "an error": ArithmeticError, "an interrupt": KeyboardInterrupt}


def calls_of(measure: Measure) -> int:
    """How often a measurement computes the loss; global states are put back."""
    calls: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        return nn.functional.cross_entropy(outputs, targets)

    with torch.random.fork_rng(devices=[]), mpl.rc_context():
        measure(net(), examples(), loss)
    return len(calls)


def does_no_damage(measure: Measure, ending: str) -> None:
    """Weights, buffers, gradients, flags, hooks, data, random states, switches and drawing defaults stay."""
    model, data = net(), examples()
    world, calls, half = World(None, (model,), data), [0], calls_of(measure) // 2

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if ENDINGS[ending] and calls[0] == half:
            raise ENDINGS[ending]("half-way")
        return nn.functional.cross_entropy(outputs, targets)

    before = belongings(world)
    with suppress(ArithmeticError, KeyboardInterrupt):
        measure(model, data, loss)
        assert not ENDINGS[ending], "the loss was to fail half-way"
    after = belongings(world)
    assert [k for k in before if before[k] != after[k]] == []


def ours(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    HessianSpectrum(top=2).run(Subject(model, data, loss, batch_size=7).with_plan(Plan(retained=False))).figure()


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_of_the_users_changes_however_it_ends(ending: str) -> None:
    does_no_damage(ours, ending)


# ------------------------------------------------------------------------------------------------ what others do


def passes(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> Tensor:
    """Ten gradients with respect to what requires them, the last returned with its graph."""
    model = Subject(model, data).module
    params = list(model.parameters())
    for _ in range(10):
        found = torch.autograd.grad(loss(model(data[0]), data[1]), [params[0]], create_graph=True)
    return found[0]


def writes_gradients(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    passes(model, data, loss)
    cross_entropy(model.eval(), *data).backward()
    model.train()[1].eval()


def leaves_a_graph(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    model[0].weight.grad = passes(model, data, loss)


def moves_weights(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    """Puts them back only where nothing went wrong."""
    model[0].weight.data.mul_(2)
    passes(model, data, loss)
    model[0].weight.data.div_(2)


def switches_a_flag(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    model[0].bias.requires_grad_(True)
    passes(model, data, loss)


def leaves_a_hook(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    hook = model[0].register_forward_hook(lambda *_: None)
    passes(model, data, loss)
    hook.remove()


def switches_the_backend(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    mpl.use("svg" if mpl.get_backend().lower() != "svg" else "agg")
    passes(model, data, loss)


def seeds(model: nn.Module, data: tuple[Tensor, Tensor], loss: Loss) -> None:
    torch.manual_seed(0)
    passes(model, data, loss)


@pytest.mark.parametrize(
    ("fault", "ending", "what"),
    [
        (writes_gradients, "a whole run", "models"),
        (leaves_a_graph, "a whole run", "models"),
        (moves_weights, "an error", "models"),
        (moves_weights, "an interrupt", "models"),
        (switches_a_flag, "a whole run", "models"),
        (leaves_a_hook, "an interrupt", "models"),
        (switches_the_backend, "a whole run", "matplotlib"),
        (seeds, "a whole run", "random torch"),
    ],
)
def test_every_kind_of_damage_is_caught(fault: Measure, ending: str, what: str) -> None:
    state = torch.get_rng_state()
    with mpl.rc_context(), pytest.raises(AssertionError, match=what):
        does_no_damage(fault, ending)
    torch.set_rng_state(state)
