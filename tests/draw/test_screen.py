"""What is sent to Plotly: fixed structure, small arrays, words as they stand, and no change of its defaults."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import plotly.io as pio
import pytest
from pictures import PICTURES, field, spectrum

from workbench.draw.screen import describe, screen
from workbench.draw.style import LOOKS, look
from workbench.figure import Axis, Bars, Contour, Figure, Heat, Line, Panel, Points, Surface, beside


def arrays(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from arrays(v)


@pytest.mark.parametrize("name", PICTURES)
def test_arrays_are_float32_and_the_rest_is_json(name):
    traces, layout = describe(PICTURES[name]())
    assert {a.dtype for t in traces for a in arrays(t)} == {np.dtype("float32")}
    json.dumps(layout, allow_nan=False)
    made = screen(PICTURES[name]())
    assert json.loads(made.to_json())["layout"]["uirevision"] == "workbench"


@pytest.mark.parametrize("kind", [Heat, Contour, Surface])
def test_structure_does_not_depend_on_what_is_known(kind):
    some, full = describe(field(kind, "log"))[0], describe(field(kind, "log", planted=False))[0]
    x, y, z = np.arange(3.0), np.arange(4.0), np.full((4, 3), np.nan)
    none = describe(Figure((Panel((kind(x, y, z),), Axis("u"), Axis("v"), Axis("loss", "log")),)))[0]
    for traces in (full, none):
        assert [(t["type"], sorted(t)) for t in traces] == [(t["type"], sorted(t)) for t in some]


def test_plotlys_defaults_and_templates_are_as_before():
    before = pio.templates.default, sorted(pio.templates), pio.renderers.default
    screen(spectrum())
    assert (pio.templates.default, sorted(pio.templates), pio.renderers.default) == before


def test_words_are_shown_as_they_stand():
    made = screen(spectrum())
    assert made.layout.title.text == "Hessian &lt;spectrum&gt;"
    assert [t.name for t in made.data if t.name] == ["95 % interval", "bulk", "atoms", "not converged"]
    assert {a.text for a in made.layout.annotations} == {"Spectrum", "on 512 of 1797 examples"}
    assert [s.label.text for s in made.layout.shapes] == ["zero"]


def test_the_camera_outlives_updates():
    scene = screen(field(Surface)).layout.scene
    assert scene.uirevision == "camera"


def test_true_values_are_under_the_pointer_on_a_symlog():
    made = screen(spectrum())
    heads = made.data[3]
    assert [row[0] for row in heads.customdata] == [900.0, 300.0, 80.0]
    np.testing.assert_allclose(heads.x, np.log10(np.array([900, 300, 80]) / 1e-3) + 10 / 9, rtol=1e-6)


def test_an_open_interval_ends_at_the_axis_of_a_logarithm():
    """The density's interval reaches below zero in the tails: it is cut at the axis, and not left out or shifted."""
    made = screen(spectrum())
    band, floor = made.data[0], 10 ** made.layout.yaxis.range[0]
    y = np.asarray(band.y, dtype=float)
    assert np.nanmin(y) == pytest.approx(floor, rel=1e-5)


def test_error_bars_that_are_not_known_are_not_drawn():
    bars = Bars([0.0, 1.0], [1.0, 2.0], [0.1, np.nan])
    made = screen(Figure((Panel((bars,), Axis("x"), Axis("y")),)))
    assert np.isnan(np.asarray(made.data[0].error_y.array)).tolist() == [False, True]
    assert made.layout.yaxis.range[0] == 0


def test_roles_differ_without_colour():
    assert len({(v.dash, v.marker, v.hollow, v.alpha) for v in LOOKS.values()}) == len(LOOKS)
    with pytest.raises(ValueError, match="'main'"):
        look("blue")
    assert screen(spectrum()).data[4].marker.symbol.endswith("-open")


def test_a_mark_that_has_no_place_in_a_scene_is_refused():
    solid = field(Surface).panels[0]
    bad = Panel((*solid.marks, Bars([0.0], [1.0])), solid.x, solid.y, solid.z)
    with pytest.raises(ValueError, match="Bars"):
        screen(Figure((bad,)))


