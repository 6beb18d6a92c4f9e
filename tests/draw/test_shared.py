"""The live figure: what travels to the page, counted on a comm that only listens."""

from __future__ import annotations

import dataclasses
import gzip
import json
from typing import ClassVar

import ipywidgets.widgets.widget as widgets
import numpy as np
import pytest
from comm.base_comm import BaseComm
from pictures import curves, field, landscape, spectrum
from plotly.basewidget import BaseFigureWidget

from workbench.draw import shared
from workbench.draw.screen import describe
from workbench.draw.shared import LiveFigure, bundle_path, carrier
from workbench.figure import Figure


class Listener(BaseComm):
    """Counts the bytes of every message and keeps its content."""

    messages: ClassVar[list] = []

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **keys):
        content = json.dumps(data or {}, default=str)
        Listener.messages.append((len(content) + sum(memoryview(b).nbytes for b in buffers or []), data or {}, buffers))


@pytest.fixture
def sent(monkeypatch):
    """Messages since the fixture began; figures made here talk to the listener."""
    monkeypatch.setattr(widgets.comm, "create_comm", lambda *a, **k: Listener(*a, **k))
    monkeypatch.setattr(shared, "_made", [])
    Listener.messages = []
    yield Listener.messages
    widgets.Widget.close_all()


def size(messages):
    return sum(m[0] for m in messages)


def scaled(figure: Figure, factor: float) -> Figure:
    """The same figure with other values in its first field, and another note."""
    panel = figure.panels[0]
    mark = panel.marks[0]
    changed = dataclasses.replace(panel, marks=(dataclasses.replace(mark, z=factor * mark.z), *panel.marks[1:]))
    return dataclasses.replace(figure, panels=(changed, *figure.panels[1:]), note=f"times {factor}")


def moved(figure: Figure, panel: int, mark: int, name: str) -> Figure:
    """The same figure with one mark's values of one axis a little larger."""
    panels, marks = list(figure.panels), list(figure.panels[panel].marks)
    marks[mark] = dataclasses.replace(marks[mark], **{name: 1.01 * np.asarray(getattr(marks[mark], name))})
    panels[panel] = dataclasses.replace(panels[panel], marks=tuple(marks))
    return dataclasses.replace(figure, panels=tuple(panels))


def test_four_figures_carry_plotlys_javascript_once(sent):
    for make in (landscape, spectrum, curves, landscape):
        LiveFigure(make())
    assert size(sent) < 2_500_000
    assert sum(m[0] > 1_000_000 for m in sent) == 1
    assert gzip.decompress(carrier().code) == bundle_path().read_bytes()


def test_an_update_sends_what_changed_in_binary_and_nothing_else(sent):
    figure = field(planted=True, points=51)
    live = LiveFigure(figure)
    sent.clear()
    live.update_from(field(planted=True, points=51))
    assert sent == []
    live.update_from(scaled(figure, 3.0))
    values = 51 * 55 * 4
    assert size(sent) < 2 * values + 20_000
    update = next(m for m in sent if m[1].get("state", {}).get("_py2js_update"))
    style, layout = (update[1]["state"]["_py2js_update"][k] for k in ("style_data", "layout_data"))
    assert set(style) <= {"z", "customdata", "text", "colorbar.tickvals", "colorbar.ticktext", "contours.end"}
    assert "template" not in json.dumps(layout)
    assert sum(memoryview(b).nbytes for b in update[2]) == 2 * values


def test_an_update_tells_every_trace_all_that_any_of_them_is_told(sent):
    """Where a message leaves a gap, the page's copy of that trace loses what it had."""
    before = spectrum()
    marks = [(i, k) for i, panel in enumerate(before.panels) for k, m in enumerate(panel.marks) if hasattr(m, "y")]
    after = moved(moved(before, *marks[0], "x"), *marks[-1], "y")
    live = LiveFigure(before)
    sent.clear()
    live.update_from(after)
    update = next(m[1]["state"]["_py2js_update"] for m in sent if m[1].get("state", {}).get("_py2js_update"))
    assert {"x", "y"} <= set(update["style_data"])
    assert len(update["style_traces"]) > 1
    assert "_undefined_" not in json.dumps(update["style_data"], default=str)


