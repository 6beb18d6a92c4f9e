"""Permutations found in every kind of net against the symmetries that are known, and planted copies."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.landscape.alignment import Symmetry, align, symmetry
from workbench.several import Pair
from workbench.subject import Subject


class Residual(nn.Module):
    """A stream of six channels through two blocks with BatchNorm; channels before a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.one = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 1))
        self.two = nn.Sequential(nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.GELU())
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        x = x + self.two(x)
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Tokens(nn.Module):
    """Embedded tokens, a learned position, an encoder layer, and the embedding again as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.body = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.last = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.last(self.body(self.embed(ids) + self.place)), self.embed.weight)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.out = kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))


def images() -> nn.Module:
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3))


def encoder() -> nn.Module:
    body = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.Sequential(nn.Linear(4, 8), body, nn.Flatten(), nn.Linear(40, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], list[int], float]] = {
    # name: (net, lengths of its permutations, share of the weights they reach)
    "dense": (dense, [7, 6], 1.0 - 3 / (35 + 48 + 12 + 21)),
    "images": (images, [4, 5], 1.0 - 3 / (72 + 4 + 8 + 20 + 5 + 10 + 15 + 3)),
    "residual": (Residual, [2, 3, 5], 1.0 - 3 / 423),
    "encoder": (encoder, [8, 2, 4, 12], 0.99),
    "tokens": (Tokens, [8, 2, 4, 12], 1.0),
    "LSTM": (lambda: Recurrent(nn.LSTM), [6], 1.0 - 3 / (24 * 12 + 18 + 3)),
    "GRU": (lambda: Recurrent(nn.GRU), [6], 1.0 - 3 / (18 * 12 + 18 + 3)),
}


def subject_of(name: str, seed: int = 0) -> Subject:
    """A net with weights, running statistics and examples that are random, in float64; it is right on all of them."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETS[name][0]().double().eval()
    with torch.no_grad():
        for n, t in (*net.named_parameters(), *net.named_buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=rng, dtype=torch.float64) * 0.4)
                t.abs_().add_(0.5) if n.endswith("running_var") else None
    fixed = torch.Generator().manual_seed(7)
    if name == "tokens":
        x = torch.randint(0, 9, (12, 5), generator=fixed)
        return Subject(net, (x, net(x).argmax(-1)), "cross_entropy")
    shape = {"images": (2, 4, 4), "residual": (2, 4, 4)}.get(name, (5, 4))
    shape = (4,) if name == "dense" else shape
    x = torch.randn(12, *shape, generator=fixed, dtype=torch.float64)
    return Subject(net, (x, net(x).argmax(-1)), "cross_entropy")


def shuffled(subject: Subject, found: Symmetry, seed: int = 3) -> Subject:
    rng = np.random.default_rng(seed)
    orders = {k: rng.permutation(n) for k, n in found.lengths.items()}
    return subject.at(found.permuted(subject.tensors(), orders))


@pytest.mark.parametrize("name", NETS)
def test_the_known_symmetries_are_found_and_change_nothing(name: str) -> None:
    subject = subject_of(name)
    found = symmetry(subject)
    assert found.notes == ()
    assert sorted(found.lengths.values()) == sorted(NETS[name][1])
    assert found.coverage(subject.params) == pytest.approx(NETS[name][2], abs=0.01)
    moved = shuffled(subject, found)
    assert moved.outputs().numpy() == pytest.approx(subject.outputs().numpy(), abs=1e-12, rel=1e-12)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(moved.params.values(), subject.params.values(), strict=True))
        > 0.1
    )


@pytest.mark.parametrize("name", NETS)
def test_a_permuted_copy_is_brought_back(name: str) -> None:
    subject = subject_of(name)
    pair = Pair(subject, shuffled(subject, symmetry(subject)))
    found = next(align(pair, np.random.default_rng(0)))
    assert found.matching
    assert found.matching.unaligned > 1
    assert found.matching.distance == pytest.approx(0, abs=1e-6)
    assert found.output_change < 1e-12
    for n, t in found.second.tensors().items():
        assert t.double().numpy() == pytest.approx(subject.tensors()[n].double().numpy(), abs=1e-12), n


class Told(nn.Module):
    """Three units in a row of which the first is used otherwise, and six that are sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = torch.cat([h[:, :1].sin(), h[:, 1:]], 1)
        return self.c(self.b(h).sort(1).values)


def test_what_is_not_understood_keeps_its_order_and_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64)
    subject = Subject(Told().double(), (x, torch.arange(12) % 3), "cross_entropy")
    found = symmetry(subject)
    assert found.lengths == {}
    assert "sort" in found.notes[0]
    aligned = next(align(Pair(subject, subject.snapshot()), np.random.default_rng(0)))
    assert (aligned.coverage, aligned.output_change) == (0.0, 0.0)


class Joined(nn.Module):
    """Six units side by side with four that are made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(torch.cat([h, self.b(h).tanh()], 1))


def test_concatenated_units_keep_their_order_and_a_fused_recurrent_layer_does_not() -> None:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    found = symmetry(Subject(Joined(), (x, torch.arange(12) % 3), "cross_entropy"))
    assert found.lengths == {}
    assert found.notes == ("axes that meet cat keep their order",)
    steps = x.reshape(3, 4, 4).repeat(4, 1, 1)
    lstm = symmetry(Subject(Recurrent(nn.LSTM), (steps, torch.arange(12) % 3), "cross_entropy"))  # float32: fused
    assert (list(lstm.lengths.values()), lstm.notes) == ([6], ())


def test_a_rule_that_were_wrong_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.landscape import channels

    monkeypatch.setitem(channels._RULES, "sort", channels._like)
    monkeypatch.setitem(channels._RULES, "select", channels._reduced)
    torch.manual_seed(0)

    class First(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            return self[1](h * h[:, 0, None])

    net = First(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    found = symmetry(Subject(net, (x, torch.arange(12) % 3), "cross_entropy"))
    assert found.lengths == {}
    assert "outputs change" in found.notes[0]


def test_the_models_stay_as_they_are() -> None:
    subject = subject_of("images")
    net = copy.deepcopy(subject.module)
    list(align(Pair(subject, shuffled(subject, symmetry(subject))), np.random.default_rng(0)))
    for mine, before in zip(subject.module.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(mine, before)
