"""Pitfall 3: the largest eigenvalue is the algebraically largest, whatever lies farther out below zero."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workbench.operators.hessian import Hessian
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

Ends = Callable[[Subject], dict[str, float]]


class Saddle(nn.Module):
    """½ (w_1² - 5 w_0²) at w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))


def half(model: Saddle, batch: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([-5.0, 1.0], dtype=torch.float64) * model.w**2).sum()


def tells_the_ends_apart(ends: Ends) -> None:
    """λ_max = 1 and λ_min = -5, each under its own name."""
    found = ends(Subject(Saddle(), [torch.zeros(1)], objective=half, reduction="mean"))
    assert found == pytest.approx({"largest": 1.0, "most negative": -5.0})


def ours(subject: Subject) -> dict[str, float]:
    reading = HessianSpectrum(top=1).run(subject)
    assert reading.summary["sharpness"] == float(reading.data.eigenvalue[0])
    assert reading.summary["negative_curvature"] == "resolved"
    labels = {name: reading.data[name].attrs["long_name"] for name in ("eigenvalue", "eigenvalue_min")}
    assert labels["eigenvalue_min"] == "most negative eigenvalue" != labels["eigenvalue"]
    return {"largest": float(reading.data.eigenvalue[0]), "most negative": float(reading.data.eigenvalue_min)}


def sorted_by_magnitude(subject: Subject) -> dict[str, float]:
    """The fault."""
    values = torch.linalg.eigvalsh(Hessian(subject).dense()).numpy()
    values = values[np.argsort(-np.abs(values))]
    return {"largest": float(values[0]), "most negative": float(values[-1])}


def test_the_largest_in_magnitude_is_not_called_the_largest() -> None:
    tells_the_ends_apart(ours)
    with pytest.raises(AssertionError):
        tells_the_ends_apart(sorted_by_magnitude)
