"""Gradient noise against curvature: matrices formed entry by entry, and a regression in which one is the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor, nn
from torch.func import functional_call

from workbench.numerics.alignment import jackknife, joined, ratios, variance_spread
from workbench.numerics.trace import half_width
from workbench.operators import noise as noise_module
from workbench.operators.noise import GradientNoise
from workbench.probe import Reading
from workbench.probes.noise_alignment import NoiseAlignment
from workbench.subject import Subject


def data(examples: int, inputs: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] + x[:, 1] ** 2 > 0.5).long()


def net(width: int = 4, inputs: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 2)).double()


class Exact:
    """H and C of a net's mean cross-entropy, one derivative at a time."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        shapes = {n: p.shape for n, p in model.named_parameters()}
        point = torch.cat([p.detach().flatten() for p in model.parameters()])

        def loss(flat: Tensor, rows: slice) -> Tensor:
            parts = flat.split([s.numel() for s in shapes.values()])
            named = {n: part.view(s) for part, (n, s) in zip(parts, shapes.items(), strict=True)}
            return nn.functional.cross_entropy(functional_call(model, named, (x[rows],)), y[rows])

        hessian: Any = torch.autograd.functional.hessian(lambda w: loss(w, slice(None)), point)
        self.h = hessian.numpy()
        each = [
            torch.autograd.functional.jacobian(lambda w, i=i: loss(w, slice(i, i + 1)), point) for i in range(len(x))
        ]
        self.gradients = torch.stack(each).numpy()
        self.mean = self.gradients.mean(0)
        self.c = np.cov(self.gradients.T)
        self.size = len(point)

    def values(self, top: int) -> dict[str, Any]:
        """Every number of a reading, from the two matrices."""
        h, c, g, size = self.h, self.c, self.mean, self.size
        curved, noisy = (np.linalg.eigh(m)[1][:, ::-1][:, :top] for m in (h, c))
        product = float(np.trace(h @ c))
        return {
            "hessian_trace": np.trace(h),
            "noise_trace": np.trace(c),
            "product_trace": product,
            "hessian_norm": np.linalg.norm(h),
            "noise_norm": np.linalg.norm(c),
            "alignment": product / np.linalg.norm(h) / np.linalg.norm(c),
            "relative_alignment": size * product / np.trace(h) / np.trace(c),
            "noise_share": np.trace(curved.T @ c @ curved) / np.trace(c),
            "subspace_overlap": np.linalg.norm(curved.T @ noisy) ** 2 / top,
            "gradient_overlap": np.linalg.norm(curved.T @ g) ** 2 / (g @ g),
            "gradient_curvature": g @ h @ g / (g @ g),
            "gradient_noise": g @ c @ g / (g @ g),
            "gradient_norm": np.linalg.norm(g),
            "chance": top / size,
        }


def words(reading: Reading) -> str:
    return " | ".join(reading.notes)


