"""Loss of plasticity: the verdict on data written down, arms and tasks as they are meant, and the effect in small."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from workbench.experiments.loss_of_plasticity import FAST, NEEDED, SLOW, LossOfPlasticity
from workbench.zoo.interventions import ContinualBackprop, NormProjection, WeightPenalty

TINY = LossOfPlasticity(
    tasks=4, examples=40, batch=16, width=12, depth=2, replaced=0.05, maturity=2, arms=(*FAST, *SLOW)
)
NAN = math.nan


def written(
    last: float = 0.2,
    fresh: float = 0.7,
    slow: float = 0.4,
    remedy: float = 0.58,
    dead: tuple[float, float] = (0.05, 0.5),
    rank: tuple[float, float] = (16, 3),
) -> xr.Dataset:
    """First accuracy 0.6 in each arm."""
    ends = {"first_accuracy": ("arm", [0.6] * 4), "last_accuracy": ("arm", [last, fresh, slow, remedy])}
    signs = {
        name: (("arm", "checkpoint"), [[0, *pair], *[[NAN] * 3] * 3])
        for name, pair in (("dead_fraction", dead), ("effective_rank", rank))
    }
    return xr.Dataset(ends | signs, {"arm": list(NEEDED)})


@pytest.mark.parametrize(
    ("told", "passed", "statistic"),
    [
        ({}, True, 1 - 0.2 / 0.6),
        ({"last": 0.37}, False, 1 - 0.37 / 0.6),
        ({"fresh": 0.3}, False, 1 - 0.2 / 0.3),
        ({"last": NAN}, False, NAN),
        ({"fresh": NAN}, False, NAN),
        ({"slow": 0.46}, False, 1 - 0.2 / 0.6),
        ({"slow": NAN}, False, 1 - 0.2 / 0.6),
        ({"remedy": 0.53}, False, 1 - 0.2 / 0.6),
        ({"remedy": NAN}, False, 1 - 0.2 / 0.6),
        ({"dead": (0.2, 0.5)}, False, 1 - 0.2 / 0.6),
        ({"dead": (0.0, 0.5)}, True, 1 - 0.2 / 0.6),
        ({"dead": (0.0, 0.0)}, False, 1 - 0.2 / 0.6),
        ({"dead": (NAN, 0.5)}, False, 1 - 0.2 / 0.6),
        ({"rank": (16, 9)}, False, 1 - 0.2 / 0.6),
        ({"rank": (16, NAN)}, False, 1 - 0.2 / 0.6),
    ],
)
def test_loss_signs_and_remedy_must_all_be_right(told: dict, passed: bool, statistic: float) -> None:
    verdict = LossOfPlasticity().verdict(written(**told))
    assert verdict.passed is passed
    assert verdict.statistic == pytest.approx(statistic, nan_ok=True)


@pytest.mark.parametrize("missing", NEEDED)
def test_no_verdict_passes_without_an_arm_that_it_needs(missing: str) -> None:
    assert not LossOfPlasticity().verdict(written().drop_sel(arm=missing)).passed


def test_no_arms_are_refused() -> None:
    with pytest.raises(ValueError, match="arms is empty; choose from plain, fresh"):
        LossOfPlasticity(arms=())


def test_tasks_permute_the_pixels_and_keep_the_rest() -> None:
    stream = TINY.tasks_of(3)
    (first, labels), (second, same), (again, _) = stream.task(1), stream.task(2), stream.task(1)
    assert torch.equal(first, again)
    assert torch.equal(labels, same)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sort(1).values, second.sort(1).values, rtol=0, atol=0)
    places = [(first == second[:, [k]]).all(0).nonzero().flatten().tolist() for k in range(64)]
    assert all(places), "one permutation for all examples"
    assert not torch.equal(TINY.tasks_of(4).task(1)[0], first)


def test_arms_are_what_they_are_called() -> None:
    probe = LossOfPlasticity(lr=0.2, slow_lr=0.1, replaced=0.3, maturity=7, decay=0.5, strength=0.4)
    every = probe.possible(0)
    assert {name: arm.rate for name, arm in every.items()} == dict.fromkeys(FAST, 0.2) | dict.fromkeys(SLOW, 0.1)
    assert [name for name, arm in every.items() if arm.fresh] == ["fresh"]
    made = {name: arm.begin(1) for name, arm in every.items()}
    normalised = [n for n, one in made.items() if any(isinstance(m, nn.LayerNorm) for m in one.net.modules())]
    assert normalised == ["layer norm", "project"]
    remedy, penalty = made["continual backprop"].keep, made["penalty"].keep
    assert isinstance(remedy, ContinualBackprop)
    assert (remedy.rate, remedy.maturity, remedy.decay) == (0.3, 7, 0.5)
    assert isinstance(penalty, WeightPenalty)
    assert penalty.strength == 0.4
    assert isinstance(made["project"].keep, NormProjection)


def test_a_tiny_run_has_only_the_chosen_arms_and_each_counts() -> None:
    seen = []
    data = TINY.run(seed=1, on_reading=lambda r: seen.append(TINY.verdict(r.data).passed)).data
    assert not any(seen[:-1]), "the end decides"
    assert sorted(data["arm"].values) == sorted((*FAST, *SLOW))
    ends = data.weight_mean.values[:, -1]
    assert len(set(np.round(ends, 9))) == len(ends), "no two arms are the same"
    few = replace(TINY, arms=("slow", "plain")).run(seed=1)
    assert few.data["arm"].values.tolist() == ["plain", "slow"]
    np.testing.assert_array_equal(few.data.online_accuracy[0], data.online_accuracy.sel(arm="plain"))
    assert len(few.probe.figure(few.data).panels) == 6
    assert set(few.summary) == {f"accuracy_{a}{e}" for a in ("plain", "slow") for e in ("", "_error")}


def test_the_loss_and_its_signs_show_in_small_on_one_seed() -> None:
    """A larger learning rate loses as much in an eighth of the tasks; remedies take their time and are left out."""
    data = LossOfPlasticity(tasks=20, lr=2e-2, arms=("plain", "fresh")).run(seed=0).data
    verdict = LossOfPlasticity().verdict(data)
    assert verdict.statistic >= verdict.threshold, str(verdict)
    plain, fresh = data.dead_fraction.values
    assert plain[-1] > 3 * plain[1]
    assert plain[-1] > 3 * fresh[-1]
    plain, fresh = data.effective_rank.values
    assert plain[-1] < min(plain[1], fresh[-1]) / 2
