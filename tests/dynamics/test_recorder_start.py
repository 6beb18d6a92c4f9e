"""What is known before the first step: recorded once, whatever happens to the training afterwards."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench import record
from workbench.dynamics.schedules import on_crossing

TOLD = st.dictionaries(st.sampled_from(["loss", "accuracy", "own"]), st.floats(), max_size=3)
ATTEMPTS = st.lists(st.tuples(TOLD, TOLD, st.integers(0, 3), st.booleans()), min_size=1, max_size=4)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@given(ATTEMPTS)
def test_attempts_in_any_order_leave_what_was_told_first(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[dict[str, float], dict[str, float], int, bool]]
) -> None:
    folder, model = tmp_path_factory.mktemp("start"), nn.Linear(1, 1)
    wanted, last = dict[str, float](), 0
    for first, second, steps, back in attempts:
        last = 0 if back else last
        model.weight.data.fill_(last)
        with wb.Recorder(folder, model, every=1) as rec:
            for told in (first, second):
                rec.start(**told)
                wanted = {**told, **wanted} if last == 0 else wanted
            for _ in range(steps):
                last += 1
                model.weight.data.fill_(last)
                rec.step(loss=-last)
        table = wb.Trajectory.open(folder).scalars
        row = table.loc[0].drop(["wall_time", "recorder_seconds"]).to_dict()
        assert all(same(row[name], value) for name, value in wanted.items())
        assert all(math.isnan(value) for name, value in row.items() if name not in wanted)
    assert table.loc[1:last, "loss"].tolist() == [-step for step in range(1, last + 1)] if last else True
    lines = (folder / record.SCALARS).read_bytes().splitlines()
    own = [line for line in map(record.Line.parse, lines) if line.step == 0 and not line.resumed]
    assert len({frozenset(line.values) for line in own}) == len(own), "what was there already was written again"


def test_training_and_checkpoints_are_as_without_it(tmp_path: Path) -> None:
    ends = []
    for told in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters())
        loss = torch.full((1,), 2.5, requires_grad=True)
        with wb.Recorder(tmp_path / str(told), model, optimizer, every=2, keep_optimizer=True) as rec:
            if told:
                rec.start(train_loss=loss, test_accuracy=math.nan)
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                rec.step(train_loss=1.0)
        ends.append((copy.deepcopy(model.state_dict()), torch.get_rng_state()))
        assert loss.grad is None
    (plain, state), (seen, seen_state) = ends
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert torch.equal(state, seen_state)
    opened, without = wb.Trajectory.open(tmp_path / "True"), wb.Trajectory.open(tmp_path / "False")
    assert opened.steps == without.steps
    assert opened.fingerprint() != without.fingerprint(), "scalars are part of what was measured"
    assert all(opened.source.digest(step) == without.source.digest(step) for step in opened.steps)
    row = opened.scalars.loc[0]
    assert row["train_loss"] == 2.5
    assert math.isnan(row["test_accuracy"])


CHILD = """
import os, signal, sys, workbench as wb
from torch import nn
model = nn.Linear(1, 1)
for p in model.parameters(): p.data.zero_()
with wb.Recorder(sys.argv[1], model) as rec:
    if sys.argv[2] == "told":
        rec.start(loss=1.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", ["told", "silent"])
def test_a_kill_right_after_it_leaves_it_and_a_kill_before_leaves_room(tmp_path: Path, before: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), before], check=False, env=environment)
    assert ended.returncode == -signal.SIGKILL
    model = nn.Linear(1, 1)
    for p in model.parameters():
        p.data.zero_()
    with wb.Recorder(tmp_path, model) as rec:
        rec.start(loss=2.5)
        rec.step(loss=0.5)
    wanted = {"told": 1.5, "silent": 2.5}[before]
    assert wb.Trajectory.open(tmp_path).scalars["loss"].tolist() == [wanted, 0.5]


def test_a_record_that_begins_to_count_later_has_its_first_row_there(tmp_path: Path) -> None:
    with wb.Recorder(tmp_path, nn.Linear(1, 1), resume=100) as rec:
        rec.start(loss=3.0)
        rec.step(loss=2.0)
    assert wb.Trajectory.open(tmp_path).scalars["loss"].to_dict() == {100: 3.0, 101: 2.0}


def test_schedules_that_watch_a_scalar_know_where_it_began(tmp_path: Path) -> None:
    with wb.Recorder(tmp_path, nn.Linear(1, 1), every=on_crossing("accuracy", 0.5)) as rec:
        rec.start(accuracy=0.1)
        for accuracy in (0.9, 0.95, 0.97):
            rec.step(accuracy=accuracy)
    assert wb.Trajectory.open(tmp_path).steps == (0, 1, 3)


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    with wb.Recorder(tmp_path, nn.Linear(1, 1)) as rec:
        with pytest.raises(TypeError, match=r"recorder\.start\(loss=\.\.\.\) takes one number"):
            rec.start(loss=torch.zeros(2))
        with pytest.raises(ValueError, match=r"recorder\.start\(wall_time=\.\.\.\): the recorder writes"):
            rec.start(wall_time=1)
        rec.step(loss=1)
        with pytest.raises(RuntimeError, match="before the first step, and one was recorded already"):
            rec.start(loss=1)
    with pytest.raises(RuntimeError, match="not open"):
        rec.start(loss=1)
    assert wb.Trajectory.open(tmp_path).scalars["loss"].dropna().to_dict() == {1: 1.0}