# ----------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("chunk", [7, None])
def test_covariance_of_gradients_entry_by_entry(
    stored: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not stored:
        monkeypatch.setattr(noise_module, "ROWS_BYTES", 0)
    model, (x, y) = net(), data(25)
    exact = Exact(model, x, y)
    with GradientNoise(Subject(model, (x, y), batch_size=chunk)) as operator:
        assert (operator.rows is not None) == stored
        np.testing.assert_allclose(operator.dense().numpy(), exact.c, atol=1e-12)
        v = torch.linspace(-1, 1, exact.size, dtype=torch.float64)
        centred = exact.gradients - exact.mean
        np.testing.assert_allclose(operator.project(v).numpy(), centred @ v.numpy(), atol=1e-12)
        if stored:
            assert operator.trace == pytest.approx(np.trace(exact.c))


def test_weights_of_classes_scale_gradients_so_that_their_mean_is_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    model, (x, y) = net(), data(20)
    parameters = list(model.parameters())
    scale = 20 / float(weight[y].sum())
    rows = []
    for i in range(20):
        loss = scale * weight[y[i]] * nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    wanted = np.cov(torch.stack(rows).numpy().T)
    subject = Subject(model, (x, y), nn.CrossEntropyLoss(weight=weight))
    for limit in (0, 2**28):
        monkeypatch.setattr(noise_module, "ROWS_BYTES", limit)
        np.testing.assert_allclose(GradientNoise(subject).dense().numpy(), wanted, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize("stored", [True, False])
def test_every_number_of_a_small_net(stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not stored:
        monkeypatch.setattr(noise_module, "ROWS_BYTES", 0)
    model, (x, y) = net(), data(40)
    reading = NoiseAlignment(top=3, tolerance=1e-4).run(Subject(model, (x, y)))
    assert reading.converged, words(reading)
    exact = Exact(model, x, y)
    for name, wanted in exact.values(3).items():
        assert float(reading.data[name]) == pytest.approx(wanted, rel=1e-4), name
    values, vectors = np.linalg.eigh(exact.h)
    curved = vectors[:, ::-1][:, :3]
    np.testing.assert_allclose(reading.data.eigenvalue, values[::-1][:3], rtol=1e-5)
    np.testing.assert_allclose(reading.data.noise_variance, np.diag(curved.T @ exact.c @ curved), rtol=1e-4)
    np.testing.assert_allclose(reading.data.noise_eigenvalue, np.linalg.eigvalsh(exact.c)[::-1][:3], rtol=1e-5)
    assert all(float(reading.data[f"{n}_error"]) == 0 for n in ("alignment", "relative_alignment", "hessian_trace"))


def test_stated_errors_hold_where_traces_are_sampled() -> None:
    model, (x, y) = net(26), data(60)
    exact = Exact(model, x, y)
    wanted = exact.values(5)
    probe, subject = NoiseAlignment(top=5, samples=30, tolerance=0.01), Subject(model, (x, y))
    assert not probe.exact(subject.size)
    names = ("alignment", "relative_alignment", "hessian_trace", "product_trace", "hessian_norm", "noise_norm")
    inside = []
    for seed in range(10):
        got = probe.run(subject, seed=seed).data
        off = [abs(float(got[n]) - wanted[n]) / float(got[f"{n}_error"]) for n in names]
        inside.append(np.array(off) <= 1)
        for name in ("noise_share", "subspace_overlap", "gradient_overlap"):
            assert abs(float(got[name]) - wanted[name]) <= float(got[f"{name}_error"])
        assert 0 < float(got.alignment_error) < 0.1 * float(got.alignment)
        assert float(got.noise_trace) == pytest.approx(wanted["noise_trace"])
    assert np.mean(inside) > 0.85


@given(st.floats(0.1, 10), st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_noise_is_curvature_in_a_well_specified_regression(sigma: float, seed: int) -> None:
    """Every input twice, with residuals ±σ: then g = ±σ x and C = σ² n/(n-1) H exactly."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(15, 6, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1])
    x, sign = torch.cat([half, half]), torch.cat([torch.ones(15, 1), -torch.ones(15, 1)]).double()
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    targets = model(x).detach() + sigma * sign
    data = NoiseAlignment(top=2, tolerance=1e-4).run(Subject(model, (x, targets), "half_mse")).data
    h = (x.T @ x / 30).numpy()
    values = np.linalg.eigvalsh(h)[::-1]
    factor = sigma**2 * 30 / 29
    assert float(data.alignment) == pytest.approx(1)
    assert float(data.relative_alignment) == pytest.approx(6 * (values**2).sum() / values.sum() ** 2)
    assert float(data.noise_trace) == pytest.approx(factor * np.trace(h))
    assert float(data.subspace_overlap) == pytest.approx(1)
    assert float(data.noise_share) == pytest.approx(values[:2].sum() / values.sum())
    np.testing.assert_allclose(data.noise_variance, factor * data.eigenvalue)
    assert float(data.gradient_norm) < 1e-12


def test_what_is_not_defined_is_refused_or_said() -> None:
    x, y = data(20)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match="no gradients of their own"):
        NoiseAlignment().run(Subject(model, (x, y), norm="batch", batch_size=10))
    with pytest.raises(ValueError, match="at least 2 examples"):
        NoiseAlignment().run(Subject(net(), (x[:1], y[:1])))
    same = NoiseAlignment(top=2).run(Subject(net(), (x[:1].repeat(12, 1), y[:1].repeat(12))))
    assert not same.converged
    assert math.isnan(float(same.data.alignment))
    assert "there is no noise to align" in words(same)
    few = NoiseAlignment(top=3).run(Subject(net(), (x, y)))
    assert "C has rank 19 at most" in words(few)
    assert "on 20 of 20 examples" in words(few)


def test_first_reading_is_partial_and_all_are_drawn() -> None:
    found: list[Reading] = []
    NoiseAlignment(top=2).run(Subject(net(), data(30)), on_reading=found.append)
    assert math.isnan(float(found[0].data.alignment))
    assert [r.done for r in found] == sorted(r.done for r in found)
    assert all(len(r.figure().panels) == 2 for r in (found[0], found[len(found) // 2], found[-1]))


# --------------------------------------------------------------------------------------------------------- the maths


def test_jackknife_of_a_mean_is_its_interval_and_of_a_ratio_covers() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((20, 1)) + 3
    value, error = jackknife(lambda s: {"mean": float(s[0])}, np.ones(1), samples)
    assert value["mean"] == pytest.approx(1 + samples.mean())
    plain = student.ppf(0.975, 19) * samples.std(ddof=1) / math.sqrt(20)
    assert error["mean"] == pytest.approx(half_width(samples[:, 0]))
    assert 1 < error["mean"] / plain < 1.25
    inside = []
    for _ in range(300):
        pairs = rng.standard_normal((40, 1)) + rng.standard_normal((40, 2)) * 0.5 + [3.0, 5.0]
        found, off = jackknife(lambda s: {"ratio": float(s[0] / s[1])}, np.zeros(2), pairs)
        inside.append(abs(found["ratio"] - 0.6) <= off["ratio"])
    assert np.mean(inside) > 0.93


def test_joined_directions_are_orthonormal_and_count_once() -> None:
    first = torch.eye(6, dtype=torch.float64)[:3]
    second = torch.stack([first[1], (first[0] + torch.eye(6, dtype=torch.float64)[4]) / math.sqrt(2)])
    rows = joined(first, second)
    assert rows.shape == (4, 6)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(second @ rows.T @ rows, second)


def test_variance_spread_is_that_of_normal_samples() -> None:
    rng = np.random.default_rng(0)
    n = 500
    resampled = rng.multinomial(n, np.full(n, 1 / n), 400).astype(float)
    found: list[float] = [variance_spread(rng.normal(0, 2, n), resampled) for _ in range(20)]
    assert np.mean(found) == pytest.approx(4 * math.sqrt(2 / (n - 1)), rel=0.1)


def test_ratios_of_nothing_are_unknown() -> None:
    nothing: Any = ratios(np.zeros(5), 3)
    assert math.isnan(nothing["alignment"])
    assert math.isnan(nothing["relative_alignment"])
