"""Screen and paper say the same: limits, levels, colours, ticks, words, and what is not known."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.contour import ContourSet
from pictures import PICTURES, field, holes, valley

from workbench.draw.paper import paper
from workbench.draw.paper_style import styled
from workbench.draw.screen import screen
from workbench.draw.sheet import sheet
from workbench.draw.venues import venue
from workbench.figure import Axis, Contour, Figure, Heat, Panel, Points, Surface


def printed(figure):
    """The paper's figure."""
    with styled(venue()):
        return paper(figure)


def plane_axes(page):
    return [a for a in page.axes if a.get_label() != "<colorbar>" and a.name != "3d"]


def bars(page):
    return [a for a in page.axes if a.get_label() == "<colorbar>"]


@pytest.mark.parametrize("name", PICTURES)
def test_axes_have_the_same_limits_and_words(name):
    figure = PICTURES[name]()
    layout, page = screen(figure).layout, printed(figure)
    flat = [n for n, p in enumerate(figure.panels, 1) if not p.solid]
    for n, axes in zip(flat, plane_axes(page), strict=True):
        found = sheet(figure.panels[n - 1])
        for side, r in (("x", found.x), ("y", found.y)):
            axis = layout[f"{side}axis{n if n > 1 else ''}"]
            np.testing.assert_allclose(axis.range, r.forward(getattr(axes, f"get_{side}lim")()), rtol=1e-9, atol=1e-9)
            words = getattr(axes, f"get_{side}label")()
            assert axis.title.text.replace("<br>", "\n") == words
            assert r.label in words


@pytest.mark.parametrize("count", [2, 3, 6])
def test_tasks_and_layers_are_named_one_by_one_with_nothing_between_them(count):
    tasks = np.arange(float(count))
    cells = Panel((Heat(tasks, tasks, np.eye(count)),), Axis("task"), Axis("task"), Axis("accuracy"))
    points = Panel((Points(tasks, np.linspace(0.1, 0.4, count)),), Axis("task"), Axis("forgetting"))
    figure = Figure((cells, points))
    layout, page = screen(figure).layout, printed(figure)
    first, second = plane_axes(page)
    for axis, ours in ((first.xaxis, layout.xaxis), (first.yaxis, layout.yaxis), (second.xaxis, layout.xaxis2)):
        low, high = sorted(axis.get_view_interval())
        for found in ([t for t in axis.get_majorticklocs() if low <= t <= high], list(ours.tickvals)):
            assert set(found) <= set(tasks)
            assert len(found) >= min(count, 3)
    assert layout.yaxis2.tickmode == "auto"


@pytest.mark.parametrize("name", ["landscape", "surface"])
def test_scenes_have_the_same_limits_and_words(name):
    figure = PICTURES[name]()
    layout = screen(figure).to_dict()["layout"]
    scene = next(v for k, v in layout.items() if k.startswith("scene"))
    below = [note["text"] for note in layout.get("annotations", ())]
    axes = next(a for a in printed(figure).axes if a.name == "3d")
    assert axes.get_zlabel() in [t.get_text() for t in axes.texts]
    for side in "xyz":
        np.testing.assert_allclose(scene[f"{side}axis"]["range"], getattr(axes, f"get_{side}lim")(), atol=1e-9)
        words = scene[f"{side}axis"]["title"]["text"].replace("<br>", " ")
        wanted = getattr(axes, f"get_{side}label")().replace("\n", " ")
        assert words == wanted or (side == "z" and not words and wanted in below), "on a scene, or at the colour bar"


@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
@pytest.mark.parametrize("levels", [None, (0.05, 0.1, 1.0, 4.0, 30.0)])
def test_contours_have_the_same_levels_and_colours(scale, levels):
    figure = field(Contour, scale, planted=False, levels=levels)
    cut = screen(figure).data[0]
    axes = plane_axes(printed(figure))[0]
    filled = next(c for c in axes.collections if isinstance(c, ContourSet) and c.filled)
    drawn = np.arange(cut.contours.start, cut.contours.end + 0.5, cut.contours.size)
    np.testing.assert_allclose(drawn, filled.levels[1:-1])
    half = cut.contours.size / 2
    np.testing.assert_allclose([cut.contours.start - half, cut.contours.end + half], filled.get_clim())
    np.testing.assert_allclose(
        np.asarray(cut.z, dtype=float), sheet(figure.panels[0]).colour_place(valley()[2]), rtol=1e-6
    )
    if levels is not None:
        values = sheet(figure.panels[0]).height.inverse(sheet(figure.panels[0]).levels)
        np.testing.assert_allclose(values, levels)


@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
def test_heat_maps_have_the_same_colour_limits_and_cells(scale):
    figure = field(Heat, scale)
    cells = screen(figure).data[0]
    mesh = next(c for c in plane_axes(printed(figure))[0].collections if isinstance(c, QuadMesh))
    np.testing.assert_allclose([cells.zmin, cells.zmax], mesh.get_clim())
    corners = np.asarray(mesh.get_coordinates())
    np.testing.assert_allclose(cells.x, corners[0, :, 0], atol=1e-6)
    np.testing.assert_allclose(cells.y, corners[:, 0, 1], atol=1e-6)
    theirs = np.ma.filled(mesh.get_array().astype(float), np.nan)
    np.testing.assert_allclose(np.asarray(cells.z, dtype=float), theirs, rtol=1e-6)


