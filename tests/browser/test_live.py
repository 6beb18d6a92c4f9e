"""A person watches a training that another process records: new points come into the picture without a touch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.lab import Lab, environment, open_notebook, run_all, shoot
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
POINTS = f"Math.max(...document.querySelector('{FIGURE}').data.map((t) => (t.x ?? []).length))"
NEWEST = "Number(document.querySelector('.wb-step .widget-readout').textContent)"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder of a training that goes on in a process of its own until the test is over."""
    folder, log = tmp_path / "slow", tmp_path / "train.log"
    with log.open("w") as said:
        command = [sys.executable, "-c", TRAIN, str(folder)]
        process = subprocess.Popen(command, env=environment(tmp_path / "home"), stdout=said, stderr=said)
    while not (folder / "scalars.jsonl").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    yield folder
    process.terminate()
    process.wait(20)


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
