"""Features and gradients of layers against plain PyTorch, and layers chosen by name, glob or automatically."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import architectures
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import Tensor, nn

from workbench.activations import Layer, choose_layers, gradients, stream
from workbench.pooling import example_rows, in_blocks, pooled, widths
from workbench.subject import Subject

Named = namedtuple("Named", ["hidden", "extra"])


def overwriting() -> nn.Sequential:
    """A net whose activation writes over what the layer before it gave, as many vision models' do."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 4))
    return nn.Sequential(*layers).double()


def images(n: int = 11) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=rng, dtype=torch.float64), torch.arange(n) % 4


class Packed(nn.Module):
    """A body that gives a tuple, a named tuple or a dict, then a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.body, self.head = kind, Body(kind), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x.flatten(1))
        return self.head(found["hidden"] if self.kind == "dict" else found[0])


class Body(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.map = kind, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.map(x))
        return {"tuple": (y, 3), "named": Named(y, None), "dict": {"hidden": y, "extra": 1}}[self.kind]


def joined(parts: Any, layer: str) -> Tensor:
    return torch.cat([part.features[Layer(layer)] for part in parts])


def test_what_is_written_in_place_afterwards_changes_no_feature() -> None:
    net, (x, y) = overwriting(), images()
    subject = Subject(net, (x, y), batch_size=4)
    layers = choose_layers(subject)
    assert [layer.name for layer in layers] == ["0", "1", "3"]
    before = joined(stream(subject, layers), "0")
    torch.testing.assert_close(before, net[0](x).detach(), rtol=1e-12, atol=1e-12)
    assert (before < 0).any()


def test_gradients_are_those_of_each_examples_own_loss() -> None:
    net, (x, y) = overwriting(), images()
    subject = Subject(net, (x, y), batch_size=4)
    found = list(gradients(subject, choose_layers(subject)))
    assert torch.cat([part.outputs for part in found]).sum() / 11 == approx(subject.loss())
    for i in range(11):
        before = net[0](x[i : i + 1]).detach().requires_grad_()
        after = F.relu(before).detach().requires_grad_()
        want = [
            torch.autograd.grad(F.cross_entropy(net[3](F.relu(before).flatten(1)), y[i : i + 1]), before)[0],
            torch.autograd.grad(F.cross_entropy(net[3](after.flatten(1)), y[i : i + 1]), after)[0],
        ]
        for layer, one in zip(("0", "1"), want, strict=True):
            torch.testing.assert_close(joined(found, layer)[i : i + 1], one, rtol=1e-10, atol=1e-14)
    logits = net(x).detach()
    softmax = logits.softmax(1) - F.one_hot(y, 4)
    torch.testing.assert_close(joined(found, "3"), softmax, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["tuple", "named", "dict"])
def test_layers_that_give_more_than_a_tensor(kind: str) -> None:
    net, (x, y) = Packed(kind).double().requires_grad_(False), images()
    net.head.weight.requires_grad_()  # all before it is frozen, and has gradients all the same
    (found,) = gradients(Subject(net, (x, y)), (Layer("body"),))
    features = torch.tanh(net.body.map(x.flatten(1)))
    want = (net.head(features).softmax(1) - F.one_hot(y, 4)) @ net.head.weight
    torch.testing.assert_close(found.features[Layer("body")], want.detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", list(architectures.SMALL))
def test_gradients_of_every_architecture_are_slopes(name: str) -> None:
    """A shift of one layer's outputs along its gradient changes an example's loss by the gradient's squared length."""
    trained = architectures.small(name)
    subject = Subject(trained.model, tuple(t[:6] for t in trained.data))
    for layer in choose_layers(subject):
        (found,) = gradients(subject, (layer,))
        step = found.features[layer]
        with subject.lock:
            handle = subject.module.get_submodule(layer.name).register_forward_hook(_moved(1e-6 * step))
            after = subject.losses()
            handle.remove()
        weights = len(step) / found.outputs.sum() * subject.loss()  # losses are scaled so that their mean is L
        slope = (after - subject.losses()) / 1e-6 / weights
        want = (step**2).flatten(1).sum(1)
        torch.testing.assert_close(slope, want, rtol=1e-3, atol=1e-5 * float(want.max()) + 1e-8)


def _moved(step: Tensor) -> Any:
    def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output + step if isinstance(output, Tensor) else (output[0] + step, *output[1:])

    return add


def test_hooks_are_gone_after_each_batch_and_after_errors() -> None:
    net, data = overwriting(), images()
    subject = Subject(net, data, batch_size=4)
    for source in (stream, gradients):
        parts = source(subject, choose_layers(subject))
        next(parts)
        assert not any(module._forward_hooks for module in subject.module.modules())
        parts.close()
        with pytest.raises(ValueError, match="no layer 'nope'"):
            next(source(subject, (Layer("0"), Layer("nope"))))
        assert not any(module._forward_hooks for module in subject.module.modules())


def test_what_has_no_gradient_of_one_example_is_refused() -> None:
    net, (x, y) = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double(), images()
    rows = x[:, 0, 0, :3]
    with pytest.raises(ValueError, match="norm='eval'"):
        next(gradients(Subject(net, (rows, y % 2), norm="batch", batch_size=4), (Layer("0"),)))
    with pytest.raises(ValueError, match="input of '2'"):
        next(gradients(Subject(net, (rows, y % 2)), (Layer("2", "input"),)))

    def coupled(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean(0) ** 2).sum()

    with pytest.raises(ValueError, match="couples the examples"):
        next(gradients(Subject(net, (rows, y % 2), coupled, reduction="mean"), (Layer("0"),)))


# ---------------------------------------------------------------------------- rows


def test_tokens_and_places_become_rows() -> None:
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    want = {
        ("mean", None): tokens.mean(1),
        ("last", None): tokens[:, 2],
        ("cls", None): tokens[:, 0],
        ("flatten", None): tokens.reshape(2, 12),
        ("mean", "mask"): torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)]),
        ("last", "mask"): torch.stack([tokens[0, 1], tokens[1, 2]]),
    }
    for (pool, masked), rows in want.items():
        found = pooled(tokens, 2, pool, mask=mask if masked else None)  # type: ignore[arg-type]
        assert torch.equal(found, rows)
    assert torch.equal(pooled(tokens, 2, channels_first=True), tokens.mean(2))
    assert torch.equal(pooled(tokens, 3), tokens.mean(0)), "sequences first: (s, n, d)"
    assert torch.equal(pooled(torch.arange(16.0).reshape(2, 2, 2, 2), 2)[:, 0], torch.tensor([1.5, 9.5]))
    with pytest.raises(ValueError, match="do not have the 5 examples"):
        pooled(tokens, 5)


def test_rows_of_features_and_of_gradients_have_one_shape_and_any_block() -> None:
    net, (x, y) = overwriting(), images()
    subject = Subject(net, (x, y), batch_size=4)
    layers = choose_layers(subject)
    assert widths(subject, layers) == [3, 3, 4]
    for of_loss in (False, True):
        whole = list(example_rows(subject, layers, of_loss=of_loss))
        blocks = list(in_blocks(iter(whole), 5))
        assert [len(block[layers[0]]) for block in blocks] == [5, 5, 1]
        for layer, d in zip(layers, (3, 3, 4), strict=True):
            rows = torch.cat([part[layer] for part in whole])
            assert rows.shape == (11, d)
            assert torch.equal(rows, torch.cat([block[layer] for block in blocks]))
    before = joined(gradients(subject, layers), "0")
    assert torch.equal(torch.cat([part[layers[0]] for part in whole]), before.mean((2, 3)))
