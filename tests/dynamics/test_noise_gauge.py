"""The gauge of the noise scale through the optimizer's preconditioner, against P written out from its state."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import workbench as wb
from workbench.dynamics import gauges

PARTS = np.array([(2.0, 0.0), (2.0, 2.0), (0.0, 0.0), (4.0, 2.0)])


class TwoWeights(nn.Module):
    """Two weights, of which an optimizer may hold one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.second = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def learn(folder: Path, model: TwoWeights, optimizer: torch.optim.Optimizer) -> tuple[list[dict], object]:
    """Four steps, each of four micro-batches whose gradients are known; the optimizer's state before each."""
    before: list[dict] = []
    both = [gauges.NoiseScale(every=1), gauges.NoiseScale(every=1, preconditioned=True)]
    with wb.Recorder(folder, model, optimizer, gauges=both) as rec:
        for step in range(4):
            before.append({p: copy.deepcopy(held) for p, held in optimizer.state.items()})
            optimizer.zero_grad()
            for a, b in PARTS * (step + 1):
                ((model.first * a + model.second * b).sum() / 4).backward()
            optimizer.step()
            rec.step()
    return before, wb.Trajectory.open(folder).scalars


def of_known_gradients(scale: np.ndarray) -> tuple[float, float]:
    """|G|² and tr Σ of the four gradients at diagonal scale η/P, unbiased, by their definition."""
    variance = (PARTS.var(axis=0, ddof=1) * scale).sum()
    return (PARTS.mean(axis=0) ** 2 * scale).sum() - variance / 4, variance


def test_the_noise_scale_is_that_of_adams_steps(tmp_path: Path) -> None:
    model = TwoWeights()
    groups = [{"params": [model.first], "lr": 0.1}, {"params": [model.second], "lr": 0.01}]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.9))
    before, table = learn(tmp_path, model, optimizer)
    assert math.isnan(table.preconditioned_noise_scale.loc[1]), "P is not known before the first step"
    means = np.zeros(2)
    for step in (2, 3, 4):
        states = [before[step - 1][p] for p in (model.first, model.second)]
        first, second = 1 - 0.5 ** (step - 1), 1 - 0.9 ** (step - 1)
        p = [first * ((s["exp_avg_sq"] / second).sqrt().item() + 1e-8) for s in states]
        square, variance = of_known_gradients(np.array([0.1, 0.01]) / p)
        square, variance = square * step**2, variance * step**2
        assert table.preconditioned_gradient_square.loc[step] == pytest.approx(square)
        assert table.preconditioned_gradient_variance.loc[step] == pytest.approx(variance)
        means = np.array([square, variance]) if step == 2 else 0.95 * means + 0.05 * np.array([square, variance])
        assert table.preconditioned_noise_scale.loc[step] == pytest.approx(means[1] / means[0])
    assert table.noise_scale.iloc[1:].tolist() == pytest.approx([1] * 4), "the plain gauge beside it"


def test_a_weight_that_the_optimizer_does_not_hold_makes_no_noise(tmp_path: Path) -> None:
    model = TwoWeights()
    _, table = learn(tmp_path, model, torch.optim.SGD([model.first], lr=0.5, momentum=0.9))
    square, variance = of_known_gradients(np.array([0.5, 0.0]))
    found = table.preconditioned_noise_scale.iloc[1:].tolist()
    assert found == pytest.approx([variance / square] * 4), "P = 1 before the first step too"


def test_rows_of_a_sparse_gradient_meet_their_own_entries(tmp_path: Path) -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=sparse).double()
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        with wb.Recorder(tmp_path / str(sparse), model, optimizer, gauges=[gauges.NoiseScale(1, 1, None, True)]) as rec:
            for _ in range(3):
                optimizer.zero_grad()
                for rows in ([0, 3], [3, 1], [1, 3]):
                    model(torch.tensor(rows)).square().sum().backward()
                optimizer.step()
                rec.step()
        found.append(wb.Trajectory.open(tmp_path / str(sparse)).scalars.preconditioned_noise_scale.iloc[2:].tolist())
    assert found[0] == pytest.approx(found[1], nan_ok=True)
    assert np.isfinite(found[0]).any()


def test_an_optimizer_without_a_known_preconditioner_is_refused_at_once(tmp_path: Path) -> None:
    model = TwoWeights()
    with pytest.raises(ValueError, match="no preconditioner is known for Rprop"):
        wb.Recorder(
            tmp_path, model, torch.optim.Rprop(model.parameters()), gauges=[gauges.NoiseScale(preconditioned=True)]
        ).__enter__()
