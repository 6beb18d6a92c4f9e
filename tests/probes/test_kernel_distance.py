"""Distances of tangent kernels against closed forms and against NumPy on whole Jacobians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.comparison import compare
from workbench.numerics.kernel_pairs import blank_alignment, kernel_distances, one_less_cosine, target_kernel
from workbench.probes.kernel_distance import KernelDistance
from workbench.several import Pair
from workbench.subject import Subject


class Scaled(nn.Module):
    """f(x) = α (w² - 1) x, of which training with loss (f - y)² / 2α² ends at w = √(1 + y/α)."""

    def __init__(self, alpha: float, w: float) -> None:
        super().__init__()
        self.alpha, self.w = alpha, nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (self.w**2 - 1) * x


@pytest.mark.parametrize("alpha", [1.0, 10.0, 100.0])
def test_the_relative_change_of_a_scaled_square_is_y_over_alpha(alpha: float) -> None:
    x = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pair = Pair(*(Subject(Scaled(alpha, w), (x, x), loss="half_mse") for w in (1.0, math.sqrt(1 + 1 / alpha))))
    data = KernelDistance().run(pair).data
    assert float(data.relative_change) == pytest.approx(1 / alpha, rel=1e-9)
    assert float(data.norm_ratio) == pytest.approx(1 + 1 / alpha, rel=1e-9)
    assert abs(float(data.distance)) < 1e-15  # it only grows
    assert abs(float(data.centred_distance)) < 1e-15
    assert float(data.relative_change_error) < 1e-12


def test_the_identity_and_ones() -> None:
    eye, ones = (k[:, None, :, None].double() for k in (torch.eye(4), torch.ones(4, 4)))
    found = kernel_distances(eye, ones)
    assert found.distance.value == pytest.approx(0.5)
    assert math.isnan(found.centred_distance.value)
    assert math.isnan(found.centred_distance.error)
    assert found.norm_ratio.value == pytest.approx(2)


def random_kernel(n: int, outputs: int, seed: int) -> Tensor:
    rows = torch.randn(n * outputs, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.7
    return (rows @ rows.T).view(n, outputs, n, outputs)


def loop(first: np.ndarray, second: np.ndarray, centre: bool) -> float:
    """1 - cosine by a projector and a trace, outputs one by one."""
    n, outputs = first.shape[:2]
    h = np.kron(np.eye(n) - np.ones((n, n)) / n, np.eye(outputs)) if centre else np.eye(n * outputs)
    a, b = (h @ k.reshape(n * outputs, -1) @ h for k in (first, second))
    return 1 - np.trace(a @ b) / math.sqrt(np.trace(a @ a) * np.trace(b @ b))


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 8), st.integers(1, 3), st.integers(0, 1000), st.booleans())
def test_leaving_out_is_leaving_out(n: int, outputs: int, seed: int, centre: bool) -> None:
    one, two = random_kernel(n, outputs, seed), random_kernel(n, outputs, seed + 1)
    found = one_less_cosine(one, two, centre).numpy()
    wanted = [loop(one.numpy(), two.numpy(), centre)]
    for i in range(n):
        kept = [j for j in range(n) if j != i]
        wanted.append(loop(*(k[kept][:, :, kept].numpy() for k in (one, two)), centre))
    assert found == pytest.approx(np.array(wanted), abs=1e-11)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
@pytest.mark.parametrize("centre", [False, True])
def test_a_small_turn_loses_no_digits(size: float, centre: bool) -> None:
    one = random_kernel(6, 1, 0)
    turned = [one + t * random_kernel(6, 1, 5) for t in (size, size / 2)]
    far, near = (float(one_less_cosine(one, k, centre)[0]) for k in turned)
    assert far / near == pytest.approx(4, rel=10 * size)  # quadratic in the turn, to the last digits


def test_what_the_identity_has() -> None:
    y = torch.eye(10, dtype=torch.float64).repeat(10, 1)
    eye = torch.eye(100, dtype=torch.float64)[:, None, :, None]
    centred, plain = blank_alignment(y, True)
    assert (plain, centred) == pytest.approx((math.sqrt(10 / 100), math.sqrt(9 / 99)))
    for centre, wanted in ((False, plain), (True, centred)):
        assert 1 - float(one_less_cosine(eye, target_kernel(y, True), centre)[0]) == pytest.approx(wanted)
    few = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(15, dtype=torch.float64).view(5, 3, 5, 3)
    centred, plain = blank_alignment(few, False)
    assert 1 - float(one_less_cosine(eye, target_kernel(few, False))[0]) == pytest.approx(plain)
    assert 1 - float(one_less_cosine(eye, target_kernel(few, False), True)[0]) == pytest.approx(centred)


def jacobian(subject: Subject, inputs: Tensor) -> np.ndarray:
    """(n, C, P) by differentiating everything at once."""
    names = list(subject.params)

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(subject.module, params, (inputs,))

    found = torch.func.jacrev(outputs)({n: p.clone() for n, p in subject.params.items()})
    return torch.cat([found[n].flatten(2) for n in names], 2).numpy()


def gram(rows: np.ndarray, outputs: str) -> np.ndarray:
    """The kernel (n, C, n, C) of a Jacobian, or its class-trace (n, 1, n, 1)."""
    if outputs == "full":
        return np.einsum("icp,jdp->icjd", rows, rows)
    return np.einsum("icp,jcp->ij", rows, rows)[:, None, :, None] / rows.shape[1]


@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_it_is_the_distance_of_whole_kernels(outputs: str) -> None:
    net = small("dense GELU")
    subject = Subject(net.model, net.data)
    rng = torch.Generator().manual_seed(1)
    moved = subject.at(
        {n: p + 0.2 * torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in subject.params.items()}
    )
    inputs = net.data[0]
    one, two = (gram(jacobian(s, inputs), outputs) for s in (subject, moved))
    data = KernelDistance(examples=len(inputs), outputs=outputs).run(Pair(subject, moved)).data
    assert float(data.distance) == pytest.approx(loop(one, two, False), rel=1e-8)
    assert float(data.centred_distance) == pytest.approx(loop(one, two, True), rel=1e-8)
    assert float(data.relative_change) == pytest.approx(np.linalg.norm(two - one) / np.linalg.norm(one))
    assert 0 < float(data.distance_error) < float(data.distance)


def test_unlike_kernels_are_refused() -> None:
    net = small("dense GELU")
    subject = Subject(net.model, net.data)
    probe = KernelDistance(examples=6)
    with pytest.raises(ValueError, match="different examples"):
        probe.run(Pair(subject, Subject(net.model, (net.data[0] + 1, net.data[1]))))
    with pytest.raises(ValueError, match="different parameters"):
        probe.run(Pair(subject, subject.restricted("4.*")))
    moved = subject.at({n: 1.1 * p for n, p in subject.params.items()})
    with pytest.raises(ValueError, match="parameters of the kernel"):
        compare(probe.run(Pair(subject, moved)), probe.run(Pair(*(s.restricted("4.*") for s in (subject, moved)))))
