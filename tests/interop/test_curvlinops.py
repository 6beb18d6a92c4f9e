"""curvlinops' matrices of a subject against ours and exact ones, and its operators under our probes."""

from __future__ import annotations

import sys

import pytest
import torch
from architectures import small

from workbench.interop import curvlinops
from workbench.operators.fisher import Fisher
from workbench.operators.gauss_newton import GaussNewton
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

pytest.importorskip("curvlinops")
# Forward-mode differentiation does not know recurrent kernels, which curvlinops needs.
NETS = ("dense GELU", "conv + BatchNorm", "tied embedding", "partly frozen")


@pytest.mark.parametrize("name", NETS)
def test_matrices_are_ours_and_the_exact_ones_over_unequal_chunks(name: str) -> None:
    net = small(name)
    subject = Subject(net.model, net.data, batch_size=32)  # 70 examples: 32, 32 and 6
    v = torch.linspace(-1, 1, subject.size, dtype=torch.float64)
    scale = float((net.hessian @ v).abs().max())
    assert torch.allclose(curvlinops.hessian(subject) @ v, net.hessian @ v, atol=1e-9 * scale)
    theirs = curvlinops.ggn(subject) @ v
    for kind in (GaussNewton, Fisher):
        with kind(subject) as ours:
            assert torch.allclose(theirs, ours @ v, atol=1e-9 * scale)


def test_its_products_are_wrong_in_the_weights_of_layer_norm() -> None:
    """By PyTorch 2.13's forward-over-reverse derivative; when this fails, drop the words about it."""
    net = small("transformer encoder")
    subject = Subject(net.model, net.data)
    v = torch.linspace(-1, 1, subject.size, dtype=torch.float64)
    apart = subject.unflatten(curvlinops.hessian(subject) @ v - net.hessian @ v)
    scale = float((net.hessian @ v).norm())
    for name, gap in apart.items():
        wrong = name.startswith("body.norm") and name.endswith("weight")
        assert (float(gap.norm()) > 1e-3 * scale) if wrong else (float(gap.norm()) < 1e-9 * scale)
    assert torch.allclose(curvlinops.ggn(subject) @ v, GaussNewton(subject) @ v, atol=1e-9 * scale)
    assert curvlinops.trap(subject)
    assert not curvlinops.trap(Subject(small("dense GELU").model, small("dense GELU").data))


def test_an_adopted_operator_is_measured() -> None:
    net = small("dense GELU")
    subject = curvlinops.adopt(curvlinops.hessian(Subject(net.model, net.data)))
    found = HessianSpectrum(top=3, tolerance=1e-4, trace=False, density=False).run(subject).data
    assert found.eigenvalue.values == pytest.approx(net.eigenvalues[:3].numpy(), rel=1e-4)
    assert curvlinops.largest(Subject(net.model, net.data), 2, 60) == pytest.approx(net.eigenvalues[:2], rel=1e-6)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small("dense GELU")
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match="peers"):
        curvlinops.hessian(Subject(net.model, net.data))
