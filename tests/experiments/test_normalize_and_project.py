"""Normalise-and-project: the verdict on data written down, what its arms do to the weights, and the effect in small."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

from workbench.experiments.experiment import judge
from workbench.experiments.normalize_and_project import ROLES, NormalizeAndProject

TINY = NormalizeAndProject(tasks=4, epochs=2, examples=40, batch=16, width=12, depth=2)
SMALL = NormalizeAndProject(tasks=12, epochs=20, examples=128, lr=1e-2)
"""Shows the effect with a larger learning rate in a tenth of the time."""
PLAIN, FRESH, LAYER, PROJECT = range(4)


def written(
    project: float = 0.98, plain: float = 0.2, layer: float = 3.0, norm: float = 1.0, rate: float = 1.0
) -> xr.Dataset:
    end = {"last_accuracy": ("arm", [plain, 0.99, 0.98, project])}
    weights = [[1.0, 2, 4], [1, 2, 2], [1, 1.5, layer], [1, norm, 1]]
    rates = [[1.0, 0.5, 0.2], [1, 0.5, 0.5], [1, 0.7, 0.3], [1, rate, 1]]
    signs = {"weight_rms": (("arm", "checkpoint"), weights), "effective_rate": (("arm", "checkpoint"), rates)}
    return xr.Dataset(end | signs, {"arm": list(ROLES)})


@pytest.mark.parametrize(
    ("told", "passed"),
    [
        ({}, True),
        ({"project": 0.96}, False),
        ({"project": math.nan}, False),
        ({"plain": 0.6}, False),
        ({"plain": math.nan}, False),
        ({"layer": 1.9}, False),
        ({"layer": math.nan}, False),
        ({"norm": 1.001}, False),
        ({"norm": 0.999}, False),
        ({"rate": 1.001}, False),
        ({"rate": math.nan}, False),
    ],
)
def test_accuracy_of_both_and_weights_of_both_must_all_be_right(told: dict[str, float], passed: bool) -> None:
    verdict = NormalizeAndProject().verdict(written(**told))
    assert verdict.passed is passed
    assert verdict.statistic == pytest.approx(told.get("project", 0.98), nan_ok=True)


def test_a_tiny_run_holds_the_weights_of_one_arm_alone() -> None:
    seen = []
    data = TINY.run(seed=1, on_reading=lambda r: seen.append(TINY.verdict(r.data))).data
    assert not any(verdict.passed for verdict in seen)
    assert np.isfinite(data.end_accuracy.values).all()
    rms, rate = data.weight_rms.values, data.effective_rate.values
    np.testing.assert_allclose(rms[PROJECT], rms[PROJECT, 0], rtol=1e-5)
    assert (np.diff(rms[LAYER]) > 1e-4).all()
    assert (np.diff(rate[LAYER]) < 0).all()
    np.testing.assert_allclose(rate[PROJECT], rate[PROJECT, 0], rtol=1e-5)
    np.testing.assert_allclose(rms[PROJECT, 0], rms[LAYER, 0], err_msg="both begin with the same weights")


def test_labels_are_new_for_each_task_and_inputs_are_not() -> None:
    stream = TINY.tasks_of(3)
    (x, first), (again, second), (_, repeated) = stream.task(1), stream.task(2), stream.task(1)
    assert torch.equal(x, again)
    assert torch.equal(first, repeated)
    assert (first == second).float().mean() < 0.4
    assert not torch.equal(TINY.tasks_of(4).task(1)[1], first)


def test_the_effect_shows_in_small_on_one_seed() -> None:
    (found,) = judge(SMALL, [0])
    assert found.verdict.passed, str(found.verdict)
    last = found.reading.data.last_accuracy.values
    assert last[FRESH] > 0.95 > last[LAYER] > last[PLAIN], "growing weights cost something with this learning rate"
