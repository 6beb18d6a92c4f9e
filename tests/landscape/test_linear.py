"""Linear mode connectivity against hand-made surfaces, permuted copies of every kind of net, and its own definition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from landscape.test_alignment import NETS, shuffled, subject_of
from landscape.test_path import nets, toy
from landscape.test_plane import Weights
from torch import nn

from workbench.landscape.alignment import symmetry
from workbench.landscape.linear import Barrier
from workbench.several import Pair
from workbench.subject import Subject

KINDS = ("barrier", "barrier_mean", "barrier_maximum")


def test_two_minima_of_a_product() -> None:
    data = Barrier(alignment="none", points=5, refine=3).run(Pair(toy([1.0, 1.0]), toy([-1.0, -1.0]))).data
    assert [float(data[n][0]) for n in KINDS] == pytest.approx([0.5] * 3)
    assert float(data.barrier_place[0]) == 0.5
    assert float(data.distance[0]) == pytest.approx(8**0.5)
    assert np.isnan(data.loss[1]).all()


def spike(model: nn.Module, batch: object) -> torch.Tensor:
    """A peak of height 1 at 0.371 that is 0.03 wide, on a slope from 0 to 0.5."""
    w = model.w[0]
    return 0.5 * w + torch.exp(-(((w - 0.371) / 0.03) ** 2))


def spiked(at: float) -> Subject:
    return Subject(Weights([at]), [torch.zeros(1, 1)], objective=spike, reduction="mean")


def test_points_gather_where_the_curve_is_highest() -> None:
    pair = Pair(spiked(0.0), spiked(1.0))
    rough = Barrier(alignment="none", points=11, refine=0).run(pair)
    fine = Barrier(alignment="none", points=11, refine=10).run(pair)
    assert float(rough.data.barrier[0]) == pytest.approx(np.exp(-((0.029 / 0.03) ** 2)))
    assert float(fine.data.barrier[0]) == pytest.approx(1, abs=1e-3)
    assert float(fine.data.barrier_place[0]) == pytest.approx(0.371, abs=2e-3)
    assert float(fine.data.barrier_mean[0]) == pytest.approx(1 + 0.371 / 2 - 0.25, abs=3e-3)
    assert float(fine.data.barrier_maximum[0]) == pytest.approx(1 + 0.371 / 2 - 0.5, abs=3e-3)
    alpha = fine.data["alpha"].values[0]
    assert (np.diff(alpha) > 0).all()
    assert alpha.size == 21


@pytest.mark.parametrize("name", [n for n in NETS if n != "GRU"])
def test_a_permuted_copy_has_a_barrier_only_until_its_units_are_matched(name: str) -> None:
    subject = subject_of(name)
    pair = Pair(subject, shuffled(subject, symmetry(subject)))
    found = Barrier(points=5, refine=2, starts=2).run(pair)
    data = found.data
    assert float(data.barrier[0]) > 1e-5
    assert float(data.barrier_mean[0]) == pytest.approx(float(data.barrier_maximum[0])), "both ends are one function"
    assert [float(data[n][1]) for n in KINDS] == pytest.approx([0, 0, 0], abs=1e-10)
    assert data.loss[1].values == pytest.approx(subject_loss(subject), rel=1e-10)
    assert float(data.distance[0]) > 1
    assert float(data.distance[1]) == pytest.approx(0, abs=1e-10)
    assert float(data.output_change) < 1e-12
    assert float(data.permuted_share) > 0.3
    assert found.converged


def subject_loss(subject: Subject) -> np.ndarray:
    return np.full(7, subject.under("recompute").loss())


def test_errors_are_those_of_paired_examples_and_unpaired_decisions() -> None:
    a, b, x, y = nets()
    pair = Pair(Subject(a, (x, y)), Subject(b, (x, y)))
    data = Barrier(alignment="none", points=7, refine=3, norm="eval").run(pair).data.sel(alignment="none")
    losses, wrong, alphas = [], [], data["alpha"].values
    for alpha in alphas:
        mixed = copy.deepcopy(a)
        for mine, hers in zip(mixed.state_dict().values(), b.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.add_(alpha * (hers - mine))
        out = mixed(x).detach()
        losses.append(nn.functional.cross_entropy(out, y, reduction="none").numpy())
        wrong.append((out.argmax(1) != y).double().numpy())
    each = np.array(losses)
    assert data.loss.values == pytest.approx(each.mean(1), rel=1e-10)
    chord = (1 - alphas)[:, None] * each[0] + alphas[:, None] * each[-1]
    top, above = each.mean(1).argmax(), (each - chord).mean(1).argmax()
    larger = each[0] if each[0].mean() > each[-1].mean() else each[-1]
    gaps = (each[above] - chord[above], each[top] - (each[0] + each[-1]) / 2, each[top] - larger)
    for name, gap in zip(KINDS, gaps, strict=True):
        assert float(data[name]) == pytest.approx(gap.mean(), abs=1e-12)
        assert float(data[f"{name}_error"]) == pytest.approx(gap.std(ddof=1) / 24**0.5, abs=1e-12)
    rate = np.array(wrong).mean(1)
    assert float(data.error_barrier_mean) == pytest.approx(rate.max() - (rate[0] + rate[-1]) / 2)
    error = np.sqrt(rate * (1 - rate) / 23)
    at = rate.argmax()
    weights = {0: -0.5, len(rate) - 1: -0.5}
    weights[at] = weights.get(at, 0) + 1
    assert float(data.error_barrier_mean_error) == pytest.approx(
        np.sqrt(sum((w * error[i]) ** 2 for i, w in weights.items()))
    )


def independent(name: str) -> Pair:
    first = subject_of(name)
    return Pair(first, first.at(subject_of(name, 1).tensors()))


def test_matching_two_independent_nets_brings_them_closer_and_says_how_far_it_reaches() -> None:
    pair = independent("images")
    found = Barrier(points=5, refine=0, starts=3).run(pair)
    starts = found.data.start_distance.values
    assert float(found.data.distance[1]) <= float(found.data.distance[0])
    assert float(found.data.distance[1]) == pytest.approx(starts.min())
    assert float(found.data.coverage) > 0.97
    ends = found.data.loss.values[:, [0, -1]]
    assert ends[1] == pytest.approx(ends[0], rel=1e-12), "the permutation changes neither model"


def test_losses_that_are_not_finite_stay_so() -> None:
    pair = independent("dense")
    with torch.no_grad():
        next(iter(pair.second.params.values())).fill_(float("nan"))
    found = Barrier(points=5, refine=4).run(pair)
    assert found.done == 1
    assert not found.converged
    assert np.isnan(found.data.barrier).all()
    assert any("not finite" in note for note in found.notes)
