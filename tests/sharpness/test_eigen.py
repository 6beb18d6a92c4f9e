"""Eigenvalues and traces in units of the weights, against Hessians row by row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from architectures import small
from surfaces import Q2, double, last, point, quadratic, surface
from torch import nn

from workbench.sharpness.eigen import largest_eigenvalue, module_eigenvalues, module_traces
from workbench.sharpness.found import NotDefined
from workbench.sharpness.scales import elementwise
from workbench.subject import Subject


def test_in_units_of_the_weights() -> None:
    subject = quadratic(Q2, 1.0, 3.0)
    found = last(largest_eigenvalue(point(subject), 1e-6, elementwise(subject, False)))
    assert found.value == pytest.approx(9, rel=1e-10)
    assert found.converged


@pytest.mark.parametrize("name", ["dense GELU", "conv + BatchNorm", "transformer encoder"])
def test_eigenvalues_are_those_of_the_exact_matrix(name: str) -> None:
    net = small(name)
    subject = Subject(net.model, net.data, batch_size=32)
    sizes = [torch.full((p.numel(),), float(p.ndim > 1)).double() for p in net.model.parameters()]
    scale = torch.cat([p.detach().abs().flatten() for p in net.model.parameters()]) * torch.cat(sizes)
    here = point(subject)
    for weight, found in (
        (torch.ones_like(scale), last(largest_eigenvalue(here, 1e-4))),
        (scale, last(largest_eigenvalue(here, 1e-4, elementwise(subject, False)))),
    ):
        exact = torch.linalg.eigvalsh(weight[:, None] * net.hessian * weight)
        assert float((exact - found.value).abs().min()) <= found.error + 1e-12
        assert found.value == pytest.approx(float(exact[-1]), rel=1e-4)
        assert found.value <= float(exact[-1]) * (1 + 1e-12)
    here.close()


def test_modules_have_the_numbers_of_their_own_blocks() -> None:
    net = small("dense GELU")
    here = point(Subject(net.model, net.data, batch_size=32))
    eigen, trace = last(module_eigenvalues(here, 1e-4)), last(module_traces(here, 0.02))
    here.close()
    places = itertools.accumulate((p.numel() for p in net.model.parameters()), initial=0)
    blocks = [(p, slice(a, a + p.numel())) for p, a in zip(net.model.parameters(), places, strict=False) if p.ndim > 1]
    for (p, at), value, wide, bound in zip(
        blocks, eigen.extra["module_eigenvalue"], trace.extra["module_trace"], trace.extra["module_trace_error"],
        strict=True,
    ):  # fmt: skip
        block, square = net.hessian[at, at], float((p.detach() ** 2).sum())
        assert value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]) * square, rel=1e-4)
        assert abs(wide - float(block.trace()) * square / p.numel()) <= 2 * bound + 1e-9
    assert eigen.value == np.max(eigen.extra["module_eigenvalue"])
    assert eigen.converged


def test_a_scale_before_a_normalisation_does_not_matter() -> None:
    """W → cW leaves the loss and λ_1 ‖W‖², and divides λ_1 by c²; statistics of the batch, ε negligible."""
    torch.manual_seed(0)
    data = (double(40, 3), torch.arange(40) % 2)
    layers = (nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6, eps=1e-12), nn.Tanh(), nn.Linear(6, 2))
    net = nn.Sequential(*layers).double()
    whole, scaled = [], []
    for factor in (1.0, 3.0, 10 / 3):  # 1, 3 and 10 in all
        with torch.no_grad():
            net[0].weight.mul_(factor)
        subject = Subject(net, data, norm="batch", batch_size=40)
        here = point(subject.restricted("0.weight"))
        scaled.append(last(module_eigenvalues(here, 1e-6)).value)
        whole.append(last(largest_eigenvalue(here, 1e-6)).value)
        here.close()
    assert scaled == pytest.approx([scaled[0]] * 3, rel=1e-5)
    assert whole == pytest.approx([whole[0], whole[0] / 9, whole[0] / 100], rel=1e-5)


def test_what_is_not_there_is_said() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    data = (torch.zeros(1, 1), torch.zeros(1))
    here = point(Subject(Bare(), data, objective=lambda m, _: (m.weight**2).sum(), reduction="mean"))
    for stream in (
        module_eigenvalues(here, 0.02),
        module_traces(here, 0.02),
        largest_eigenvalue(here, 0.02, elementwise(here.subject, False)),
    ):
        with pytest.raises(NotDefined, match="two dims"):
            next(stream)


def test_products_that_are_not_finite_are_said() -> None:
    here = point(surface(lambda w: (w.abs() ** 1.5).sum(), 0.0, 1.0))  # its second derivative at 0 is infinite
    with pytest.raises((NotDefined, ArithmeticError)):
        last(largest_eigenvalue(here, 0.02))
