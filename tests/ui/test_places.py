"""Points and parts of a map of losses: chosen, stood at, coded, zoomed into and left again, without a page."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ui.test_session import until
from ui.toys import Path

import workbench as wb
from workbench import catalog
from workbench.landscape.plane import Plane
from workbench.probes.spectrum import HessianSpectrum
from workbench.ui.app import Page
from workbench.ui.bench import Bench
from workbench.ui.places import Place, Rest, loosened, nearest, ranges_after, told
from workbench.ui.session import Session

GRID = Plane(points=5, extent=0.5, sampling="grid")


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog of one map and one probe for its points."""
    known = {"HessianSpectrum": HessianSpectrum, "Plane": Plane}
    monkeypatch.setattr(catalog, "probes", lambda looks_at=None: dict(known) if looks_at != "trajectory" else {})


def tiny() -> wb.Subject:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(12, 3, dtype=torch.float64), torch.randint(0, 2, (12,))
    return wb.Subject(net, data, loss="cross_entropy")


def mapped(settings: Plane = GRID, seed: int = 0) -> Session:
    """A session with a finished map in view."""
    session = Session(tiny(), store=False)
    session.limit(seed, None)
    session.settle(settings)
    session.submit()
    session.job.wait(20)
    return session


def measured(session: Session) -> Any:
    session.submit()
    session.job.wait(20)
    return session.latest


def run(code: str, session: Session) -> dict[str, Any]:
    """What lines of a bench make, given the subject that it stands on."""
    names: dict[str, Any] = {"subject": session.target}
    exec(code, names)
    return names


@pytest.mark.usefixtures("offered")
class TestAPoint:
    def test_a_click_chooses_the_nearest_grid_point_and_its_code_loads_the_model_there(self) -> None:
        session = mapped(seed=3)
        assert session.places.click(0.21, -0.55)
        place, data = session.places.chosen, session.latest.data
        assert (place.u, place.v, place.seed) == (0.25, -0.5, 3)
        loss = float(data.loss.sel(u=0.25, v=-0.5))
        there = run(session.places.code, session)["there"]
        assert there.loss() == pytest.approx(loss, rel=1e-10)
        assert f"loss {loss:.4g} ± {float(data.loss_error.sel(u=0.25, v=-0.5)):.2g}" in session.places.words
        assert not session.places.click(0.23, -0.6), "the same point again is nothing new"

    def test_probes_stand_there_until_they_are_called_back(self) -> None:
        session = mapped()
        session.places.choose(0.25, 0.5)
        assert session.places.go()
        assert not session.places.go()
        session.settle(HessianSpectrum(top=2))
        there, here = measured(session), session.target.fingerprint()
        assert there.provenance["fingerprint"] == GRID.subject_at(session.target, 0.25, 0.5).fingerprint() != here
        assert run(session.code(), session)["reading"].data.identical(there.data)
        assert any("u = 0.25, v = 0.5" in note for note in there.provenance["subject"]["notes"])
        assert session.places.back()
        assert "there" not in session.code()
        assert measured(session).provenance["fingerprint"] == here

    def test_a_map_around_a_point_has_points_of_its_own(self) -> None:
        session = mapped()
        session.places.choose(0.25, 0.5)
        session.places.go()
        data = measured(session).data
        assert session.places.chosen is None, "the point belonged to the other map"
        assert float(data.loss_here) == pytest.approx(GRID.subject_at(session.target, 0.25, 0.5).loss(), rel=1e-12)
        session.places.click(-0.5, 0.0)
        assert session.places.chosen.base == session.places.here
        there = run(session.places.code, session)["there"]
        assert there.loss() == pytest.approx(float(data.loss.sel(u=-0.5, v=0.0)), rel=1e-10)

    def test_a_point_of_other_directions_is_forgotten_and_of_another_part_kept(self) -> None:
        session = mapped()
        session.places.choose(0.25, 0.5)
        session.settle(dataclasses.replace(GRID, extent=1.0, points=3))
        measured(session)
        assert session.places.chosen is not None
        session.settle(dataclasses.replace(GRID, normalization="layer"))
        measured(session)
        assert session.places.chosen is None

    def test_what_is_no_map_has_no_points(self) -> None:
        session = mapped()
        session.settle(HessianSpectrum(top=2))
        measured(session)
        assert session.places.map is None
        assert not session.places.click(0.1, 0.1)
        assert not session.places.zoom((0.0, 0.1), (0.0, 0.1))


