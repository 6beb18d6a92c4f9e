"""Schedules: each against a plain reading of its words; the time budget against a clock that the test turns."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench import record
from workbench.dynamics.schedules import Moment, budget, every, log_spaced, on_crossing, on_spike
from workbench.record import Line

schedules = wb.dynamics.schedules


def moment(values: list[float], kept: int = 0) -> Moment:
    """The moment of the last of these values of ``loss``, one a step."""
    return Moment(len(values), {"loss": values[-1]}, recent={"loss": values[:-1][-200:]}, kept=kept)


finite = st.floats(-1e3, 1e3, allow_subnormal=False)


@given(st.lists(finite, min_size=2, max_size=60), st.floats(0.5, 10))
def test_a_spike_is_what_numpys_medians_say(values: list[float], threshold: float) -> None:
    before = np.array(values[:-1])
    middle = np.median(before)
    spread = 1.4826 * np.median(np.abs(before - middle))
    limit = middle + threshold * max(spread, 1e-12 * abs(middle))
    if abs(values[-1] - limit) < 1e-9 * (1 + abs(limit)):
        return
    assert on_spike("loss", threshold).due(moment(values)) == (len(before) >= 20 and values[-1] > limit)


@given(st.lists(finite, min_size=22, max_size=60), st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**30]))
def test_a_spike_does_not_depend_on_the_unit_of_the_loss(values: list[float], unit: float) -> None:
    assert on_spike("loss").due(moment(values)) == on_spike("loss").due(moment([unit * x for x in values]))


def test_a_loss_that_becomes_nan_is_a_spike_once_and_is_no_history() -> None:
    values = [1.0, 1.1, 0.9] * 10
    assert on_spike("loss").due(moment([*values, math.nan]))
    assert not on_spike("loss").due(moment([*values, math.nan, math.nan]))
    assert on_spike("loss").due(moment([*values, math.nan, math.nan, 9.0]))
    assert not on_spike("loss").due(moment([*values, 9.0], kept=25))
    assert not on_spike("other").due(moment([*values, 9.0]))


@given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=30), st.floats(allow_nan=False))
def test_crossings_are_the_changes_of_side(values: list[float], threshold: float) -> None:
    rule = on_crossing("loss", threshold, apart=0)
    found = [rule.due(moment(values[: i + 1])) for i in range(len(values))]
    sides = np.array(values) >= threshold
    assert found == [False, *(sides[1:] != sides[:-1]).tolist()]


@given(st.integers(0, 500), st.booleans(), st.booleans())
def test_joined_schedules_are_either_and_both(step: int, a: bool, b: bool) -> None:
    now = Moment(step, {})
    assert (every(3) | every(5)).due(now) == (step % 3 == 0 or step % 5 == 0)
    assert (every(3) & log_spaced(4)).due(now) == (step % 3 == 0 and log_spaced(4).due(now))
    assert (every(7) | 3).due(now) == (step % 7 == 0 or step % 3 == 0)
    assert (on_spike("a") | on_crossing("b", 1) & every(2)).watches == ("a", "b")
    assert repr(every(3) | every(5)) == "Either(first=Every(steps=3), second=Every(steps=5))"


@pytest.mark.parametrize(
    "make", [lambda: budget(0), lambda: budget(1.5), lambda: on_spike("a", 0), lambda: every(0), lambda: every(3) | 0]
)
def test_settings_that_make_no_sense_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"must be|is a share"):
        make()
    with pytest.raises(TypeError, match="another schedule"):
        every(2) | "often"


class Turned:
    """A clock that stands still until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, checkpoint: float) -> None:
        self.now, save = 0.0, record.save_tensors

        def slow(*arguments) -> None:
            self.now += checkpoint
            save(*arguments)

        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(record, "save_tensors", slow)


