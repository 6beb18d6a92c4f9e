"""Rank of the curvature: softmax regression by hand, dense Hessians, blurred spectra, and nets with dead units."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from workbench.numerics.curvature_rank import covered, mean_cosine, threshold_rank
from workbench.probes.curvature_rank import CurvatureRank
from workbench.subject import Subject


def softmax_regression() -> Subject:
    """Four inputs, three classes, weights 0: eigenvalues .75 and .25 twice each, and two zeros, for any targets."""
    net = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(net.weight)
    x = torch.tensor([[1.0, 0], [0, 2], [1, 1], [2, 1]], dtype=torch.float64)
    return Subject(net, (x, torch.tensor([0, 1, 2, 0])))


def test_softmax_regression_by_hand() -> None:
    reading = CurvatureRank().run(softmax_regression())
    data = reading.data
    assert reading.converged
    assert (float(data.threshold_rank), float(data.threshold_rank_error)) == (4, 0)
    assert float(data.relative_rank) == pytest.approx(4 / 6)
    assert float(data.flat_share) == pytest.approx(2 / 6)
    assert float(data.negative_part) == pytest.approx(0, abs=1e-12)
    assert float(data.sharpness) == pytest.approx(0.75)
    assert data.covered.values[:4] == pytest.approx([0.375, 0.75, 0.875, 1.0])
    assert float(CurvatureRank(share=0.75).run(softmax_regression()).data.threshold_rank) == 2
    # Gradients (softmax - one-hot) xᵀ are Kronecker products, so that cosines are those of residuals times of inputs.
    x, y = torch.tensor([[1.0, 0], [0, 2], [1, 1], [2, 1]]), [0, 1, 2, 0]
    rest = torch.full((4, 3), 1 / 3) - torch.eye(3)[y]
    pairs = list(itertools.combinations(range(4), 2))
    alike = [[float(functional.cosine_similarity(t[i], t[j], 0)) for t in (x, rest)] for i, j in pairs]
    wanted = np.mean([one * two for one, two in alike])
    assert float(data.gradient_cosine) == pytest.approx(wanted, abs=1e-6)


def net(hidden: int = 5, seed: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def examples(count: int = 23) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(5)).double(), torch.arange(count) % 3


def dense(model: nn.Module, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """All eigenvalues by plain autograd over one flat vector."""
    named = dict(model.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        params = {n: v.view_as(p) for (n, p), v in zip(named.items(), parts, strict=True)}
        return functional.cross_entropy(functional_call(model, params, (data[0],)), data[1])

    point = torch.cat([p.detach().flatten() for p in named.values()])
    return np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, point).numpy())


def plain(values: np.ndarray, share: float) -> int:
    sizes = sorted(np.abs(values), reverse=True)
    return next(k for k in range(1, len(sizes) + 1) if sum(sizes[:k]) >= share * sum(sizes) * (1 - 1e-12))


def test_a_net_against_its_dense_hessian_and_plain_loops_over_examples() -> None:
    model, (x, y) = net(), examples()
    values = dense(model, (x, y))
    data = CurvatureRank(share=0.9, flat=0.01, examples=1000).run(Subject(model, (x, y), batch_size=5)).data
    assert bool(data.known)
    assert float(data.threshold_rank) == plain(values, 0.9)
    assert float(data.flat_share) == pytest.approx((np.abs(values) < 0.01 * values[-1]).mean())
    assert float(data.negative_part) == pytest.approx(-values[values < 0].sum() / np.abs(values).sum())
    assert float(data.negative_part) > 0.01
    units = []
    for i in range(len(x)):
        model.zero_grad()
        functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        units.append((flat / flat.norm()).numpy())

    def mean(rows: list[np.ndarray]) -> float:
        return float(np.mean([a @ b for a, b in itertools.combinations(rows, 2)]))

    n, left = len(units), [mean(units[:i] + units[i + 1 :]) for i in range(len(units))]
    assert float(data.gradient_cosine) == pytest.approx(mean(units))
    assert float(data.gradient_cosine_error) == pytest.approx(math.sqrt((n - 1) ** 2 / n * np.var(left, ddof=1)))


def test_a_density_is_right_within_its_error() -> None:
    model, data = net(hidden=24, seed=7), examples(40)
    values = dense(model, data)
    wanted = {
        "threshold_rank": plain(values, 0.9),
        "flat_share": (np.abs(values) < 1e-3 * values[-1]).mean(),
        "negative_part": -values[values < 0].sum() / np.abs(values).sum(),
    }
    inside, errors = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0.0)
    for seed in range(8):
        reading = CurvatureRank(share=0.9, exact=0, depth=30, examples=0).run(Subject(model, data), seed=seed)
        assert not bool(reading.data.known)
        for name, value in wanted.items():
            error = float(reading.data[f"{name}_error"])
            inside[name] += abs(float(reading.data[name]) - value) <= error
            errors[name] += error / 8
    assert all(count >= 7 for count in inside.values()), inside
    assert errors["threshold_rank"] < 0.4 * wanted["threshold_rank"]
    assert errors["flat_share"] < 1


@given(
    st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=12),
    st.floats(0.5, 0.99),
    st.floats(1e-3, 1e3),
    st.integers(1, 5),
)
def test_ranks_are_those_of_loops_in_any_unit_order_and_grouping(
    values: list[float], share: float, unit: float, copies: int
) -> None:
    nodes = np.array(values)
    one = np.ones(len(nodes))
    found, last = threshold_rank(nodes, one, share)
    assert found == plain(nodes, share)
    assert last == pytest.approx(sorted(np.abs(nodes))[-int(found)])
    assert threshold_rank(-unit * nodes[::-1], one, share)[0] == found
    many = np.repeat(nodes, copies)
    grouped, _ = threshold_rank(nodes, copies * one, share)
    assert plain(many, share) - 1 - 1e-6 <= grouped <= plain(many, share) + 1e-6
    assert covered(nodes, one)[1][-1] == pytest.approx(1)


def test_what_has_no_rank_is_unknown() -> None:
    assert all(map(math.isnan, threshold_rank(np.zeros(3), np.ones(3), 0.9)))
    assert all(map(math.isnan, threshold_rank(np.array([1.0, math.nan]), np.ones(2), 0.9)))
    assert all(map(math.isnan, mean_cosine(np.ones(1), 1.0)))
    straight = Subject(nn.Linear(2, 1).double(), (torch.ones(4, 2).double(), torch.ones(4, 1).double()), "l1")
    reading = CurvatureRank().run(straight)
    assert np.isnan(reading.data.threshold_rank)
    assert np.isnan(reading.data.flat_share)
    assert any("no eigenvalue is positive" in note for note in reading.notes)


def test_a_net_with_dead_units_has_fewer_curved_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    alive = CurvatureRank(examples=0).run(Subject(model, examples())).data
    with torch.no_grad():
        model[0].bias[3:] = -100.0
    dead = CurvatureRank(examples=0).run(Subject(model, examples())).data
    assert float(dead.threshold_rank) < 0.5 * float(alive.threshold_rank)
    assert float(dead.flat_share) > float(alive.flat_share) + 0.3


def test_examples_without_a_gradient_of_their_own_are_left_out_or_said() -> None:
    model, (x, y) = net(), examples()
    x, y = torch.cat([x, x[:3]]), torch.cat([y, torch.tensor([-100, -100, -100])])
    subject = Subject(model, (x, y), nn.CrossEntropyLoss())
    every = CurvatureRank(examples=1000).run(Subject(model, examples())).data
    data = CurvatureRank(examples=1000).run(subject).data
    assert float(data.gradients) == 23
    assert float(data.gradient_cosine) == pytest.approx(float(every.gradient_cosine))
    batched = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    reading = CurvatureRank().run(Subject(batched, examples(), norm="batch", batch_size=8))
    assert np.isnan(reading.data.gradient_cosine)
    assert any("gradients were not compared" in note for note in reading.notes)
    assert np.isfinite(reading.data.threshold_rank)