def test_another_checkpoint_is_looked_at_itself() -> None:
    session = Session(Path())
    session.stand(Place(GRID, 0.1, 0.2))
    session.move(50)
    assert session.order.place is not None
    session.move(20)
    assert session.order.place is None


@pytest.mark.usefixtures("offered")
class TestWhatIsKnown:
    def test_of_points_that_were_evaluated_interpolated_or_neither(self) -> None:
        reading = mapped(Plane(points=9, extent=0.5, most=40)).latest
        u, v = reading.data.u.values, reading.data.v.values
        between = np.argwhere(~reading.data.evaluated.values)[0]
        here = float(reading.data.loss_here)
        assert told(reading, 0.0, 0.0).startswith(f"loss {here:.4g} ±")
        assert "interpolated, to about ±" in told(reading, u[between[0]], v[between[1]])
        assert told(reading, 0.123, 0.0) == ""
        lost = dataclasses.replace(reading, data=reading.data.assign(loss_here=float("nan")))
        assert told(lost, 0.0, 0.0) == "loss NaN"
        unknown = dataclasses.replace(reading, data=reading.data.assign(surface=reading.data.surface * np.nan))
        assert told(unknown, u[between[0]], v[between[1]]) == "loss not known yet"

    def test_of_where_a_click_goes(self) -> None:
        reading = mapped(Plane(points=4, extent=0.6, sampling="grid")).latest
        assert nearest(reading, 0.0, 0.0) == (0.0, 0.0), "the model's own mark, which is no point of an even grid"
        assert nearest(reading, 0.1, -9.0) == pytest.approx((0.2, -0.6))


@pytest.mark.usefixtures("offered")
class TestAPart:
    def test_a_zoom_samples_what_is_visible_and_the_whole_comes_back(self) -> None:
        session = mapped()
        assert session.places.zoom((0.0, 0.25), (-0.25, 0.0))
        data = measured(session).data
        assert data.u.values[[0, -1]] == pytest.approx([0.0, 0.25], abs=1e-6)
        assert data.v.values[[0, -1]] == pytest.approx([-0.25, 0.0], abs=1e-6)
        assert data.u.size == 5
        assert session.places.zoom((0.05, 0.1), (-0.1, -0.05))
        measured(session)
        session.settle(dataclasses.replace(session.order.probe, view="contour"))
        assert session.places.zoomed, "how it is drawn does not matter"
        assert session.places.whole()
        assert session.order.probe == dataclasses.replace(GRID, view="contour")
        assert not session.places.zoomed
        assert not session.places.whole()

    def test_a_zoom_out_past_the_whole_is_the_whole_and_then_more(self) -> None:
        session = mapped()
        session.places.zoom((0.0, 0.25), (-0.25, 0.0))
        measured(session)
        assert session.places.zoom((-0.51, 0.6), (-0.7, 0.55))
        assert session.order.probe == GRID
        measured(session)
        assert session.places.zoom((-1.0, 1.0), (-1.0, 1.0))
        assert session.order.probe.extent == pytest.approx(1.0)

    def test_what_is_sampled_already_or_out_of_date_is_no_wish(self) -> None:
        session = mapped()
        assert not session.places.zoom((0.501, -0.4999), (-0.5, 0.5)), "axes may run backwards"
        assert not session.places.zoom((0.0, float("nan")), (-0.5, 0.5))
        session.settle(dataclasses.replace(GRID, extent=2.0))
        assert not session.places.zoom((0.0, 0.25), (-0.25, 0.0)), "the map in view is not that of these settings"

    def test_settings_changed_by_hand_are_a_whole_of_their_own(self) -> None:
        session = mapped()
        session.places.zoom((0.0, 0.25), (-0.25, 0.0))
        measured(session)
        session.settle(dataclasses.replace(session.order.probe, points=7))
        assert not session.places.zoomed


def test_only_the_last_of_several_wishes_is_done() -> None:
    done: list[int] = []
    rest = Rest(0.05)
    for k in range(4):
        rest(lambda k=k: done.append(k))
    until(lambda: done)
    rest(lambda: done.append(9))
    rest.give_up()
    time.sleep(0.15)
    assert done == [3]


