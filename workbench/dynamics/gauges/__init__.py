"""Gauges: small numbers read off a training while it runs, each optional and of known cost; see ``gauge.Gauge``.

::

    from workbench.dynamics import gauges

    with wb.Recorder("runs/mine", model, optimizer, data=(x, y), loss="cross_entropy",
                     gauges=[*gauges.defaults(), gauges.Sharpness(every=50)]) as recorder:
        ...
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AttentionLogits": "forward",
    "CoordinateSpikes": "moments",
    "Distance": "norms",
    "DormantUnits": "forward",
    "EffectiveRate": "norms",
    "Evaluation": "forward",
    "Gauge": "gauge",
    "GradientNorm": "norms",
    "LogZ": "forward",
    "Meter": "gauge",
    "NoiseScale": "noise",
    "Sharpness": "sharpness",
    "Training": "gauge",
    "Updates": "norms",
    "WeightNorm": "norms",
    "defaults": "standard",
}
"""Where each public name is defined; imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"workbench.dynamics.gauges has no {name!r}; it has {', '.join(sorted(_HOME))}.")
    return getattr(importlib.import_module(f"workbench.dynamics.gauges.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
