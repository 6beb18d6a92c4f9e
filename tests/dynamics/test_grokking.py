"""Grokking on curves whose crossings are written down, on runs with censored ones, and with signals known to come."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

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
    assert found["loss_delay_ratio"] == 100
    assert found["grokked"] == "1 of 1"
    assert reading.figure().panels[0].x.scale == "symlog"


@pytest.mark.parametrize(
    ("memorised", "grokked", "wanted"), [(200, 1000, False), (1, 5000, True), (200, math.inf, False)]
)
def test_it_is_grokking_from_a_ratio_of_ten_on(memorised: float, grokked: float, wanted: bool) -> None:
    assert bool(Grokking().run(path(memorised, grokked)).data.run_grokked[0]) is wanted


def test_what_never_generalises_is_censored_and_says_what_its_ratio_exceeds() -> None:
    reading = Grokking().run(path(200, math.inf))
    assert np.isnan(reading.data.delay_ratio)
    assert np.isnan(reading.data.step_generalise)
    assert reading.data.run_delay_ratio_least.values == [250]
    assert "more than 250" in " ".join(reading.notes)


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