def test_a_budget_is_kept_and_the_overhead_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Turned(monkeypatch, checkpoint=0.5), nn.Linear(2, 2)
    with wb.Recorder(tmp_path, model, every=budget(0.1)) as rec:
        for step in range(1, 101):
            clock.now += 1.0
            rec.step(loss=0.0)
            assert rec.seconds <= max(0.1 * step, 0.5)
        assert rec.seconds == 10.0
    opened = wb.Trajectory.open(tmp_path)
    assert len(opened.steps) == 20, "one checkpoint each five seconds of training"
    assert opened.overhead == 0.1
    bounded = every(2) & budget(0.1)
    with wb.Recorder(tmp_path / "both", model, every=bounded) as rec:
        for _ in range(40):
            clock.now += 1.0
            rec.step()
    assert wb.Trajectory.open(tmp_path / "both").steps == (0, 10, 16, 20, 26, 30, 36, 40)


def test_the_overhead_goes_on_where_a_record_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Turned(monkeypatch, checkpoint=1.0), nn.Linear(2, 2)
    for _ in range(2):
        with wb.Recorder(tmp_path, model, every=1) as rec:
            for _ in range(4):
                model.weight.data.add_(1)
                clock.now += 10.0
                rec.step()
        clock.now += 1000.0
    lines, _ = record.read_lines(tmp_path / record.SCALARS)
    assert [(line.step, line.training, line.cost) for line in lines[1:]] == [
        (k, 10.0 * k, 1.0 + k) for k in range(1, 9)
    ]
    assert wb.Trajectory.open(tmp_path).overhead == pytest.approx(9 / 80)
    assert math.isnan(wb.Trajectory.adopt(_plain(tmp_path / "s1.pt")).overhead)


def _plain(path: Path) -> Path:
    torch.save(nn.Linear(1, 1).state_dict(), path)
    return path


def test_checkpoints_are_kept_at_spikes_and_crossings(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    rule = on_spike("loss") | on_crossing("accuracy", 60)
    with wb.Recorder(tmp_path, model, every=rule) as rec:
        for step in range(1, 81):
            loss = 50.0 if step == 41 else 1 + 0.1 * (step % 3)
            rec.step(loss=loss, **({"accuracy": step} if step % 5 == 0 else {}))
    assert wb.Trajectory.open(tmp_path).steps == (0, 41, 60, 80)
    assert "Spike" in record.Manifest.read(tmp_path).schedule


class _Slow:
    """Numbers that arrive when the test says so."""

    def __init__(self, values: list[float]) -> None:
        self.there, self.numbers, self.waited = False, values, False

    def ready(self) -> bool:
        return self.there

    def values(self) -> list[float]:
        self.waited = not self.there
        return self.numbers


def test_lines_wait_for_a_device_in_order_and_nobody_waits_for_them() -> None:
    from workbench.dynamics.pending import Pending

    written: list[Line] = []
    asked: list[_Slow] = []

    def ask(tensors) -> _Slow:
        asked.append(_Slow([float(t) for t in tensors]))
        return asked[-1]

    pending = Pending(written.append, ask, most=3)
    pending.push(Line(1, 0.0, values={"a": 1.0}), {})
    for step in (2, 3):
        pending.push(Line(step, 0.0, values={"a": 1.0}), {"loss": torch.tensor(step / 4)})
    pending.push(Line(4, 0.0, values={"a": 5.0}), {})
    assert [line.step for line in written] == [1]
    asked[1].there = True
    pending.drain()
    assert [line.step for line in written] == [1], "a later line never overtakes an earlier one"
    asked[0].there = True
    pending.drain()
    assert [dict(line.values) for line in written[1:]] == [
        {"a": 1.0, "loss": 0.5},
        {"a": 1.0, "loss": 0.75},
        {"a": 5.0},
    ]
    assert pending.arrived == {"loss": 0.75}
    assert not any(a.waited for a in asked)
    for step in range(5, 10):
        pending.push(Line(step, 0.0), {"loss": torch.tensor(0.0)})
    assert [line.step for line in written][4:] == [5, 6]
    pending.drain(wait=True)
    assert [line.step for line in written] == list(range(1, 10))
    assert not len(pending)
