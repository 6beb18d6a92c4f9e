# ruff: noqa: NPY002 (NumPy's global state is drawn from on purpose: a recorder must not disturb it)
"""The recorder: what it keeps, what it survives, and that the training never notices."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

import workbench as wb
from workbench import record
from workbench.dynamics.lock import LOCK, InUse
from workbench.dynamics.schedules import Every, LogSpaced
from workbench.record import Line


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, recorder: wb.Recorder | None = None
) -> None:
    """Noisy steps that use every global random state, so that any draw of the recorder's would show."""
    for _ in range(steps):
        noise = torch.from_numpy(np.random.standard_normal((16, 4))) * random.random()
        loss = model(torch.randn(16, 4, dtype=torch.float64) + noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recorder:
            recorder.step(train_loss=loss)


def states() -> tuple[bytes, str, str]:
    return torch.get_rng_state().numpy().tobytes(), str(random.getstate()), str(np.random.get_state())


def test_training_is_bitwise_as_without_a_recorder(tmp_path: Path) -> None:
    ends = []
    for recorded in (False, True):
        model = net()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters())
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.zeros(9, 4, dtype=torch.float64), torch.zeros(9)), shuffle=True
        )
        if recorded:
            with wb.Recorder(tmp_path / "r", model, optimizer, every=2, data=loader, keep_optimizer=True) as rec:
                descend(model, optimizer, 12, rec)
            assert rec.count == 12
        else:
            descend(model, optimizer, 12)
        ends.append(
            (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), states(), model.training)
        )
    (plain, plain_state, *plain_rest), (seen, seen_state, *seen_rest) = ends
    assert plain_rest == seen_rest
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert str(plain_state) == str(seen_state)


def test_the_start_and_the_end_are_kept_bit_for_bit(tmp_path: Path) -> None:
    model = net()
    model[0].weight.data[0, 0] = math.nan
    start = copy.deepcopy(model.state_dict())
    with wb.Recorder(tmp_path / "r", model, every=5) as rec:
        descend(model, torch.optim.SGD(model.parameters(), lr=0.1), 7, rec)
    opened = wb.Trajectory.open(tmp_path / "r")
    assert opened.steps == (0, 5, 7)
    for step, wanted in ((0, start), (7, model.state_dict())):
        kept = opened.weights(step)
        assert list(kept) == list(wanted) or set(kept) == set(wanted)
        for name, tensor in wanted.items():
            assert kept[name].numpy().tobytes() == tensor.numpy().tobytes()
            assert kept[name].dtype == tensor.dtype


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-310, 0.1 + 0.2, -0.0])
def test_scalars_come_back_exactly_and_losses_may_be_anything(tmp_path: Path, value: float) -> None:
    with wb.Recorder(tmp_path / "r", nn.Linear(1, 1)) as rec:
        rec.step(a=value, b=torch.tensor([2.5], requires_grad=True))
    row = wb.Trajectory.open(tmp_path / "r").scalars.loc[1]
    assert np.float64(row["a"]).tobytes() == np.float64(value).tobytes() or (math.isnan(value) and math.isnan(row["a"]))
    assert row["b"] == 2.5
    for line in (tmp_path / "r" / record.SCALARS).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.dictionaries(st.text(min_size=1), st.floats(), max_size=3), st.booleans()),
        max_size=8,
    ),
    st.integers(0, 400),
)
def test_any_prefix_of_the_scalars_file_reads_as_the_lines_that_are_whole(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, dict[str, float], bool]], cut: int
) -> None:
    lines = [Line(s, 1.0, 0.0, {} if r else v, r) for s, v, r in made]
    path = tmp_path_factory.mktemp("lines") / "scalars.jsonl"
    path.write_bytes(b"".join(line.to_bytes() for line in lines)[:cut])
    sizes = np.cumsum([len(line.to_bytes()) for line in lines])
    whole = int((sizes <= cut).sum())
    held: list[Line] = []
    for line in lines[:whole]:
        held = [old for old in held if (old.step <= line.step if line.resumed else old.step != line.step)]
        held += [] if line.resumed else [line]
    found, size = record.read_lines(path)
    assert size == (sizes[whole - 1] if whole else 0)
    assert [repr(x) for x in found] == [repr(x) for x in sorted(held, key=lambda x: x.step)]


@given(st.integers(1, 40), st.integers(0, 100_000))
def test_log_spaced_keeps_exactly_the_rounded_powers(per_decade: int, step: int) -> None:
    powers = {0, *(round(10 ** (k / per_decade)) for k in range(6 * per_decade))}
    assert LogSpaced(per_decade).keeps(step) == (step in powers)


@pytest.mark.parametrize("make", [lambda: LogSpaced(0), lambda: Every(0)])
def test_schedules_that_keep_nothing_are_refused(make) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make()


CHILD = """
import sys, torch, workbench as wb
from safetensors import SafetensorError
from torch import nn
model = nn.Linear(64, 64)
with torch.no_grad():
    for p in model.parameters(): p.zero_()
with wb.Recorder(sys.argv[1], model, every=1) as rec:
    print("ready", flush=True)
    for _ in range(100_000):
        with torch.no_grad():
            for p in model.parameters(): p.fill_(rec.count + 1)
        rec.step(value=float(rec.count + 1))
        print(rec.count, flush=True)
"""


