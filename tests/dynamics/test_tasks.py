"""Sequences of tasks on written-down accuracies: forgetting, transfer, the stability gap, and drift by module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from workbench.dynamics.forgetting import Forgetting
from workbench.dynamics.stability_gap import StabilityGap, largest_fall
from workbench.record import Line
from workbench.several import Runs
from workbench.sources import Held
from workbench.trajectory import Trajectory

Row = tuple[int, list[float]]
TABLE = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.75, 0.95]]


def path(rows: list[Row], weights: dict[int, dict[str, torch.Tensor]] | None = None, label: str = "run") -> Trajectory:
    """Rows of (task at hand, accuracy on each task), one a step from step 0."""
    lines = tuple(
        Line(step, 0.0, values={"task": float(task), **{f"test_accuracy_task{j}": a for j, a in enumerate(accuracies)}})
        for step, (task, accuracies) in enumerate(rows)
    )
    return Trajectory(Held(label, lines, weights or {}))


def of_table(table: list[list[float]], initial: list[float]) -> Trajectory:
    """One evaluation before training, one in the middle of each task that must not matter, and one at its end."""
    rows: list[Row] = [(0, initial)]
    for k, accuracies in enumerate(table):
        rows += [(k, [0.123] * len(table)), (k, accuracies)]
    return path(rows)


# -------------------------------------------------------------------- forgetting, transfer


def test_the_known_table() -> None:
    found = Forgetting().run(of_table(TABLE, [0.1, 0.1, 0.1]))
    assert found.summary["average_accuracy"] == approx(0.76666667)
    assert found.summary["backward_transfer"] == approx(-0.175)
    assert found.summary["forward_transfer"] == approx(0.15)
    assert found.summary["forgetting"] == approx(0.175)
    assert found.data.after.values[0] == approx(np.array(TABLE))
    assert found.data.task_forgetting.values[0, :2] == approx([0.3, 0.05])


def test_a_task_that_was_best_later_tells_forgetting_from_backward_transfer() -> None:
    found = Forgetting().run(of_table([[0.5, 0, 0], [0.8, 0.6, 0], [0.7, 0.6, 0.9]], [0, 0, 0])).summary
    assert found["backward_transfer"] == approx((0.2 + 0) / 2)
    assert found["forgetting"] == approx((0.1 + 0) / 2)


def test_runs_give_the_mean_and_its_error_and_must_have_the_same_tasks() -> None:
    runs = {"a": of_table(TABLE, [0.1] * 3), "b": of_table((np.array(TABLE) - 0.05).tolist(), [0.1] * 3)}
    data = Forgetting().run(Runs(runs)).data
    assert float(data.average_accuracy) == approx(0.76666667 - 0.025)
    assert float(data.average_accuracy_error) == approx(0.025)
    assert float(data.forgetting_error) == approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="the same tasks"):
        Forgetting().run(Runs({"a": runs["a"], "b": path([(0, [0.5]), (0, [0.6])])}))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5).flatmap(lambda t: st.lists(st.floats(0, 1), min_size=t * t + t, max_size=t * t + t)))
def test_forgetting_is_at_least_minus_backward_transfer_and_all_equal_loops(numbers: list[float]) -> None:
    count = int((np.sqrt(4 * len(numbers) + 1) - 1) / 2)
    table = np.array(numbers[: count * count]).reshape(count, count)
    initial = numbers[count * count :]
    found = Forgetting().run(of_table(table.tolist(), initial)).summary
    end = range(count - 1)
    assert found["average_accuracy"] == approx(sum(table[-1]) / count)
    assert found["backward_transfer"] == approx(sum(table[-1][j] - table[j][j] for j in end) / (count - 1))
    best = [max(table[i][j] for i in end) for j in end]
    assert found["forgetting"] == approx(sum(best[j] - table[-1][j] for j in end) / (count - 1))
    forward = sum(table[j - 1][j] - initial[j] for j in range(1, count)) / (count - 1)
    assert found["forward_transfer"] == approx(forward)
    assert found["forgetting"] >= -found["backward_transfer"] - 1e-12


# --------------------------------------------------------------------------- stability gap

GAP: list[Row] = [(0, [0.2, 0.5]), (0, [0.95, 0.5]), *((1, [a, 0.88]) for a in (0.9, 0.4, 0.7, 0.85))]


def test_the_known_gap() -> None:
    reading = StabilityGap().run(path(GAP))
    found = reading.summary
    assert found["min_accuracy"] == approx(0.40)
    assert found["worst_case_accuracy"] == approx(0.64)
    assert found["gap"] == approx(0.55)
    assert reading.data.run_forgetting_short.values == approx([0.55 / 2]), "the second task never falls"
    assert reading.data.run_gain_long.values == approx([(0.75 + 0.38) / 2])
    assert reading.data.min_accuracy_at.values[0] == approx([np.nan, np.nan, 0.9, 0.4, 0.4, 0.4], nan_ok=True)
    assert reading.data.worst_case_accuracy_at.values[0, 2:] == approx([0.89, 0.64, 0.64, 0.64])
    assert Forgetting().run(path(GAP)).summary["forgetting"] == approx(0.10), "what ends of tasks see"
    assert np.isnan(reading.data.recovery.values[0, 1, 0]), "0.85 is less than 95 % of 0.95"
    assert StabilityGap(share=0.7).run(path(GAP)).data.recovery.values[0, 1, 0] == 3
    assert StabilityGap(share=0.4).run(path(GAP)).data.recovery.values[0, 1, 0] == 0


def test_windows_count_evaluations() -> None:
    rows: list[Row] = [(0, [0.9]), (0, [0.8]), (0, [0.7]), (0, [0.9]), (0, [0.2])]
    for width, wanted in ((2, 0.7), (5, 0.7)):
        assert StabilityGap(short=width).run(path(rows)).data.run_forgetting_short[0] == approx(wanted)
    slow: list[Row] = [(0, [1 - 0.1 * k]) for k in range(8)]
    data = StabilityGap(short=3, long=6).run(path(slow)).data
    assert (float(data.forgetting_short), float(data.forgetting_long)) == approx((0.2, 0.5))
    assert np.isnan(data.min_accuracy), "one task has no earlier ones"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(2, 14))
def test_the_largest_fall_is_that_of_all_pairs_and_grows_with_the_window(values: list[float], width: int) -> None:
    pairs = [a - b for i, a in enumerate(values) for j, b in enumerate(values) if i < j < i + width]
    found = largest_fall(np.array(values), width)
    assert found == max([0.0, *pairs])
    assert found <= largest_fall(np.array(values), width + 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=6, max_size=15))
def test_worst_cases_equal_loops_and_only_fall_within_a_task(accuracies: list[list[float]]) -> None:
    third = len(accuracies) // 3
    rows = [(min(step // third, 2), a) for step, a in enumerate(accuracies)]
    data = StabilityGap().run(path(rows)).data
    for t, (k, at) in enumerate(rows):
        if k:
            least = [min(a[i] for s, (_, a) in enumerate(rows) if (i + 1) * third <= s <= t) for i in range(k)]
            assert data.min_accuracy_at.values[0, t] == approx(np.mean(least))
            assert data.worst_case_accuracy_at.values[0, t] == approx(at[k] / (k + 1) + k / (k + 1) * np.mean(least))
    for k in (1, 2):
        assert (
            np.diff(data.min_accuracy_at.values[0][[s for s, (task, _) in enumerate(rows) if task == k]]) <= 0
        ).all()


def test_the_module_that_moves_is_named_and_running_statistics_are_not_weights() -> None:
    def weights(body: float, head: float) -> dict[str, torch.Tensor]:
        return {
            "body.weight": torch.full((2, 2), body),
            "body.bias": torch.zeros(2),
            "body.running_mean": torch.rand(2),
            "head.weight": torch.full((3,), head),
        }

    kept = {0: weights(1.0, 1.0), 1: weights(2.0, 1.0), 5: weights(2.0, 4.0)}
    reading = StabilityGap().run(path(GAP, kept))
    assert list(reading.data["module"].values) == ["body", "head"]
    assert reading.data.drift.values[0] == approx(np.array([[1.0, 0.0], [0.0, 3.0]]))
    assert reading.summary["drifted_most"] == "head"
    sparse = StabilityGap().run(path(GAP, {0: kept[0], 1: kept[1]})).data.drift.values[0]
    assert np.isnan(sparse[1]).all(), "no checkpoint in the second task"


# ------------------------------------------------------------------------------- the record


def test_it_reads_what_a_recorder_wrote_and_says_what_is_missing(tmp_path: Path) -> None:
    trajectory = toys.world("trajectory", tmp_path).subject
    data = StabilityGap().run(trajectory).data
    assert float(data.gap) == 0.5
    assert float(data.recovery[0, 1, 0]) == 2, "steps from 6 to 8"
    assert np.isfinite(data.drift.values).all()
    for probe in (StabilityGap, Forgetting):
        with pytest.raises(ValueError, match="no recorded 'epoch', the number of the task at hand; it has train_loss"):
            probe(task="epoch").run(trajectory)
        with pytest.raises(ValueError, match="no recorded 'acc/0'"):
            probe(accuracy="acc/{}").run(trajectory)
        with pytest.raises(ValueError, match="task 0 more than once"):
            probe().run(path([(0, [1, 1]), (1, [1, 1]), (0, [1, 1])]))
        with pytest.raises(TypeError, match="Give Runs of Trajectories"):
            probe().run(Runs({"a": toys.ToySubject()}))
