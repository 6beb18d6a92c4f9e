"""On a CUDA device: the same numbers as on the CPU, and no waiting for the device inside products. ``make slow``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import SMALL, small
from toys import quick

import workbench as wb
from workbench import catalog
from workbench.operators.table import OPERATORS, OperatorName, curvature

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
POINTS = [name for name, cls in catalog.probes().items() if cls.looks_at == "subject"]


def subject(name: str, device: str, dtype: torch.dtype = torch.float64) -> wb.Subject:
    """One of the small trained nets on a device; the examples stay where they are and are moved by the subject."""
    net = small(name)
    return wb.Subject(copy.deepcopy(net.model).to(device, dtype), net.data)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", SMALL)
def test_products_are_those_of_the_cpu(name: str, operator: OperatorName) -> None:
    here, there = subject(name, "cpu"), subject(name, "cuda")
    v = torch.linspace(-1, 1, here.size, dtype=torch.float64)
    with curvature(here, operator) as a, curvature(there, operator) as b:
        found = b.matvec(v.cuda()).cpu()
        assert torch.allclose(found, a.matvec(v), rtol=1e-9, atol=1e-9 * float(found.abs().max()))


@pytest.fixture
def strict() -> Iterator[Any]:
    """Makes every wait for the device an error while it is on."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else before)
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_products_never_wait_for_the_device(strict: Any, operator: OperatorName) -> None:
    with curvature(subject("dense GELU", "cuda", torch.float32), operator) as matrix:
        v = torch.ones(matrix.size, device="cuda")
        matrix.matvec(v)  # builds the graphs
        strict(True)
        matrix.matvec(v)
        strict(False)


@pytest.mark.parametrize("name", POINTS)
def test_probes_give_the_numbers_of_the_cpu(name: str) -> None:
    probe = quick(catalog.probes()[name])
    readings = [probe.run(subject("dense GELU", device), seed=1) for device in ("cpu", "cuda")]
    assert readings[0].summary.keys() == readings[1].summary.keys()
    for key, value in readings[0].summary.items():
        if isinstance(value, float) and f"{key}_error" in readings[0].summary:
            errors = [float(r.summary[f"{key}_error"]) for r in readings]
            assert float(readings[1].summary[key]) == pytest.approx(value, rel=1e-6, abs=4 * sum(errors), nan_ok=True)
