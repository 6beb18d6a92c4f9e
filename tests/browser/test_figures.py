"""Figures as a browser draws them: what Plotly makes of margins, legends and colour bars is seen nowhere else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from browser.lab import shoot
from pictures import landscape

from workbench.draw.screen import screen
from workbench.figure import Figure, beside

pytestmark = pytest.mark.browser
# Every box as [left, right, top, bottom] in pixels: maps, colour bars and their words, the legend, captions.
BOXES = """() => {
  const box = (found) => { const b = found.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]; };
  const all = (where) => Array.from(document.querySelectorAll(where), box);
  const gd = document.querySelector('.js-plotly-plot'), at = gd.getBoundingClientRect(), layout = gd._fullLayout;
  const map = ({ xaxis: x, yaxis: y }) => [at.left + x._offset, at.left + x._offset + x._length,
                                           at.top + y._offset, at.top + y._offset + y._length];
  return { maps: Object.values(layout._plots).map(map), bars: all('.infolayer .cbfills'),
           legends: all('.infolayer .legend'), names: all('.legendtext'),
           words: Array.from(document.querySelectorAll('.annotation-text'), (t) => [t.textContent, box(t)]) }; }"""


def comparison() -> Figure:
    """Three maps, each with a legend that is wider than a third of a page."""
    plane = landscape().panels[0]
    marks = [dataclasses.replace(plane.marks[-1], label=f"{name} of the model's surroundings") for name in "abc"]
    one = Figure((dataclasses.replace(plane, marks=(plane.marks[0], *marks)),), note="on 10 examples")
    return beside({f"seed {i}": one for i in range(3)})


@pytest.mark.parametrize("width", [660, 1100])
def test_colour_bars_and_words_stand_at_their_panels(page: Any, tmp_path: Path, width: int) -> None:
    screen(comparison()).write_html(tmp_path / "figure.html", include_plotlyjs=True)
    page.set_viewport_size({"width": width, "height": 700})
    page.goto((tmp_path / "figure.html").as_uri())
    page.wait_for_selector(".infolayer .cbfills")
    boxes = page.evaluate(BOXES)
    shoot(page, f"figure-comparison-{width}")
    words = dict(boxes["words"])
    titles = [words[f"seed {i}"] for i in range(3)]
    assert len(boxes["bars"]) == len(boxes["maps"]) == 3
    for bar, drawn, title in zip(sorted(boxes["bars"]), sorted(boxes["maps"]), titles, strict=True):
        middle = 0.5 * (drawn[0] + drawn[1])
        assert bar[0] < middle < bar[1], "the colour bar stands below its own map"
        assert bar[1] - bar[0] < width / 3
        assert bar[2] > drawn[3]
        assert title[3] < drawn[2]
        assert bar[0] - 10 < title[0] < bar[1]
    assert len(boxes["legends"]) == 1
    assert len(boxes["names"]) == 3, "each name once"
    legend = boxes["legends"][0]
    assert legend[1] <= width
    assert legend[3] <= min(title[2] for title in titles) + 2, "and above all captions"
