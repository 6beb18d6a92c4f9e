"""SAM's and ASAM's steps against closed forms."""

from __future__ import annotations

import pytest
import torch
from surfaces import Q2, last, point, quadratic, surface

from workbench.sharpness.balls import Ellipsoid, Euclidean
from workbench.sharpness.first_order import first_order
from workbench.sharpness.scales import elementwise


def test_sam_on_a_quadratic() -> None:
    here = point(quadratic(Q2, 1.0, 1.0))
    found = last(first_order(here, Euclidean(0.1)))
    assert found.value == pytest.approx(0.23260680, abs=5e-9)
    assert found.error < 1e-14
    assert here.gradient_norm == pytest.approx(5**0.5, rel=1e-14)
    slope, bend = 5**0.5, 9 / 5  # ‖g‖ and gᵀHg/‖g‖²
    wanted = [0.1 * f * slope + 0.5 * (0.1 * f) ** 2 * bend for f in (0.1, 0.3, 1.0)]
    assert found.rise == pytest.approx(wanted, rel=1e-10)
    assert found.notes == ()


@pytest.mark.parametrize(("compat", "wanted"), [(False, 0.96530739), (True, 0.96894557)])
def test_asam_on_a_quadratic(compat: bool, wanted: float) -> None:
    subject = quadratic(Q2, 1.0, 3.0)
    found = last(first_order(point(subject), Ellipsoid(0.1, elementwise(subject, compat))))
    assert found.value == pytest.approx(wanted, abs=5e-9)


def test_a_vanishing_gradient_is_said_to_be_noise() -> None:
    for at in (1e-6, 0.0):
        found = last(first_order(point(quadratic(Q2, at, at)), Euclidean(0.1)))
        assert bool(found.notes) == (at != 0)
        assert at != 0 or found.value == 0
    assert "noise" in last(first_order(point(quadratic(Q2, 1e-6, 1e-6)), Euclidean(0.1))).notes[0]


def test_steps_that_rounding_swallows_are_said() -> None:
    subject = surface(lambda w: (w**2).sum(), 1e6, 1.0)
    notes = last(first_order(point(subject), Euclidean(1e-11))).notes
    assert any("rounding left" in note for note in notes)
    assert torch.equal(subject.params["weight"], torch.tensor([[1e6, 1.0]], dtype=torch.float64))
