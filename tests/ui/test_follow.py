"""A bench, or a page, on records that grow: what is new comes by itself, at their pace, and stops with them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from ui.test_bench import finish
from ui.test_session import until as happens
from ui.toys import Still

import workbench as wb
from workbench import record
from workbench.figure import Axis, Figure, Panel, Points
from workbench.probe import Probe, Reading, Variable
from workbench.several import Runs
from workbench.ui import follow
from workbench.ui.app import Page
from workbench.ui.bench import Bench
from workbench.ui.follow import Follower
from workbench.ui.session import Session


def until(true: Any) -> None:
    """Wait for it, also where the machine has much else to do."""
    happens(true, 60)


@dataclass(frozen=True)
class Level(Probe[Any]):
    """The one weight of a model, which these tests make equal to the step."""

    variables: ClassVar[tuple[Variable, ...]] = (Variable("level", ("x",), "weight"),)

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        yield self.reading(1.0, {"level": subject.params["weight"].flatten()}, coords={"x": [0.0]}, converged=True)

    def summary(self, data: Any) -> dict[str, Any]:
        return {"level": float(data.level[-1])}

    def figure(self, data: Any) -> Figure:
        return Figure((Panel((Points(data["x"].values, data.level.values),), Axis("x"), Axis("level")),))


@dataclass(frozen=True)
class Curve(Level):
    """The recorded loss at every step."""

    looks_at: ClassVar[Any] = "trajectory"

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        losses = subject.scalars["loss"].dropna()
        yield self.reading(1.0, {"level": losses.values}, coords={"x": losses.index.values}, converged=True)


@dataclass(frozen=True)
class Counts(Level):
    """How many losses each of several runs has recorded."""

    looks_at: ClassVar[Any] = "runs"

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        counts = [float(len(run.scalars["loss"].dropna())) for run in subject.values()]
        yield self.reading(1.0, {"level": counts}, coords={"x": np.arange(float(len(counts)))}, converged=True)


@pytest.fixture(autouse=True)
def own_toys(toys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "SHARE", 1)  # a busy machine's slow looks shall not make the next one wait for long
    toys.clear()
    toys.update(Level=Level, Curve=Curve, Counts=Counts)


class Training:
    """A recorder that is open, around a net of one weight."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.net = nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            self.net.weight.zero_()
        data = (torch.ones(4, 1, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64))
        self.recorder = wb.Recorder(folder, self.net, every=2, data=data, loss="mse", **more)

    def __enter__(self) -> Training:
        self.recorder.__enter__()
        self.go(2)
        return self

    def __exit__(self, *problem: Any) -> None:
        self.recorder.__exit__(None, None, None)

    def go(self, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                self.net.weight += 1
            self.recorder.step(loss=float(self.net.weight.detach()))

    def bench(self) -> Bench:
        given = {"model": nn.Linear(1, 1, bias=False).double()}
        made = Bench(Session(wb.Trajectory.open(self.recorder.folder), **given))
        made._submit()
        finish(made)
        return made


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    with Training(tmp_path / "run") as training:
        yield training


def level(bench: Bench) -> float:
    return bench.session.latest.summary["level"] if bench.session.latest is not None else math.nan


def test_at_the_last_step_the_slider_goes_on_and_what_is_new_is_measured(training: Training) -> None:
    bench = training.bench()
    assert (bench.step.options, bench.step.value, level(bench)) == ((0, 2), 2, 2.0)
    bench.follow(0.02)
    assert "recording now" in bench.title.value
    training.go(6)
    until(lambda: bench.step.options == (0, 2, 4, 6, 8) and level(bench) == 8)
    assert bench.step.value == 8
    assert "subject(8)" in bench.code.value
    assert "steps 0 to 8" in bench.title.value
    bench.close()


def test_at_an_earlier_step_the_slider_grows_and_nothing_else_happens(training: Training) -> None:
    bench = training.bench()
    bench.step.value = 0
    finish(bench)
    submitted: list[Any] = []
    bench.session.job.submit = lambda *given, **more: submitted.append(given)
    bench.follow(0.02)
    training.go(4)
    until(lambda: bench.step.options == (0, 2, 4, 6))
    time.sleep(0.1)
    assert bench.step.value == 0
    assert submitted == []
    bench.close()


def test_what_looks_at_the_whole_path_is_read_again_for_each_line(training: Training) -> None:
    bench = training.bench()
    bench.probe.value = "Curve"
    finish(bench)
    assert list(bench.session.latest.data.level.values) == [1, 2]
    bench.follow(0.02)
    for count in (3, 4, 5):
        training.go(1)
        until(lambda n=count: level(bench) == n)
    assert list(bench.session.latest.data["x"].values) == [1, 2, 3, 4, 5]
    assert bench.step.value == 4
    bench.close()


def test_it_stops_with_the_recording_and_has_seen_its_end(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        bench = training.bench()
        bench.follow(0.02)
        training.go(3)
    until(lambda: bench.ticker is not None and not bench.ticker.running)
    finish(bench)
    assert bench.step.value == 5
    assert level(bench) == 5
    assert "recording now" not in bench.title.value
    fresh = training.bench()
    fresh.follow(0.02)
    assert fresh.ticker is None, "nobody writes there"


def test_it_stops_when_the_widgets_are_closed(training: Training) -> None:
    bench = training.bench()
    bench.follow(0.02)
    assert bench.ticker is not None
    assert bench.ticker.running
    bench.view.close()
    until(lambda: not bench.ticker.running)


def test_after_cancel_nothing_is_measured_by_itself(training: Training) -> None:
    bench = training.bench()
    bench.cancel.value = True
    bench.follow(0.02)
    training.go(4)
    until(lambda: bench.step.value == 6)
    time.sleep(0.1)
    assert level(bench) == 2
    bench.run.value = True
    until(lambda: level(bench) == 6)
    bench.close()


def test_what_runs_is_not_given_up_for_what_is_new(training: Training) -> None:
    session = training.bench().session
    follower = Follower(session)
    training.go(2)
    assert follower.look()
    session.state = type(session.state)("running")
    assert not follower.due()
    training.go(2)
    assert follower.look()
    assert session.order.step == 2
    session.state = type(session.state)("done", 1.0)
    assert follower.due()
    assert session.order.step == 6, "both times it stood at the end"
    assert not follower.due()
    assert not follower.look()


def test_a_person_who_moves_meanwhile_stays_where_they_went(training: Training) -> None:
    session = training.bench().session
    follower = Follower(session)
    training.go(2)
    assert follower.look()
    session.move(0)
    assert not follower.due()
    assert session.order.step == 0


def test_a_checkpoint_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as first:
        first.go(2)
        bench = first.bench()
    follower = bench.follower
    assert level(bench) == 4
    with Training(tmp_path / "run", resume=2) as again:
        again.go(2)  # its weight counts from 0 again: 2 at step 4
        assert follower.look()
        bench.step.value = 4
        bench.run.value = True
        until(lambda: level(bench) == 2)
    assert first.net.weight.item() == 4


def test_a_recorder_is_explored_as_what_it_has_recorded(training: Training, tmp_path: Path) -> None:
    session = Session(training.recorder, model=training.net)
    assert session.kind == "trajectory"
    assert session.steps == (0, 2)
    assert Follower(session).goes_on
    with pytest.raises(FileNotFoundError, match=r"no record|holds no"):
        Session(Training(tmp_path / "other").recorder)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Training, Training]]:
    with Training(tmp_path / "a") as a, Training(tmp_path / "b") as b:
        yield a, b


