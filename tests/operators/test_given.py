"""Foreign matrices measured by our probes, and our operators in SciPy's hands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as linalg
import torch
from architectures import small

from workbench.numerics.operator import Diagonal, Matrix
from workbench.operators.given import given
from workbench.operators.hessian import Hessian
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

SPECTRUM = np.concatenate([[9.0, 5.0, 5.0, 2.0], np.linspace(-0.5, 0.5, 36)])


def symmetric() -> torch.Tensor:
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    return torch.from_numpy(basis @ np.diag(SPECTRUM) @ basis.T)


def forms() -> dict[str, Any]:
    a = symmetric()
    return {
        "tensor": a,
        "array": a.numpy(),
        "operator": Matrix(a),
        "scipy": linalg.aslinearoperator(a.numpy()),
        "single": a.float(),
    }


@pytest.mark.parametrize("form", ["tensor", "array", "operator", "scipy", "single"])
def test_the_spectrum_of_a_matrix_in_any_form(form: str) -> None:
    subject = given(forms()[form], name=form)
    reading = HessianSpectrum(top=5, tolerance=1e-5).run(subject)
    close = 1e-5 if form == "single" else 1e-8
    assert reading.data.eigenvalue.values == pytest.approx([9, 5, 5, 2, 0.5], abs=close)
    assert float(reading.data.eigenvalue_min) == pytest.approx(-0.5, abs=close)
    assert float(reading.data.trace) == pytest.approx(SPECTRUM.sum(), abs=100 * close)
    assert reading.converged
    assert (float(reading.data.train_loss), float(reading.data.gradient_norm)) == (0.0, 0.0)


def test_a_product_with_the_subject_is_one_product_with_the_matrix() -> None:
    class Counting(Diagonal):
        count = 0

        def matvec(self, vector: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return super().matvec(vector)

    operator = Counting(torch.arange(1.0, 6.0, dtype=torch.float64))
    with Hessian(given(operator)) as hessian:
        hessian.matvec(torch.ones(5, dtype=torch.float64))
        before = operator.count
        assert hessian.matvec(torch.ones(5, dtype=torch.float64)).tolist() == [1, 2, 3, 4, 5]
        assert operator.count == before + 1


def test_curvlinops_operators_are_measured_and_ours_are_scipys() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    net = small("dense GELU")
    params = [p for p in net.model.parameters() if p.requires_grad]
    theirs = curvlinops.HessianLinearOperator(net.model, torch.nn.CrossEntropyLoss(), params, [net.data])
    probe = HessianSpectrum(top=3, tolerance=1e-4, trace=False, density=False)
    found = probe.run(given(theirs, "curvlinops")).data
    exact = net.eigenvalues.numpy()
    assert found.eigenvalue.values == pytest.approx(exact[:3], rel=1e-4)
    assert float(found.eigenvalue_min) == pytest.approx(exact[-1], rel=1e-3)
    with Hessian(Subject(net.model, net.data)) as hessian:
        largest = linalg.eigsh(hessian.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert np.sort(largest)[::-1] == pytest.approx(exact[:3], rel=1e-8)


def test_matrices_are_told_apart_and_bad_ones_refused() -> None:
    a = symmetric()
    assert given(a).fingerprint() == given(a).fingerprint()
    assert given(a).fingerprint() != given(2 * a).fingerprint()
    lopsided = a.clone()
    lopsided[0, 1] += 5
    with pytest.raises(ValueError, match="is not symmetric"):
        given(lopsided)
    with pytest.raises(ValueError, match=r"square matrix; got one of shape \(3, 4\)"):
        given(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="got str"):
        given("a matrix")


def test_named_tensors_are_multiplied_by_name() -> None:
    net = small("conv + BatchNorm")
    subject = Subject(net.model, net.data)
    v = torch.linspace(-1, 1, subject.size, dtype=torch.float64)
    with Hessian(subject) as hessian:
        named = hessian @ subject.unflatten(v)
        assert set(named) == set(subject.params)
        assert torch.equal(subject.flatten(named), hessian @ v)
        with pytest.raises(KeyError, match="no tensor for parameter"):
            hessian @ {"0.weight": named["0.weight"]}
        with pytest.raises(KeyError, match="nope"):
            hessian @ {**named, "nope": v}
