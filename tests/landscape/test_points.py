"""Every way of evaluating points against the plain one, on nets that tempt it to be wrong; the user's model stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from landscape.test_plane import Weights, broken
from torch import Tensor, nn

from workbench.landscape.directions import mover, random_direction
from workbench.landscape.evaluation import choice
from workbench.landscape.evaluation.affine import first_layers
from workbench.landscape.evaluation.runner import Runner
from workbench.landscape.evaluation.way import Way
from workbench.landscape.points import PlanePoints, expected_bytes
from workbench.numerics.sampling import Draw
from workbench.subject import Subject

POINTS = [(0.0, 0.0), (0.3, -0.7), (-1.0, 0.25), (0.0, 0.5), (0.9, 0.0), (1.0, 1.0)]
WAYS = [
    Way(),
    Way(chunk=5),
    Way(channels_last=True),
    Way(affine=True),
    Way(together=4),
    Way(chunk=7, channels_last=True, affine=True, together=3),
    Way(fast=True),
    Way(folded=True),
    Way(chunk=7, channels_last=True, fast=True, folded=True),
    Way(affine=True, together=3, fast=True, folded=True),
]


class Tied(nn.Module):
    """The first layer's weight is used a second time, by another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Reused(nn.Module):
    """The first layer's weight is used a second time, as a tensor, out of sight of gradients where asked."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.first, self.last, self.hidden = nn.Linear(4, 4), nn.Linear(4, 4), hidden

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight.detach() if self.hidden else self.first.weight
        return self.last(torch.tanh(self.first(x))) * (1 + weight.square().sum())


class Twice(nn.Module):
    """The first layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.tanh(self.first(x)))


class Behind(nn.Module):
    """The dense layer's input depends on moving weights, out of sight of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.first = nn.Parameter(torch.tensor([[1.0, 2.0, 0.5, 1.5]])), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x * self.scale.detach())


class Named(nn.Module):
    """Two named inputs, each with a first layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last(torch.tanh(self.left(left) + self.right(right)))


class Tokens(nn.Module):
    """A transformer that predicts a class for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


class Residual(nn.Module):
    """A block whose BatchNorm stands before and after its shortcut, with gains and statistics away from 1 and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(inplace=True),
            nn.Conv2d(5, 5, 3, padding=1, groups=5, padding_mode="circular"),
            nn.BatchNorm2d(5, affine=False),
        )
        self.around, self.norm = nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5, eps=0.1)
        self.head, self.last = nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)
        for m in (self.body[1], self.body[4], self.norm, self.last):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(F.relu(self.body(x) + self.norm(self.around(x))).mean((2, 3))))


class Masked(nn.Module):
    """Causal attention with its scores masked, called by its functional name, and log-probabilities at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen = F.scaled_dot_product_attention(self.query(x), x, x, mask)
        also = F.scaled_dot_product_attention(self.query(x), x, x, None, 0.5, True, scale=0.3)
        return torch.log_softmax(self.head(seen + also).flatten(0, 1), -1).view(*ids.shape, 11)


class Recurrent(nn.Module):
    """An LSTM over the columns of small images."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(18, 7, batch_first=True), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.transpose(1, 3).flatten(2))[0][:, -1])


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 9), nn.ReLU(inplace=True), nn.Linear(9, 4))


def vectors(n: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    return torch.randn(n, 4, dtype=dtype), torch.randint(0, 4, (n,))


def images(n: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    return torch.randn(n, 3, 6, 6, dtype=dtype), torch.randint(0, 4, (n,))


def tokens(n: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    labels = torch.randint(0, 11, (n, 5))
    labels[:, 0] = -100
    return torch.randint(0, 11, (n, 5)), labels


def named(n: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    left, right = torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype)
    return [{"left": left, "right": right, "labels": torch.randint(0, 4, (n,))}]


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.dtype], Any]]] = {
    "dense": (dense, vectors),
    "convolutions": (conv, images),
    "transformer": (Tokens, tokens),
    "tied": (Tied, vectors),
    "used again": (lambda: Reused(False), vectors),
    "called twice": (Twice, vectors),
    "two named inputs": (Named, named),
    "residual": (Residual, images),
    "attention": (Masked, tokens),
    "recurrent": (Recurrent, images),
}


