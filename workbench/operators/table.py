"""The curvature matrices that probes offer, by the value of their setting ``operator``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from workbench.operators.curvature import Curvature
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.hessian import Hessian
from workbench.subject import Subject

OperatorName = Literal["hessian", "ggn"]
WORDS: Mapping[str, str] = {
    "hessian": "the Hessian of the loss",
    "ggn": "the Gauss-Newton matrix: no curvature of the model",
}
"""What each is, for forms."""
OPERATORS: Mapping[str, type[Curvature]] = {"hessian": Hessian, "ggn": GaussNewton}


def curvature(subject: Subject, operator: OperatorName = "hessian") -> Curvature:
    """The operator of that name on a subject; close it, or use it as a context manager, to free its graphs."""
    return OPERATORS[operator](subject)