def of_both(two: tuple[Training, Training]) -> Bench:
    net = nn.Linear(1, 1, bias=False).double()
    paths = (wb.Trajectory.open(t.recorder.folder).using(net) for t in two)
    made = Bench(Session(Runs(dict(zip("ab", paths, strict=True))), store=False))
    made._submit()
    finish(made)
    return made


def test_of_several_runs_the_chosen_one_is_followed_to_its_end(two: tuple[Training, Training]) -> None:
    bench = of_both(two)
    assert (bench.run_choice.value, bench.step.value, level(bench)) == ("a", 2, 2.0)
    bench.follow(0.02)
    two[0].go(4)
    until(lambda: bench.step.options == (0, 2, 4, 6) and level(bench) == 6)
    two[1].go(2)
    until(lambda: bench.session.target["b"].steps == (0, 2, 4))
    assert (bench.step.value, bench.step.options) == (6, (0, 2, 4, 6))
    bench.run_choice.value = "b"
    until(lambda: level(bench) == 4)
    assert bench.step.options == (0, 2, 4)
    two[0].recorder.__exit__(None, None, None)
    two[1].go(2)
    until(lambda: level(bench) == 6)
    assert "recording now" in bench.title.value, "the other one still goes on"
    two[1].recorder.__exit__(None, None, None)
    until(lambda: not bench.ticker.running)
    assert "recording now" not in bench.title.value