def subject_of(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Subject:
    torch.manual_seed(3)
    make, data = NETS[name]
    return Subject(make().to(dtype), data(17, dtype), **settings)


def two_directions(subject: Subject, normalization: Any = "none") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    draw = Draw(1, "points", subject.size, subject.dtype)
    return random_direction(subject, draw, 0, normalization), random_direction(subject, draw, 1, normalization)


def plain(subject: Subject, u: dict[str, Tensor], v: dict[str, Tensor]) -> list[dict[str, float]]:
    at = mover(subject, u, v)
    return [subject.evaluate(at(a, b)) for a, b in POINTS]


def close(found: list[dict[str, float]], wanted: list[dict[str, float]], rel: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=rel, nan_ok=True)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_way_gives_the_numbers_of_one_evaluation_after_another(name: str, dtype: torch.dtype) -> None:
    subject = subject_of(name, dtype)
    u, v = two_directions(subject)
    wanted = plain(subject, u, v)
    for way in WAYS:
        runner = Runner(subject, u, v, way)
        if way.together > 1 and name == "recurrent":  # vmap has no rule for it, so it says so
            with pytest.raises(RuntimeError):
                runner.evaluate(POINTS[:2], ("loss",))
            continue
        groups = [POINTS[i : i + way.together] for i in range(0, len(POINTS), way.together)]
        found = [row for group in groups for row in runner.evaluate(group, ("loss", "error_rate"))]
        close(found, wanted, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("norm", ["eval", "batch", "recompute"])
def test_statistics_follow_the_policy_at_every_point(norm: Any) -> None:
    subject = subject_of("convolutions", norm=norm, batch_size=6)
    u, v = two_directions(subject)
    wanted = plain(subject, u, v)
    for way in WAYS:
        if way.together > 1 and norm == "batch":  # vmap cannot write running statistics, so it says so
            with pytest.raises(RuntimeError):
                Runner(subject, u, v, way).evaluate(POINTS[:2], ("loss",))
        else:
            runner = Runner(subject, u, v, way)
            assert (runner.folded is not None) == (way.folded and norm == "eval" and not way.affine), "no norm is left"
            close([runner.evaluate([p], ("loss", "error_rate"))[0] for p in POINTS], wanted, 1e-10)


def layers_of(subject: Subject, room: float = math.inf) -> set[str]:
    u, v = two_directions(subject)
    found = first_layers(subject, u, v, Runner(subject, u, v, Way())._total, room)
    return set(found.names) if found else set()


def test_layers_are_affine_only_where_nothing_that_moves_reaches_them_and_nobody_else_uses_them() -> None:
    assert layers_of(subject_of("dense")) == {"1.weight", "1.bias"}
    assert layers_of(subject_of("convolutions")) == {"0.weight", "0.bias"}
    assert layers_of(subject_of("two named inputs")) == {"left.weight", "left.bias", "right.weight", "right.bias"}
    assert layers_of(subject_of("dense", parameters="1.weight")) == {"1.weight"}
    assert layers_of(subject_of("dense", parameters="3.*")) == {"3.weight", "3.bias"}  # before it nothing moves
    for name in ("tied", "used again", "called twice", "transformer"):
        assert not layers_of(subject_of(name)), name
    assert not layers_of(subject_of("dense"), room=9 * 8 * 3 - 1)
    assert layers_of(subject_of("dense"), room=9 * 8 * 3)


def eager(patch: pytest.MonkeyPatch, wanted: Way, small: bool = False) -> None:
    """Let the race be run on the smallest nets, as if they were small or not, and be won by one way."""
    monkey: dict[str, Any] = {"QUICK": 0.0, "EFFORT": 1e9, "PATIENCE": 1e9, "CALL": 1e9 if small else 0.0}
    for name, value in monkey.items():
        patch.setattr(choice, name, value)
    patch.setattr(choice, "_chosen", type(choice._chosen)())
    real = choice.Trial._measured

    def measured(self: choice.Trial, runner: Runner) -> float:
        found = real(self, runner)
        part = [f.name for f in fields(Way) if getattr(runner.way, f.name) != getattr(Way(), f.name)]
        good = all(getattr(runner.way, f) == getattr(wanted, f) for f in part)
        return found if math.isinf(found) else (1.0 / (1 + len(part)) if good else 9.0)

    patch.setattr(choice.Trial, "_measured", measured)


@pytest.mark.parametrize("net", [Behind, lambda: Reused(True)])
def test_dependence_that_gradients_do_not_show_is_found_by_comparison(
    net: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    subject = Subject(net().double(), vectors(17, torch.float64))
    u, v = two_directions(subject)
    assert layers_of(subject), "the trap is set"
    with pytest.raises(AssertionError):
        close(list(Runner(subject, u, v, Way(affine=True)).evaluate(POINTS, ("loss",))), plain(subject, u, v), 1e-10)
    eager(monkeypatch, Way(affine=True))
    points = PlanePoints(subject, u, v, expected=100)
    close(points.evaluate(POINTS), plain(subject, u, v), 1e-10)
    assert "first layer" not in points.how
    subject = Subject(dense().double(), vectors(17, torch.float64))
    key = choice.key_of(subject, 100, Way())
    choice._chosen[(*key, False)] = Way(affine=True)  # as if another model of these shapes had won by it
    points = PlanePoints(subject, *two_directions(subject), expected=100)
    points.evaluate(POINTS)
    assert "first layer" in points.how


def test_a_remembered_way_is_compared_again_before_products_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    subject = Subject(Behind().double(), vectors(17, torch.float64))
    u, v = two_directions(subject)
    monkeypatch.setattr(
        choice, "_chosen", type(choice._chosen)({(*choice.key_of(subject, 100, Way()), False): Way(affine=True)})
    )
    points = PlanePoints(subject, u, v, expected=100)
    close(points.evaluate(POINTS), plain(subject, u, v), 1e-10)
    assert "first layer" not in points.how


SMALL = Way(affine=True, together=64, fast=True)
LAST = Way(channels_last=True, folded=True, fast=True)


@pytest.mark.parametrize(
    ("name", "small", "wanted"),
    [
        ("dense", True, SMALL),
        ("convolutions", True, SMALL),
        ("recurrent", True, Way(affine=False, fast=True)),
        ("dense", False, Way(affine=True, fast=True)),
        ("convolutions", False, LAST),
        ("residual", False, replace(LAST, affine=True)),
    ],
)
def test_the_winner_is_kept_and_its_numbers_come_again_bit_for_bit(
    name: str, small: bool, wanted: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch, wanted, small)
    subject = subject_of(name)
    u, v = two_directions(subject, "filter")
    first = PlanePoints(subject, u, v, expected=100)
    assert first.together == 1
    numbers = first.evaluate(POINTS)
    close(numbers, plain(subject, u, v), 1e-10)
    assert first._runner is not None
    assert first._runner.way == wanted
    words = {"affine": "first layer", "together": "64 points at once", "channels_last": "channels last"}
    words |= {"fast": "kernels that are not differentiated", "folded": "BatchNorm folded"}
    for field, said in words.items():
        assert (said in first.how) == (getattr(wanted, field) != getattr(Way(), field))
    monkeypatch.setattr(choice.Trial, "best", lambda _: pytest.fail("timed again"))
    again = PlanePoints(subject_of(name), u, v, expected=100)
    assert again.evaluate(POINTS) == numbers
    assert again._runner is not None
    assert again._runner.way == wanted
    turns = list(again.in_turn(np.linspace(-1, 1, 200).reshape(100, 2)))
    assert [len(turn) for turn in turns] == ([64, 36] if wanted.together > 1 else [1] * 100)


def test_a_small_job_does_not_wait_for_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch, SMALL, small=True)
    monkeypatch.setattr(choice, "CALL", 1e3)  # a pass of the plain way "takes" one second here: clearly less
    subject, tried = subject_of("dense"), list[Way]()
    real = choice.Trial._time
    monkeypatch.setattr(choice.Trial, "_time", lambda self, way: (tried.append(way), real(self, way))[1])
    monkeypatch.setattr(choice.Trial, "_pass", lambda *_: 0.0)
    PlanePoints(subject, *two_directions(subject), expected=100).evaluate(POINTS)
    assert tried == [Way(), SMALL]


def test_the_model_is_as_it_was_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, (x, y) = conv().double().train(), images(17, torch.float64)
    before = {k: (t.clone(), t.data_ptr(), t._version) for k, t in net.state_dict(keep_vars=True).items()}
    subject = Subject(net, (x, y), norm="batch", batch_size=6)
    u, v = two_directions(subject)
    kept = [{k: t.clone() for k, t in d.items()} for d in (u, v)]
    runner = Runner(subject, u, v, Way(channels_last=True, affine=True))
    calm = runner.evaluate([POINTS[1]], ("loss",))
    with monkeypatch.context() as patch:
        patch.setattr(F, "batch_norm", lambda *_, **__: pytest.fail("in the middle"))
        with pytest.raises(pytest.fail.Exception):
            runner.evaluate([POINTS[2]], ("loss",))
        with pytest.raises(pytest.fail.Exception):
            Runner(subject, u, v, Way(affine=True))
    assert not any("forward" in vars(m) for m in subject.module.modules())
    assert runner.evaluate([POINTS[1]], ("loss",)) == calm
    assert subject.loss() == Subject(net, (x, y), norm="batch", batch_size=6).loss()
    for name, tensor in net.state_dict(keep_vars=True).items():
        value, place, version = before[name]
        assert torch.equal(tensor, value)
        assert (tensor.data_ptr(), tensor._version) == (place, version)
    assert all(torch.equal(d[k], old[k]) for d, old in zip((u, v), kept, strict=True) for k in d)


def test_lines_objectives_and_losses_that_are_no_numbers() -> None:
    subject = subject_of("dense")
    u, v = two_directions(subject)
    zero = {k: torch.zeros_like(t) for k, t in u.items()}
    line = PlanePoints(subject, u, expected=5)
    wanted = [subject.evaluate(mover(subject, u, zero)(a, 0.0)) for a in (-1.0, 0.5)]
    close(line.evaluate([-1.0, 0.5]), wanted, 1e-12)
    assert line.evaluate([0.5], ("loss",)) == [{k: wanted[1][k] for k in ("loss", "loss_error")}]
    own = Subject(Weights([0.1, -0.2]), [torch.zeros(1, 1)], objective=broken, reduction="mean")
    u, v = two_directions(own)
    at = mover(own, u, v)
    far = [(a, b) for a in (-3.0, 0.1, 3.0) for b in (-3.0, 0.2, 3.0)]
    found, wanted = PlanePoints(own, u, v, expected=9).evaluate(far), [own.evaluate(at(a, b)) for a, b in far]
    assert any(not math.isfinite(w["loss"]) for w in wanted)
    close(found, wanted, 1e-12)


def test_a_preview_says_that_it_is_one() -> None:
    subject = subject_of("dense", torch.float32)
    u, v = two_directions(subject, "filter")
    points = PlanePoints(subject, u, v, expected=9, preview=True)
    close(points.evaluate(POINTS), plain(subject, u, v), 0.1)
    assert points.evaluate(POINTS) != PlanePoints(subject, u, v).evaluate(POINTS)
    assert "bfloat16" in points.how
    assert "bfloat16" not in PlanePoints(subject, u, v).how


def test_what_cannot_be_evaluated_is_refused_in_words() -> None:
    subject = subject_of("dense")
    u, v = two_directions(subject)
    for wrong in ([1.0, 2.0], [[1.0]], [[[1.0, 2.0]]]):
        with pytest.raises(ValueError, match=r"shape .*one \(a, b\) a row"):
            PlanePoints(subject, u, v).evaluate(wrong)
    with pytest.raises(ValueError, match="no metric 'accuracy'"):
        PlanePoints(subject, u, v).evaluate(POINTS, ("accuracy",))
    assert PlanePoints(subject, u, v).evaluate(np.zeros((0, 2))) == []
    assert subject.memory() < expected_bytes(subject) <= 9 * subject.memory() + 8 * subject.size
    assert replace(Way(), together=4).words(64) == "64 examples at a time, 4 points at once"
