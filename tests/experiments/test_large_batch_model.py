"""Large-batch model: sweeps against plain loops, the fit at its least squares, verdicts on data written down."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn import functional

from workbench.experiments.batch_sweep import Batches, Goal, Trial
from workbench.experiments.experiment import judge
from workbench.experiments.large_batch_model import LargeBatchModel
from workbench.figure import Line
from workbench.numerics.sampling import Draw
from workbench.probes.gradient_noise import GradientNoise
from workbench.subject import Subject
from workbench.zoo.digits import standardised
from workbench.zoo.nets import dense

SMALL = LargeBatchModel(
    examples=120, width=8, target=0.8, largest_batch=32, rates=3, smallest_rate=0.05, largest_rate=0.8, repeats=1,
    noise_batch=32, noise_until=0.5, noise_points=4,
)  # fmt: skip
DRAW = Draw(3, "test", 0)


def test_an_epoch_shows_every_example_once() -> None:
    source = Batches(10, 4, np.random.default_rng(0))
    rows = torch.stack([source() for _ in range(5)]).flatten()
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert len(Batches(3, 7, np.random.default_rng(0))()) == 7


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = standardised(60, 0, floor=0.1)
    return x.double(), y


def test_a_trial_is_as_quick_as_its_trainings_by_plain_loops(data) -> None:
    nets, rates, looks = (
        [dense((64, 8, 10), "relu", seed=s).double() for s in (1, 2)],
        (0.05, 0.2, 0.4),
        tuple(range(90)),
    )
    trial = Trial(nets, data, 4, Goal(1.0, rates, looks), DRAW)
    assert list(trial.train()) == list(range(int(np.nanmax(trial.reached[trial.best])) + 1))
    reached = np.full((3, 2), np.nan)
    for i, rate in enumerate(rates):
        for k, seed in enumerate((1, 2)):
            net, source = dense((64, 8, 10), "relu", seed=seed).double(), Batches(60, 4, DRAW.generator(4, k))
            for step in looks:
                loss = functional.cross_entropy(net(data[0]), data[1])
                if loss.item() <= 1.0 and math.isnan(reached[i, k]):
                    reached[i, k] = step
                rows = source()
                gradients = torch.autograd.grad(
                    functional.cross_entropy(net(data[0][rows]), data[1][rows]), list(net.parameters())
                )
                with torch.no_grad():
                    for p, g in zip(net.parameters(), gradients, strict=True):
                        p -= rate * g
    mean = np.exp(np.log(reached).mean(1))
    assert trial.best == int(np.nanargmin(mean))
    assert trial.steps[trial.best] == pytest.approx(np.nanmin(mean))
    assert trial.error[trial.best] == pytest.approx(
        np.nanmin(mean) * np.log(reached[trial.best]).std(ddof=1) / math.sqrt(2)
    )
    assert np.isnan(trial.steps[0]), "the slowest rate was not waited for"
    labels = {f"batch 4, repeat {k}": r.scalars for k, r in enumerate(trial.records().values())}
    assert set(labels) == set(trial.records())
    for k, table in enumerate(labels.values()):
        assert table.train_loss[table.train_loss <= 1.0].index[0] == reached[trial.best, k]


def test_a_trial_in_which_all_diverge_ends_and_reaches_nothing(data) -> None:
    trial = Trial(
        [dense((64, 8, 10), seed=1).double()], data, 4, Goal(0.1, (math.inf, math.inf), tuple(range(500))), DRAW
    )
    assert len(list(trial.train())) < 50
    assert np.isnan(trial.steps).all()


@pytest.fixture(scope="module")
def small() -> xr.Dataset:
    return SMALL.run(seed=5).data


def test_the_hyperbola_is_that_of_least_squares_in_the_logarithm_of_steps(small: xr.Dataset) -> None:
    sizes, steps = small["batch_size"].values, small.steps.values
    assert sizes.tolist() == [1, 2, 4, 8, 16, 32]
    assert np.isfinite(steps).all()
    assert small.examples.values == pytest.approx(sizes * steps)
    ends = float(small.fewest_steps), float(small.fewest_examples)
    assert small.misfit.values == pytest.approx(steps / (ends[0] + ends[1] / sizes) - 1)

    def off(a: float, b: float) -> float:
        return float((np.log(a * ends[0] + b * ends[1] / sizes) - np.log(steps)).__pow__(2).sum())

    assert all(off(1, 1) < off(a, b) for a, b in ((1.02, 1), (0.98, 1), (1, 1.02), (1, 0.98), (1.02, 0.98)))
    assert float(small.critical_batch) == pytest.approx(ends[1] / ends[0])


def test_the_noise_scale_is_that_of_the_nets_on_the_way(small: xr.Dataset) -> None:
    there = np.isfinite(small.noise_step.values)
    loss, step = small.noise_loss.values[there], small.noise_step.values[there]
    assert step[0] == 0
    assert (np.diff(loss) < 0).all()
    assert (np.diff(step) > 0).all()
    assert loss[-1] <= SMALL.noise_until
    draw = Draw(5, SMALL.name, 0)
    net = dense((64, 8, 10), "relu", seed=int(draw.generator(0, 0).integers(2**31)))
    data = standardised(120, 5, floor=0.1)
    assert loss[0] == pytest.approx(functional.cross_entropy(net(data[0]), data[1]).item())
    found = GradientNoise(examples=120, batch=1).run(Subject(net, data, max_examples=None)).data
    assert small.noise_scale.values[0] == pytest.approx(float(found.noise_scale), rel=0.5)
    before = loss >= SMALL.target
    assert float(small.mean_noise_scale) == pytest.approx(small.noise_scale.values[there][before].mean(), nan_ok=True)


def written(
    rise: float = 20, misfit: float = -0.1, corner: float = 50, mean: float = 60, unreached: bool = False
) -> xr.Dataset:
    held = {"noise_rise": rise, "critical_batch": corner, "mean_noise_scale": mean}
    return xr.Dataset(held | {"misfit": ("batch_size", [0.05, math.nan if unreached else misfit])})


@pytest.mark.parametrize(
    ("told", "passed"),
    [
        ({}, True),
        ({"rise": 9.0}, False),
        ({"rise": math.nan}, False),
        ({"misfit": -0.21}, False),
        ({"misfit": 0.21}, False),
        ({"unreached": True}, False),
        ({"corner": 170.0}, True),
        ({"corner": 190.0}, False),
        ({"corner": 19.0}, False),
        ({"mean": math.nan}, False),
    ],
)
def test_rise_fit_and_corner_must_all_be_right(told: dict, passed: bool) -> None:
    assert SMALL.verdict(written(**told)).passed is passed


def test_nothing_passes_before_the_end_and_curves_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.pace.PAUSE", 0.0)
    seen: list[tuple[bool, int, float]] = []

    def look(reading) -> None:
        lines = sum(isinstance(mark, Line) for mark in SMALL.figure(reading.data).panels[0].marks)
        seen.append((SMALL.verdict(reading.data).passed, lines, reading.done))

    reading = SMALL.run(seed=5, on_reading=look)
    assert not any(passed for passed, _, done in seen if done < 1)
    assert [lines for _, lines, _ in seen] == sorted(lines for _, lines, _ in seen)
    assert (seen[0][1], seen[-1][1]) == (1, 6)
    assert [done for *_, done in seen] == sorted(done for *_, done in seen)
    assert reading.done == 1


def test_training_that_diverges_reaches_nothing_and_does_not_pass() -> None:
    broken = LargeBatchModel(
        examples=60, width=8, largest_batch=2, rates=2, smallest_rate=5.0, largest_rate=9.9, repeats=1, steps=20,
        target=1e-3, noise_until=1e-3, noise_batch=2,
    )  # fmt: skip
    (found,) = judge(broken, [0])
    assert not found.verdict.passed
    assert np.isnan(found.reading.data.steps).all()
    assert np.isnan(found.reading.data.noise_scale).all()


def test_settings_that_do_not_fit_are_refused() -> None:
    for told, words in (
        ({"smallest_rate": 2.0}, "must lie below"),
        ({"examples": 100}, "cannot be larger than examples=100"),
        ({"noise_until": 0.3}, "must not lie above"),
    ):
        with pytest.raises(ValueError, match=words):
            LargeBatchModel(**told)


def test_an_unresolved_noise_scale_is_drawn_at_what_it_exceeds(small: xr.Dataset) -> None:
    drawn = small.copy(deep=True)
    drawn.noise_scale[-1], drawn.noise_scale_low[-1] = math.nan, 123.0
    marks = [mark for mark in SMALL.figure(drawn).panels[2].marks if getattr(mark, "role", "") == "unconverged"]
    assert [np.asarray(mark.y).tolist()[-1] for mark in marks] == [123.0]


def test_less_of_everything_still_shows_the_effect() -> None:
    """Half the data, a few learning rates and one repeat: wider limits, the same three things."""
    less = LargeBatchModel(examples=700, largest_batch=128, rates=4, smallest_rate=0.09, repeats=2, noise_points=4)
    data = less.run(seed=0).data
    assert float(data.noise_rise) > 5
    assert np.abs(data.misfit.values).max() < 0.4
    assert 1 / 4 < float(data.critical_batch) / float(data.mean_noise_scale) < 4
    assert data.steps.values[0] > 20 * data.steps.values[-1]
