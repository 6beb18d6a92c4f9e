"""What importing Workbench brings along: nothing that draws, nothing with widgets, no progress bars."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import workbench

AT_THE_EDGE = {
    "matplotlib",
    "tueplots",
    "plotly",
    "ipywidgets",
    "anywidget",
    "panel",
    "bokeh",
    "IPython",
    "rich",
    "tqdm",
}
FIRST = """
import json, sys
import torch, xarray
before = sorted(sys.modules)
"""
LAST = """
print(json.dumps([before, sorted(sys.modules)]))
"""


def modules_after(statements: str) -> tuple[set[str], set[str]]:
    """Modules in a fresh interpreter after torch and xarray, and those that ``statements`` then add."""
    script = FIRST + statements + LAST
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    return set(before), set(after) - set(before)


def at_the_edge(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] in AT_THE_EDGE}


WALK = """
import workbench
found = list(workbench.catalog.probes())
assert len(found) >= 3, found
"""
LOWER = """
import importlib, pkgutil, workbench
edge = ("workbench.ui", "workbench.draw", "workbench.interop", "workbench.cli", "workbench.__main__")
names = [m.name for m in pkgutil.walk_packages(workbench.__path__, "workbench.")]
names = [name for name in names if not name.startswith(edge)]
assert len(names) > 15, names
for name in names:
    importlib.import_module(name)
"""


@pytest.mark.parametrize(
    "statements", ["import workbench", WALK, LOWER], ids=["package", "catalog", "everything-below"]
)
def test_importing_brings_in_nothing_that_draws(statements: str) -> None:
    _, added = modules_after(statements)
    assert "workbench" in added
    assert at_the_edge(added) == set()


def test_torch_and_xarray_bring_in_only_a_plain_progress_bar() -> None:
    """torch.hub imports tqdm's text bar by itself. Were there more, the test above could not see ours."""
    before, _ = modules_after("")
    assert {name.split(".")[0] for name in at_the_edge(before)} <= {"tqdm"}
    assert not {"tqdm.notebook", "tqdm.auto", "tqdm.rich"} & before


def test_the_front_door_has_few_names() -> None:
    assert 10 <= len(workbench.__all__) <= 25
    assert len(set(workbench.__all__)) == len(workbench.__all__)


@pytest.mark.parametrize("name", workbench.__all__)
def test_every_name_of_the_front_door_can_be_had(name: str) -> None:
    assert getattr(workbench, name) is not None
    assert name in dir(workbench)


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(AttributeError, match="Trajectory"):
        _ = workbench.Trajektory  # type: ignore[attr-defined]
