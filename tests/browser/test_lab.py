"""A person at the bench in JupyterLab: opens the tour, chooses, slides, cancels, exports, reloads, reopens.

The steps follow one another in one notebook, as a person's do; each test is one step. They run in the order written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser.lab import PATIENCE, ROOT, WITHOUT_KERNEL, Lab, ask_kernel, open_notebook, run_all, save, shoot

pytestmark = pytest.mark.browser
TOUR = ROOT / "notebooks" / "00_tour.ipynb"
FIGURE = ".wb-figure.js-plotly-plot"
DRAWN = f"() => !!document.querySelector('{FIGURE}')?.data?.length"
HEIGHTS = f"() => document.querySelector('{FIGURE}').data.map(t => Array.from(t.z ?? t.y ?? []).flat().join())"
CHANGED = f"(before) => ({HEIGHTS})().join() !== before.join()"
DONE = "() => /100%/.test(document.querySelector('.wb-progress').textContent)"
CODE = "document.querySelector('.wb-code-box').textContent"
# A cell that runs until the test opens the gate, and what is known of it. The kernel's status would not do: messages
# that a subshell handles meanwhile set it to idle.
RUN_UNTIL = """(gate) => { const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const code = `import os, time
print("running")
while not os.path.exists(${JSON.stringify(gate)}):
    time.sleep(0.05)`;
  const future = kernel.requestExecute({ code, store_history: false });
  window.cell = "asked";
  future.onIOPub = (m) => { if (m.header.msg_type === "stream") window.cell = "running"; };
  future.done.then(() => { window.cell = "done"; }); }"""


@pytest.fixture(scope="module")
def page(browser: Any, lab: Lab) -> Iterator[Any]:
    """One page for all steps, with the tour's first cells run: training, then the bench."""
    name = lab.write("tour.ipynb", *first_cells())
    context = browser.new_context(viewport={"width": 1500, "height": 1300})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    open_notebook(page, lab, name)
    run_all(page)
    page.wait_for_function(DRAWN)
    yield page
    context.close()


def first_cells() -> list[str]:
    """The tour's code up to and with the cell that opens the bench."""
    cells = ["".join(c["source"]) for c in json.loads(TOUR.read_text())["cells"] if c["cell_type"] == "code"]
    last = next(i for i, text in enumerate(cells) if "wb.explore(" in text)
    return cells[: last + 1]


def choose(page: Any, probe: str) -> None:
    page.locator(".wb-probe select").select_option(label=probe)


def finished(page: Any, probe: str) -> None:
    page.wait_for_function(f"() => {CODE}.includes('{probe}(') && ({DONE})()")
    page.wait_for_function(DRAWN)


def test_the_tour_opens_a_bench_with_a_figure(page: Any) -> None:
    page.wait_for_function(DONE)
    assert page.locator(".wb-bench").count() == 1
    page.wait_for_function("() => document.querySelectorAll('.wb-summary td').length > 3")
    page.wait_for_function(DRAWN)
    traces = page.evaluate(
        "() => document.querySelector('.js-plotly-plot').data.map((t) => [t.x?.length, t.y?.length])"
    )
    assert all(x == y for x, y in traces), "what streamed in while it was drawn has left nothing out"
    assert not page.locator(".legendtext", has_text=re.compile(r"^trace \d")).count()
    shoot(page, "lab-1-open")


def test_a_slider_moved_by_keyboard_gives_a_new_figure(page: Any) -> None:
    choose(page, "HessianSpectrum")
    finished(page, "HessianSpectrum")
    before = page.evaluate(HEIGHTS)
    shoot(page, "lab-2-spectrum")
    handle = page.locator(".wb-step [role=slider]")
    assert handle.get_attribute("aria-label") == "checkpoint"
    handle.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(CHANGED, arg=before)
    finished(page, "HessianSpectrum")
    page.wait_for_function("() => document.querySelector('.wb-summary-box').textContent.includes('±')")
    shoot(page, "lab-3-moved")


