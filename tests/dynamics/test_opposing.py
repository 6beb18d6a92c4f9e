"""Opposing signals: two examples swung to and fro at the edge of stability, found among others that are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench.dynamics.opposing import OpposingSignals, _correlation
from workbench.trajectory import Trajectory

SWUNG = torch.tensor([[10.0, 1.0], [-10.0, 1.0]], dtype=torch.float64)


def train(folder: Path, x: torch.Tensor, steps: int, every: int = 1) -> Trajectory:
    """Gradient descent on ½(w·x - 1)² just above 2/λ, from w = (.01, 0)."""
    model, y = nn.Linear(2, 1, bias=False).double(), torch.ones(len(x), 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.01, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0201 * len(x) / 2)
    with wb.Recorder(folder, model, optimizer, every=every) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = 0.5 * (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            recorder.step(train_loss=loss)
    return Trajectory.open(folder).using(nn.Linear(2, 1, bias=False).double(), (x, y), "half_mse")


def test_two_examples_at_the_edge(tmp_path: Path) -> None:
    """Losses (.405, .605), (.584, .386), (.368, .564): the mean moves a tenth of what each of them does."""
    data = OpposingSignals(step=0).run(train(tmp_path / "run", SWUNG, 2)).data
    losses = np.array([[0.405, 0.605], [0.58417241, 0.38623260], [0.36824848, 0.56414930]])
    assert data.example.values.ravel().tolist() == [0, 1]
    assert data.group_loss.values == pytest.approx(losses, abs=1e-8)
    assert data.change.values.ravel() == pytest.approx(losses[1] - losses[0], abs=1e-8)
    assert data.mean_change.values[:2] == pytest.approx(np.diff(losses.mean(1)), abs=1e-8)
    assert float(data.alternation[1]) == pytest.approx(-1.0)
    assert data.group_share.values[:2] == pytest.approx([1.0, 1.0])
    grads = (SWUNG @ torch.tensor([0.01, 0.0]).double() - 1)[:, None] * SWUNG
    cosine = float(grads[0] @ grads[1] / grads[0].norm() / grads[1].norm())
    assert float(data.cosine) == pytest.approx(cosine)
    assert cosine < -0.97
    assert data.group_energy.values == pytest.approx([100 / 101] * 2), "both are proportional to (10, 1) or (-10, 1)"
    assert float(data.gradient_energy) == pytest.approx(0.5), "their mean is (1, -1), along no eigenvector"
    assert float(data.sharpness) == pytest.approx(100.0)
    errors = [*data.group_energy_error.values, float(data.gradient_energy_error), float(data.sharpness_error)]
    assert max(errors) < 1e-6


def test_they_are_found_among_examples_with_weak_signals(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    quiet = torch.cat([0.1 * torch.randn(98, 1, generator=rng), torch.full((98, 1), 0.1)], 1).double()
    x = torch.cat([quiet[:40], SWUNG * torch.tensor([1.0, 0.1]), quiet[40:]])  # the common signal is learnt slowly
    reading = OpposingSignals(share=0.01).run(train(tmp_path / "run", x, 8))
    assert sorted(reading.data.example.values.ravel().tolist()) == [40, 41]
    assert reading.data.target.values.ravel().tolist() == [1.0, 1.0]
    assert reading.summary["alternation"] < -0.8
    assert min(reading.summary[f"{group}_energy"] for group in ("rising", "falling")) > 0.99
    plain = OpposingSignals(share=0.01, directions=0).run(train(tmp_path / "again", x, 8))
    assert np.isnan(plain.data.group_energy).all()
    assert plain.data.example.identical(reading.data.example)
    assert not any("more than one step apart" in note for note in reading.notes)


def test_without_a_hessian_all_but_the_energies_is_there(tmp_path: Path) -> None:
    """√(w²) at w = 0 has a value, but no derivative that is finite."""

    class Kinked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + (self.weight[0, 1] ** 2).sqrt()

    path = train(tmp_path / "run", SWUNG, 2)
    reading = OpposingSignals(step=0).run(path.using(Kinked(2, 1, bias=False).double()))
    assert float(reading.data.picked_at) == 0
    assert np.isnan(reading.data.group_energy).all()
    assert not reading.converged
    assert any("energies could not be measured" in note for note in reading.notes)


def test_gaps_between_checkpoints_are_said_and_steps_must_exist(tmp_path: Path) -> None:
    trajectory = train(tmp_path / "run", SWUNG, 4, every=2)
    assert any("more than one step apart" in note for note in OpposingSignals().run(trajectory).notes)
    with pytest.raises(ValueError, match="with another after it"):
        OpposingSignals(step=4).run(trajectory)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10**6))
def test_the_correlation_is_numpys(count: int, seed: int) -> None:
    one, two = np.random.default_rng(seed).normal(size=(2, count))
    assert _correlation(one, two) == pytest.approx(np.corrcoef(one, two)[0, 1])
    assert np.isnan(_correlation(np.ones(count), two))