@pytest.mark.parametrize("after", [0.0, 0.013, 0.11])
def test_a_kill_loses_at_most_the_last_record(tmp_path: Path, after: float) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    said = child.stdout.read().splitlines()
    child.wait()
    done = int(said[-1]) if said and said[-1].isdigit() else 0
    opened = wb.Trajectory.open(tmp_path)
    assert opened.steps[-1] in (done, done + 1, done + 2)
    assert opened.steps == tuple(range(opened.steps[-1] + 1))
    assert opened.scalars.index[-1] >= done
    assert (opened.scalars["value"].dropna() == opened.scalars.index[1:]).all() if done else True
    for step in opened.steps:
        assert (opened.weights(step)["weight"] == step).all()
    # The dead process's lock is taken over, and the record goes on from the checkpoint that the weights equal.
    model, point = nn.Linear(64, 64), opened.steps[-1]
    model.load_state_dict(opened.weights(point))
    with wb.Recorder(tmp_path, model) as rec:
        rec.step(value=-1)
    again = opened.refresh()
    assert again.steps[-1] == point + 1
    assert again.scalars["value"].loc[point + 1] == -1
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not (tmp_path / LOCK).exists()


def recorded(folder: Path, steps: int = 6) -> nn.Module:
    model = nn.Linear(2, 2).double()
    with wb.Recorder(folder, model, every=1) as rec:
        for step in range(1, steps + 1):
            model.weight.data.fill_(step)
            rec.step(loss=step)
    return model


def test_resuming_replaces_what_came_later_only_once_training_goes_on(tmp_path: Path) -> None:
    model = recorded(tmp_path)
    model.load_state_dict(wb.Trajectory.open(tmp_path).weights(3))
    with wb.Recorder(tmp_path, model, every=2) as rec:
        assert rec.count == 3
        assert wb.Trajectory.open(tmp_path).steps[-1] == 6
        rec.step(loss=-4)
        opened = wb.Trajectory.open(tmp_path)
        assert opened.steps == (0, 1, 2, 3, 4)
        assert opened.scalars["loss"].tolist()[1:] == [1, 2, 3, -4]
        rec.step(loss=-5)
    assert wb.Trajectory.open(tmp_path).steps == (0, 1, 2, 3, 4, 5)


