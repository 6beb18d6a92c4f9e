"""Relative flatness against closed forms, traces of exact Hessians, and its own invariance."""

from __future__ import annotations

import itertools

import pytest
import torch
from architectures import small
from hypothesis import given, settings
from hypothesis import strategies as st
from surfaces import double, last, point, quadratic
from torch import Tensor, nn

from workbench.sharpness import flatness
from workbench.sharpness.flatness import neuronwise_flatness, relative_flatness
from workbench.sharpness.found import Found, NotDefined
from workbench.subject import Subject


def classifier(weight: list[list[float]]) -> nn.Linear:
    made = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
    return made


def kappa(subject: Subject, layer: str | None = None, standardise: bool = False) -> Found:
    return last(relative_flatness(point(subject), layer, standardise))


def exact(weight: Tensor, hessian: Tensor) -> float:
    """Σ_{s,s'} ⟨w_s, w_s'⟩ Σ_i H[(s, i), (s', i)]."""
    rows, columns = weight.shape
    blocks = hessian.reshape(rows, columns, rows, columns)
    return float(((weight @ weight.T) * torch.einsum("sitj,ij->st", blocks, torch.eye(columns).double())).sum())


def test_one_example_of_two_classes() -> None:
    data = (torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    found = kappa(Subject(classifier([[1, 0], [-1, 0]]), data))
    assert found.value == pytest.approx(0.28260330, abs=5e-9)
    assert found.error < 1e-14


def test_squared_error() -> None:
    net, x = nn.Sequential(nn.Tanh(), nn.Linear(4, 3)).double(), double(11, 4)
    found = kappa(Subject(net, (x, double(11, 3, seed=1)), loss="half_mse", batch_size=4))
    wanted = float((net[1].weight.detach() ** 2).sum()) * float((torch.tanh(x) ** 2).sum(1).mean())
    assert found.value == pytest.approx(wanted, rel=1e-12)


@pytest.fixture(scope="module")
def dense() -> tuple[Subject, nn.Module, Tensor, list[slice]]:
    """A trained net, its exact Hessian, and where its weights lie."""
    net = small("dense GELU")
    sizes = torch.tensor([0, *(p.numel() for p in net.model.parameters())]).cumsum(0).tolist()
    places = [slice(a, b) for a, b in itertools.pairwise(sizes)]
    return Subject(net.model, net.data, batch_size=32), net.model, net.hessian, places


def test_the_classifier_and_inner_layers_of_a_net(dense: tuple[Subject, nn.Module, Tensor, list[slice]]) -> None:
    subject, model, hessian, places = dense
    last_layer = kappa(subject)
    wanted = exact(model[4].weight.detach(), hessian[places[2], places[2]])
    assert last_layer.value == pytest.approx(wanted, rel=1e-9)
    assert kappa(subject, "4").value == last_layer.value
    inner = kappa(subject, "2")
    wanted = exact(model[2].weight.detach(), hessian[places[0], places[0]])
    assert abs(inner.value - wanted) < 4 * inner.error
    assert 0 < inner.error < 0.5 * wanted


def test_neuron_by_neuron(dense: tuple[Subject, nn.Module, Tensor, list[slice]]) -> None:
    subject, model, hessian, places = dense
    weight = model[4].weight.detach()
    blocks = hessian[places[2], places[2]].reshape(*weight.shape, *weight.shape)
    wanted = sum(float((w**2).sum() * torch.linalg.eigvalsh(blocks[s, :, s])[-1]) for s, w in enumerate(weight))
    assert last(neuronwise_flatness(point(subject), None, False)).value == pytest.approx(wanted, rel=1e-9)


def test_many_outputs_are_sampled(
    dense: tuple[Subject, nn.Module, Tensor, list[slice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = kappa(dense[0])
    monkeypatch.setattr(flatness, "MOST_OUTPUTS", 1)
    sampled = kappa(dense[0])
    assert abs(sampled.value - closed.value) < 4 * sampled.error
    with pytest.raises(NotDefined, match="too large"):
        last(neuronwise_flatness(point(dense[0]), None, False))


@settings(max_examples=10, deadline=None)
@given(scales=st.lists(st.floats(0.05, 20), min_size=6, max_size=6), standardise=st.booleans())
def test_rescaling_neurons_changes_nothing(scales: list[float], standardise: bool) -> None:
    """Hidden neuron j times c_j, its outgoing weights over c_j: the same function of a ReLU network."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    data, c = (double(20, 4), torch.arange(20) % 3), torch.tensor(scales, dtype=torch.float64)
    before = kappa(Subject(net, data), None, standardise).value
    alone = last(neuronwise_flatness(point(Subject(net, data)), None, True)).value
    with torch.no_grad():
        net[0].weight.mul_(c[:, None])
        net[0].bias.mul_(c)
        net[2].weight.div_(c)
    same_scale = len(set(scales)) == 1 or standardise
    after = kappa(Subject(net, data), None, standardise).value
    if same_scale:
        assert after == pytest.approx(before, rel=1e-8)
    assert last(neuronwise_flatness(point(Subject(net, data)), None, True)).value == pytest.approx(alone, rel=1e-8)


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_rescaling_layers_changes_nothing(factor: float) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).double()
    data = (double(20, 4), torch.arange(20) % 3)
    before = [kappa(Subject(net, data), layer).value for layer in (None, "0")]
    with torch.no_grad():
        net[0].weight.mul_(factor)
        net[2].weight.div_(factor)
    assert [kappa(Subject(net, data), layer).value for layer in (None, "0")] == pytest.approx(before, rel=1e-8)


def test_standardising_is_a_change_of_coordinates() -> None:
    """Features over their spread and weights times it, done by hand, one constant feature left as it is."""
    x, net = double(15, 3), nn.Linear(3, 2, bias=False).double()
    x[:, 2] = 2.0
    y = torch.arange(15) % 2
    spread = torch.cat([x[:, :2].std(0, unbiased=False), torch.ones(1).double()])
    other = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        other.weight.copy_(net.weight * spread)
    by_hand = kappa(Subject(other, (x / spread, y))).value
    assert kappa(Subject(net, (x, y), batch_size=4), None, True).value == pytest.approx(by_hand, rel=1e-10)


def test_a_hidden_layer_as_wide_as_there_are_classes_is_no_classifier() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    found = kappa(Subject(net, (double(20, 4), torch.arange(20) % 3)), "0")
    assert "random directions" in found.protocol


def test_what_does_not_apply_says_so() -> None:
    bare = point(quadratic(torch.eye(2, dtype=torch.float64), 1.0, 1.0))
    with pytest.raises(NotDefined, match="outputs"):
        next(relative_flatness(bare, None, False))
    with pytest.raises(NotDefined, match="no layer"):
        next(relative_flatness(bare, "nowhere", False))
    squashed = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    subject = Subject(squashed, (double(9, 4), double(9, 3)), loss="half_mse")
    with pytest.raises(NotDefined, match="layer"):
        next(relative_flatness(point(subject), None, False))
    assert "random directions" in kappa(subject, "0").protocol


def test_an_objective_with_a_named_layer_is_measured() -> None:
    torch.manual_seed(0)
    net, data = nn.Linear(3, 2).double(), (double(9, 3), torch.arange(9) % 2)
    by_loss = kappa(Subject(net, data)).value
    subject = Subject(Shelf(net), data, objective=lambda m, b: nn.functional.cross_entropy(m.inner(b[0]), b[1]))
    found = kappa(subject, "inner")
    assert abs(found.value - by_loss) < 4 * found.error


class Shelf(nn.Module):
    """A module with the layer inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
