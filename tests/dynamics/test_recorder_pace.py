"""Steps at which nothing is due take a short way; what is recorded is what the long way records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench import record
from workbench.dynamics import gauges
from workbench.dynamics.schedules import Moment, budget, every, following, log_spaced, on_crossing, schedule

PLAIN = st.one_of(st.builds(every, st.integers(1, 12)), st.builds(log_spaced, st.integers(1, 30)))
SCHEDULES = st.recursive(
    st.one_of(PLAIN, st.just(budget(0.5)), st.just(on_crossing("loss", 0.5))),
    lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] | t[1] if t[2] else t[0] & t[1]),
    max_leaves=4,
)


def moments(step: int) -> list[Moment]:
    """Whatever may be the case at a step: the loss crosses or not, time was spent or not."""
    return [
        Moment(step, {"loss": now}, 1.0, spent, recent={"loss": [0.0]}) for now in (0.1, 0.9) for spent in (0.0, 9.0)
    ]


@given(SCHEDULES, st.integers(0, 3000))
def test_nothing_is_due_before_a_schedule_says_that_it_can_be(given_: Any, step: int) -> None:
    found = following(given_, step)
    assert found > step
    assert not any(given_.due(moment) for between in range(step + 1, found) for moment in moments(between))


@given(PLAIN, st.integers(0, 5000))
def test_those_that_look_at_the_step_alone_say_exactly_when(given_: Any, step: int) -> None:
    found = following(given_, step)
    assert given_.due(Moment(found, {}))


@dataclass(frozen=True)
class Asked:
    """A schedule that is asked at every step, as it does not say when it can be due."""

    inner: Any

    @property
    def watches(self) -> tuple[str, ...]:
        return tuple(getattr(self.inner, "watches", ()))

    def due(self, moment: Moment) -> bool:
        return self.inner.due(moment)


VALUES = st.one_of(st.floats(), st.integers(-5, 5), st.floats().map(lambda v: torch.tensor(v, dtype=torch.float64)))
RARE = st.dictionaries(st.sampled_from(["loss", "own", 'ø "1"']), VALUES, max_size=3)
USUAL = st.fixed_dictionaries({"loss": st.floats()})
STEPS = st.lists(st.one_of(USUAL, USUAL, USUAL, USUAL, RARE), min_size=15, max_size=30)
KEPT = SCHEDULES.filter(lambda one: "Budget" not in repr(one))


@given(STEPS, KEPT, PLAIN, PLAIN)
def test_the_short_way_records_what_the_long_way_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, Any]], kept: Any, one: Any, two: Any
) -> None:
    ends = []
    for way in (schedule, Asked):
        folder, model = tmp_path_factory.mktemp("way"), nn.Linear(2, 2).double()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        watched = [gauges.Updates(way(one)), gauges.WeightNorm(way(two))]
        with wb.Recorder(folder, model, optimizer, every=way(kept), gauges=watched) as recorder:
            for scalars in steps:
                optimizer.zero_grad()
                model(torch.ones(1, 2).double()).sum().backward()
                optimizer.step()
                recorder.step(**scalars)
        lines, _ = record.read_lines(folder / record.SCALARS)
        ends.append(([(x.step, sorted((n, repr(v)) for n, v in x.values.items())) for x in lines],
                     wb.Trajectory.open(folder).steps))  # fmt: skip
        assert all(a.cost <= b.cost and a.training <= b.training for a, b in pairwise(lines))
    assert ends[0] == ends[1]
    assert [step for step, _ in ends[0][0]] == list(range(len(steps) + 1))


def test_steps_between_take_the_short_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, take = [], wb.Recorder._take
    monkeypatch.setattr(wb.Recorder, "_take", lambda self, given_: (long.append(self.count + 1), take(self, given_)))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wb.Recorder(tmp_path, model, optimizer, every=50, gauges=gauges.defaults(20)) as rec:
        for step in range(1, 62):
            rec.step(loss=math.nan if step == 30 else 0.5, **({"new": 1.0} if step > 44 else {}))
    # The first, each before a reading (gauges are told then), each reading, the checkpoint, and where a name is new.
    assert long == [1, 19, 20, 39, 40, 45, 50, 59, 60]
    assert wb.Trajectory.open(tmp_path).scalars["loss"].isna().sum() == 2
