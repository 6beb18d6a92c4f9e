"""Dormant units: written-down activations, plain NumPy over every layer, laws, and errors by leaving examples out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pytest import approx
from torch import nn

from workbench.probe import Reading
from workbench.probes.dormant_units import FRACTIONS, DormantUnits, hidden_layers
from workbench.subject import Subject

Array = np.ndarray


def of_rows(rows: Array, act: nn.Module | None = None, **changes: object) -> Reading:
    """The probe on given pre-activations: the data pass through an activation and a linear map."""
    model = nn.Sequential(act or nn.ReLU(), nn.Linear(rows.shape[1], 2).double())
    return DormantUnits(**changes).run(Subject(model, (torch.from_numpy(rows), torch.arange(len(rows)) % 2)))  # type: ignore[arg-type]


def by_loops(h: Array, tau: float = 0.025, rarely: float = 0.01) -> dict[str, float]:
    """The definitions one unit after another, from activations (n, d)."""
    n, d = h.shape
    sizes = [sum(abs(x) for x in h[:, i]) / n for i in range(d)]
    mean = sum(sizes) / d
    held = {"dormant": 0, "dead": 0, "rarely_active": 0, "active": 0.0, "ever_active": 0}
    for i in range(d):
        held["dormant"] += sizes[i] <= tau * mean
        held["dead"] += all(x == 0 for x in h[:, i])
        held["rarely_active"] += sum(x != 0 for x in h[:, i]) < rarely * n
        held["active"] += sum(x > 0 for x in h[:, i]) / n
        held["ever_active"] += any(x > 0 for x in h[:, i])
    return {f"{name}_fraction": count / d for name, count in held.items()}


def fractions(reading: Reading, layer: int = 0) -> dict[str, float]:
    return {name: float(reading.data[name][layer]) for name in FRACTIONS if name != "saturated_fraction"}


def test_the_known_scores() -> None:
    reading = of_rows(np.array([[0.0, 2, 1], [0, 0, 5]]))
    assert reading.data.score.values[0].tolist() == [0, 0.75, 2.25]
    assert float(reading.data.dormant_fraction[0]) == approx(1 / 3)
    assert float(of_rows(np.array([[0.0, 2, 1], [0, 0, 5]]), tau=0.75).data.dormant_fraction[0]) == approx(2 / 3)


def test_the_two_active_fractions_of_one_table() -> None:
    reading = of_rows(np.array([[1.0, 0, 0], [2, 0, 3], [0, 0, 1], [4, 0, 0]]))
    assert float(reading.data.active_fraction[0]) == approx(0.41666667)
    assert float(reading.data.ever_active_fraction[0]) == approx(0.66666667)
    assert float(reading.data.dead_fraction[0]) == approx(1 / 3)


def test_four_definitions_disagree() -> None:
    rows = np.ones((300, 4))
    rows[:, 0] = -1.0  # dead
    rows[1:, 1] = -1.0  # awake on 1 of 300
    rows[:, 2] = 1e-3  # always on, and negligible
    data = of_rows(rows).data
    found = [float(data[f"{name}_fraction"][0]) for name in ("dead", "rarely_active", "dormant", "ever_active")]
    assert found == [0.25, 0.5, 0.75, 0.75]
    assert np.isnan(data.saturated_fraction[0]), "a ReLU has not two ends"
    everywhere_zero = of_rows(-rows.clip(0.5, 1)).data
    assert float(everywhere_zero.dormant_fraction[0]) == 1
    assert float(everywhere_zero.dead_fraction[0]) == 1


@pytest.mark.parametrize(
    ("act", "low", "high"), [(nn.Tanh(), -1, 1), (nn.Sigmoid(), 0, 1), (nn.Hardtanh(-2.0, 3.0), -2, 3)]
)
def test_saturated_units_lie_at_an_end(act: nn.Module, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 5)) * np.array([0.1, 1, 30, 3000, 3000])
    rows[:, 4] = -np.abs(rows[:, 4]) - 50
    h = act(torch.from_numpy(rows)).numpy()
    want = np.mean(((h > high - 0.01) | (h < low + 0.01)).mean(0) > 0.95)
    data = of_rows(rows, act, mostly=0.95).data
    assert 0 < want < 1
    assert float(data.saturated_fraction[0]) == want == float(data.total_saturated_fraction)


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 2), nn.Tanh(), nn.Flatten(), nn.Linear(28, 6), nn.ReLU6(),
        nn.Linear(6, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("batch_size", [41, 7])
def test_layers_and_totals_equal_loops_with_channels_as_units(batch_size: int) -> None:
    torch.manual_seed(0)
    model, x = conv(), torch.randn(41, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias[:2] = -50.0
    reading = DormantUnits(tau=0.9).run(Subject(model, (x, torch.arange(41) % 3), batch_size=batch_size))
    data = reading.data
    assert list(data["layer"].values) == ["1", "3", "6"]
    assert list(data.units.values) == [5, 7, 6]
    assert reading.converged
    wanted = []
    for i, end in enumerate((2, 4, 7)):
        h = model[:end](x).detach().numpy()
        flat = np.moveaxis(h, 1, -1).reshape(-1, h.shape[1])  # places as if they were examples
        wanted.append(by_loops(flat, tau=0.9))
        assert fractions(reading, i) == approx(wanted[-1], abs=1e-12)
        assert data.active_share.values[i][: h.shape[1]] == approx((flat > 0).mean(0))
    assert float(data.dead_fraction[0]) >= 0.4
    for name in wanted[0]:
        total = sum(w[name] * d for w, d in zip(wanted, (5, 7, 6), strict=True)) / 18
        assert float(data[f"total_{name}"]) == approx(total)
    assert float(data.total_saturated_fraction) == float(data.saturated_fraction[1]), "only tanh has two ends here"


def test_errors_are_the_spread_when_groups_are_left_out() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(53, 9)) - 1.5
    reading = of_rows(rows, groups=5, tau=0.8)
    h = np.maximum(rows, 0)
    again = [by_loops(np.delete(h, np.s_[g::5], 0), tau=0.8) for g in range(5)]
    for name in again[0]:
        spread = np.sqrt(4 * np.var([a[name] for a in again]))
        assert float(reading.data[f"{name}_error"][0]) == approx(spread, abs=1e-12)
    without = of_rows(rows, groups=0)
    assert np.isnan(without.data.score_error).all()
    assert without.converged


def test_the_stated_error_is_that_of_fresh_examples() -> None:
    rng = np.random.default_rng(5)
    found = [of_rows(rng.normal(size=(100, 6)) - 0.5).data for _ in range(40)]
    actual = np.std([float(d.active_fraction[0]) for d in found])
    stated = np.mean([float(d.active_fraction_error[0]) for d in found])
    assert stated == approx(actual, rel=0.35)


class Tokens(nn.Module):
    """Sequences whose activation is a module, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(x)).mean(1)


