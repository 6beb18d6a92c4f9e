"""Log Z: ten equal logits, a common shift that the loss cannot see, and ignored tokens and padded classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.probes.log_z import LogZ
from workbench.subject import Subject


class Table(nn.Module):
    """Logits by example number, plus a common shift."""

    def __init__(self, logits: Tensor, shift: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0].long()] + self.shift


def subject(logits: Tensor, targets: Tensor, shift: float = 0.0) -> Subject:
    places = torch.arange(len(logits)).double()[:, None]
    return Subject(Table(logits.movedim(-1, 1) if logits.ndim > 2 else logits, shift), (places, targets))


def test_ten_equal_logits() -> None:
    data = LogZ().run(subject(torch.zeros(4, 10).double(), torch.arange(4))).data
    assert float(data.log_z) == pytest.approx(2.30258509)
    assert float(data.z_loss) == pytest.approx(5.301898e-4)
    assert float(data.excess) == pytest.approx(0.0, abs=1e-12)
    assert float(data.log_z_error) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(-1000, 1000))
def test_a_common_shift_moves_log_z_and_nothing_that_the_loss_sees(shift: float) -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    still, moved = (subject(logits, torch.arange(9) % 4, s) for s in (0.0, shift))
    one, two = (LogZ().run(s).data for s in (still, moved))
    assert float(two.log_z) == pytest.approx(float(one.log_z) + shift, abs=1e-9)
    assert float(two.mean_logit) == pytest.approx(float(one.mean_logit) + shift, abs=1e-9)
    assert float(two.excess) == pytest.approx(float(one.excess), abs=1e-9)
    assert moved.loss() == pytest.approx(still.loss(), abs=1e-9)
    assert float(two.log_z_error) == pytest.approx(float(one.log_z_error), abs=1e-9)


def test_tokens_that_are_ignored_and_classes_that_are_padding_do_not_count() -> None:
    """Against loops; the error is over examples, and a token of another example is no independent prediction."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(6, 3, 5)), rng.integers(0, 4, (6, 3))
    targets[0, 1:], logits[..., 4] = -100, 50.0
    data = LogZ(classes=4).run(subject(torch.tensor(logits), torch.tensor(targets))).data
    kept = [(i, math.log(np.exp(logits[i, t, :4]).sum())) for i in range(6) for t in range(3) if targets[i, t] >= 0]
    values = np.array([z for _, z in kept])
    sums = [sum(z - values.mean() for owner, z in kept if owner == i) for i in range(6)]
    assert float(data.log_z) == pytest.approx(values.mean())
    assert float(data.log_z_square) == pytest.approx((values**2).mean())
    assert float(data.log_z_error) == pytest.approx(np.sqrt(6 / 5 * np.square(sums).sum()) / len(values))
    assert float(data.log_z_quantile.sel(quantile=1.0)) == pytest.approx(values.max())
    assert float(data.predictions) == 16


def test_more_classes_than_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="the outputs have 3"):
        LogZ(classes=4).run(subject(torch.zeros(4, 3).double(), torch.arange(4) % 3))
