"""What every test gets: a store of its own, one thread for torch, and Hypothesis without deadlines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Cores are shared with whatever else runs, so a deadline would fail good code. In CI the examples never vary.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


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