def test_masked_tokens_do_not_count() -> None:
    torch.manual_seed(1)
    x, mask = torch.randn(12, 3, 4, dtype=torch.float64), torch.ones(12, 3)
    mask[:, 2] = 0
    data = {"x": x, "attention_mask": mask, "labels": torch.arange(12) % 2}
    reading = DormantUnits(groups=0).run(Subject(Tokens(), data))
    sizes = nn.functional.gelu(x[:, :2]).abs().mean((0, 1)).numpy()
    assert reading.data.score.values[0] == approx(sizes / sizes.mean())


@settings(max_examples=25, deadline=None)
@given(
    rows=arrays.arrays(np.float64, (12, 4), elements=st.integers(-3, 3).map(float)),
    scale=st.sampled_from([0.25, 2.0, 1024.0]),
    order=st.permutations(range(4)),
)
def test_scaling_and_order_change_nothing_and_more_dormant_at_larger_tau(
    rows: Array, scale: float, order: list[int]
) -> None:
    plain = of_rows(rows, groups=0)
    other = of_rows(scale * rows[::-1][:, order].copy(), groups=0)
    assert fractions(other) == approx(fractions(plain), abs=1e-12)
    data = plain.data
    assert (
        data.dead_fraction[0] <= data.dormant_fraction[0] <= of_rows(rows, groups=0, tau=0.5).data.dormant_fraction[0]
    )
    assert data.dead_fraction[0] <= data.rarely_active_fraction[0]
    assert float(data.ever_active_fraction[0]) == 1 - float(data.dead_fraction[0]), "for a ReLU"
    assert fractions(plain) == approx(by_loops(np.maximum(rows, 0)), abs=1e-12)


def test_which_layers_are_hidden() -> None:
    def names(*parts: nn.Module) -> list[str]:
        x = torch.randn(9, 4, dtype=torch.float64)
        model = nn.Sequential(*parts).double()
        return [la.name for la in hidden_layers(Subject(model, (x, torch.randn(9, 2, dtype=torch.float64)), "mse"))]

    assert names(nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 2), nn.Sigmoid()) == ["1"], "not the output"
    assert names(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)) == ["0", "1"], "a net without activations"
    with pytest.raises(ValueError, match="no hidden layers"):
        names(nn.Linear(4, 2))


def test_a_network_that_puts_out_nan_is_refused_and_an_infinite_unit_is_unknown() -> None:
    broken = nn.Sequential(nn.ReLU(), nn.Linear(3, 2).double())
    subject = Subject(broken, (torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 2))
    with torch.no_grad():
        broken[1].bias[0] = torch.nan
    with pytest.raises(ValueError, match="outputs are nan"):
        DormantUnits().run(subject)
    model = nn.Sequential(nn.ReLU(), nn.Hardtanh(), nn.Linear(3, 2).double())
    data = (torch.full((20, 3), torch.inf, dtype=torch.float64), torch.arange(20) % 2)
    reading = DormantUnits().run(Subject(model, data))
    assert np.isnan(reading.data.dormant_fraction[0])
    assert np.isnan(reading.data.total_dormant_fraction)
    assert not reading.converged