def test_entering_again_without_a_step_changes_nothing(tmp_path: Path) -> None:
    model = recorded(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with wb.Recorder(tmp_path, model, every=1):
        pass
    assert before == {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_what_was_forgotten_can_be_added_by_entering_again(tmp_path: Path) -> None:
    model = recorded(tmp_path)
    data = (torch.ones(3, 2, dtype=torch.float64), torch.tensor([0, 1, 1]))
    for given_ in ({"data": data, "loss": "cross_entropy"}, {"norm": "eval"}):
        with wb.Recorder(tmp_path, model, every=1, **given_):
            pass
    opened = wb.Trajectory.open(tmp_path)
    assert opened.steps == (0, 1, 2, 3, 4, 5, 6)
    assert opened.subject(6, model=model).examples == 3


def test_weights_that_were_never_recorded_ask_where_to_go_on(tmp_path: Path) -> None:
    model = recorded(tmp_path)
    model.weight.data.fill_(77)
    with pytest.raises(ValueError, match=r"equal none of its checkpoints.*resume=STEP"):
        wb.Recorder(tmp_path, model).__enter__()
    with wb.Recorder(tmp_path, model, resume=4) as rec:
        rec.step(loss=0)
    opened = wb.Trajectory.open(tmp_path)
    assert opened.steps == (0, 1, 2, 3, 4, 5)
    assert (opened.weights(5)["weight"] == 77).all()
    with pytest.raises(ValueError, match=r"resume=9\) must lie in \[0, 5\]"):
        wb.Recorder(tmp_path, model, resume=9).__enter__()


def test_another_model_is_refused_with_the_tensor_that_differs(tmp_path: Path) -> None:
    recorded(tmp_path)
    with pytest.raises(ValueError, match=r"weight is float64 of shape \(2, 2\), here it is float32 of shape \(3, 2\)"):
        wb.Recorder(tmp_path, nn.Linear(2, 3)).__enter__()
    assert not (tmp_path / LOCK).exists()


def test_a_torn_last_line_is_cut_off_before_new_lines_follow(tmp_path: Path) -> None:
    model = recorded(tmp_path)
    with (tmp_path / record.SCALARS).open("ab") as opened:
        opened.write(b'{"step": 7, "ti')
    assert wb.Trajectory.open(tmp_path).scalars.index[-1] == 6
    with wb.Recorder(tmp_path, model) as rec:
        rec.step(loss=7)
    assert wb.Trajectory.open(tmp_path).scalars["loss"].tolist()[1:] == [1, 2, 3, 4, 5, 6, 7]


def test_two_writers_are_refused_and_the_lock_ends_with_its_owner(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    first = wb.Recorder(tmp_path, model)
    first.__enter__()
    with pytest.raises(InUse, match=f"written by process {os.getpid()}"):
        wb.Recorder(tmp_path, model).__enter__()
    code = "import sys, torch, workbench as wb; wb.Recorder(sys.argv[1], torch.nn.Linear(1, 1)).__enter__()"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "InUse" in other.stderr
    del first
    with wb.Recorder(tmp_path, model):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_used_again_process_number_does_not_keep_a_folder_locked(tmp_path: Path) -> None:
    with wb.Recorder(tmp_path / "a", nn.Linear(1, 1)):
        held = json.loads((tmp_path / "a" / LOCK).read_text())
    (tmp_path / "a" / LOCK).write_text(json.dumps(held | {"started": held["started"] - 1000}))
    with wb.Recorder(tmp_path / "a", nn.Linear(1, 1), resume=0):
        pass
    (tmp_path / "a" / LOCK).write_text(json.dumps(held | {"host": "elsewhere"}))
    with pytest.raises(InUse, match="another machine"):
        wb.Recorder(tmp_path / "a", nn.Linear(1, 1), resume=0).__enter__()


def test_the_last_step_is_kept_after_an_error_too(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with contextlib.suppress(ZeroDivisionError), wb.Recorder(tmp_path, model, every=100) as rec:
        rec.step()
        model.weight.data.fill_(5)
        rec.step()
        _ = 1 / 0
    assert wb.Trajectory.open(tmp_path).steps == (0, 2)
    assert wb.Trajectory.open(tmp_path).weights(2)["weight"] == 5


def test_a_full_disk_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = recorded(tmp_path, 2)
    held = wb.Trajectory.open(tmp_path).weights(2)
    with wb.Recorder(tmp_path, model, every=1) as rec, monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", _half_then_full)
        with pytest.raises(OSError, match=r"the disk is full: step-000000003.safetensors was not written"):
            rec.step()
    assert not list(tmp_path.rglob(".*.tmp"))
    assert torch.equal(wb.Trajectory.open(tmp_path).weights(2)["weight"], held["weight"])


def _half_then_full(tensors, path, metadata=None) -> None:
    Path(path).write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    inner = nn.Linear(2, 2)
    for name, wrapped in (("compiled", torch.compile(inner)), ("parallel", nn.DataParallel(inner))):
        with wb.Recorder(tmp_path / name, wrapped):
            pass
        assert set(wb.Trajectory.open(tmp_path / name).weights(0)) == {"weight", "bias"}


def test_the_optimizer_is_kept_when_asked(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.8, 0.9))
    with wb.Recorder(tmp_path, model, optimizer, keep_optimizer=True) as rec:
        descend(model, optimizer, 2, rec)
    held = wb.Trajectory.open(tmp_path).optimizer(2)
    assert held is not None
    assert held["groups"][0]["lr"] == 0.02
    assert held["groups"][0]["betas"] == [0.8, 0.9]
    assert held["class"] == "torch.optim.adam:Adam"
    assert held["parameters"] == [name for name, _ in model.named_parameters()]
    fresh = torch.optim.Adam(model.parameters())
    fresh.load_state_dict({"state": held["state"], "param_groups": held["groups"]})
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, fresh.state_dict()["state"][index][name]) for name, value in entry.items())
    with pytest.raises(ValueError, match="needs the optimizer"):
        wb.Recorder(tmp_path, model, keep_optimizer=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"build": lambda: None}, "importable module"),
        ({"build": "no colon"}, "mypackage.nets:resnet"),
        ({"build": "a.b:c", "build_args": {"width": object()}}, "JSON"),
        ({"loss": lambda f, y: f}, "importable module"),
        ({"every": 0}, "at least 1"),
        ({"every": 10.0}, "whole number of steps"),
    ],
)
def test_what_a_record_cannot_say_is_refused_before_training(tmp_path: Path, arguments: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        wb.Recorder(tmp_path, nn.Linear(1, 1), **arguments)


def test_examples_too_large_to_store_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.dynamics.examples.SMALL", 1000)
    data = (torch.zeros(100, 8), torch.zeros(100))
    with pytest.raises(ValueError, match="module:callable"):
        wb.Recorder(tmp_path, nn.Linear(8, 1), data=data).__enter__()


@pytest.mark.parametrize("bad", [torch.zeros(2), "word", None])
def test_scalars_are_numbers(tmp_path: Path, bad) -> None:
    with (
        wb.Recorder(tmp_path, nn.Linear(1, 1)) as rec,
        pytest.raises(TypeError, match=r"step\(loss=...\) takes one number"),
    ):
        rec.step(loss=bad)
    with pytest.raises(RuntimeError, match="not open"):
        rec.step(loss=1)


def test_the_recorders_own_cost_is_recorded(tmp_path: Path) -> None:
    with wb.Recorder(tmp_path, nn.Linear(1, 1)) as rec:
        for _ in range(20):
            rec.step(loss=0.0)
    cost = wb.Trajectory.open(tmp_path).scalars["recorder_seconds"]
    assert cost.is_monotonic_increasing
    assert 0 < cost.iloc[-1] <= rec.seconds
