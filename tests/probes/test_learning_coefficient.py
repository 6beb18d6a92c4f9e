"""Local learning coefficients against closed forms: of the posterior, of the finite step, and of random batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm as gaussian
from torch import Tensor, nn

from workbench.plan import Plan
from workbench.probe import Reading
from workbench.probes.learning_coefficient import LearningCoefficient
from workbench.subject import Subject

HEAT = 1000 / math.log(1000)  # nβ of a thousand examples
CURVATURES = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)


class Weights(nn.Module):
    """Independent copies (copies, dims) of a point: as many chains in one, for sharp averages at little cost."""

    def __init__(self, copies: int, *start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64).repeat(copies, 1))


def formula(loss: Callable[[Tensor], Tensor], copies: int, *start: float) -> Subject:
    """Σ over copies of ``loss(w)``, so that λ̂ is ``copies`` times that of one."""

    def total(model: Any, batch: Any) -> Tensor:
        return loss(model.w).sum()

    return Subject(Weights(copies, *start), [torch.zeros(1)], objective=total, reduction="mean")


def quadratic(copies: int) -> Subject:
    return formula(lambda w: 0.5 * CURVATURES * w**2, copies, 0.0, 0.0, 0.0)


def closed_form(step: float, pull: float, heat: float = HEAT) -> float:
    """½ Σ nβh / (a (1 - εa/4)) with a = nβh + γ."""
    a = heat * CURVATURES + pull
    return float((heat * CURVATURES / (a * (1 - step * a / 4))).sum() / 2)


def each(reading: Reading, copies: int, name: str = "learning_coefficient") -> tuple[float, float]:
    data = reading.data
    return float(data[name]) / copies, float(data.learning_coefficient_error) / copies


def agree(found: tuple[float, float], wanted: float, sharp: float) -> None:
    """Within four standard errors, which are small enough to mean something."""
    value, error = found
    assert 0 < error < sharp
    assert abs(value - wanted) < 4 * error


def words(reading: Reading) -> str:
    return " | ".join(reading.notes)


# ----------------------------------------------------------------------------------------------------- the number


def test_the_closed_form_itself() -> None:
    assert closed_form(1e-12, 1e-9) == pytest.approx(1.5)
    assert closed_form(1e-12, 1.0) == pytest.approx(1.45744911)
    assert closed_form(1e-3, 1.0) == pytest.approx(1.48726256)


@pytest.mark.parametrize(
    ("step", "burn_in", "draws"), [(1e-2, 150, 400), pytest.param(1e-3, 800, 2000, marks=pytest.mark.slow)]
)
def test_a_quadratic_with_its_finite_step_and_without(step: float, burn_in: int, draws: int) -> None:
    probe = LearningCoefficient(step=step, burn_in=burn_in, draws=draws, inverse_temperature=HEAT, tolerance=0.5)
    reading = probe.run(quadratic(1000))
    assert float(reading.data.split_rhat) < 1.1
    agree(each(reading, 1000), closed_form(step, 1.0), 0.01)
    agree(each(reading, 1000, "unbiased_coefficient"), closed_form(1e-12, 1.0), 0.01)
    difference = closed_form(step, 1.0) - closed_form(1e-12, 1.0)
    assert each(reading, 1000, "step_bias")[0] == pytest.approx(difference, rel=0.02)


def test_random_batches_add_what_theory_says() -> None:
    n, size, per_batch, step = 100, 800, 8, 0.01
    heat = n / math.log(n)
    slopes = torch.randn(n, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes -= slopes.mean(0)
    variance = slopes.var(0) / per_batch * (1 - per_batch / n)

    def losses(model: Any, batch: Any) -> Tensor:
        return 0.5 * (model.w**2).sum() + batch[0] @ model.w[:, 0]

    subject = Subject(Weights(size, 0.0), [(slopes, torch.zeros(n))], objective=losses, reduction="none")
    reading = LearningCoefficient(step=step, burn_in=100, localisation=0.0, batch=per_batch, tolerance=0.5).run(subject)
    excess = (1 + step * heat**2 * variance / 4) / (1 - step * heat / 4)
    assert float(reading.data.inverse_temperature) == pytest.approx(heat)
    agree(each(reading, size), float(excess.mean()) / 2, 0.01)
    agree(each(reading, size, "unbiased_coefficient"), 0.5, 0.01)
    assert float(excess.mean()) > 1.15, "a bias that a test can see"
    assert "random batches of 8" in words(reading)


def test_a_quartic_is_half_as_complex_as_a_quadratic() -> None:
    probe = LearningCoefficient(localisation=0.0, inverse_temperature=HEAT, burn_in=400, draws=1000)
    reading = probe.run(formula(lambda w: w**4, 500, 0.0))
    assert reading.converged, words(reading)
    assert 0.88 < float(reading.data.acceptance) < 0.97
    value, error = each(reading, 500)
    bias = each(reading, 500, "step_bias")[0]
    agree((value - bias / 2, error), 0.25, 0.01)  # E[w·∇U] = P + (ε/4) E‖∇U‖² holds for any loss, and w·∇w⁴ = 4 w⁴
    assert abs(value - 0.25) < bias + 4 * error


def crossing(heat: float, pull: float) -> float:
    """E[nβ w_1² w_2²] with the pull, the second weight integrated by hand."""

    def weight(w: float) -> float:
        return math.exp(-pull * w * w / 2) / math.sqrt(heat * w * w + pull / 2)

    def inner(w: float) -> float:
        return weight(w) * heat * w * w / (2 * (heat * w * w + pull / 2))

    limit = 12 / math.sqrt(pull)
    return quad(inner, 0, limit, points=[0.1], limit=200)[0] / quad(weight, 0, limit, points=[0.1], limit=200)[0]


def test_two_valleys_that_cross() -> None:
    heat, pull = 100.0, 10.0
    probe = LearningCoefficient(localisation=pull, inverse_temperature=heat, tolerance=0.05)
    reading = probe.run(formula(lambda w: w[:, 0] ** 2 * w[:, 1] ** 2, 500, 0.0, 0.0))
    value, error = each(reading, 500)
    bias = each(reading, 500, "step_bias")[0]
    assert error < 0.01
    assert -4 * error < value - crossing(heat, pull) < bias + 4 * error


@pytest.mark.slow
def test_reduced_rank_regression() -> None:
    """B A from 2 over 2 to 2 dimensions at rank 0: 3/2, against the 4 of eight free parameters."""

    def loss(w: Tensor) -> Tensor:
        first, second = w[:, :4].reshape(-1, 2, 2), w[:, 4:].reshape(-1, 2, 2)
        return 0.5 * (second @ first) ** 2

    probe = LearningCoefficient(localisation=1.0, inverse_temperature=1e5, burn_in=2000, draws=4000)
    reading = probe.run(formula(loss, 200, *([0.0] * 8)))
    value, error = each(reading, 200, "unbiased_coefficient")
    assert value == pytest.approx(1.5, abs=0.2 + 4 * error)


def test_logistic_regression_at_its_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    y = (torch.rand(400, generator=generator, dtype=torch.float64) < torch.sigmoid(x[:, 0])).double()
    model = nn.Linear(5, 1, dtype=torch.float64)
    loss = nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x).squeeze(1), y)
        value.backward()
        return value

    optimizer.step(closure)
    flat = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    hessian = torch.autograd.functional.hessian(lambda w: loss(x @ w[:5] + w[5], y), flat)
    h = torch.linalg.eigvalsh(hessian) * 400 / math.log(400)
    wanted = float((h / (h + 1)).sum() / 2)
    reading = LearningCoefficient(draws=800).run(Subject(model, (x, y[:, None]), nn.BCEWithLogitsLoss()))
    assert reading.converged, words(reading)
    value, error = each(reading, 1, "unbiased_coefficient")
    assert error < 0.2
    assert abs(value - wanted) < 4 * error + 0.05 * wanted  # the loss is not quadratic over the posterior's width


# -------------------------------------------------------------------------------------------------- how sure it is


def test_acceptance_is_the_metropolis_ratio() -> None:
    step, heat = 0.05, 40.0
    a = heat  # one weight, h = 1, γ = 0
    probe = LearningCoefficient(step=step, inverse_temperature=heat, localisation=0.0, burn_in=200)
    reading = probe.run(formula(lambda w: 0.5 * w**2, 1, 0.0))
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1 / math.sqrt(a * (1 - step * a / 4)), 200_000)
    moved = w * (1 - step * a / 2) + math.sqrt(step) * rng.standard_normal(w.size)

    def log_move(here: np.ndarray, there: np.ndarray) -> np.ndarray:
        return gaussian.logpdf(there, here - step / 2 * a * here, math.sqrt(step))

    ratio = a * (w**2 - moved**2) / 2 + log_move(moved, w) - log_move(w, moved)
    wanted = np.minimum(1, np.exp(ratio)).mean()
    assert wanted < 0.9
    assert float(reading.data.acceptance) == pytest.approx(wanted, abs=0.02)


def test_too_long_a_step_is_said() -> None:
    probe = LearningCoefficient(step=0.0272, inverse_temperature=HEAT)  # unstable beyond 4/a = 0.02744
    reading = probe.run(quadratic(10))
    assert not reading.converged
    assert "set a smaller step" in words(reading)
    gone = LearningCoefficient(step=0.1, inverse_temperature=HEAT).run(quadratic(2))
    assert not gone.converged
    assert math.isnan(float(gone.data.learning_coefficient)) or "accept" in words(gone)


def test_chains_that_did_not_mix_are_said() -> None:
    reading = LearningCoefficient(step=1e-6, inverse_temperature=HEAT, draws=300).run(quadratic(1))
    assert not reading.converged
    assert "have not mixed" in words(reading)


def test_no_minimum_is_said() -> None:
    reading = LearningCoefficient(inverse_temperature=HEAT).run(formula(lambda w: (w - 1) ** 2, 4, 0.0))
    assert float(reading.data.learning_coefficient) < 0
    assert "no local minimum" in words(reading)
    assert float(reading.data.gradient_norm) == pytest.approx(4.0)


@pytest.mark.slow
def test_standard_errors_hold_over_seeds() -> None:
    probe = LearningCoefficient(step=1e-2, inverse_temperature=HEAT, draws=500, burn_in=100, tolerance=0.5)
    subject, wanted = quadratic(3), 3 * closed_form(1e-2, 1.0)
    off = []
    for seed in range(50):
        data = probe.run(subject, seed=seed).data
        off.append(abs(float(data.learning_coefficient) - wanted) / float(data.learning_coefficient_error))
    assert np.mean(np.array(off) < 2) > 0.85
    assert np.mean(np.array(off) < 1) > 0.55


# ------------------------------------------------------------------------------------------------ what it rests on


def small(**words: Any) -> Subject:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Subject(model, (x, (x[:, 0] > 0).long()), **words)


@pytest.mark.parametrize("batch", [0, 16])
def test_chunks_number_of_chains_and_tuning_leave_a_chain_as_it_is(batch: int) -> None:
    probe = LearningCoefficient(chains=2, draws=300, burn_in=100, batch=batch)
    whole = probe.run(small())
    step = float(whole.data.step_size)
    given = LearningCoefficient(chains=1, draws=300, burn_in=100, batch=batch, step=step)
    alone, chunked = given.run(small()), given.run(small().with_plan(Plan(chunk=7)))
    np.testing.assert_array_equal(alone.data.excess_loss.values[0], whole.data.excess_loss.values[0])
    np.testing.assert_allclose(chunked.data.excess_loss.values, alone.data.excess_loss.values, rtol=1e-7, atol=1e-10)
    assert np.isfinite(whole.data.excess_loss.values).all()


def test_batches_cost_no_sharpness_where_they_are_compared_with_themselves() -> None:
    """L(w*) on the same batch: at w* itself every excess is exactly zero, whatever the batch."""
    data = LearningCoefficient(chains=3, draws=300, burn_in=100, batch=5, step=1e-5).run(small()).data
    np.testing.assert_allclose(data.excess_loss.values[:, 0], 0, atol=1e-15)


def test_grid_repeats_the_run_at_its_middle() -> None:
    probe = LearningCoefficient(chains=1, draws=300, burn_in=100, step=3e-3, inverse_temperature=HEAT, grid=True)
    data = probe.run(quadratic(100)).data
    assert float(data.grid_coefficient[1, 1]) == float(data.learning_coefficient)
    assert np.isfinite(data.grid_coefficient.values).all()
    by_step = data.grid_coefficient.values[:, 1] / 100
    assert by_step == pytest.approx([closed_form(s, 1.0) for s in (1e-3, 3e-3, 9e-3)], abs=0.15)
    assert (np.diff(data.grid_coefficient.values, axis=1) < 0).all(), "a stronger pull leaves less freedom"
    assert probe.figure(data).panels[-1].title == "grid"


def test_what_cannot_be_sampled_is_refused_before_work() -> None:
    with pytest.raises(ValueError, match="at least 3 examples"):
        LearningCoefficient().run(quadratic(1))
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match="batch must be 0"):
        LearningCoefficient(batch=8).run(Subject(model, (x, torch.zeros(20).long()), norm="batch", batch_size=10))
    with pytest.raises(ValueError, match="draws"):
        LearningCoefficient(draws=2)


def test_a_reading_says_how_it_was_measured() -> None:
    reading = LearningCoefficient(draws=300, burn_in=100, chains=2).run(small())
    said = json.loads(reading.data.attrs["notes"])
    assert "on 40 of 40 examples" in said
    assert any(note.startswith("nβ = 10.8434 = 40/ln 40") for note in said)
    assert any("tuned" in note for note in said)
    assert list(reading.data["draw"].values[[0, 99, 100, -1]]) == [-99, 0, 1, 300]
    later = reading.data.excess_loss.sel(draw=slice(1, None))
    assert float(reading.data.learning_coefficient) == pytest.approx(40 / math.log(40) * float(later.mean()))
