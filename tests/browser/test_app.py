"""A person at the same bench as a served page: opens it, chooses, slides, cancels, exports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.lab import PATIENCE, environment, free_port, shoot, wait_for_http

pytestmark = pytest.mark.browser
RECORD = """
import sys
import workbench as wb
from workbench.zoo.digits import digits
from workbench.zoo.nets import conv
from workbench.zoo.training import train
data = digits()
for seed in (0, 1):
    recipe = {"channels": [4, 8], "seed": seed}
    model = conv(**recipe)
    with wb.Recorder(f"{sys.argv[1]}/seed{seed}", model, every=wb.log_spaced(3), data=data.test, loss="cross_entropy",
                     build="workbench.zoo.nets:conv", build_args=recipe) as record:
        train(model, data.train, steps=100, lr=0.05, recorder=record)
"""
SERVE = """
import sys
from workbench.ui.app import serve
serve(sys.argv[1], port=int(sys.argv[2]), open_browser=False)
"""
FIGURES = """() => { const found = []; const walk = (root) => { for (const e of root.querySelectorAll('*')) {
  if (e.classList.contains('js-plotly-plot')) found.push(e); if (e.shadowRoot) walk(e.shadowRoot); } };
  walk(document); return found; }"""
HEIGHTS = f"() => ({FIGURES})().flatMap((g) => (g.data ?? []).map((t) => JSON.stringify(t.z ?? t.y ?? [])))"
CHANGED = f"(before) => ({HEIGHTS})().length && ({HEIGHTS})().join() !== before.join()"


class Served:
    """The page's server in a process of its own, in a folder of its own."""

    def __init__(self, home: Path) -> None:
        self.runs, self.port, self.log = home / "runs", free_port(), home / "serve.log"
        env = environment(home) | {"WORKBENCH_STORE": ""}
        subprocess.run([sys.executable, "-c", RECORD, str(self.runs)], env=env, check=True, timeout=250)
        command = [sys.executable, "-c", SERVE, str(self.runs), str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log)
        self.url = f"http://127.0.0.1:{self.port}/"
        wait_for_http(self.url, self.process, self.log)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.process.terminate()
    server.process.wait(20)


@pytest.fixture(scope="module")
def page(browser: Any, served: Served) -> Iterator[Any]:
    """One page for all steps; what it asks the network for is kept."""
    context = browser.new_context(viewport={"width": 1500, "height": 1200})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(served.url)
    yield page
    context.close()


def said(page: Any, where: str, words: str) -> None:
    try:
        page.locator(f"{where} >> text={words}").first.wait_for()
    except Exception as error:
        shoot(page, "app-failed")
        raise AssertionError(f"{words!r} never stood in {where}; there was {_texts(page, where)}") from error


def _texts(page: Any, where: str) -> str:
    parts = (where, ".wb-status", ".wb-progress", ".wb-folder")
    return repr({part: [t[:200] for t in page.locator(f"{part} >> div").all_inner_texts()[:1]] for part in parts})


def choose(page: Any, probe: str) -> None:
    page.locator(".wb-probe select").select_option(label=probe)
    said(page, ".wb-code-box", f"{probe}(")


def test_the_page_opens_with_a_figure_and_asks_nobody_else(page: Any, served: Served) -> None:
    said(page, ".wb-progress", "100%")
    page.wait_for_function(f"() => ({HEIGHTS})().length > 0")
    shoot(page, "app-1-open")
    others = {
        u for u in page.asked if not u.startswith((served.url, f"ws://127.0.0.1:{served.port}", "data:", "blob:"))
    }
    assert not others


def test_a_slider_moved_by_keyboard_gives_a_new_figure(page: Any) -> None:
    choose(page, "HessianSpectrum")
    said(page, ".wb-progress", "100%")
    before = page.evaluate(HEIGHTS)
    page.locator(".wb-step .noUi-handle").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(CHANGED, arg=before)
    said(page, ".wb-progress", "100%")
    said(page, ".wb-summary-box", "±")
    shoot(page, "app-2-moved")


def test_a_second_opinion_comes_in_the_background(page: Any) -> None:
    choose(page, "HessianSpectrum")
    said(page, ".wb-progress", "100%")
    page.locator(".wb-ask button:not([disabled])").click()
    said(page, ".wb-opinion-box", "PyHessian")
    assert page.locator(".wb-status >> .wb-error").count() == 0
    shoot(page, "app-5-second-opinion")
    choose(page, "NeuralCollapse")
    said(page, ".wb-progress", "100%")
    page.locator(".wb-ask button[disabled]").wait_for()
    assert page.locator(".wb-opinion-box >> .wb-opinion").count() == 0, "it was about another reading"


def test_a_running_landscape_streams_and_is_cancelled(page: Any) -> None:
    choose(page, "Plane")
    page.locator(".wb-set-sampling select").select_option(label="grid")
    box = page.locator(".wb-set-points input").first
    box.fill("201")
    box.press("Enter")
    said(page, ".wb-code-box", "points=201")
    said(page, ".wb-progress", "left")
    page.wait_for_function(f"() => ({FIGURES})().some((g) => g.data.some((t) => t.type === 'contour'))")
    shoot(page, "app-3-streaming")
    page.locator(".wb-cancel button").click()
    said(page, ".wb-progress", "cancelled")


def test_export_writes_a_pdf(page: Any, served: Served, tmp_path: Path) -> None:
    choose(page, "NeuralCollapse")
    said(page, ".wb-progress", "100%")
    page.locator(".wb-venue option >> text=icml2024").first.wait_for(state="attached")
    page.locator(".wb-venue select").select_option(label="icml2024")
    box = page.locator(".wb-file input")
    box.fill(str(tmp_path / "fig4"))
    box.press("Enter")
    page.locator(".wb-export button").click()
    said(page, ".wb-status", "Wrote")
    assert (tmp_path / "fig4.pdf").read_bytes().startswith(b"%PDF")
    shoot(page, "app-4-exported")


def test_another_run_is_chosen_in_the_page(page: Any) -> None:
    before = page.evaluate(HEIGHTS)
    page.locator(".wb-folder select").select_option(label="seed1")
    said(page, ".wb-code-box", "runs/seed1")
    page.wait_for_function(CHANGED, arg=before)


def test_a_second_tab_has_a_session_of_its_own(page: Any, served: Served) -> None:
    other = page.context.new_page()
    other.goto(served.url)
    said(other, ".wb-code-box", "runs/seed0")
    page.bring_to_front()  # a tab behind another may be put to sleep by the browser
    said(page, ".wb-code-box", "runs/seed1")
    other.close()


def test_it_listens_on_this_machine_alone_and_to_its_own_page(served: Served) -> None:
    import http.client
    import socket

    with socket.socket() as s:
        found = s.connect_ex((socket.gethostbyname(socket.gethostname()), served.port))
    loopback = socket.gethostbyname(socket.gethostname()).startswith("127.")
    assert found != 0 or loopback
    ask = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "x" * 22 + "==",
    }
    ask.request("GET", "/ws", headers=upgrade | {"Origin": "http://elsewhere.example"})
    assert ask.getresponse().status == 403
