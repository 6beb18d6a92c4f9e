"""Workbench: watch how neural networks learn, with numbers that say how sure they are.

>>> import workbench as wb
>>> subject = wb.Subject(model, data, loss="cross_entropy")
>>> wb.probes.HessianSpectrum(top=5).run(subject)

Names are imported on first use, so that ``import workbench`` stays light and pulls in nothing that draws.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Along",
    "Job",
    "Pair",
    "Probe",
    "Reading",
    "Recorder",
    "Runs",
    "Store",
    "Subject",
    "Trajectory",
    "app",
    "catalog",
    "compare",
    "dynamics",
    "experiments",
    "explore",
    "landscape",
    "load",
    "log_spaced",
    "operators",
    "probes",
    "sweep",
    "trainings",
    "zoo",
]

_HOME = {
    "Along": "workbench.dynamics.along",
    "Job": "workbench.job",
    "Pair": "workbench.several",
    "Probe": "workbench.probe",
    "Reading": "workbench.probe",
    "Recorder": "workbench.dynamics.recorder",
    "Runs": "workbench.several",
    "Store": "workbench.store",
    "Subject": "workbench.subject",
    "Trajectory": "workbench.trajectory",
    "app": "workbench.ui.app",
    "compare": "workbench.comparison",
    "explore": "workbench.ui.bench",
    "load": "workbench.draw.export",
    "log_spaced": "workbench.dynamics.recorder",
    "sweep": "workbench.sweeping",
    "trainings": "workbench.trainings",
}
"""Where each name that is not a folder or module of its own is defined."""

if TYPE_CHECKING:
    from workbench import catalog, dynamics, experiments, landscape, operators, probes, zoo
    from workbench.comparison import compare
    from workbench.draw.export import load
    from workbench.dynamics.along import Along
    from workbench.dynamics.recorder import Recorder, log_spaced
    from workbench.job import Job
    from workbench.probe import Probe, Reading
    from workbench.several import Pair, Runs
    from workbench.store import Store
    from workbench.subject import Subject
    from workbench.sweeping import sweep
    from workbench.trainings import trainings
    from workbench.trajectory import Trajectory
    from workbench.ui.app import app
    from workbench.ui.bench import explore


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = found
        return found
    if name in __all__:
        return importlib.import_module(f"workbench.{name}")
    raise AttributeError(f"workbench has no {name!r}; it has {', '.join(sorted(__all__))}.")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