def test_an_update_shows_what_a_new_figure_would(sent):
    live = LiveFigure(landscape())
    for figure in (scaled(landscape(), 5.0), spectrum(), curves(), landscape()):
        live.update_from(figure)
        traces, layout = describe(figure)
        assert [t.type for t in live.data] == [t["type"] for t in traces]
        for shown, wanted in zip(live.data, traces, strict=True):
            for name in {"x", "y", "z", "customdata"} & set(wanted):
                a, b = (np.asarray(v, dtype=float) for v in (shown[name], wanted[name]))
                np.testing.assert_array_equal(a, b)
        assert [a.text for a in live.layout.annotations] == [a["text"] for a in layout["annotations"]]
        assert live.layout.height == layout["height"]


def test_a_page_that_reloads_gets_the_figure_as_it_is_now(sent):
    live = LiveFigure(field())
    live.update_from(scaled(field(), 7.0))
    state = live.get_state()
    assert "times 7.0" in json.dumps(state["_widget_layout"], default=str)
    rows = state["_widget_data"][0]["z"]
    now = np.array([np.frombuffer(r["buffer"], dtype=r["dtype"]) for r in rows])
    np.testing.assert_array_equal(now, np.asarray(live.data[0].z))


def test_another_picture_is_sent_whole_and_drawn_from_nothing(sent):
    live = LiveFigure(landscape())
    sent.clear()
    live.update_from(spectrum())
    states = [m[1]["state"] for m in sent]
    assert not any(name.startswith("_py2js") for state in states for name in state)
    whole = next(s for s in states if "_widget_data" in s)
    assert [t["type"] for t in whole["_widget_data"]] == [t["type"] for t in describe(spectrum())[0]]
    assert states.index(whole) < next(i for i, s in enumerate(states) if "_wb_redraw" in s)
    assert not live.acknowledged
    live.set_state({"_wb_drawn": live._last_trace_edit_id})
    sent.clear()
    live.update_from(spectrum())
    assert sent == []


def test_back_pressure_follows_the_pages_answers(sent):
    live = LiveFigure(field())
    assert live.acknowledged
    live.update_from(scaled(field(), 2.0))
    assert not live.acknowledged
    live.set_state({"_wb_drawn": live._last_trace_edit_id})
    assert live.acknowledged


def test_a_page_that_is_ready_is_told_the_figure_as_it_is_now(sent):
    live = LiveFigure(field())
    live.update_from(scaled(field(), 7.0))
    told = []
    live.send_state = lambda key=None: told.append({key} if isinstance(key, str) else set(key))
    live.set_state({"_wb_asked": 42})
    assert {"_widget_data", "_widget_layout"} <= told[0]
    assert {"_wb_answered"} in told[1:]
    assert live._wb_answered == 42


def test_a_carrier_that_was_closed_is_made_again(sent):
    LiveFigure(field())
    first = carrier()
    assert carrier() is first
    widgets.Widget.close_all()
    LiveFigure(field())
    assert carrier() is not first
    assert carrier().comm is not None


def test_without_the_expected_file_figures_bring_their_own_javascript(monkeypatch, tmp_path):
    other = tmp_path / "plotly"
    (other / "package_data").mkdir(parents=True)
    monkeypatch.setattr(shared.plotly, "__file__", str(other / "__init__.py"))
    assert bundle_path() is None
    (other / "package_data" / "widgetbundle.js").write_text("export { something as other };")
    assert bundle_path() is None
    assert not shared.shared()


def test_the_private_names_of_plotly_that_are_used_exist():
    """A release of Plotly that renames one of these must fail here and not in a notebook."""
    live = LiveFigure(field())
    for name in ("_data", "_layout_obj", "_trait_values", "_last_trace_edit_id", "_send_relayout_msg"):
        assert hasattr(live, name), name
    for trait in ("_widget_data", "_widget_layout", "_py2js_update", "_py2js_addTraces", "_py2js_restyle", "_config"):
        assert BaseFigureWidget.class_traits()[trait].metadata["sync"], trait
    script = bundle_path().read_text(encoding="utf-8")
    for name in (
        "as FigureView",
        "as default}",
        "do_relayout(",
        "initialize(",
        "_sendLayoutDelta(",
        "_sendTraceDeltas(",
        "touch(",
    ):
        assert name in script, name
