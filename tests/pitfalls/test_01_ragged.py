"""Pitfall 1: a ragged last batch counts by its examples (or unmasked tokens), never as one batch among others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pitfalls.exact import IDS, N, X, Y, built, cross_entropy, dense, derivatives, double, flat, gap
from promises import not_close
from torch import Tensor, nn
from toys import quick

from workbench import catalog
from workbench.operators.hessian import Hessian
from workbench.probe import Probe
from workbench.subject import Subject

SPLITS = ([70], [64, 6], [1, 69], [10] * 7)
Batches = list[tuple[Tensor, Tensor]]
Measured = tuple[float, Tensor, Tensor]
MASKED = IDS.masked_fill(double(N, 5, seed=9) > 0.2, -100)
MASKED[:6, 1:] = -100  # batches of one size then hold different numbers of tokens


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "classes": (dense, X, Y),
    "tokens": (tokens, IDS, MASKED),
}


def agrees_on_every_split(name: str, measure: Callable[[nn.Module, Batches, Tensor], Measured]) -> None:
    """Loss, gradient and a product are those of the whole, to 1e-5."""
    make, x, y = NETS[name]
    net = built(make)
    loss, gradient, hessian = derivatives(net, x, y)
    v = double(len(gradient), seed=5)
    for sizes in SPLITS:
        found = measure(net, list(zip(x.split(sizes), y.split(sizes), strict=True)), v)
        assert found[0] == pytest.approx(loss, rel=1e-5), sizes
        assert gap(found[1], gradient) < 1e-5, sizes
        assert gap(found[2], hessian @ v) < 1e-5, sizes


def ours(net: nn.Module, batches: Batches, v: Tensor, loss: Any = "cross_entropy", **words: Any) -> Measured:
    subject = Subject(net, batches, loss, **words)
    with Hessian(subject) as hessian:
        return subject.loss(), subject.flatten(subject.gradient()), hessian @ v


def mean_of_batch_means(net: nn.Module, batches: Batches, v: Tensor) -> Measured:
    """The fault: every batch counts alike."""
    params = list(net.parameters())
    value = torch.stack([cross_entropy(net, x, y) for x, y in batches]).mean()
    gradient = flat(torch.autograd.grad(value, params, create_graph=True))
    return value.item(), gradient.detach(), flat(torch.autograd.grad(gradient @ v, params))


def weighted_by_examples(net: nn.Module, batches: Batches, v: Tensor) -> Measured:
    """The fault that only token losses show: weights are examples, although masks leave unequal numbers of tokens."""
    found = [mean_of_batch_means(net, [b], v) for b in batches]
    shares = [len(x) / N for x, _ in batches]
    return tuple(sum(s * f[i] for s, f in zip(shares, found, strict=True)) for i in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("name", NETS)
def test_no_split_changes_loss_gradient_or_product(name: str) -> None:
    agrees_on_every_split(name, ours)
    with pytest.raises(AssertionError, match="64, 6"):
        agrees_on_every_split(name, mean_of_batch_means)


def test_tokens_are_counted_where_they_are_not_masked() -> None:
    agrees_on_every_split("classes", weighted_by_examples)
    with pytest.raises(AssertionError, match="64, 6"):
        agrees_on_every_split("tokens", weighted_by_examples)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_every_reduction_are_weighted(reduction: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    agrees_on_every_split("classes", lambda net, batches, v: ours(net, batches, v, loss))
    mistaken = "sum" if reduction == "mean" else "mean"
    words = {"reduction": mistaken} if reduction != "none" else {}
    if words:
        with pytest.raises(AssertionError):
            agrees_on_every_split("classes", lambda net, batches, v: ours(net, batches, v, loss, **words))


def reads_alike(probe: Probe[Any], subjects: Callable[[Batches], Any]) -> None:
    """A probe's numbers on the ragged splits are those on one batch, to 1e-6 of their size."""
    case: Any = type("Case", (), {"probe": probe})
    readings = [probe.run(subjects(list(zip(X.split(s), Y.split(s), strict=True))), seed=1) for s in SPLITS[:3]]
    for other in readings[1:]:
        apart = not_close(readings[0].data, other.data, case)
        assert not apart, f"{probe.name} differs in {apart}"


PROBES = {name: cls for name, cls in catalog.probes().items() if cls.looks_at == "subject"}
QUICK = ("HessianSpectrum", "NeuralCollapse", "LayerSpectra", "Sharpness")
ROUND = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PROBES]


@pytest.mark.parametrize("name", ROUND)
def test_no_split_changes_what_a_probe_reads(name: str) -> None:
    net = built(dense)
    reads_alike(quick(PROBES[name]), lambda batches: Subject(net, batches, held_out=(X[:20], Y[:20])))


@pytest.mark.parametrize("name", ["HessianSpectrum", "NeuralCollapse"])
def test_a_probe_to_which_each_batch_counts_alike_is_caught(name: str) -> None:
    def careless(batches: Batches) -> Subject:
        times = [math.prod(len(y) for _, y in batches) // len(y) for _, y in batches]
        repeated = [(x.repeat(t, 1), y.repeat(t)) for t, (x, y) in zip(times, batches, strict=True)]
        return Subject(built(dense), repeated)

    with pytest.raises(AssertionError, match=f"{name} differs"):
        reads_alike(quick(PROBES[name]), careless)
