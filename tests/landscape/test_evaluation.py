"""Kernels that nobody differentiates and BatchNorm folded away: the plain numbers, and only where they may be used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape.test_points import POINTS, close, conv, images, plain, subject_of, two_directions
from torch import Tensor, nn

from workbench.kernels import Rules
from workbench.landscape.evaluation import fast
from workbench.landscape.evaluation.fast import FAST
from workbench.landscape.evaluation.folding import foldable
from workbench.landscape.evaluation.runner import Runner
from workbench.landscape.evaluation.way import Way
from workbench.subject import Subject


class Pair(nn.Module):
    """A convolution with a BatchNorm behind it, and something that keeps them from being one layer."""

    def __init__(self, change: Callable[[Pair], Any] | None = None, forward: Any = None) -> None:
        super().__init__()
        self.first, self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.own = forward or (lambda m, x: m.norm(m.conv(x)))
        if change:
            change(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, self.first(x)).mean((2, 3))


def shortcut(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y


def hidden(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) * (1 + y.detach().square().mean())


def twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) + m.norm(m.conv(2 * x))


def norm_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.norm(m.conv(x)))


def between(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x).relu())


def replaced_conv(m: Pair) -> None:
    nn.utils.parametrizations.weight_norm(m.conv)


def old_weight_norm(m: Pair) -> None:
    nn.utils.weight_norm(m.conv)


def without_statistics(m: Pair) -> None:
    m.norm = nn.BatchNorm2d(4, track_running_stats=False)


def tied(m: Pair) -> None:
    m.first = nn.Conv2d(4, 4, 3, bias=False)
    m.first.weight = m.conv.weight


def pairs(net: nn.Module, data: Any, **settings_: Any) -> list[tuple[str, str]]:
    subject = Subject(net.double(), data, **settings_)
    found = foldable(subject, Runner(subject, *two_directions(subject), Way())._total)
    return [(layer, norm) for layer, _, norm, _ in found.pairs] if found else []


def test_a_normalisation_is_folded_only_into_a_layer_that_it_alone_follows() -> None:
    torch.manual_seed(0)
    data = images(17, torch.float64)
    assert pairs(Pair(), data) == [("conv", "norm")]
    assert pairs(conv(), data) == [("0", "1")]
    for forward in (shortcut, hidden, twice, norm_twice, between):
        assert not pairs(Pair(forward=forward), data), forward.__name__
    for change in (replaced_conv, old_weight_norm, without_statistics):
        assert not pairs(Pair(change), data), change.__name__
    for norm in ("batch", "recompute"):
        assert not pairs(Pair(), data, norm=norm, batch_size=6)
    x, y = torch.randn(17, 4, 5, 5, dtype=torch.float64), data[1]
    assert not pairs(Pair(tied, lambda m, x: m.norm(m.conv(x))), (F.pad(x, (2, 2, 2, 2)), y))
    positions = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(15, 4), nn.BatchNorm1d(4))
    assert pairs(positions, (x[:, :3, 0], y)) == [("3", "4")]  # the first one's channels are not the layer's outputs


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("forward", [shortcut, hidden, twice, between])
@pytest.mark.parametrize("change", [None, replaced_conv, old_weight_norm, without_statistics])
def test_what_cannot_be_folded_is_left_as_it_is(forward: Any, change: Any) -> None:
    torch.manual_seed(0)
    subject = Subject(Pair(change, forward).double(), images(17, torch.float64))
    u, v = two_directions(subject)
    runner = Runner(subject, u, v, Way(folded=True, fast=True))
    assert runner.folded is None
    close(list(runner.evaluate(POINTS, ("loss", "error_rate"))), plain(subject, u, v), 1e-10)


def test_a_folded_layer_follows_the_weights_and_statistics_of_the_moment() -> None:
    torch.manual_seed(0)
    net = Pair().double()
    subject = Subject(net, images(17, torch.float64), parameters="conv.*")  # gain and shift stay where they are
    u, v = two_directions(subject)
    runner = Runner(subject, u, v, Way(folded=True))
    with torch.no_grad():
        net.norm.weight.mul_(-2)
        net.norm.running_var.mul_(3)
    assert runner.folded is not None
    close(list(runner.evaluate(POINTS, ("loss", "error_rate"))), plain(subject, u, v), 1e-10)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    classes=st.integers(1, 40),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    kind=st.sampled_from(["numbers", "ignored", "shares", "positions"]),
    scale=st.sampled_from([1.0, 300.0]),
)
def test_losses_of_classes_are_those_of_pytorch(
    n: int, classes: int, reduction: str, weighted: bool, smoothing: float, kind: str, scale: float
) -> None:
    make = torch.Generator().manual_seed(n * 41 + classes)
    shape = (n, classes, 3) if kind == "positions" else (n, classes)
    scores = scale * torch.randn(shape, generator=make, dtype=torch.float64)
    labels = torch.randint(0, classes, (n, *shape[2:]), generator=make)
    labels[0] = -100 if kind == "ignored" and n > 1 else labels[0]
    target = torch.rand(shape, generator=make, dtype=torch.float64).softmax(1) if kind == "shares" else labels
    words: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    words["weight"] = torch.rand(classes, generator=make, dtype=torch.float64) + 0.1 if weighted else None
    with Rules(0, FAST):
        found = F.cross_entropy(scores, target, **words), scores.log_softmax(1), F.log_softmax(scores, dim=-1)
    wanted = F.cross_entropy(scores, target, **words), torch.log_softmax(scores, 1), torch.log_softmax(scores, -1)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


@pytest.mark.skipif(F.linear not in FAST, reason="this build of PyTorch is without oneDNN")
def test_dense_layers_go_to_onednn_in_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = list[torch.Size](), torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *_: (calls.append(x.shape), real(x, *_))[1])
    for name in ("transformer", "residual", "dense"):
        for dtype, way in ((torch.float32, Way(fast=True)), (torch.float64, Way(fast=True)), (torch.float32, Way())):
            subject = subject_of(name, dtype)
            u, v = two_directions(subject)
            runner = Runner(subject, u, v, way)
            calls.clear()
            close(list(runner.evaluate(POINTS, ("loss", "error_rate"))), plain(subject, u, v), 1e-5)
            assert bool(calls) == (way.fast and dtype == torch.float32)
    preview = Runner(subject, u, v, Way(fast=True, preview=True))
    calls.clear()
    preview.evaluate(POINTS, ("loss",))
    assert not calls, "autocast would not reach it"


def test_other_kernels_last_as_long_as_an_evaluation_and_are_one_subjects_own(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, other = subject_of("attention"), subject_of("attention")
    runner = Runner(subject, *two_directions(subject), Way(fast=True))
    seen = list[bool]()

    def watch(rules: Rules, func: Any, args: Any, kwargs: Any) -> Any:
        one = threading.Thread(target=lambda: seen.append(bool(other._shell.instead)))
        one.start()
        one.join()
        return func(*args, **kwargs)

    monkeypatch.setattr("workbench.landscape.evaluation.runner.FAST", {**FAST, F.linear: watch})
    runner.evaluate(POINTS[:1], ("loss",))
    assert seen
    assert not any(seen)
    assert not subject._shell.instead
    monkeypatch.setattr("workbench.landscape.evaluation.runner.FAST", {F.linear: lambda *_: pytest.fail("inside")})
    with pytest.raises(pytest.fail.Exception):
        runner.evaluate(POINTS[:1], ("loss",))
    assert not subject._shell.instead
    assert fast.FAST is FAST
    gradient = subject.gradient()  # by explicit attention, which can be differentiated any number of times
    assert all(g.isfinite().all() for g in gradient.values())
