"""A person on a map of losses in JupyterLab: clicks on a point, probes there, comes back, zooms and returns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser.lab import PATIENCE, Lab, ask_kernel, open_notebook, run_all, shoot
from browser.test_lab import CODE, DONE, DRAWN, FIGURE, choose, finished

pytestmark = pytest.mark.browser
OPEN = """
import torch, workbench as wb
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()
data = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
subject = wb.Subject(net, data, loss="cross_entropy")
bench = wb.explore(subject)
"""
# Where the contour map lies in the page, and what its axes show: clicks are given in data coordinates.
MAP = f"""() => {{
  const gd = document.querySelector('{FIGURE}'), {{ xaxis: x, yaxis: y }} = gd._fullLayout;
  const box = gd.getBoundingClientRect();
  return {{ left: box.left + x._offset, top: box.top + y._offset, width: x._length, height: y._length,
            x: [...x.range], y: [...y.range], u: Array.from(gd.data.find((t) => t.type === 'contour').x) }}; }}"""
# While a picture is drawn from nothing there is no map for a moment.
SAFELY = f"() => {{ try {{ return ({MAP})(); }} catch {{ return null; }} }}"
PLACE = "() => document.querySelector('.wb-place-code').textContent"
SAID = "() => document.querySelector('.wb-place-words').textContent"


def at(page: Any, x: float, y: float) -> tuple[float, float]:
    """The pixel of the point (x, y) of the map."""
    page.locator(FIGURE).scroll_into_view_if_needed()
    m = page.evaluate(MAP)
    along = (x - m["x"][0]) / (m["x"][1] - m["x"][0]), (m["y"][1] - y) / (m["y"][1] - m["y"][0])
    return m["left"] + along[0] * m["width"], m["top"] + along[1] * m["height"]


@pytest.fixture(scope="module")
def page(browser: Any, lab: Lab) -> Iterator[Any]:
    """One notebook for all steps, with a finished map in view."""
    context = browser.new_context(viewport={"width": 1500, "height": 1500})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    open_notebook(page, lab, lab.write("places.ipynb", OPEN))
    run_all(page)
    page.wait_for_function(DRAWN)
    choose(page, "Plane")
    finished(page, "Plane")
    page.wait_for_function(f"() => document.querySelector('{FIGURE}').data.some((t) => t.type === 'contour')")
    yield page
    context.close()


def test_the_pointer_tells_coordinates_loss_and_error(page: Any) -> None:
    page.mouse.move(*at(page, 0.5, 0.25))
    page.wait_for_function(
        "() => /u: 0[.]5.*v: 0[.]25.*loss: .*±/.test(document.querySelector('.hoverlayer').textContent)"
    )
    shoot(page, "places-1-hover")


def test_a_click_shows_the_code_that_loads_the_model_there(page: Any) -> None:
    page.mouse.click(*at(page, -0.5, 0.5))
    page.wait_for_function(f"() => /u = -0[.]5, v = 0[.]5 · loss/.test(({SAID})())")
    page.wait_for_function(f"() => ({PLACE})().includes('subject_at(subject, -0.5, 0.5, seed=0)')")
    code = page.evaluate(PLACE)
    check = "k = bench.session.latest.data.sel(u=-0.5, v=0.5); print(abs(there.loss() - float(k.surface)) < 0.1)"
    assert "True" in ask_kernel(page, f"{code}\n{check}")
    page.wait_for_function(
        f"() => document.querySelector('{FIGURE}').data.some((t) => t.name === 'chosen' && t.x[0] === -0.5)"
    )
    shoot(page, "places-2-chosen")


def test_probe_here_runs_the_others_there_and_there_is_a_way_back(page: Any) -> None:
    page.locator(".wb-place-probe").click()
    finished(page, "Plane")
    page.wait_for_function(f"() => {CODE}.includes('run(there') && ({SAID})().includes('Probes look at the point')")
    choose(page, "HessianSpectrum")
    finished(page, "HessianSpectrum")
    page.wait_for_selector(".wb-summary td")
    spot = "there = wb.landscape.Plane().subject_at(subject, -0.5, 0.5, seed=0)"
    same = "bench.session.latest.provenance['fingerprint'] == there.fingerprint()"
    assert "True" in ask_kernel(page, f"{spot}\nprint({same})")
    shoot(page, "places-3-probed-there")
    page.locator(".wb-place-back").click()
    page.wait_for_function(f"() => !{CODE}.includes('there') && ({DONE})()")
    same = "bench.session.latest.provenance['fingerprint'] == subject.fingerprint()"
    page.wait_for_function("() => document.querySelector('.wb-place-words').textContent === ''")
    assert "True" in ask_kernel(page, f"print({same})")


def test_a_zoom_samples_the_visible_part_and_a_double_click_returns(page: Any) -> None:
    choose(page, "Plane")
    finished(page, "Plane")
    whole = page.evaluate(MAP)["u"]
    page.mouse.move(*at(page, 0.2, 0.2))
    page.mouse.down()
    page.mouse.move(*at(page, 0.5, 0.5), steps=4)
    page.mouse.move(*at(page, 0.7, 0.7), steps=4)
    page.mouse.up()
    page.wait_for_function(f"() => {CODE}.includes('centre_u=') && ({DONE})()")
    zoomed = "Math.abs(m.u[0] - 0.2) < 0.05 && m.u.at(-1) < 0.75 && Math.abs(m.x[0] - m.u[0]) < 1e-6"
    part = page.wait_for_function(f"() => {{ const m = ({SAFELY})(); return m && {zoomed} && m; }}").json_value()
    assert len(part["u"]) == len(whole)
    assert part["x"] == pytest.approx([part["u"][0], part["u"][-1]], abs=1e-6)
    shoot(page, "places-4-zoomed")
    page.mouse.dblclick(*at(page, 0.4, 0.4))
    page.wait_for_function(f"(whole) => ({SAFELY})()?.u.join() === whole.join()", arg=whole)
    page.wait_for_timeout(1000)
    back = page.evaluate(MAP)
    assert back["x"] == pytest.approx([whole[0], whole[-1]], abs=1e-6), json.dumps(back)
    assert "centre_u" not in page.evaluate(f"() => {CODE}")
    shoot(page, "places-5-whole")