def on_folder(folder: Path) -> Bench:
    """A bench on all runs of a folder, as ``wb.explore(folder)`` makes it, whose follower looks often."""
    made = Bench(Session(str(folder), model=nn.Linear(1, 1, bias=False).double(), store=False))
    made._submit()
    finish(made)
    made.follow(0.02)
    return made


def test_a_run_that_begins_in_the_folder_is_listed_and_nothing_that_is_chosen_changes(
    two: tuple[Training, Training], tmp_path: Path
) -> None:
    bench = on_folder(tmp_path)
    assert bench.run_choice.options == ("a", "b")
    bench.run_choice.value = "b"
    until(lambda: level(bench) == 2 and not bench.session.state.busy)
    order, submitted, submit = bench.session.order, list[Any](), bench.session.job.submit
    bench.session.job.submit = lambda *given, **more: submitted.append(given)
    (tmp_path / "0 no checkpoint").mkdir()
    (tmp_path / "0 no checkpoint" / record.MANIFEST).write_text("{}")
    with Training(tmp_path / "0 later") as later:
        until(lambda: bench.run_choice.options == ("a", "b", "0 later"))
        later.go(2)
        until(lambda: bench.session.target["0 later"].steps == (0, 2, 4))
        assert (bench.run_choice.value, bench.session.order) == ("b", order)
        assert submitted == []
        assert "for label in ['a', 'b', '0 later']" in bench.code.value.replace("&#x27;", "'")
        bench.session.job.submit = submit
        bench.run_choice.value = "0 later"
        until(lambda: level(bench) == 2 and bench.step.options == (0, 2, 4))
        bench.step.value = 4
        until(lambda: level(bench) == 4)
        later.go(2)
        until(lambda: level(bench) == 6)
    bench.close()
    until(lambda: not bench.ticker.running)


def test_what_looks_at_all_runs_is_read_again_with_one_that_begins(
    two: tuple[Training, Training], tmp_path: Path
) -> None:
    bench = on_folder(tmp_path)
    bench.probe.value = "Counts"
    until(lambda: bench.session.latest.probe.name == "Counts" and not bench.session.state.busy)
    with Training(tmp_path / "c") as later:
        until(lambda: list(bench.session.latest.data.level.values)[2:] == [2])
        later.go(1)
        until(lambda: list(bench.session.latest.data.level.values)[2:] == [3])
    assert bench.run_choice.value == "a"
    bench.close()


def test_a_folder_whose_runs_have_all_ended_is_watched_on(tmp_path: Path) -> None:
    with Training(tmp_path / "a"):
        pass
    bench = on_folder(tmp_path)
    assert "recording now" not in bench.title.value
    with Training(tmp_path / "b"):
        until(lambda: bench.run_choice.options == ("a", "b"))
        until(lambda: "recording now" in bench.title.value)
    until(lambda: "recording now" not in bench.title.value)
    assert bench.ticker.running
    bench.close()


def test_a_folder_that_is_a_run_opens_as_that_run(training: Training) -> None:
    session = Session(training.recorder.folder, model=training.net)
    assert (session.kind, session.folder) == ("trajectory", None)
    with pytest.raises(FileNotFoundError, match="no recorded runs"):
        Session(training.recorder.folder / record.CHECKPOINTS)


def test_what_looks_at_all_runs_is_read_again_when_any_has_grown(two: tuple[Training, Training]) -> None:
    bench = of_both(two)
    bench.probe.value = "Counts"
    finish(bench)
    bench.follow(0.02)
    two[1].go(3)
    until(lambda: list(bench.session.latest.data.level.values) == [2, 5])
    two[0].go(1)
    until(lambda: list(bench.session.latest.data.level.values) == [3, 5])
    bench.close()


