"""Both forms show what a schema says and give equal settings back."""

from __future__ import annotations

import dataclasses
from typing import Any

import param
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ui.toys import Nested, Wave

from workbench import schema
from workbench.ui import form

BUILDERS = {"ipywidgets": form.widgets, "panel": form.panel}
parts = st.lists(st.sampled_from(["real", "imaginary", "phase"]), unique=True).map(tuple)
waves = st.builds(
    Wave,
    points=st.integers(2, 400),
    frequency=st.floats(1e-3, 1e3),
    shift=st.floats(-1, 1),
    offset=st.floats(-1e6, 1e6),
    shape=st.sampled_from(["sine", "square"]),
    parts=parts,
    noisy=st.booleans(),
    limit=st.none() | st.integers(1, 50),
    layer=st.none() | st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1),
    style=st.sampled_from(["line", "points"]),
)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
class TestForm:
    @settings(max_examples=25)
    @given(wave=waves)
    def test_what_is_shown_is_what_is_read(self, build: Any, wave: Wave) -> None:
        _, read = build(Wave, wave)
        assert read() == wave

    @settings(max_examples=10)
    @given(inner=waves)
    def test_also_inside_a_nested_probe(self, build: Any, inner: Wave) -> None:
        _, read = build(Nested, Nested(probe=inner, points=5))
        assert read() == Nested(probe=inner, points=5)

    def test_without_settings_the_defaults_are_shown(self, build: Any) -> None:
        assert build(Wave)[1]() == Wave()


def control(shown: Any, name: str) -> Any:
    row = next(r for r in shown.children if f"wb-set-{name}" in r._dom_classes)
    first = row.children[0]
    return first.children[1] if "wb-log" in first._dom_classes else first


def test_a_change_by_hand_is_read_and_told() -> None:
    told: list[int] = []
    shown, read = form.widgets(Wave, on_change=lambda: told.append(1))
    for name, value in {
        "points": 30,
        "frequency": 0.5,
        "shape": "square",
        "noisy": True,
        "layer": "conv1",
        "limit": True,
    }.items():
        control(shown, name).value = value
    assert len(told) == 6
    want = Wave(points=30, frequency=0.5, shape="square", noisy=True, layer="conv1", limit=1)
    assert read() == want


def test_a_change_in_a_panel_form_is_told_on_release_where_it_is_slow() -> None:
    told: list[int] = []
    shown, read = form.panel(Wave, on_change=lambda: told.append(1))
    slow = next(r for r in shown if "wb-set-frequency" in r.css_classes)[0]
    slow.value = 10.0
    assert told == []
    with param.edit_constant(slow):  # as the page does when the handle is let go
        slow.value_throttled = 10.0
    assert told == [1]
    assert read().frequency == 10.0
    live = next(r for r in shown if "wb-set-points" in r.css_classes)[0]
    live.value = 9
    assert told == [1, 1]


def test_every_setting_is_explained_and_slow_ones_wait_for_release() -> None:
    shown, _ = form.widgets(Wave)
    assert len(shown.children) == len(schema.fields(Wave))
    for f, row in zip(schema.fields(Wave), shown.children, strict=True):
        assert f.doc in row.children[-1].value
    slider, box = next(r for r in shown.children if "wb-set-frequency" in r._dom_classes).children[0].children
    assert slider.continuous_update is False
    slider.value = 10**1.35
    assert box.value == 22.0
    box.value = 123.4
    assert slider.value == 123.4
    assert box.value == 123.4
    assert control(shown, "points").continuous_update is True
    assert "abrupt" in control(shown, "shape").tooltip
    control(shown, "shape").value = "square"
    row = next(r for r in shown.children if "wb-set-shape" in r._dom_classes)
    assert "abrupt" in row.children[-1].value
    assert "smooth" not in row.children[-1].value


def test_choosing_another_nested_probe_shows_its_form() -> None:
    told: list[int] = []
    shown, read = form.widgets(Nested, on_change=lambda: told.append(1))
    row = next(r for r in shown.children if "wb-set-probe" in r._dom_classes)
    chosen, box = row.children[:2]
    chosen.value = "Endless"
    assert type(read().probe).__name__ == "Endless"
    control(box.children[0], "pace").value = 0.5
    assert read().probe.pace == 0.5
    assert len(told) == 2


def test_what_does_not_fit_together_is_refused_in_the_words_of_the_schema() -> None:
    shown, read = form.widgets(Wave)
    control(shown, "offset").value = float("inf")
    with pytest.raises(ValueError, match=r"Wave\.offset must be finite; got inf"):
        read()


def test_a_ladder_has_round_rungs_and_the_values_asked_for() -> None:
    rungs = form.ladder(0.001, 1000.0, (0.123,))
    assert rungs[0] == 0.001
    assert rungs[-1] == 1000.0
    assert {0.01, 0.123, 1.0, 2.0, 5.0} <= set(rungs)
    assert rungs == sorted(set(rungs))
    assert dataclasses.replace(Wave(), frequency=rungs[7]).frequency == rungs[7]


def test_a_slider_that_its_page_moves_to_the_nearest_step_changes_nothing() -> None:
    """As soon as they are shown, pages do so; a person moves a slider by a step at least."""
    first = Wave(frequency=0.0123, shift=0.4451)
    box, read = form.widgets(Wave, first)
    rows = {name: row for row in box.children for name in row._dom_classes if name.startswith("wb-set-")}
    slider, shift = rows["wb-set-frequency"].children[0].children[0], rows["wb-set-shift"].children[0]
    slider.value, shift.value = 10**-1.9, 0.44
    assert read() == first
    slider.value, shift.value = 10**-1.85, 0.42000000000000004
    assert read() == Wave(frequency=0.014, shift=0.42)
