"""A person on a map of losses in the served page: clicks, probes there, zooms by a box, by a button and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser.lab import PATIENCE, shoot
from browser.test_app import FIGURES, Served, choose, said, served

pytestmark = pytest.mark.browser
__all__ = ["served"]
MAP = f"""() => {{
  const gd = ({FIGURES})().find((g) => (g.data ?? []).some((t) => t.type === 'contour'));
  if (!gd) return null;
  const {{ xaxis: x, yaxis: y }} = gd._fullLayout, box = gd.getBoundingClientRect();
  return {{ left: box.left + x._offset, top: box.top + y._offset, width: x._length, height: y._length,
            x: [...x.range], y: [...y.range], u: Array.from(gd.data.find((t) => t.type === 'contour').x) }}; }}"""


def at(page: Any, x: float, y: float) -> tuple[float, float]:
    """The pixel of the point (x, y) of the map."""
    m = page.evaluate(MAP)
    along = (x - m["x"][0]) / (m["x"][1] - m["x"][0]), (m["y"][1] - y) / (m["y"][1] - m["y"][0])
    return m["left"] + along[0] * m["width"], m["top"] + along[1] * m["height"]


def still(page: Any) -> None:
    """Wait until the measurement is over and the map has stopped changing: a picture that comes ends a drag."""
    said(page, ".wb-progress", "100%")
    page.evaluate("() => { window.wbSeen = null; }")
    page.wait_for_function(
        f"""() => {{ const now = JSON.stringify(({MAP})()), last = window.wbSeen;
          if (!last || last.now !== now) window.wbSeen = {{ now, since: performance.now() }};
          return now !== 'null' && last && last.now === now && performance.now() - last.since > 1500; }}"""
    )


def sampled_from(page: Any, low: float) -> None:
    """Wait until the map's samples begin at this u."""
    page.wait_for_function(f"() => {{ const m = ({MAP})(); return m && Math.abs(m.u[0] - {low}) < 0.05; }}")
    still(page)


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    page.mouse.move(*at(page, *start))
    page.mouse.down()
    for spot in (middle, end):
        page.mouse.move(*at(page, *spot), steps=4)
    page.mouse.up()


def is_whole(page: Any) -> bool:
    m = page.evaluate(MAP)
    return [*m["x"], *m["y"], m["u"][0], m["u"][-1]] == pytest.approx([-1, 1, -1, 1, -1, 1], abs=1e-6)


@pytest.fixture(scope="module")
def page(browser: Any, served: Served) -> Iterator[Any]:
    """One page for all steps, with a finished map in view."""
    context = browser.new_context(viewport={"width": 1500, "height": 1400})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(served.url)
    choose(page, "Plane")
    still(page)
    yield page
    context.close()


def test_a_click_chooses_a_point_and_probes_go_there_and_back(page: Any) -> None:
    page.mouse.click(*at(page, -0.5, 0.5))
    said(page, ".wb-place-words", "u = -0.5, v = 0.5")
    said(page, ".wb-place-code", "0.5, 0.5, seed=0)")
    page.locator(".wb-place-probe button:not([disabled])").click()
    said(page, ".wb-place-words", "Probes look at the point")
    said(page, ".wb-code-box", "run(there")
    still(page)
    shoot(page, "app-6-probed-there")
    page.locator(".wb-place-back button").click()
    said(page, ".wb-code-box", "Plane().run(trajectory.subject(")
    still(page)


def test_a_double_click_on_the_whole_map_leaves_it_whole(page: Any) -> None:
    for _ in range(2):  # the page's own way back is to the first picture that it drew, which was another one
        page.mouse.dblclick(*at(page, 0.4, 0.4))
        still(page)
        page.wait_for_function(f"() => ({MAP})().x.join() === '-1,1' && ({MAP})().y.join() === '-1,1'")
    assert is_whole(page)


def test_a_box_is_sampled_and_a_double_click_returns(page: Any) -> None:
    whole = page.evaluate(MAP)["u"]
    drag(page, (0.2, 0.2), (0.7, 0.7))
    said(page, ".wb-code-box", "centre_u=")
    sampled_from(page, 0.2)
    part = page.evaluate(MAP)
    assert len(part["u"]) == len(whole)
    assert part["u"][-1] == pytest.approx(0.7, abs=0.03)
    assert part["x"] == pytest.approx([part["u"][0], part["u"][-1]], abs=1e-6)
    shoot(page, "app-7-zoomed")
    page.mouse.dblclick(*at(page, 0.4, 0.4))
    sampled_from(page, -1)
    assert is_whole(page)
    said(page, ".wb-code-box", "Plane().run(")


def test_a_part_of_a_part_is_left_by_a_button(page: Any) -> None:
    assert not page.locator(".wb-place-whole button").is_visible()
    drag(page, (-0.6, -0.6), (0.4, 0.4))
    sampled_from(page, -0.6)
    drag(page, (-0.2, -0.2), (0.3, 0.3))
    sampled_from(page, -0.2)
    page.locator(".wb-place-whole button").click()
    sampled_from(page, -1)
    assert is_whole(page)
    shoot(page, "app-8-whole")
