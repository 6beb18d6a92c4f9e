"""Experiments in the bench, and probes that look at one path or at all runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ui.test_bench import finish, opened
from ui.test_session import until, wait
from ui.toys import Climb, Crowd, Path, Wave

from workbench.several import Runs
from workbench.ui import look
from workbench.ui.app import Page
from workbench.ui.session import Session


@pytest.fixture(autouse=True)
def more_toys(toys: dict[str, Any]) -> None:
    toys.update(Climb=Climb, Crowd=Crowd)


def test_a_bench_opens_on_the_experiment_with_its_knobs_and_gives_a_verdict() -> None:
    bench = opened(Climb(slope=0.75))
    finish(bench)
    assert bench.session.order.probe == Climb(slope=0.75)
    assert bench.session.choose("Climb") == Climb(slope=0.75), "its settings are those last used"
    assert "wb-passed" in bench.summary.value
    assert "passed: 3, wanted at least 1 (how &lt;high&gt; it climbed)" in bench.summary.value
    row = next(r for r in bench.form.children[0].children if "wb-set-slope" in r._dom_classes)
    row.children[0].value = 0.125
    finish(bench)
    assert "wb-failed" in bench.summary.value
    assert "failed: 0.5" in bench.summary.value
    assert "Experiment" in look.title(bench.session.target)


def test_curves_come_while_it_trains_and_the_verdict_only_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    go, whole = threading.Event(), Climb.stream

    def slowly(self: Climb, subject: Any, draw: Any) -> Iterator[Any]:
        for reading in whole(self, subject, draw):
            yield reading
            assert go.wait(20)

    monkeypatch.setattr(Climb, "stream", slowly)
    bench = opened(Climb())
    until(lambda: bench.summary.value != "")
    assert len(bench.figure.data) == 1
    assert bench.session.latest.done == 0.2
    assert "wb-verdict" not in bench.summary.value
    go.set()
    finish(bench)
    assert "wb-passed" in bench.summary.value


def test_its_code_runs_it_again() -> None:
    session = Session(Climb(slope=0.25), store=False)
    session.limit(2, None)
    session.submit()
    names: dict[str, Any] = {}
    exec(session.code(), names)
    assert session.code().splitlines()[-1].endswith("Climb(slope=0.25).run(seed=2)")
    assert names["reading"].data.identical(wait(session).data)


def test_only_experiments_are_offered_beside_one() -> None:
    session = Session(Climb())
    assert set(session.probes) == {"Climb"}
    assert not session.steps
    assert not session.labels


def test_a_probe_that_is_no_experiment_is_refused() -> None:
    with pytest.raises(TypeError, match="got Wave"):
        Session(Wave())


def test_the_served_page_runs_experiments_too() -> None:
    page = Page({"": lambda: Session(Climb())})
    until(lambda: page.session is not None and page.session.state.status == "done")
    assert "passed: 2" in page.summary.object
    assert "Climb" in page.code.object


def test_what_looks_at_runs_too_reads_all_of_them() -> None:
    runs = Runs({"a": Path(1.0), "b": Path(2.0), "c": Path(3.0)})
    bench = opened(runs)
    bench.probe.value = "Crowd"
    assert bench.run_choice.disabled
    assert bench.step.disabled
    finish(bench)
    assert bench.session.latest.summary["top"] == pytest.approx(3, rel=0.1)
    assert bench.session.code().splitlines()[-1].endswith("Crowd().run(runs, seed=0)")
    bench.probe.value = "Wave"
    assert not bench.run_choice.disabled
    finish(bench)


def test_on_one_path_it_reads_that_path() -> None:
    session = Session(Path(), store=False)
    session.choose("Crowd")
    session.submit()
    assert wait(session).summary["top"] == pytest.approx(1, rel=0.1)
    assert session.code().splitlines()[-1].endswith("Crowd().run(trajectory, seed=0)")