@pytest.mark.parametrize("mark", [Line([], []), Points([], []), Bars([], [])])
def test_empty_marks_can_be_drawn(mark):
    assert screen(Figure((Panel((mark,), Axis("x"), Axis("y")),))).data


def test_a_colour_bar_takes_no_width_from_panels_side_by_side():
    together, alone = screen(PICTURES["landscape"]()), screen(field())
    bar, axis = together.data[0].colorbar, together.layout.xaxis
    height = together.layout.height - together.layout.margin.t - together.layout.margin.b
    assert bar.orientation == "h"
    assert (bar.x, bar.len) == (pytest.approx(np.mean(axis.domain)), pytest.approx(np.ptp(axis.domain)))
    assert (together.layout.yaxis.domain[0] - bar.y) * height > 50, "the axis has its numbers and label between"
    assert together.layout.margin.b + bar.y * height > 40, "and its own stand on the page"
    assert alone.data[0].colorbar.orientation != "h"
    assert alone.data[0].colorbar.x > alone.layout.xaxis.domain[1]


def test_small_print_is_broken_between_its_parts():
    parts = [f"part {i} " + "x" * (7 * i + 1) for i in range(9)]
    one, many = (Figure(spectrum().panels, note=" · ".join(p)) for p in (parts[:1], parts))
    text = screen(many).layout.annotations[-1].text
    lines = text.split("<br>")
    assert " · ".join(lines) == " · ".join(parts)
    assert 1 < len(lines) < len(parts)
    assert max(map(len, lines)) <= 100
    grown = screen(many).layout, screen(one).layout
    assert grown[0].height - grown[1].height == grown[0].margin.b - grown[1].margin.b == 18 * (len(lines) - 1)


def test_legends_that_fit_stay_with_their_panels():
    figure = PICTURES["curves"]()
    named = [t for t in screen(beside({"a": figure, "b": spectrum()})).data if t.name]
    assert len({t.legend for t in named}) == 1, "four panels with long names share a legend"
    both = dataclasses.replace(figure, panels=(figure.panels[0], figure.panels[0]))
    assert {t.legend for t in screen(both).data if t.name} == {"legend", "legend2"}
    assert all(t.showlegend for t in screen(both).data if t.name)


def test_a_legend_of_the_last_panel_alone_stands_above_all_where_the_page_would_end():
    left = PICTURES["curves"]().panels[0]
    plain = dataclasses.replace(left, marks=tuple(Line(m.x, m.y) for m in left.marks if isinstance(m, Line)))
    looks = ("main", "second", "third")
    long = [Line([1.0, 2.0], [1.0, 2.0], label=f"a long name, number {i}", role=r) for i, r in enumerate(looks)]
    crowded = dataclasses.replace(left, marks=tuple(long))
    last, first = (screen(Figure(panels)) for panels in ((plain, crowded), (crowded, plain)))
    assert {t.legend for t in last.data if t.name} == {"legend"}
    assert last.layout.legend.yref == "container"
    assert first.layout.legend.yref != "container", "there it has the width of the page"


def test_what_looks_alike_in_two_panels_is_told_apart_by_their_words():
    left = PICTURES["curves"]().panels[0]
    one, two = (
        dataclasses.replace(
            left, marks=(Line([1.0, 2.0], [1.0, 2.0], label=f"{name} of the long named kind"),), title=t
        )
        for name, t in (("weights", "sizes"), ("gradients", ""))
    )
    drawn = screen(Figure((one, two, two)))
    shown = [t for t in drawn.data if t.showlegend]
    assert [t.legendgrouptitle.text for t in shown] == ["sizes", "loss", "loss"]
    assert len({t.legendgroup for t in shown}) == 3
    assert {t.legend for t in shown} == {"legend"}
    same = screen(Figure((one, one, one)))
    assert [t.showlegend for t in same.data if t.name] == [True, False, False]
    assert drawn.layout.margin.t > same.layout.margin.t, "it takes a line more"
    clicks = drawn.layout.legend.groupclick, same.layout.legend.groupclick
    assert clicks == ("toggleitem", "togglegroup"), "a name that stands once is that of all panels"