def test_what_was_seen_before_comes_from_the_store(page: Any) -> None:
    page.locator(".wb-step [role=slider]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.wb-progress').textContent.includes('from the store')")


def test_a_second_opinion_comes_in_the_background(page: Any) -> None:
    choose(page, "HessianSpectrum")
    finished(page, "HessianSpectrum")
    page.wait_for_function("() => !document.querySelector('.wb-ask').disabled")
    page.locator(".wb-ask").click()
    page.locator(".wb-explain").click()  # the bench answers meanwhile
    page.wait_for_selector(".wb-explained .wb-doc")
    page.locator(".wb-explain").click()
    page.wait_for_function("() => document.querySelectorAll('.wb-opinion td').length > 5")
    assert "PyHessian" in page.locator(".wb-opinion-box").text_content()
    assert page.locator(".wb-status .wb-error").count() == 0
    page.wait_for_function("() => !document.querySelector('.wb-ask').disabled")
    shoot(page, "lab-11-second-opinion")
    choose(page, "NeuralCollapse")
    finished(page, "NeuralCollapse")
    page.wait_for_function("() => document.querySelector('.wb-ask').disabled")
    page.wait_for_function("() => !document.querySelector('.wb-opinion')")  # it was about another reading


def test_a_failing_setting_is_said_in_the_bench(page: Any) -> None:
    choose(page, "Plane")
    page.locator(".wb-set-directions select").select_option(label="pca")
    page.locator(".wb-set-directions select").select_option(label="random")
    choose(page, "NeuralCollapse")
    finished(page, "NeuralCollapse")
    box = page.locator(".wb-set-layer input")
    box.fill("no such layer <b>")
    box.press("Enter")
    page.wait_for_selector(".wb-status .wb-error")
    assert "no such layer <b>" in page.locator(".wb-status").text_content()
    shoot(page, "lab-4-error")
    box.fill("")
    box.press("Enter")
    page.wait_for_function("() => !document.querySelector('.wb-status .wb-error')")
    finished(page, "NeuralCollapse")


def test_a_running_landscape_streams_and_is_cancelled_while_a_cell_runs(page: Any, lab: Lab) -> None:
    choose(page, "Plane")
    page.locator(".wb-set-sampling select").select_option(label="grid")
    readout = page.locator(".wb-set-points .widget-readout")
    readout.fill("201")
    readout.press("Enter")
    page.wait_for_function(f"() => {CODE}.includes('points=201')")
    page.wait_for_function("() => /[1-9]% · .* left/.test(document.querySelector('.wb-progress').textContent)")
    page.wait_for_function(f"() => document.querySelector('{FIGURE}').data.some(t => t.type === 'contour')")
    gate = lab.root / "open"
    page.evaluate(RUN_UNTIL, str(gate))
    page.wait_for_function("() => window.cell === 'running'")
    shoot(page, "lab-5-streaming")
    page.locator(".wb-cancel").click()
    page.wait_for_function("() => document.querySelector('.wb-progress').textContent.includes('cancelled')")
    assert page.evaluate("() => window.cell") == "running"
    gate.touch()
    page.wait_for_function("() => window.cell === 'done'")
    page.wait_for_function("() => document.querySelector('.wb-cancel').disabled")
    shoot(page, "lab-6-cancelled")


def test_export_writes_a_pdf(page: Any, lab: Lab) -> None:
    choose(page, "NeuralCollapse")
    finished(page, "NeuralCollapse")
    page.wait_for_function("() => document.querySelectorAll('.wb-venue option').length > 5")
    page.locator(".wb-venue select").select_option(label="icml2024")
    box = page.locator(".wb-file input")
    box.fill("fig3")
    box.press("Enter")
    page.locator(".wb-export").click()
    page.wait_for_function("() => document.querySelector('.wb-status').textContent.includes('Wrote fig3.pdf')")
    assert (lab.root / "fig3.pdf").read_bytes().startswith(b"%PDF")
    shoot(page, "lab-7-exported")


