"""A subject's curvature as symmetric operators on its flat parameter vector, restricted and preconditioned at will."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Block": "blocks",
    "Curvature": "curvature",
    "EmpiricalFisher": "gradients",
    "Fisher": "fisher",
    "GaussNewton": "gauss_newton",
    "GradientCovariance": "gradients",
    "GradientNoise": "noise",
    "Hessian": "hessian",
    "Preconditioned": "preconditioned",
    "Preconditioner": "preconditioned",
    "SampledFisher": "fisher",
    "TangentKernel": "tangent_kernel",
    "curvature": "table",
    "given": "given",
    "groups": "blocks",
    "preconditioner": "preconditioned",
    "restrict": "blocks",
}
"""Where each public name is defined; imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"workbench.operators has no {name!r}; it has {', '.join(sorted(_HOME))}.")
    return getattr(importlib.import_module(f"workbench.operators.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
