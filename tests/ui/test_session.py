"""The rules below the widgets: what is offered, what is submitted, what is said as code."""

from __future__ import annotations

import threading
import time
from pathlib import Path as File
from typing import Any

import pytest
from ui.toys import Broken, Endless, Nested, Path, Still, Wave

import workbench as wb
from workbench.several import Pair, Runs
from workbench.store import Store
from workbench.ui.session import Session


def wait(session: Session, seconds: float = 20) -> Any:
    return session.job.wait(seconds)


def until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class TestWhatIsOffered:
    def test_a_subject_gets_point_probes(self) -> None:
        assert set(Session(Still()).probes) == {"Wave", "Endless", "Broken"}

    def test_a_trajectory_gets_point_probes_at_its_steps_and_its_own(self) -> None:
        session = Session(Path())
        assert set(session.probes) == {"Wave", "Endless", "Broken", "Nested"}
        assert session.steps == Path.steps
        assert session.order.step == 50
        assert session.needs_step
        session.choose("Nested")
        assert not session.needs_step

    def test_runs_offer_what_their_members_offer(self) -> None:
        runs = Runs({"a": Path(1.0), "b": Path(2.0)})
        session = Session(runs)
        assert session.labels == ("a", "b")
        session.move(10)
        session.visit("b")
        assert session.order.step == 10
        session.submit()
        assert wait(session).summary["top"] == pytest.approx(20, rel=0.2)

    def test_a_target_that_is_none_is_refused_with_what_would_do(self) -> None:
        with pytest.raises(TypeError, match="Subject, Pair, Trajectory or Runs; got dict"):
            Session({})
        with pytest.raises(TypeError, match="model can be given with a Trajectory only"):
            Session(Still(), model=object())

    def test_a_target_nothing_looks_at_is_refused(self) -> None:
        pair = Pair.__new__(Pair)
        with pytest.raises(LookupError, match="no probe looks at a pair"):
            Session(pair)

    def test_an_unknown_probe_is_answered_with_the_known_ones(self) -> None:
        with pytest.raises(KeyError, match=r"no probe 'Hessian'.*Wave, Endless, Broken"):
            Session(Still()).choose("Hessian")


class TestMeasuring:
    def test_settings_are_remembered_for_each_probe(self) -> None:
        session = Session(Still())
        session.settle(Wave(points=3))
        session.choose("Endless")
        assert session.choose("Wave") == Wave(points=3)

    def test_checkpoints_are_opened_in_the_worker_and_kept_open(self) -> None:
        path = Path()
        session = Session(path, store=False)
        for step in (5, 10, 5, 10):
            session.move(step)
            session.submit()
            wait(session)
        assert [step for step, _ in path.opened] == [5, 10]
        assert all("MainThread" not in thread for _, thread in path.opened)

    def test_the_latest_wins(self) -> None:
        heard: list[Any] = []
        session = Session(Still(), on_reading=lambda r: heard.append(r.probe), store=False)
        session.settle(Endless())
        session.submit()
        until(lambda: heard)
        for n in range(2, 12):
            session.settle(Wave(points=n))
            session.submit()
        assert wait(session).probe == Wave(points=11)
        assert heard[-1] == Wave(points=11)
        assert len({p.points for p in heard if isinstance(p, Wave)}) <= 2

    def test_cancel_keeps_what_was_reached_and_shows_it(self) -> None:
        states: list[Any] = []
        session = Session(Still(), on_state=states.append, store=False)
        session.settle(Endless(pace=0.001))
        session.submit()
        until(lambda: session.job.latest is not None)
        session.cancel()
        until(lambda: states[-1].status == "cancelled")
        assert session.latest is not None
        assert 0 < session.latest.done < 1
        assert session.latest is session.latest

    def test_a_setting_of_the_picture_draws_anew_and_measures_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        heard: list[Any] = []
        session = Session(Still(), on_reading=heard.append, store=False)
        session.submit()
        wait(session)
        drawn = len(heard)
        monkeypatch.setattr(session.job, "submit", lambda *_, **__: pytest.fail("it was measured again"))
        session.settle(Wave(style="points"))
        session.submit()
        assert len(heard) == drawn + 1
        assert heard[-1].figure().panels[0].marks[0].__class__.__name__ == "Points"
        assert heard[-1].data.identical(heard[-2].data)

    def test_a_setting_seen_before_comes_from_the_store(self, tmp_path: File) -> None:
        states: list[Any] = []
        session = Session(Path(), on_state=states.append, store=Store(tmp_path))
        for step in (5, 10, 5):
            session.move(step)
            session.submit()
            wait(session)
        until(lambda: states[-1].status == "done")
        assert states[-1].from_store

    def test_what_a_probe_raises_is_told(self) -> None:
        states: list[Any] = []
        session = Session(Still(), on_state=states.append)
        session.settle(Broken())
        session.submit()
        until(lambda: states and states[-1].status == "failed")
        assert "no</b> such number" in states[-1].message


class TestCode:
    @pytest.mark.parametrize("probe", [Wave(points=5, layer="it's"), Wave(frequency=0.1, parts=("real",), limit=3)])
    def test_it_makes_the_same_reading(self, probe: Any) -> None:
        session = Session(Path(2.0), store=False)
        session.settle(probe)
        session.move(5)
        session.limit(3, None)
        session.submit()
        names: dict[str, Any] = {"trajectory": session.target}
        exec(session.code(), names)  # what a person pastes
        assert names["reading"].data.identical(wait(session).data)
        assert names["reading"].probe == probe
        assert names["reading"].provenance["seed"] == 3

    def test_a_probe_of_the_whole_path_runs_on_it(self) -> None:
        session = Session(Path())
        session.choose("Nested")
        assert session.code().splitlines()[-1].endswith(".run(trajectory, seed=0)")

    def test_runs_and_budgets_are_said(self) -> None:
        session = Session(Runs({"seed 0": Path()}))
        session.limit(1, 5.0)
        assert session.code().splitlines()[-1].endswith(".run(runs['seed 0'].subject(50), seed=1, seconds=5)")


class TestExport:
    def test_it_writes_what_is_on_screen(self, tmp_path: File) -> None:
        session = Session(Still(), store=False)
        session.submit()
        reading = wait(session)
        venue = "icml2024"
        words = session.export(tmp_path / "f.pdf", venue, session.venues[venue][0], "full")
        assert words.startswith(f"Wrote {tmp_path / 'f.pdf'}")
        assert wb.load(tmp_path / "f.pdf").data.identical(reading.data)

    def test_before_the_first_reading_it_says_so(self, tmp_path: File) -> None:
        with pytest.raises(ValueError, match="nothing has been measured yet"):
            Session(Still()).export(tmp_path / "f.pdf", "workbench", "half", "full")

    def test_the_house_style_is_the_first_venue(self) -> None:
        venues = Session(Still()).venues
        assert next(iter(venues)) == "workbench"
        assert "neurips2024" in venues

    def test_chores_run_in_a_thread_of_their_own(self) -> None:
        where = Session(Still()).chore(lambda: threading.current_thread().name).result(10)
        assert where.startswith("workbench-chores")


def test_it_begins_with_the_probe_that_it_is_given() -> None:
    begun = Session(Path(), probe=Wave(points=5))
    assert begun.order.probe == Wave(points=5)
    assert begun.settings("Wave") == Wave(points=5)
    with pytest.raises(LookupError, match=r"Nested does not look at a subject; .*Wave"):
        Session(Still(), probe=Nested())
