"""The bench's widgets, driven as a page would drive them, without a page."""

from __future__ import annotations

import time
from pathlib import Path as File
from typing import Any

import pytest
from ui.test_session import until
from ui.toys import Endless, Path, Still, Wave

from workbench.draw.sheet import grid
from workbench.figure import Figure
from workbench.ui import look, session
from workbench.ui.bench import Bench, explore
from workbench.ui.session import Session


def opened(target: Any) -> Bench:
    bench = Bench(Session(target))
    bench._submit()
    return bench


def finish(bench: Bench) -> None:
    until(lambda: bench.session.state.status in ("done", "failed", "cancelled"))


def test_a_click_becomes_a_figure() -> None:
    bench = Bench(Session(Still()))
    bench.run.value = True
    finish(bench)
    assert bench.run.value is False
    assert bench.bar.value == 1
    assert len(bench.figure.data) == 1
    assert list(bench.figure.data[0].y) == pytest.approx(bench.session.latest.data.height.values, rel=1e-6)
    assert "top" in bench.summary.value
    assert "±" in bench.summary.value
    assert bench.status.value == ""


def test_moving_a_control_measures_again_and_changes_the_figure_in_place() -> None:
    bench = opened(Path())
    finish(bench)
    trace, before = bench.figure.data[0], bench.figure.data[0].y.copy()
    bench.step.value = 10
    finish(bench)
    assert bench.figure.data[0] is trace
    assert bench.figure.data[0].y[1] == pytest.approx(before[1] * 10 / 50)
    assert "subject(10)" in bench.code.value


def test_choosing_a_probe_shows_its_form_and_its_words() -> None:
    bench = opened(Path())
    bench.probe.value = "Endless"
    assert "every few milliseconds" in bench.about.value
    assert isinstance(bench._read(), Endless)
    bench.cancel.value = True
    bench.probe.value = "Nested"
    assert bench.step.disabled
    finish(bench)


def test_the_probe_that_it_opens_with_is_the_one_that_the_menu_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "OPENS_WITH", ("Nested",))
    bench = Bench(Session(Path()))
    assert next(iter(bench.session.probes)) != "Nested"
    assert bench.probe.value == bench._read().name == bench.session.order.probe.name == "Nested"


def test_cancel_stops_and_says_so() -> None:
    bench = opened(Still())
    bench.probe.value = "Endless"
    until(lambda: bench.session.latest is not None and isinstance(bench.session.latest.probe, Endless))
    assert not bench.cancel.disabled
    bench.cancel.value = True
    finish(bench)
    assert "cancelled" in bench.progress.value
    assert bench.cancel.disabled
    assert 0 < bench.bar.value < 1


def test_a_failing_probe_shows_its_message_and_the_bench_goes_on() -> None:
    bench = opened(Still())
    bench.probe.value = "Broken"
    until(lambda: "wb-error" in bench.status.value)
    assert "&lt;b&gt;no&lt;/b&gt; such number &amp; no other" in bench.status.value
    assert "<b>" not in bench.status.value
    bench.probe.value = "Wave"
    finish(bench)
    assert bench.status.value == ""
    assert bench.bar.value == 1


def test_an_exception_in_a_callback_is_shown() -> None:
    bench = opened(Still())
    finish(bench)
    row = next(r for r in bench.form.children[0].children if "wb-set-offset" in r._dom_classes)
    row.children[0].value = float("inf")
    assert "Wave.offset must be finite; got inf" in bench.status.value


def test_quick_moves_end_with_the_last() -> None:
    bench = opened(Path())
    for step in Path.steps:
        bench.step.value = step
    bench.seed.value = 4
    finish(bench)
    assert bench.session.latest.provenance["seed"] == 4
    assert bench.session.job.state.done == 1


def test_export_writes_the_file_and_says_where(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bench = opened(Still())
    finish(bench)
    until(lambda: len(bench.venue.options) > 5)
    bench.venue.value = "neurips2024"
    assert tuple(bench.column.options) == ("full",)
    bench.file.value, bench.format.value = "wave", "svg"
    bench.export.value = True
    until(lambda: "Wrote wave.svg" in bench.status.value, 30)
    assert (tmp_path / "wave.svg").stat().st_size > 1000
    bench.file.value = str(tmp_path / "missing" / "wave")
    bench.export.value = True
    until(lambda: "wb-error" in bench.status.value, 30)


def test_more_room_means_more_panels_in_a_row() -> None:
    bench = opened(Still())
    finish(bench)
    bench.copy.room = 500
    until(lambda: bench.session.chore(lambda: True).result(10))
    assert bench.status.value == ""
    panel = bench.session.latest.figure().panels[0]
    several = Figure((panel, panel, panel))
    assert [grid(look.fitted(several, room))[1] for room in (300, 500, 700, 1000)] == [1, 1, 2, 3]


def test_explore_shows_the_bench_and_then_a_still_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []

    class Handle:
        def update(self, bundle: dict[str, Any], raw: bool) -> None:
            shown.append(bundle)

    def display(bundle: dict[str, Any], raw: bool, display_id: bool = False) -> Handle:
        shown.append(bundle)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("workbench.ui.still.REST", 0.05)
    bench = explore(Path())
    assert isinstance(bench, Bench)
    assert shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == bench.view.model_id
    assert shown[1].keys() >= {"image/png", "application/vnd.plotly.v1+json", "text/plain"}
    kept = shown[-1]["image/png"]
    bench.step.value = 1
    finish(bench)
    until(lambda: shown[-1]["image/png"] != kept, 20)


def test_many_moves_draw_no_more_often_than_ten_times_a_second() -> None:
    bench = opened(Still())
    drawn: list[float] = []
    update = bench.figure.update_from
    bench.session.job.ready = None  # else it is a page that draws which says when
    bench.figure.update_from = lambda figure: (drawn.append(time.monotonic()), update(figure))
    bench.probe.value = "Endless"
    until(lambda: len(drawn) > 20, 60)
    bench.cancel.value = True
    # Single gaps may be short on a loaded machine, where one picture starts late and the next in time.
    middle = drawn[1:-1]
    assert middle[-1] - middle[0] > 0.05 * (len(middle) - 1)


def test_a_setting_of_the_picture_changes_the_picture_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = opened(Still())
    finish(bench)
    monkeypatch.setattr(bench.session.job, "submit", lambda *_, **__: pytest.fail("it was measured again"))
    row = next(r for r in bench.form.children[0].children if "wb-set-style" in r._dom_classes)
    row.children[0].value = "points"
    assert bench.figure.data[0].mode == "markers"
    assert bench._read() == Wave(style="points")
