"""Model and data on different devices: the data follow the model, and a model in two places is refused in words."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from pitfalls.exact import X, Y, built, cross_entropy, dense
from torch import Tensor, nn

from workbench.subject import Subject

Loss = Callable[[nn.Module, Tensor, Tensor], float]


def brings_them_together(loss: Loss, model: str, data: str) -> None:
    """The loss is that of both on the host; neither model nor data move."""
    net = built(dense)
    wanted = cross_entropy(net, X, Y).item()
    there, x, y = copy.deepcopy(net).to(model), X.to(data), Y.to(data)
    assert loss(there, x, y) == pytest.approx(wanted, rel=1e-10)
    assert {p.device.type for p in there.parameters()} == {model}
    assert (x.device.type, y.device.type) == (data, data)


def ours(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return Subject(net, (x, y)).loss()


def moves_the_model(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fault: the user's model goes to where the data are."""
    return cross_entropy(net.to(x.device), x, y).item()


def as_they_are(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fault."""
    return cross_entropy(net, x, y).item()


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "data"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_data_follow_the_model(model: str, data: str) -> None:
    brings_them_together(ours, model, data)
    with pytest.raises(AssertionError):
        brings_them_together(moves_the_model, model, data)
    with pytest.raises(RuntimeError, match="same device"):
        brings_them_together(as_they_are, model, data)


def is_refused_in_words(loss: Loss) -> None:
    """A model of which a part has no values: named, with what to do."""
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3, device="meta")).double()
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device and has no values; load the weights"):
        loss(net, X, Y)


def test_a_model_in_two_places_is_refused_by_name() -> None:
    is_refused_in_words(ours)
    with pytest.raises((RuntimeError, NotImplementedError)):
        is_refused_in_words(as_they_are)
    with pytest.raises(ValueError, match="use device='auto', where the model is"):
        Subject(built(dense), (X, Y), device="meta")
