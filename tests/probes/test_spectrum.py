"""Spectra against those of Hessians computed entry by entry, on every kind of net; what a reading says of itself."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import SMALL, small
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from workbench.figure import Points, Stems
from workbench.operators.gauss_newton import GaussNewton
from workbench.probe import ModelChanged, Reading, drive
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject

CHEAP = HessianSpectrum(top=1, minimum=False, trace=False, density=False)


def subject(name: str, **words: Any) -> Subject:
    net = small(name)
    return Subject(net.model, net.data, **words)


def exact(name: str) -> np.ndarray:
    return small(name).eigenvalues.detach().numpy()


def worst(found: Any, wanted: Any) -> float:
    return float(np.max(np.abs(np.asarray(found) / np.asarray(wanted) - 1)))


class Weights(nn.Module):
    """A point in weight space, for objectives that are formulas."""

    def __init__(self, *start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def quadratic(*curvatures: float) -> Subject:
    """½ Σ a_i w_i² at w = 1."""
    a = torch.tensor(curvatures, dtype=torch.float64)

    def half(model: Weights, batch: Tensor) -> Tensor:
        return 0.5 * (a * model.w**2).sum()

    return Subject(Weights(*np.ones(len(a))), [torch.zeros(1)], objective=half, reduction="mean")


# ------------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-4), (torch.float32, 1e-3)])
def test_accuracy_at_a_tight_tolerance(name: str, dtype: torch.dtype, allowed: float) -> None:
    truth = exact(name)
    reading = HessianSpectrum(tolerance=1e-4, trace=dtype == torch.float64).run(subject(name, dtype=dtype))
    assert reading.converged
    assert worst(reading.data.eigenvalue, truth[:10]) < allowed
    assert worst(reading.data.eigenvalue_min, truth[-1]) < allowed
    if dtype == torch.float64:
        assert worst(reading.data.trace, truth.sum()) < allowed
        assert float(reading.data.trace_error) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["dense GELU", "LSTM", "tied embedding"])
def test_stated_errors_hold_at_the_default_tolerance(name: str, dtype: torch.dtype) -> None:
    truth, reading = exact(name), HessianSpectrum().run(subject(name, dtype=dtype))
    data = reading.data
    assert reading.converged
    nearest = np.abs(data.eigenvalue.values[:, None] - truth).min(axis=1)
    rounding = 16 * torch.finfo(dtype).eps * truth[0]  # of the products, and of the reference
    assert np.all(nearest <= data.residual.values + rounding)
    assert np.all(data.residual <= 0.02 * data.eigenvalue)
    assert float(data.eigenvalue[0]) <= truth[0] * (1 + 8 * torch.finfo(dtype).eps)
    assert np.abs(float(data.eigenvalue_min) - truth).min() <= float(data.eigenvalue_min_residual)
    assert abs(float(data.trace) - truth.sum()) < 1.5 * float(data.trace_error)
    assert float(data.trace_error) <= 0.02 * abs(float(data.trace))
    nodes, weights = (v[np.isfinite(v)] for v in (data.node.values, data.weight.values))
    assert weights.sum() == pytest.approx(1)
    assert wasserstein_distance(nodes, truth, weights) < 1.1 * float(data.density_error)
    assert np.trapezoid(data.density, data["value"]) == pytest.approx(1, abs=2e-3)


def test_loss_and_gradient_stand_beside_the_spectrum() -> None:
    net, data = small("dense GELU"), CHEAP.run(subject("dense GELU")).data
    loss = net.loss(net.model)
    norm = math.hypot(*(float(g.norm()) for g in torch.autograd.grad(loss, list(net.model.parameters()))))
    assert float(data.train_loss) == pytest.approx(loss.item(), rel=1e-10)
    assert float(data.gradient_norm) == pytest.approx(norm, rel=1e-10)
    each = subject("dense GELU").losses()
    assert each is not None
    assert float(data.train_loss_error) == pytest.approx(float(each.std()) / math.sqrt(len(each)), rel=1e-10)


def test_judged_by_its_estimate_the_first_eigenvalue_costs_fewer_products_and_says_so() -> None:
    """Tolerance 1e-4: the true error keeps to it, while the bound, which is still shown, need not."""
    target, first = subject("dense GELU"), exact("dense GELU").max()
    bound, estimate = (replace(CHEAP, tolerance=1e-4, judged=judged).run(target) for judged in ("residual", "estimate"))
    assert int(estimate.data.products) < int(bound.data.products)
    assert estimate.converged
    assert abs(float(estimate.data.eigenvalue[0]) - first) <= 1e-4 * first
    assert float(estimate.data.estimated_error[0]) <= 1e-4 * first < float(estimate.data.residual[0])
    assert any("no bound" in note for note in estimate.notes)
    assert not any("no bound" in note for note in bound.notes)
    assert float(estimate.summary["sharpness_error"]) == float(estimate.data.residual[0])


def test_gauss_newton_spectrum() -> None:
    with GaussNewton(subject("dense GELU")) as matrix:
        truth = torch.linalg.eigvalsh(matrix.dense()).flip(0).numpy()
    reading = HessianSpectrum(operator="ggn", top=5, tolerance=1e-4).run(subject("dense GELU"))
    assert reading.converged
    assert worst(reading.data.eigenvalue, truth[:5]) < 1e-4
    assert worst(reading.data.trace, truth.sum()) < 1e-4
    assert np.isnan(reading.data.eigenvalue_min)
    assert any("minimum was not sought" in note for note in reading.notes)


# --------------------------------------------------------------------------------------------- known by formula


def test_the_largest_is_not_the_largest_in_magnitude() -> None:
    reading = HessianSpectrum(top=2).run(quadratic(-5, 1))
    assert reading.data.eigenvalue.values == pytest.approx([1, -5])
    assert reading.summary["eigenvalue_min"] == pytest.approx(-5)
    assert reading.summary["negative_curvature"] == "resolved"
    assert reading.data.trace == pytest.approx(-4)


@pytest.mark.parametrize("tolerance", [0.02, 1e-4])
def test_repeated_eigenvalues_are_all_found(tolerance: float) -> None:
    x = torch.tensor([[1, 0], [0, 2], [1, 1], [2, 1]], dtype=torch.float64)
    model = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    reading = HessianSpectrum(tolerance=tolerance).run(Subject(model, (x, torch.tensor([0, 1, 2, 0]))))
    found = reading.data.eigenvalue.values
    assert found[:6] == pytest.approx([0.75, 0.75, 0.25, 0.25, 0, 0], abs=1e-12)
    assert np.isnan(found[6:]).all()
    assert reading.converged
    assert any("only 6 eigenvalues" in note for note in reading.notes)
    assert reading.summary["negative_curvature"] == "no negative curvature resolved"
    assert reading.data.trace == pytest.approx(2)
    assert float(reading.data.density_error) == 0


@pytest.mark.parametrize("tolerance", [0.02, 1e-4])
def test_repeated_eigenvalues_above_a_bulk_are_all_found(tolerance: float) -> None:
    reading = HessianSpectrum(top=6, tolerance=tolerance, trace=False).run(
        quadratic(*np.linspace(0, 1, 300), 5, 5, 4, 4, 4)
    )
    assert reading.data.eigenvalue.values == pytest.approx([5, 5, 4, 4, 4, 1], rel=tolerance)
    assert reading.converged
    assert reading.data.products < 120


@settings(max_examples=15)
@given(st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.01, 0.5, 2.0, 2.02, 7.0]), min_size=1, max_size=60))
def test_any_small_spectrum(curvatures: list[float]) -> None:
    truth = np.sort(curvatures)[::-1]
    reading = HessianSpectrum(top=5, tolerance=1e-4).run(quadratic(*curvatures))
    count, scale = min(5, len(truth)), np.abs(truth).max()
    assert np.allclose(reading.data.eigenvalue.values[:count], truth[:count], atol=1e-4 * scale)
    assert float(reading.data.eigenvalue_min) == pytest.approx(truth[-1], abs=1e-4 * scale)
    assert float(reading.data.trace) == pytest.approx(truth.sum(), abs=1e-4 * np.abs(truth).sum())
    assert reading.converged


# ------------------------------------------------------------------------------------------ what a reading says


def test_the_first_eigenvalue_alone_is_cheap() -> None:
    for name in SMALL:
        reading = CHEAP.run(subject(name))
        assert reading.converged
        assert reading.summary["products"] <= 12
        assert worst(reading.summary["sharpness"], exact(name)[0]) < 1e-3
        assert {"trace", "eigenvalue_min", "density_error"}.isdisjoint(reading.summary)


def test_a_starved_run_says_so_and_is_drawn_grey() -> None:
    reading = HessianSpectrum().run(subject("dense GELU"), seconds=1e-9)
    assert not reading.converged
    assert reading.done < 1
    assert not reading.data.converged.any()
    first = reading.figure().panels[0]
    drawn = {m.role: np.isfinite(m.y).sum() for m in first.marks if isinstance(m, Points)}
    assert drawn == {"main": 0, "unconverged": 1}


def test_the_figure_tells_what_is_sure() -> None:
    reading = HessianSpectrum().run(subject("dense GELU"))
    eigenvalues, density = reading.figure().panels
    points = next(m for m in eigenvalues.marks if isinstance(m, Points) and m.role == "main")
    assert np.array_equal(points.y, reading.data.eigenvalue)
    assert np.array_equal(points.error, reading.data.residual)
    assert not any(np.isfinite(m.y).any() for m in eigenvalues.marks if isinstance(m, Points) and m is not points)
    atoms = next(m for m in density.marks if isinstance(m, Stems))
    assert sorted(atoms.x) == sorted([*reading.data.eigenvalue.values, float(reading.data.eigenvalue_min)])
    width = float(reading.data.smoothing_width)
    assert f"{width:.2g}" in density.title
    assert atoms.y == pytest.approx(1 / (math.sqrt(2 * math.pi) * width * small("dense GELU").size))
    assert len(HessianSpectrum(density=False).run(subject("dense GELU")).figure().panels) == 1


def test_notes_tell_what_the_numbers_are_of() -> None:
    notes = " ".join(CHEAP.run(subject("conv + BatchNorm", dtype=torch.float32, max_examples=50)).notes)
    for words in ("float32 copy", "running statistics", "on 50 of 70", "biased upwards", "kinks", "self-test"):
        assert words in notes
    assert "biased" not in " ".join(CHEAP.run(subject("dense GELU")).notes)


def test_readings_of_a_stream_sharpen_and_say_how_far_they_are() -> None:
    readings = list(drive(HessianSpectrum(), subject("dense GELU")))
    products = [int(r.data.products) for r in readings]
    assert products[0] == 1
    assert products == sorted(products)
    assert [r.done for r in readings] == sorted(r.done for r in readings)
    firsts = [float(r.data.eigenvalue[0]) for r in readings]
    assert np.all(np.diff(firsts) > -1e-9)
    assert isinstance(readings[0], Reading)
    assert json.loads(readings[0].data.attrs["notes"])


def test_training_meanwhile_stops_the_run() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    stream = drive(HessianSpectrum(), Subject(model, (torch.randn(20, 4), torch.arange(20) % 3)))
    next(stream)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    with pytest.raises(ModelChanged, match="snapshot"):
        list(stream)


def test_a_loss_that_is_not_finite_is_named() -> None:
    def diverged(model: Weights, batch: Tensor) -> Tensor:
        return (model.w**2).sum() / 0 * 0

    with pytest.raises(ValueError, match="loss at the model's own point is nan"):
        CHEAP.run(Subject(Weights(1, 2), [torch.zeros(1)], objective=diverged, reduction="mean"))
