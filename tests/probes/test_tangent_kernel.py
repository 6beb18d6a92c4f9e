"""The probe of the tangent kernel against closed forms and plain linear algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import small
from torch import Tensor, nn

from workbench.comparison import compare
from workbench.numerics import kernel_numbers as numbers
from workbench.operators.tangent_examples import picked, targets
from workbench.probes.tangent_kernel import TangentKernel
from workbench.subject import Subject

Y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)


def square(matrix: Tensor) -> Tensor:
    return matrix[:, None, :, None]


def test_alignments_have_their_known_values() -> None:
    eye, ones = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    assert numbers.alignment(square(eye), Y) == pytest.approx(0.5)
    assert numbers.alignment(numbers.centred(square(eye)), Y) == pytest.approx(1 / math.sqrt(3))
    both = square(ones + Y @ Y.T)
    assert numbers.alignment(both, Y) == pytest.approx(math.sqrt(0.5))
    assert numbers.alignment(numbers.centred(both), Y) == pytest.approx(1)
    assert math.isnan(numbers.alignment(numbers.centred(square(ones)), Y))
    one_hot = torch.eye(10, dtype=torch.float64).repeat(10, 1)
    eye = square(torch.eye(100, dtype=torch.float64))
    assert numbers.alignment(eye, one_hot) == pytest.approx(math.sqrt(10 / 100))
    less = one_hot - one_hot.mean(0)
    assert numbers.alignment(numbers.centred(eye), less) == pytest.approx(math.sqrt(9 / 99))


def test_a_power_law_is_found_by_sub_samples() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((256, 6000)) * np.arange(1, 6001) ** (-0.75)
    kernel = square(torch.from_numpy(features @ features.T))
    values = numbers.eigenvalues(kernel)
    found, error = numbers.exponent(kernel, values, rng)
    assert found == pytest.approx(1.5, abs=0.08)  # the fit itself is of small n: 1.5047 between 100 and 1000
    assert 0 < error < 0.05
    direct, error = numbers.direct_exponent(values)
    assert direct == pytest.approx(1.5, abs=0.25)
    assert all(math.isnan(x) for x in (*numbers.direct_exponent(values[:50]), numbers.slope(values[:2], values[:2])[0]))
    short = square(torch.from_numpy(features[:64, :20] @ features[:64, :20].T))
    assert math.isnan(numbers.exponent(short, numbers.eigenvalues(short), rng)[0])


def linear(n: int = 40) -> tuple[Subject, Tensor]:
    """f = W x: Θ = XXᵀ ⊗ I."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=rng, dtype=torch.float64) + 1
    return Subject(nn.Linear(5, 3, bias=False).double(), (x, torch.arange(n) % 3)), x


@pytest.mark.parametrize("centred", [False, True])
def test_a_linear_model_has_the_spectrum_of_its_inputs(centred: bool) -> None:
    subject, x = linear()
    used = x - x.mean(0) if centred else x
    wanted = torch.linalg.eigvalsh(used @ used.T).flip(0)[:5].numpy()
    full = TangentKernel(examples=40, top=9, centred=centred).run(subject).data
    trace = TangentKernel(examples=40, top=5, centred=centred, outputs="trace", keep=True).run(subject).data
    assert full.eigenvalue.values == pytest.approx(np.repeat(wanted, 3)[:9])
    assert trace.eigenvalue.values == pytest.approx(wanted)
    assert trace.kernel.values == pytest.approx((x @ x.T).numpy())
    assert np.all(full.residual.values < 1e-11 * wanted[0])
    shares = wanted / wanted.sum()
    rank = math.exp(-(shares * np.log(shares)).sum())
    assert float(trace.effective_rank) == pytest.approx(rank, rel=1e-6)
    assert float(full.effective_rank) == pytest.approx(3 * rank, rel=1e-6)
    assert float(trace.trace) == pytest.approx(wanted.sum())


def test_products_find_the_same_eigenvalues() -> None:
    net = small("dense GELU")
    subject = Subject(net.model, net.data)
    for centred in (False, True):
        exact = TangentKernel(examples=10, top=4, centred=centred).run(subject)
        lean = TangentKernel(examples=10, top=4, centred=centred, solver="products", tolerance=1e-6).run(subject)
        assert lean.converged
        assert lean.data.eigenvalue.values == pytest.approx(exact.data.eigenvalue.values, rel=1e-5)
        assert math.isnan(float(lean.data.effective_rank))
    with pytest.raises(ValueError, match="full"):
        TangentKernel(solver="products", outputs="trace")


def test_the_jackknife_covers_what_other_examples_give() -> None:
    net = small("dense ReLU")
    whole = Subject(net.model, net.data)
    halves = [whole.selected(range(start, 70, 2)) for start in (0, 1)]
    found = [TangentKernel(examples=35, outputs="trace").run(half).data for half in halves]
    for name in ("alignment", "alignment_uncentred", "effective_rank"):
        one, two = ((float(d[name]), float(d[f"{name}_error"])) for d in found)
        assert 0 < one[1] < abs(one[0])
        assert abs(one[0] - two[0]) < 4 * math.hypot(one[1], two[1])


def test_targets_in_the_first_eigenvectors_have_all_power_there() -> None:
    subject, x = linear()
    y = torch.einsum("ij,cj->ic", x, torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    fitting = Subject(nn.Linear(5, 3, bias=False).double(), (x, y), loss="half_mse")
    power = TangentKernel(examples=40, top=15).run(fitting).data.target_power.values
    assert power[-1] == pytest.approx(1)  # what a linear model can fit lies in its kernel's 15 eigenvectors
    assert np.all(np.diff(power) >= 0)
    other = TangentKernel(examples=40, top=15).run(subject).data.target_power.values
    assert other[-1] < 0.9


def test_examples_are_balanced_and_the_same_at_all_weights() -> None:
    labels = torch.tensor([0] * 50 + [1] * 6 + [2] * 4)
    data = torch.randn(60, 4, dtype=torch.float64), labels
    subject = Subject(nn.Linear(4, 3).double(), data)
    chosen = picked(subject, 12)
    found = targets(chosen, 3)
    assert found is not None
    assert found.sum(0).tolist() == [4, 4, 4]
    moved = subject.at({"weight": torch.zeros(3, 4, dtype=torch.float64)})
    assert picked(moved, 12).data_digest == chosen.data_digest
    assert targets(chosen, 5) is None
    yes = Subject(
        nn.Linear(4, 1).double(), (data[0], (labels > 0).double()[:, None]), loss="binary_cross_entropy_with_logits"
    )
    assert set(targets(yes, 1).flatten().tolist()) == {-1.0, 1.0}


def test_kernels_that_differ_are_not_compared() -> None:
    net = small("dense GELU")
    subject = Subject(net.model, net.data)
    probe = TangentKernel(examples=12, outputs="trace")
    one = probe.run(subject)
    with pytest.raises(ValueError, match="parameters of the kernel"):
        compare(one, probe.run(subject.restricted("4.*")))
    with pytest.raises(ValueError, match="centred"):
        compare(one, TangentKernel(examples=12, outputs="trace", centred=True).run(subject))
    same = compare(one, probe.run(subject))
    assert "alignment" in str(same)


def test_a_kernel_that_is_not_finite_is_refused() -> None:
    subject, _ = linear()
    subject.module.weight.data[0, 0] = math.inf
    with pytest.raises((ArithmeticError, ValueError), match="finite"):
        TangentKernel(examples=8).run(subject)