def test_news_of_another_run_starts_nothing(two: tuple[Training, Training]) -> None:
    session = of_both(two).session
    session.choose("Curve")
    session.submit()
    until(lambda: not session.state.busy and session.latest.probe.name == "Curve")
    follower = Follower(session)
    two[1].go(2)
    assert follower.look()
    assert not follower.due()
    two[0].go(2)
    assert follower.look()
    assert follower.due()


def page_on(folder: Path) -> Page:
    """A page whose follower looks often."""
    net = nn.Linear(1, 1, bias=False).double()
    page = Page({"": lambda: Session(wb.Trajectory.open(folder), model=net)})
    until(lambda: page.session.latest is not None and not page.session.state.busy)
    assert page.ticker is not None
    page.ticker.stop()
    page._follow(0.02)
    return page


def shown(page: Page) -> tuple[int, float]:
    return page.step.value, page.session.latest.summary["level"]


def test_a_page_follows_to_the_end_of_the_recording(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        page = page_on(tmp_path / "run")
        assert shown(page) == (2, 2.0)
        assert "recording now" in page.head.object
        training.go(4)
        until(lambda: shown(page) == (6, 6.0))
        assert page.step.options == [0, 2, 4, 6]
        assert "subject(6)" in page.code.object
        page.step.value = 2
        until(lambda: shown(page) == (2, 2.0))
        training.go(2)
        until(lambda: page.step.options == [0, 2, 4, 6, 8])
        assert shown(page) == (2, 2.0), "the person went elsewhere"
        page.probe.value = "Curve"
        until(lambda: shown(page)[1] == 8)
        training.go(1)
        until(lambda: shown(page)[1] == 9)
    until(lambda: not page.ticker.running)
    until(lambda: "recording now" not in page.head.object)


def test_a_page_that_is_closed_or_shows_another_run_looks_no_more(tmp_path: Path) -> None:
    net = nn.Linear(1, 1, bias=False).double()
    with Training(tmp_path / "a"), Training(tmp_path / "b"):
        opener = lambda name: lambda: Session(wb.Trajectory.open(tmp_path / name), model=net)  # noqa: E731
        page = Page({name: opener(name) for name in "ab"})
        first = page.ticker
        page.folder.value = "b"
        until(lambda: not first.running)
        second = page.ticker
        assert second is not first
        assert second.running
        page.close()
        assert not second.running


def test_a_page_lists_the_runs_that_begin_and_stays_on_its_own(tmp_path: Path) -> None:
    net = nn.Linear(1, 1, bias=False).double()

    def opener(folder: Path) -> Any:
        return lambda: Session(wb.Trajectory.open(folder), model=net)

    with Training(tmp_path / "b"):
        page = Page(lambda: {name: opener(folder) for name, folder in record.runs_in(tmp_path).items()})
        until(lambda: page.session.latest is not None and not page.session.state.busy)
        page.watch.stop()
        page._watch(0.02)
        session, watch = page.session, page.watch
        assert (page.folder.options, page.folder.visible) == (["b"], False)
        with Training(tmp_path / "a"):
            until(lambda: page.folder.options == ["a", "b"])
            assert page.folder.visible
            assert (page.folder.value, page.session) == ("b", session)
            page.folder.value = "a"
            until(lambda: page.session is not session and page.session.latest is not None)
            assert page.ticker.running, "it is being recorded"
        assert watch.running
        page.close()
        assert not watch.running


@given(st.lists(st.sets(st.sampled_from("abcd")), max_size=4), st.data())
def test_the_list_is_what_is_there_and_what_is_chosen(rounds: list[set[str]], data: st.DataObject) -> None:
    there = {"c"}
    page = Page(lambda: {name: lambda: Session(Still()) for name in sorted(there)})
    page.watch.stop()
    for present in rounds:
        there.clear()
        there.update(present)
        session, chosen = page.session, page.folder.value
        page._sought()
        assert set(page.folder.options) == present | {chosen}
        assert (page.folder.value, page.session) == (chosen, session)
        page.folder.value = data.draw(st.sampled_from(page.folder.options))
        assert (page.session is session) == (page.folder.value == chosen)
    page.close()
