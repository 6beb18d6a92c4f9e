"""The learning curve of a linear model's kernel: its law, its prediction and what regression does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from workbench.probes.eigenframework import Eigenframework
from workbench.subject import Subject

WIDTH = 24


def linear(n: int, labels: bool = False) -> Subject:
    """f = W x of Gaussian inputs: a kernel with WIDTH equal eigenvalues."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, WIDTH, generator=rng, dtype=torch.float64)
    w = torch.randn(WIDTH, 2, generator=rng, dtype=torch.float64)
    y = x @ w / w.norm()
    net = nn.Linear(WIDTH, 2, bias=False).double()
    return Subject(net, (x, y.argmax(1) if labels else y), loss="cross_entropy" if labels else "half_mse")


def test_equal_eigenvalues_learn_one_mode_an_example() -> None:
    """Ridgeless risk of n examples among m equal modes is 1 - n/m of the targets' power, and 0 from n = m on."""
    data = Eigenframework(examples=2000, sizes=8, trials=20, ridge=1e-9).run(linear(2000)).data
    n, power = data["size"].values, float(data.constant)
    assert power == pytest.approx(1, abs=0.1)
    wanted = np.maximum(1 - n / WIDTH, 0)
    inside = n < WIDTH
    assert data.predicted.values[inside] == pytest.approx(wanted[inside], abs=0.05)
    assert data.measured.values[inside] == pytest.approx(wanted[inside], abs=0.08)
    assert data.measured.values[n > WIDTH] == pytest.approx(0, abs=1e-6)
    assert data.predicted.values[n > WIDTH] == pytest.approx(0, abs=1e-6)
    assert data.power.values[WIDTH - 1] == pytest.approx(1)
    assert data.eigenvalue.values[:WIDTH] == pytest.approx(1, abs=0.4)
    assert data.eigenvalue.values[WIDTH] < 1e-12


def test_prediction_and_measurement_agree_with_ridge() -> None:
    data = Eigenframework(examples=1200, sizes=5, trials=30, ridge=0.2).run(linear(1200, labels=True)).data
    apart = np.abs(data.predicted.values - data.measured.values)
    assert np.all(apart < 0.08 * data.measured.values)
    assert np.all(np.diff(data.predicted.values) < 0)
    assert np.all(data.predicted_error.values > 0)
    assert np.all(data.predicted_error.values < 0.1 * data.predicted.values)
    assert float(data.constant) == pytest.approx(0.5)  # one-hot less 1/2
    assert float(data.learnability.sum()) <= float(data["size"][-1])


def test_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="24 examples"):
        Eigenframework().run(linear(12))