@pytest.mark.parametrize("kind", [Heat, Contour])
def test_colour_bars_print_the_same_numbers_at_the_same_places(kind):
    figure = field(kind, "symlog")
    bar = screen(figure).data[0].colorbar
    axes = bars(printed(figure))[0]
    np.testing.assert_allclose(bar.tickvals, axes.get_yticks())
    assert axes.get_ylabel() == bar.title.text.replace("<br>", "\n")
    assert "linear below" in axes.get_ylabel()
    assert len(bar.ticktext) == len(axes.get_yticklabels())


def test_signed_values_get_a_colour_scale_that_is_symmetric_about_zero():
    heat = screen(PICTURES["alignment"]()).data[0]
    assert heat.zmin == -heat.zmax
    colours = [c for _, c in heat.colorscale]
    assert colours[len(colours) // 2] == "#f7f7f7"


def area(polygons):
    return sum((p[:, 0].max() - p[:, 0].min()) * (p[:, 1].max() - p[:, 1].min()) for p in polygons)


def screen_hatch(figure):
    """The hatched rectangles on screen."""
    trace = next(t for t in screen(figure).data if t.type == "scatter" and t.fillpattern.shape)
    x, y = np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)
    pieces = np.split(np.stack([x, y], axis=1), np.flatnonzero(np.isnan(x)))
    return [p[~np.isnan(p[:, 0])] for p in pieces if p.size]


def paper_hatch(figure):
    """The hatched rectangles on paper."""
    axes = plane_axes(printed(figure))[0]
    found = next(c for c in axes.collections if isinstance(c, PolyCollection) and c.get_gid() == "unknown")
    assert found.get_hatch()
    return [path.vertices for path in found.get_paths()]


@pytest.mark.parametrize(
    ("kind", "scale", "cells"), [(Heat, "linear", 2), (Heat, "log", 3), (Contour, "log", 12), (Contour, "linear", 8)]
)
def test_cells_that_are_not_known_are_hatched_in_both(kind, scale, cells):
    figure = field(kind, scale)
    x, y, _ = valley()
    one = (x[1] - x[0]) * (y[1] - y[0])
    assert area(screen_hatch(figure)) == pytest.approx(cells * one, rel=1e-5)
    assert area(paper_hatch(figure)) == pytest.approx(cells * one, rel=1e-5)
    assert area(screen_hatch(field(kind, scale, planted=False))) == 0


@pytest.mark.parametrize("kind", [Heat, Contour, Surface])
def test_other_values_are_drawn_as_without_the_gaps(kind):
    x, y, z = valley()
    axis = Axis("loss", "log", limits=(0.01, 100.0))
    traces = [
        screen(Figure((Panel((kind(x, y, values),), Axis("u"), Axis("v"), axis),))).data[0] for values in (z, holes(z))
    ]
    whole, gappy = (np.asarray(t.z, dtype=float) for t in traces)
    gone = np.isnan(gappy)
    assert np.argwhere(gone).tolist() == [[2, 3], [7, 8], [11, 1]]
    np.testing.assert_array_equal(whole[~gone], gappy[~gone])


def test_the_pointer_is_told_why_a_value_is_not_known():
    traces = screen(field(Contour, "log")).data
    unknown = next(t for t in traces if t.text is not None)
    assert list(unknown.text) == ["nan", "inf", "-1 has no place on a log scale"]
    assert "not known" in unknown.hovertemplate


def test_a_surface_leaves_out_each_mesh_with_an_unknown_corner():
    axes = next(a for a in printed(field(Surface, "log")).axes if a.name == "3d")
    meshes = max((len(c._vec[0]) // 4 if hasattr(c, "_vec") else 0) for c in axes.collections)
    x, y, _ = valley()
    assert meshes <= (x.size - 1) * (y.size - 1)
    full = next(a for a in printed(field(Surface, "log", planted=False)).axes if a.name == "3d")
    assert len(axes.lines[-1].get_data_3d()[0]) == 3
    assert len(full.lines[-1].get_data_3d()[0]) == 0


def test_the_minimum_of_a_valley_is_where_it_was_put():
    """x runs along direction 1, and the steep direction is the second: nothing is transposed or shifted."""
    figure = field(Heat, "linear", planted=False)
    cells = screen(figure).data[0]
    z = np.asarray(cells.z)
    row, column = np.unravel_index(z.argmin(), z.shape)
    centre = lambda edges, i: 0.5 * (edges[i] + edges[i + 1])  # noqa: E731
    assert centre(cells.x, column) == pytest.approx(0, abs=1e-6)
    assert centre(cells.y, row) == pytest.approx(0, abs=1e-6)
    assert z[-1, column] > z[row, -1]
    np.testing.assert_array_equal(z, z[::-1, ::-1])
