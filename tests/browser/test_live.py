"""A person watches a training that another process records: new points come into the picture without a touch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import test_app
from browser.lab import PATIENCE, Lab, environment, free_port, open_notebook, run_all, shoot, wait_for_http
from browser.test_lab import CODE, DRAWN, FIGURE, choose, finished

pytestmark = pytest.mark.browser
TRAIN = """
import sys, time, torch
import workbench as wb
from workbench.zoo.digits import digits
from workbench.zoo.nets import conv
data, recipe = digits(), {"channels": [4, 8], "seed": 0}
model = conv(**recipe)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
with wb.Recorder(sys.argv[1], model, optimizer, every=5, data=data.test, loss="cross_entropy",
                 build="workbench.zoo.nets:conv", build_args=recipe) as recorder:
    inputs, targets = data.train
    while True:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[:256]), targets[:256])
        loss.backward()
        optimizer.step()
        recorder.step(train_loss=loss)
        time.sleep(0.5)
"""
# The page as `workbench serve` serves it, but for two things: sessions that nobody looks at end after ten seconds, and
# how many threads follow a record is written into a file again and again.
SERVE = """
import functools, os, sys, threading, time
import panel as pn
from workbench.ui.app import serve
pn.serve = functools.partial(
    pn.serve, check_unused_sessions_milliseconds=500, unused_session_lifetime_milliseconds=10_000)
serve(sys.argv[1], port=int(sys.argv[2]), open_browser=False, block=False)
while True:
    count = sum(thread.name == "workbench-follow" for thread in threading.enumerate())
    with open("looking.new", "w") as file:
        file.write(str(count))
    os.replace("looking.new", "looking")
    time.sleep(0.2)
"""
POINTS = f"Math.max(...document.querySelector('{FIGURE}').data.map((t) => (t.x ?? []).length))"
NEWEST = "Number(document.querySelector('.wb-step .widget-readout').textContent)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a training that goes on in a process of its own until the tests are over."""
    home = tmp_path_factory.mktemp("training")
    folder, log = home / "slow", home / "train.log"
    process = train(folder, log, home / "home")
    while not (folder / "scalars.jsonl").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    yield folder
    process.terminate()
    process.wait(20)


def train(folder: Path, log: Path, home: Path) -> subprocess.Popen[bytes]:
    """A training in a process of its own, which goes on until it is ended."""
    with log.open("w") as said:
        command = [sys.executable, "-c", TRAIN, str(folder)]
        return subprocess.Popen(command, env=environment(home), stdout=said, stderr=said)


def test_three_new_points_come_without_a_touch(page: Any, lab: Lab, run: Path) -> None:
    cell = f"import workbench as wb\nbench = wb.explore(wb.Trajectory.open({str(run)!r}))"
    open_notebook(page, lab, lab.write("live.ipynb", cell))
    run_all(page)
    page.wait_for_function(DRAWN)
    page.wait_for_selector(".wb-live")
    choose(page, "Spikes")
    finished(page, "Spikes")
    before = page.evaluate(POINTS)
    for count in (1, 2, 3):
        page.wait_for_function(f"(least) => {POINTS} >= least", arg=before + count)
    shoot(page, "live-1-curve")
    choose(page, "NeuralCollapse")
    finished(page, "NeuralCollapse")
    stood = page.evaluate(NEWEST)
    page.wait_for_function(f"(stood) => {NEWEST} > stood && {CODE}.includes(`subject(${{{NEWEST}}})`)", arg=stood)
    finished(page, "NeuralCollapse")
    assert page.locator(".wb-status .wb-error").count() == 0
    shoot(page, "live-2-newest")


@pytest.fixture
def served(run: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server of the folder that holds that run, in a process of its own."""
    port, log = free_port(), tmp_path / "serve.log"
    env = environment(tmp_path / "served") | {"WORKBENCH_STORE": ""}
    with log.open("w") as said:
        command = [sys.executable, "-c", SERVE, str(run.parent), str(port)]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=said, stderr=said)
    url = f"http://127.0.0.1:{port}/"
    wait_for_http(url, process, log)
    yield url
    process.terminate()
    process.wait(20)


def followers(tmp_path: Path) -> int:
    return int((tmp_path / "looking").read_text())


def test_a_served_page_follows_without_a_touch_until_it_is_closed(page: Any, served: str, tmp_path: Path) -> None:
    page.goto(served)
    test_app.choose(page, "Spikes")
    test_app.said(page, ".wb-progress", "100%")
    page.locator(".wb-live").first.wait_for()
    points = f"Math.max(...({test_app.FIGURES})().flatMap((g) => g.data).map((t) => (t.x ?? []).length))"
    before = page.evaluate(points)
    for count in (1, 2, 3):
        page.wait_for_function(f"(least) => {points} >= least", arg=before + count)
    shoot(page, "live-3-served-curve")
    test_app.choose(page, "NeuralCollapse")
    test_app.said(page, ".wb-progress", "100%")
    stood = step(page)
    until(lambda: step(page) > stood and f"subject({step(page)})" in page.locator(".wb-code-box >> pre").inner_text())
    test_app.said(page, ".wb-progress", "100%")
    assert page.locator(".wb-status >> .wb-error").count() == 0
    shoot(page, "live-4-served-newest")
    assert followers(tmp_path) == 2, "one follows the run, the other looks for new ones"
    page.close()
    until(lambda: followers(tmp_path) == 0)


def test_a_run_that_begins_is_listed_without_a_touch_and_can_be_chosen(page: Any, served: str, run: Path) -> None:
    page.goto(served)
    test_app.said(page, ".wb-progress", "100%")
    assert page.locator(".wb-folder select").is_hidden(), "there is but one run, and nothing to choose"
    test_app.choose(page, "Spikes")
    test_app.said(page, ".wb-progress", "100%")
    other = train(run.parent / "later", run.parent / "later.log", run.parent / "home")
    try:
        names = page.locator(".wb-folder select >> option")
        until(lambda: names.all_inner_texts() == ["later", "slow"])
        assert page.locator(".wb-folder select").input_value() == "slow"
        assert page.locator(".wb-probe select").input_value() == "Spikes"
        assert "slow" in page.locator(".wb-title").first.inner_text()
        page.locator(".wb-folder select").select_option(label="later")
        until(lambda: "later" in page.locator(".wb-title").first.inner_text())
        page.locator(".wb-live").first.wait_for()
        until(lambda: "/later" in page.locator(".wb-code-box >> pre").inner_text())
        assert page.locator(".wb-status >> .wb-error").count() == 0
        shoot(page, "live-5-later")
    finally:
        other.terminate()
        other.wait(20)


def step(page: Any) -> int:
    """The checkpoint that the slider of the served page stands at."""
    return int(page.locator(".wb-step.bk-Div >> .bk-clearfix").inner_text().split(":")[-1])


def until(true: Any, seconds: float = PATIENCE / 1000) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