@pytest.mark.usefixtures("offered")
class TestInTheBench:
    def bench(self) -> Bench:
        bench = Bench(Session(tiny(), store=False))
        bench.session.settle(GRID)
        bench.probe.value = "Plane"
        finish(bench)
        return bench

    def touch(self, bench: Bench, **what: Any) -> None:
        bench.figure._wb_touched = what | {"at": time.monotonic()}

    def test_click_probe_there_and_back(self) -> None:
        bench = self.bench()
        assert bench.place.go.disabled
        self.touch(bench, kind="click", x=0.26, y=-0.5)
        until(lambda: any(t.name == "chosen" and list(t.x) == [0.25] for t in bench.figure.data))
        assert "subject_at(subject, 0.25, -0.5, seed=0)" in bench.place.code.value
        assert bench.place.u.value == 0.25
        bench.place.v.value = 0.125
        assert "subject_at(subject, 0.25, 0.125, seed=0)" in bench.place.code.value
        bench.place.go.value = True
        finish(bench)
        bench.probe.value = "HessianSpectrum"
        finish(bench)
        assert "there = wb.landscape.Plane().subject_at(subject, 0.25, 0.125" in bench.code.value
        assert "Probes look at the point u = 0.25, v = 0.125" in bench.place.words.value
        assert bench.place.u.layout.display == "none"
        bench.place.back.value = True
        finish(bench)
        assert bench.place.view.layout.display == "none"
        assert bench.session.latest.provenance["fingerprint"] == bench.session.target.fingerprint()
        assert bench.status.value == ""

    def test_zoom_and_double_click(self) -> None:
        bench = self.bench()
        bench._rest = Rest(0.02)
        self.touch(bench, kind="zoom", x=[0.0, 0.3], y=[0.0, 0.3])
        self.touch(bench, kind="zoom", x=[0.0, 0.25], y=[0.0, 0.25])
        until(lambda: bench.session.latest.probe != GRID)
        finish(bench)
        ticks = bench.session.latest.data.u.values
        assert ticks[[0, -1]] == pytest.approx([0, 0.25], abs=1e-6)
        assert bench._read() == bench.session.order.probe, "the form shows the part's settings"
        assert list(bench.figure.layout.xaxis.range) == pytest.approx([0, 0.25], abs=1e-6)
        bench.figure.layout.xaxis.range = [0.1, 0.2]  # as the page reports it
        self.touch(bench, kind="reset")
        assert bench.session.order.probe == GRID
        finish(bench)
        assert list(bench.figure.layout.xaxis.range) == [-0.5, 0.5]

    def test_a_map_can_be_exported_for_paraview_and_a_spectrum_cannot(self, tmp_path: File) -> None:
        bench = self.bench()
        assert "vts" in bench.format.options
        bench.format.value, bench.file.value = "vts", str(tmp_path / "map")
        bench.export.value = True
        until(lambda: "Wrote" in bench.status.value, 20)
        assert (tmp_path / "map.vts").read_bytes().startswith(b"<?xml")
        bench.probe.value = "HessianSpectrum"
        assert "vts" not in bench.format.options
        finish(bench)


def test_what_the_axes_show_after_an_event_of_the_page() -> None:
    seen = {"xaxis.range": [-1, 1], "yaxis.range": [-2, 2], "xaxis2.range": [0, 5], "yaxis2.range": [3, 4]}
    box = {"xaxis.range[0]": 0.1, "xaxis.range[1]": 0.2, "yaxis.range[0]": 0.3, "yaxis.range[1]": 0.4}
    assert ranges_after(box, seen) == ((0.1, 0.2), (0.3, 0.4))
    assert ranges_after({"yaxis.range[0]": 0.3, "yaxis.range[1]": 0.4}, seen) == ((-1, 1), (0.3, 0.4))
    assert ranges_after({"xaxis2.range": [1, 2]}, seen) == ((1, 2), (3, 4))
    assert ranges_after({"xaxis.range[0]": "2026-01-01", "xaxis.range[1]": "2026-01-02"}, seen) is None
    assert ranges_after({"xaxis.range[0]": 0.1, "xaxis.range[1]": 0.2}, {}) is None
    for other in ({"width": 3, "height": 4}, {"autosize": True}, {"scene.camera": {}}, {"xaxis.autorange": True}, {}):
        assert ranges_after(other, seen) is None
    assert loosened({"xaxis.autorange": True, "yaxis2.autorange": True, "xaxis3.autorange": False, "width": 3}) == [
        "xaxis",
        "yaxis2",
    ]


