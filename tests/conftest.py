"""What every test gets: a store of its own, streams without pauses, one thread, and Hypothesis without deadlines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Cores are shared with whatever else runs, so a deadline would fail good code. In CI the examples never vary.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def hide_a_torchvision_of_another_kind() -> None:
    """Make a torchvision built for CUDA look absent beside a torch built without it.

    It comes along with a peer and nothing here needs it. It cannot be imported there, and transformers, which
    imports it wherever it is installed, would then fail too.
    """
    try:
        torch_kind, vision_kind = (version(name).partition("+")[2] for name in ("torch", "torchvision"))
    except PackageNotFoundError:
        return
    if torch_kind == "cpu" != vision_kind:
        sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]


hide_a_torchvision_of_another_kind()


@pytest.fixture(autouse=True)
def every_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams make a reading whenever they may, whatever the clock says: tests count and compare them."""
    monkeypatch.setattr("workbench.pace.PAUSE", 0.0)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store in the test's own folder: no test reads what another, or the user, has measured."""
    store = tmp_path / "store"
    monkeypatch.setenv("WORKBENCH_STORE", str(store))
    return store


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread a worker: equal sums in each run, and no two workers fighting over the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