def test_copy_as_code_runs_in_the_kernel(page: Any) -> None:
    code = page.evaluate(CODE)
    assert "error" not in ask_kernel(page, code + "\nprint(reading.probe == bench.session.latest.probe)").lower()
    assert "True" in ask_kernel(page, "print(reading.data.identical(bench.session.latest.data))")
    page.locator(".wb-copy-button").click()
    page.wait_for_function("() => document.querySelector('.wb-copy-button').textContent === 'Copied'")


def test_after_a_reload_the_figure_is_the_present_one(page: Any, lab: Lab) -> None:
    page.locator(".wb-step [role=slider]").focus()
    before = page.evaluate(HEIGHTS)
    page.keyboard.press("Home")
    page.wait_for_function(f"() => {CODE}.includes('subject(0)') && ({DONE})()")
    page.wait_for_function(CHANGED, arg=before)
    before = at_rest(page)
    wait_for_still(page)
    save(page)
    page.reload()
    page.wait_for_function(DRAWN)
    page.wait_for_function(f"(before) => !({CHANGED})(before)", arg=before)
    page.locator(".wb-step [role=slider]").focus()
    page.keyboard.press("End")
    page.wait_for_function(CHANGED, arg=before)
    shoot(page, "lab-8-reloaded")


def at_rest(page: Any) -> list[str]:
    """What the figure shows once it has stopped to change."""
    seen, now = [], page.evaluate(HEIGHTS)
    while now != seen:
        page.wait_for_timeout(500)
        seen, now = now, page.evaluate(HEIGHTS)
    return now


def wait_for_still(page: Any) -> None:
    """Until the picture below the bench is that of the newest reading."""
    page.wait_for_function(
        """() => { const outputs = window.jupyterapp.shell.currentWidget.content.widgets.flatMap(
             (c) => c.outputArea ? c.outputArea.model.toJSON() : []);
           const named = (data) => String(data["text/plain"]).startsWith("NeuralCollapse");
           return outputs.some((o) => o.data?.["image/png"] && named(o.data)); }"""
    )


def test_without_a_kernel_the_pictures_are_there(browser: Any, page: Any, lab: Lab) -> None:
    outputs = [o for c in lab.read("tour.ipynb")["cells"] for o in c.get("outputs", []) if "data" in o]
    kept = [o["data"] for o in outputs if "image/png" in o["data"]]
    assert len(kept) == 1
    assert "application/vnd.plotly.v1+json" in kept[0]
    page.close()
    lab.shut_kernels()
    context = browser.new_context(viewport={"width": 1500, "height": 1300})
    fresh = context.new_page()
    fresh.set_default_timeout(PATIENCE)
    fresh.goto(lab.url("tour.ipynb"))
    fresh.wait_for_function(WITHOUT_KERNEL)
    picture = fresh.locator(".jp-OutputArea-output.jp-RenderedPlotly")
    picture.locator("img").wait_for()
    assert picture.locator("img").bounding_box()["width"] > 300
    assert fresh.locator(".wb-bench").count() == 0
    picture.hover()
    picture.locator(".main-svg").first.wait_for()
    shoot(fresh, "lab-9-without-kernel")
    context.close()


def test_in_the_dark_theme_it_can_be_read(browser: Any, lab: Lab) -> None:
    """Nothing is white there; the screenshot is for people."""
    context = browser.new_context(viewport={"width": 1500, "height": 1300})
    page = context.new_page()
    open_notebook(page, lab, "tour.ipynb")
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
    run_all(page)
    page.wait_for_function(DRAWN)
    choose(page, "HessianSpectrum")
    finished(page, "HessianSpectrum")
    colours = page.evaluate(
        """() => ['.wb-card', '.wb-code', '.wb-figure .main-svg'].map(
             (s) => getComputedStyle(document.querySelector(s)).backgroundColor)"""
    )
    assert not any(c in ("rgb(255, 255, 255)", "white") for c in colours), colours
    page.locator(".wb-explain").click()
    page.wait_for_selector(".wb-explained .wb-doc")
    shoot(page, "lab-10-dark")
    context.close()