@pytest.mark.usefixtures("offered")
def test_a_zoom_in_a_served_page_is_sampled_and_left_again() -> None:
    page = Page({"": lambda: Session(tiny(), store=False)})
    until(lambda: page.session is not None)
    page._rest, told_page = Rest(0.02), list[Any]()
    page.figure._send_update_msg = lambda *message: told_page.append(message[1])
    page.session.settle(GRID)
    page.probe.value = "Plane"
    finish(page)
    page.figure.viewport = {"xaxis.range": [-0.5, 0.5], "yaxis.range": [-0.5, 0.5]}
    assert not page.whole.visible
    along = {"yaxis.range[0]": -0.25, "yaxis.range[1]": 0.0}
    for high in (0.3, 0.25):  # steps of one zoom
        page.figure.relayout_data = along | {"xaxis.range[0]": 0.0, "xaxis.range[1]": high}
    until(lambda: page.session.latest is not None and page.session.latest.probe != GRID, 20)
    finish(page)
    data = page.session.latest.data
    assert data.u.values[[0, -1]] == pytest.approx([0, 0.25], abs=1e-6)
    assert data.v.values[[0, -1]] == pytest.approx([-0.25, 0], abs=1e-6)
    assert page._read() == page.session.order.probe, "the form shows the part's settings"
    assert page.whole.visible
    page.whole.clicks += 1
    finish(page)
    assert page.session.order.probe == GRID
    told_page.clear()  # Panel's own echo of what it took in
    page.figure.relayout_data = {"xaxis.autorange": True, "yaxis.autorange": True}
    page.figure.param.trigger("doubleclick_data")
    back = {"xaxis.range": [-0.5, 0.5], "yaxis.range": [-0.5, 0.5]}
    assert told_page == [back, back], "there is no part to leave, so the axes are put back"
    page.figure.relayout_data = {"width": 500, "height": 400}
    assert told_page == [back, back]
    assert page.status.object == ""


@pytest.mark.usefixtures("offered")
def test_a_double_click_in_a_served_page_takes_a_zoom_back_that_is_not_sampled_yet() -> None:
    page = Page({"": lambda: Session(tiny(), store=False)})
    until(lambda: page.session is not None)
    page._rest = Rest(0.2)
    page.session.settle(GRID)
    page.probe.value = "Plane"
    finish(page)
    asked = list[Any]()
    page.session.places.zoom = lambda *part: bool(asked.append(part))
    box = {"xaxis.range": [0.0, 0.25], "yaxis.range": [0.0, 0.25]}
    page.figure.relayout_data = box
    page.figure.param.trigger("doubleclick_data")
    page.figure.relayout_data = box | {"xaxis.range": [0.0, 0.2]}
    until(lambda: asked, 20)
    assert asked == [((0.0, 0.2), (0.0, 0.25))]


@pytest.mark.usefixtures("offered")
def test_a_served_page_stands_there_too() -> None:
    page = Page({"": lambda: Session(tiny(), store=False)})
    until(lambda: page.session is not None)
    page.session.settle(GRID)
    page.probe.value = "Plane"
    finish(page)
    assert "vts" in page.format.options
    page.figure.click_data = {"points": [{"x": 0.26, "y": -0.5, "curveNumber": 0}]}
    assert page.u.value == 0.25
    assert "subject_at(subject, 0.25, -0.5, seed=0)" in page.place_code.object
    assert any(t.name == "chosen" and list(t.x) == [0.25] for t in page.figure.object.data)
    page.go.clicks += 1
    page.probe.value = "HessianSpectrum"
    finish(page)
    there = GRID.subject_at(page.session.target, 0.25, -0.5).fingerprint()
    assert page.session.latest.provenance["fingerprint"] == there
    assert "Probes look at the point" in page.place_words.object
    page.back.clicks += 1
    finish(page)
    assert page.session.latest.provenance["fingerprint"] == page.session.target.fingerprint()
    assert not page.place.visible


def finish(bench: Any) -> None:
    until(lambda: bench.session.state.status in ("done", "failed", "cancelled"), 20)
    bench.session.chore(threading.Event).result(10)  # what was begun beside it has ended, too
