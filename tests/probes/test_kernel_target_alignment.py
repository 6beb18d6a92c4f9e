"""Alignment of tangent kernels with targets against loops over a linear model's closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import small
from torch import Tensor, nn

from workbench.probes.kernel_target_alignment import KernelTargetAlignment
from workbench.subject import Subject


def linear(y: Tensor, loss: str | None = None) -> tuple[Subject, np.ndarray]:
    """f = W x: J_c J_cᵀ = X Xᵀ for all outputs."""
    n = len(y)
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    outputs = y.shape[1] if y.ndim > 1 else int(y.max()) + 1
    net = nn.Linear(5, outputs, bias=False).double()
    return Subject(net, (x, y), **({"loss": loss} if loss else {})), x.numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def aligned(k: np.ndarray, y: np.ndarray, centre: bool) -> float:
    h = np.eye(len(k)) - (1 / len(k) if centre else 0)
    return cosine(h @ k @ h, h @ y @ y.T @ h)


def left_out(k: np.ndarray, y: np.ndarray, centre: bool) -> float:
    """Jackknife by really leaving out."""
    n = len(k)
    kept = [[j for j in range(n) if j != i] for i in range(n)]
    found = np.array([aligned(k[np.ix_(s, s)], y[s], centre) for s in kept])
    return float(np.sqrt((n - 1) / n * ((found - found.mean()) ** 2).sum()))


def test_a_linear_model_is_aligned_as_its_inputs_are() -> None:
    labels = torch.arange(24) % 3
    subject, x = linear(labels)
    data = KernelTargetAlignment(examples=24, top=5).run(subject).data
    y, k = np.eye(3)[labels.numpy()], x @ x.T
    for name, centre in (("alignment", True), ("alignment_uncentred", False)):
        assert float(data[name]) == pytest.approx(aligned(k, y, centre), rel=1e-10)
        assert float(data[f"{name}_error"]) == pytest.approx(left_out(k, y, centre), rel=1e-8)
    for c in range(3):
        assert float(data.class_alignment[c]) == pytest.approx(aligned(k, y[:, [c]], True), rel=1e-10)
        assert float(data.class_alignment_error[c]) == pytest.approx(left_out(k, y[:, [c]], True), rel=1e-8)
    assert float(data.identity) == pytest.approx(math.sqrt(2 / 23))
    assert float(data.identity_uncentred) == pytest.approx(math.sqrt(3 / 24))
    used, aim = x - x.mean(0), y - y.mean(0)
    left = np.linalg.svd(used, full_matrices=False)[0]
    shares = ((left.T @ aim) ** 2).sum(1).cumsum() / (aim**2).sum()
    assert data.power.values == pytest.approx(shares, rel=1e-8)


def test_the_full_kernel_takes_all_targets_in_a_row() -> None:
    y = torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    subject, x = linear(y, "half_mse")
    data = KernelTargetAlignment(examples=12, top=12, outputs="full").run(subject).data
    h = np.eye(12) - 1 / 12
    k, flat = np.kron(h @ x @ x.T @ h, np.eye(2)), (h @ y.numpy()).reshape(-1, 1)
    assert float(data.alignment) == pytest.approx(cosine(k, flat @ flat.T), rel=1e-10)
    assert float(data.identity) == pytest.approx(1 / math.sqrt(11 * 2))
    assert float(data.class_alignment[1]) == pytest.approx(aligned(x @ x.T, y.numpy()[:, [1]], True), rel=1e-10)
    assert data.power.values[9] == pytest.approx(data.power.values[11])  # rank 5 for each of two outputs


@pytest.mark.parametrize("seed", range(3))
def test_targets_that_the_kernel_makes_are_aligned(seed: int) -> None:
    """y = X w: what a linear model makes lies in its kernel; one direction alone is its kernel."""
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    subject = Subject(nn.Linear(1, 1, bias=False).double(), (x, 3 * x), loss="half_mse")
    data = KernelTargetAlignment(examples=20, top=2).run(subject).data
    assert float(data.alignment) == pytest.approx(1)
    assert float(data.alignment_error) == pytest.approx(0, abs=1e-8)
    assert data.power.values == pytest.approx(1)


def test_the_jackknife_covers_other_examples() -> None:
    net = small("dense ReLU")
    whole = Subject(net.model, net.data)
    found = [KernelTargetAlignment(examples=35).run(whole.selected(range(s, 70, 2))).data for s in (0, 1)]
    one, two = ((float(d.alignment), float(d.alignment_error)) for d in found)
    assert abs(one[0] - two[0]) < 4 * math.hypot(one[1], two[1])
    assert found[0].power_error.values[:5].min() > 0


def test_constant_targets_have_no_alignment() -> None:
    subject, _ = linear(torch.ones(8, 1, dtype=torch.float64), "half_mse")
    data = KernelTargetAlignment(examples=8, top=3).run(subject).data
    assert math.isnan(float(data.alignment))
    assert math.isnan(float(data.identity))
    assert np.isnan(data.power.values).all()
    assert math.isfinite(float(data.alignment_uncentred))
