"""Probes along a path: what happens while a network learns. ``schedules`` and ``gauges`` are for ``wb.Recorder``."""

from __future__ import annotations

import importlib
from typing import Any

from workbench.resolve import folder

_get, __dir__ = folder("workbench.dynamics")


def __getattr__(name: str) -> Any:
    if name in ("schedules", "gauges"):
        return importlib.import_module(f"workbench.dynamics.{name}")
    return _get(name)
