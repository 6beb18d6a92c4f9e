"""The curvature matrices that probes offer, by the value of their setting ``operator``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from workbench.operators.curvature import Curvature
from workbench.operators.fisher import Fisher, SampledFisher
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.gradients import EmpiricalFisher, GradientCovariance
from workbench.operators.hessian import Hessian
from workbench.subject import Subject

OperatorName = Literal["hessian", "ggn", "fisher", "fisher_mc", "empirical_fisher", "gradient_covariance"]
WORDS: Mapping[str, str] = {
    "hessian": "the Hessian of the loss",
    "ggn": "the Gauss-Newton matrix: no curvature of the model",
    "fisher": "the Fisher matrix: labels as the model draws them",
    "fisher_mc": "the Fisher matrix from one drawn label for each example",
    "empirical_fisher": "second moment of the examples' gradients, labels of the data",
    "gradient_covariance": "covariance of the examples' gradients",
}
"""What each is, for forms."""
OPERATORS: Mapping[str, type[Curvature]] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
    "fisher": Fisher,
    "fisher_mc": SampledFisher,
    "empirical_fisher": EmpiricalFisher,
    "gradient_covariance": GradientCovariance,
}


def curvature(subject: Subject, operator: OperatorName = "hessian") -> Curvature:
    """The operator of that name on a subject; close it, or use it as a context manager, to free its graphs."""
    return OPERATORS[operator](subject)
