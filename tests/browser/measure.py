"""What the bench costs in JupyterLab: ``python -m browser.measure`` from the folder of the tests prints it as JSON.

Bytes over the WebSocket for four figures, bytes for each move of the slider, milliseconds from key press to redrawn
figure, and the memory of kernel and page after a hundred updates. Times depend on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from browser.lab import FLAGS, Lab, ask_kernel, chromium, open_notebook, run_all
from browser.test_lab import CODE, DRAWN, FIGURE, choose, finished, first_cells

FOUR = """
from workbench.draw.shared import LiveFigure
from IPython.display import display
readings = [wb.probes.NeuralCollapse().run(trajectory.subject(s)).figure() for s in trajectory.steps[:4]]
for made in readings:
    display(LiveFigure(made))
"""
# A picture of another structure comes with new event listeners, so what is drawn is looked at rather than listened to.
MOVE = f"""(key) => new Promise((done) => {{
  const shown = () => document.querySelector('{FIGURE}').data.map(
    (t) => String(t.z?.[0] ?? t.y) + String(t.z?.at(-1) ?? t.x)).join();
  const text = () => document.querySelector('.wb-progress').textContent, began = performance.now();
  let before = shown(), first = 0, last = 0;
  const watch = setInterval(() => {{
    const now = shown();
    if (now !== before) {{
      before = now;
      requestAnimationFrame(() => {{ last = performance.now() - began; first ||= last; }});
    }} else if (last && /100%/.test(text()) && performance.now() - began - last > 150) {{
      clearInterval(watch);
      done([first, last]);
    }}
  }}, 4);
  const handle = document.querySelector('.wb-step [role=slider]');
  handle.dispatchEvent(new KeyboardEvent('keydown', {{ key, bubbles: true }}));
}})"""
MEMORY = "import psutil; print(psutil.Process().memory_info().rss)"


class Frames:
    """Bytes that went over the page's WebSockets."""

    def __init__(self, page: Any) -> None:
        self.received = self.sent = self.count = 0
        page.on("websocket", self._listen)

    def _listen(self, socket: Any) -> None:
        socket.on("framereceived", lambda payload: self._add(payload, "received"))
        socket.on("framesent", lambda payload: self._add(payload, "sent"))

    def _add(self, payload: Any, way: str) -> None:
        setattr(self, way, getattr(self, way) + len(payload))
        self.count += 1

    def since(self, before: tuple[int, int, int]) -> dict[str, int]:
        now = self.now()
        return {k: b - a for k, a, b in zip(("received", "sent", "frames"), before, now, strict=True)}

    def now(self) -> tuple[int, int, int]:
        return self.received, self.sent, self.count


def moves(page: Any, frames: Frames, keys: list[str]) -> dict[str, Any]:
    """Median time and bytes of one move each."""
    firsts, lasts, moved = [], [], []
    for key in keys:
        before = frames.now()
        first, last = page.evaluate(MOVE, key)
        firsts.append(first)
        lasts.append(last)
        page.wait_for_timeout(100)
        moved.append(frames.since(before))
    return {
        "moves": len(keys),
        "ms to the first picture": round(statistics.median(firsts)),
        "ms to the last picture": round(statistics.median(lasts)),
        "worst": round(max(lasts)),
        **{f"bytes {k}": round(statistics.median(m[k] for m in moved)) for k in ("received", "sent")},
        "frames": round(statistics.median(m["frames"] for m in moved)),
    }


def heap(page: Any) -> int:
    page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
    return page.evaluate("() => performance.memory.usedJSHeapSize")


def measure(page: Any, lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = {}
    frames = Frames(page)
    open_notebook(page, lab, lab.write("bench.ipynb", *first_cells()))
    run_all(page)
    page.wait_for_function(DRAWN)
    finished(page, "NeuralCollapse")
    for name in ("NeuralCollapse", "HessianSpectrum"):
        choose(page, name)
        finished(page, name)
        page.wait_for_timeout(1500)
        found[f"{name}, new"] = moves(page, frames, ["ArrowLeft"] * 8)
        found[f"{name}, seen before"] = moves(page, frames, ["ArrowRight"] * 8)
    choose(page, "Plane")
    finished(page, "Plane")
    page.locator(".wb-step [role=slider]").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"() => !{CODE}.includes('subject(400)')")
    finished(page, "Plane")
    page.wait_for_timeout(1500)
    found["Plane 25 x 25 with surface, seen before"] = moves(page, frames, ["ArrowRight", "ArrowLeft"] * 4)
    choose(page, "NeuralCollapse")
    finished(page, "NeuralCollapse")
    ask_kernel(page, "trajectory.subject(0)")
    before = int(ask_kernel(page, MEMORY)), heap(page)
    moves(page, frames, ["ArrowLeft", "ArrowRight"] * 50)
    after = int(ask_kernel(page, MEMORY)), heap(page)
    found["memory, MB"] = {
        "kernel before": before[0] // 10**6,
        "kernel after 100 updates": after[0] // 10**6,
        "page before": before[1] // 10**6,
        "page after 100 updates": after[1] // 10**6,
    }
    return found


def four_figures(page: Any, lab: Lab) -> dict[str, Any]:
    frames = Frames(page)
    cells = first_cells()[:-1]
    opened = 'trajectory = wb.Trajectory.open("runs/tour")'
    open_notebook(page, lab, lab.write("four.ipynb", *cells, opened + FOUR))
    before = frames.now()
    run_all(page)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.js-plotly-plot')].filter((g) => g.data?.length).length === 4"
    )
    page.wait_for_timeout(1000)
    return frames.since(before)


def main() -> None:
    from playwright.sync_api import sync_playwright

    lab = Lab(Path(tempfile.mkdtemp()))
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
            found = {}
            for name, work in (("four figures, bytes", four_figures), ("bench", measure)):
                page = browser.new_page(viewport={"width": 1500, "height": 1300})
                page.set_default_timeout(120_000)
                found[name] = work(page, lab)
                page.close()
                lab.shut_kernels()
            browser.close()
        print(json.dumps(found, indent=2))
    finally:
        lab.stop()


if __name__ == "__main__":
    main()
