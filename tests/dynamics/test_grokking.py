"""Grokking on curves whose crossings are written down, on runs with censored ones, and with signals known to come."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.dynamics.delays import resampled
from workbench.dynamics.grokking import Grokking
from workbench.dynamics.recorder import Recorder
from workbench.record import Line
from workbench.several import Runs
from workbench.sources import Held
from workbench.trajectory import Trajectory

STEPS = (1, 10, 100, 200, 1000, 5000, 20000, 30000, 40000, 50000)


def path(memorised: float, grokked: float, signal: float = math.inf, label: str = "run") -> Trajectory:
    """Scores that jump at the given steps, losses that fall by e^-4 around them, and a signal of known onset."""
    lines = [
        Line(
            s,
            0.0,
            values={
                "train_accuracy": 0.1 + 0.9 * (s >= memorised),
                "test_accuracy": 0.1 + 0.9 * (s >= grokked),
                "train_loss": math.exp(-4.0 * (s >= memorised)),
                "test_loss": math.exp(-4.0 * (s >= grokked)),
                "warning": float(s >= signal),
            },
        )
        for s in STEPS
    ]
    return Trajectory(Held(label, tuple(lines)))


def test_a_hundredfold_delay() -> None:
    reading = Grokking().run(path(200, 20000))
    found = reading.summary
    assert (found["step_memorise"], found["step_generalise"], found["delay_ratio"]) == (200, 20000, 100)
    assert (found["step_memorise_error"], found["step_generalise_error"]) == (99, 14999)
    assert found["delay_ratio_error"] == pytest.approx(20000 / 101 - 100)
    assert (found["delay"], found["delay_error"]) == (19800, 14999)
    assert (found["loss_delay"], found["loss_delay_ratio"]) == (19800, 100)
    assert "grokked_share" not in found, "the size of the test set is not known"
    assert found["grokked"] == "1 of 1"
    assert reading.figure().panels[0].x.scale == "symlog"


@pytest.mark.parametrize(
    ("memorised", "grokked", "wanted"), [(200, 1000, False), (1, 5000, True), (200, math.inf, False)]
)
def test_it_is_grokking_from_a_ratio_of_ten_on(memorised: float, grokked: float, wanted: bool) -> None:
    assert bool(Grokking().run(path(memorised, grokked)).data.run_grokked[0]) is wanted


@pytest.mark.parametrize(
    ("memorised", "grokked", "number", "words"),
    [
        (math.inf, math.inf, 0, "confusion"),
        (math.inf, 1000, 0, "confusion"),
        (200, math.inf, 1, "memorisation"),
        (200, 5000, 2, "grokking"),
        (200, 1000, 3, "comprehension"),
        (1000, 200, 3, "comprehension"),
    ],
)
def test_a_training_ends_in_one_of_four_phases(memorised: float, grokked: float, number: int, words: str) -> None:
    reading = Grokking().run(path(memorised, grokked))
    assert reading.data.run_phase.item() == number
    assert reading.summary["phase"] == words


def test_phases_are_counted_over_runs_and_soon_is_a_setting() -> None:
    runs = Runs({"a": path(200, 5000), "b": path(200, 1000), "c": path(200, math.inf), "d": path(10, 1000)})
    assert Grokking().run(runs).summary["phase"] == "1 memorisation, 1 grokking, 2 comprehension"
    assert Grokking(soon=800).run(runs).data.run_phase.values.tolist() == [2, 3, 1, 2]


def test_scores_that_were_never_known_are_in_no_phase() -> None:
    lines = tuple(Line(s, 0.0, values={"train_accuracy": 1.0, "test_accuracy": math.nan}) for s in STEPS)
    reading = Grokking().run(Trajectory(Held("run", lines)))
    assert math.isnan(reading.data.run_phase.item())
    assert reading.summary["phase"] == "unknown"


def test_what_never_generalises_is_censored_and_says_what_its_ratio_exceeds() -> None:
    reading = Grokking().run(path(200, math.inf))
    assert np.isnan(reading.data.delay_ratio)
    assert np.isnan(reading.data.step_generalise)
    assert reading.data.run_delay_ratio_least.values == [250]
    assert reading.data.run_delay_least.values == [49800]
    assert np.isnan(reading.data.delay)
    assert "more than 49800 steps, its delay ratio more than 250" in " ".join(reading.notes)


def test_runs_give_the_median_in_which_a_censored_run_is_beyond_all_others() -> None:
    ends = (1000, 5000, 20000, math.inf, math.inf)
    runs = Runs({f"seed {k}": path(100, end) for k, end in enumerate(ends)})
    data = Grokking().run(runs).data
    assert data.run_delay_ratio.values[:3].tolist() == [10, 50, 200]
    assert data.delay_ratio == 200
    assert np.isnan(data.delay_ratio_error), "a quartile is infinite"
    three = Grokking().run(Runs({label: runs[label] for label in ("seed 0", "seed 1", "seed 2")})).data
    assert (float(three.step_generalise), float(three.step_generalise_error)) == (5000, 4750), "half between quartiles"
    assert float(three.delay_ratio) == 50
    assert float(three.delay_ratio_error) == pytest.approx(5000 / 11 - 50), "evaluations too far apart decide"
    most = Grokking().run(Runs({label: runs[label] for label in ("seed 0", "seed 3", "seed 4")})).data
    assert np.isnan(most.delay_ratio), "the median is a censored run"
    assert most.step_memorise == 100


def test_a_warning_has_a_lead_and_false_alarms() -> None:
    probe = Grokking(signal="warning")
    assert probe.run(path(200, 20000, 1000)).summary["lead_time"] == 19000
    runs = Runs({"a": path(200, 20000, 1000), "b": path(200, math.inf, 1000), "c": path(200, math.inf)})
    assert Grokking(signal="warning").run(runs).data.false_alarms == 0.5
    below = Grokking(signal="test_loss", signal_threshold=0.5, signal_side="below")
    assert below.run(path(200, 20000)).summary["lead_time"] == 0


def test_norms_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    trajectory = toys.world("trajectory", tmp_path).subject
    data = Grokking(embeddings="first*", signal="weight_norm_ratio", signal_threshold=0.1).run(trajectory).data
    for k, step in enumerate(trajectory.steps):
        held = trajectory.weights(step)
        first, head = held["first.weight"], held["head.weight"]
        assert data.weight_norm[0, k] == pytest.approx(torch.cat([first.flatten(), head.flatten()]).norm().item())
        assert data.embedding_norm[0, k] == pytest.approx(first.norm().item())
    assert data.weight_norm_ratio[0, 0] == 1
    assert data.run_step_signal[0] == 0


def test_it_reads_what_a_recorder_wrote_and_says_what_is_missing(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with Recorder(tmp_path / "run", model, every=2) as recorder:
        for step in range(1, 7):
            recorder.step(train_accuracy=float(step > 2), validation=0.0)
    trajectory = Trajectory.open(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no recorded 'test_accuracy'; it has train_accuracy, validation"):
        Grokking().run(trajectory)
    data = Grokking(test="validation").run(trajectory).data
    assert data.step_memorise == 3
    assert np.isnan(data.loss_delay_ratio)
    with pytest.raises(TypeError, match="Give Runs of Trajectories"):
        Grokking().run(Runs({"a": toys.ToySubject()}))


def scored(test: list[float], steps: tuple[int, ...] = STEPS, **more: list[float]) -> Trajectory:
    """A run that has memorised at step 100, with these test scores."""
    lines = [
        Line(
            s,
            0.0,
            values={"train_accuracy": float(s >= 100), "test_accuracy": test[k]} | {n: v[k] for n, v in more.items()},
        )
        for k, s in enumerate(steps)
    ]
    return Trajectory(Held("run", tuple(lines)))


def test_a_small_test_set_makes_the_delay_uncertain_by_what_resampling_it_shows() -> None:
    """19 of 20 are right from step 1000 to 5000, and all from 20000 on: all drawn are among these with 0.95^20."""
    reading = Grokking(test_examples=20, least_ratio=15).run(scored([0.1] * 4 + [0.95] * 2 + [1.0] * 4))
    data, early = reading.data, 0.95**20
    assert float(data.run_grokked_share[0]) == pytest.approx(1 - early, abs=4 * math.sqrt(early * (1 - early) / 1000))
    assert (float(data.delay), float(data.delay_ratio)) == (19900, 200)
    assert (data.run_delay_low.values, data.run_delay_high.values) == ([201 - 100], [20000 - 11])
    assert (data.run_step_generalise_low.values, data.run_step_generalise_high.values) == ([201], [20000])
    assert float(data.delay_ratio_error) == pytest.approx(max(200 - 2.01, 20000 / 11 - 200))
    assert float(data.step_generalise_error) == 20000 - 201
    assert reading.summary["grokked_share"] == float(data.run_grokked_share[0])
    assert list(reading.figure().panels[0].marks[0].x) == [201, 20000]  # type: ignore[union-attr]
    many = Grokking(test_examples=10**6).run(scored([0.1] * 4 + [0.95] * 2 + [1.0] * 4)).data
    assert many.run_step_generalise_low.values == [5001]
    assert float(many.run_grokked_share[0]) == 1


def test_where_the_end_may_have_been_missed_the_interval_has_none() -> None:
    """99 of 100 are right at the end: on a test set drawn anew that is fewer with 1 - P(Bin(100, 0.99) >= 99)."""
    data = Grokking(test_examples=100).run(scored([0.1] * 6 + [0.99] * 4)).data
    missed = 1 - 0.99**100 - 100 * 0.01 * 0.99**99
    assert data.run_step_generalise_high.values == [math.inf]
    assert float(data.step_generalise_error) == math.inf
    assert float(data.run_grokked_share[0]) == pytest.approx(1 - missed, abs=0.06)
    never = Grokking(test_examples=100).run(scored([0.1] * 6 + [0.985] * 4)).data
    assert np.isnan(never.step_generalise)
    assert never.run_step_generalise_low.values == [5001], "on some test sets of that size it would have been seen"


def test_scores_that_are_no_shares_are_not_resampled_and_evaluations_far_apart_are_said() -> None:
    reading = Grokking(test_examples=10).run(scored([-0.5] * 6 + [1.0] * 4))
    assert np.isnan(reading.data.run_delay_low).all()
    assert any("outside of 0 to 1" in note for note in reading.notes)
    assert any("evaluated 1.74 times a decade within the delay; 20 are wanted" in note for note in reading.notes)
    dense = tuple(range(1, 301))
    run = scored([0.1] * 199 + [1.0] * 101, dense)
    assert not any("a decade" in note for note in Grokking().run(run).notes)


def test_chance_may_be_said_where_the_first_evaluation_came_late() -> None:
    run = scored([0.6] * 6 + [1.0] * 4)
    assert bool(Grokking().run(run).data.run_grokked[0])
    assert not bool(Grokking(chance=0.1).run(run).data.run_grokked[0])


def test_losses_are_drawn_beside_scores() -> None:
    figure = Grokking().run(path(200, 20000)).figure()
    assert [panel.y.label for panel in figure.panels] == ["score", "loss", "weight norm"]
    assert figure.panels[1].y.scale == "log"
    assert len(Grokking(train_loss="", test_loss="").run(path(200, 20000)).figure().panels) == 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(0, 10**6))
def test_a_resample_is_a_draw_of_examples_that_are_learnt_in_one_order(right: list[int], seed: int) -> None:
    """Against a table of who is right when, of which rows are drawn: the same mean and spread, and order kept."""
    scores, rng = np.array(right) / 12, np.random.default_rng(seed)
    drawn = resampled(scores, 12, rng, 4000)
    table = np.arange(12)[:, None] < np.array(right)[None]
    plain = np.stack([table[rng.integers(0, 12, 12)].mean(0) for _ in range(4000)])
    for moment in (np.mean, np.std):
        assert moment(drawn, axis=0) == pytest.approx(moment(plain, axis=0), abs=0.025)
    assert np.cov(drawn.T) == pytest.approx(np.cov(plain.T), abs=0.004)
    order = np.argsort(scores, kind="stable")
    assert (np.diff(drawn[:, order], axis=1) >= 0).all()
    assert drawn[:, scores == 0].max(initial=0) == 0
    assert drawn[:, scores == 1].min(initial=1) == 1
