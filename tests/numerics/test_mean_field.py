"""Mean-field theory: closed forms for rectifiers and lines, and the fixed point of critical initialisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from workbench.numerics.mean_field import Affine, backward, forward, gaussian_moments


@given(st.floats(1e-3, 1e3))
def test_closed_forms(variance: float) -> None:
    assert gaussian_moments(nn.ReLU(), variance) == pytest.approx((variance / 2, 0.5), rel=1e-5)
    assert gaussian_moments(nn.Identity(), variance) == pytest.approx((variance, 1.0), rel=1e-9)
    half = gaussian_moments(torch.erf, variance)[0]  # Williams 1998: E erf(u)² = 2/π arcsin(2v/(1 + 2v))
    assert half == pytest.approx(2 / math.pi * math.asin(2 * variance / (1 + 2 * variance)), rel=1e-5)


def test_rectifiers_at_criticality_keep_both_moments_for_ever() -> None:
    width = 64
    steps = [step for _ in range(30) for step in (Affine(2 / width, 0.0, width, width), nn.ReLU())]
    seconds, slopes = forward(steps, 1.0)
    assert seconds[0::2] == pytest.approx(np.full(30, 2.0), rel=1e-4)
    assert backward(steps, slopes, 1.0)[1::2] == pytest.approx(np.ones(30), rel=1e-4)


def test_unequal_widths_hand_gradients_down_by_the_outgoing_side() -> None:
    steps = [Affine(0.1, 0.5, 10, 40), nn.Identity(), Affine(0.2, 0.0, 40, 5)]
    seconds, slopes = forward(steps, 3.0)
    assert seconds == pytest.approx([3.5, 3.5, 28.0])
    assert backward(steps, slopes, 7.0) == pytest.approx([7.0, 7.0, 7.0])
