"""Pitfall 8: points that are NaN or Inf stay so, are counted and hatched, and change nothing beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from surfaces import surface
from torch import Tensor

from workbench.landscape.plane import Plane

Array = NDArray[np.float64]
PLANE = Plane(points=7, normalization="none")


def sound(w: Tensor) -> Tensor:
    return 1.0 + 50 * w[0] ** 2 + 0.5 * w[1] ** 2


def broken(w: Tensor) -> Tensor:
    """NaN to one side, +Inf to the other."""
    return sound(w) + torch.where(w[0] > 0.4, torch.nan, 0.0) + torch.where(w[1] > 0.6, torch.inf, 0.0)


def measured() -> Array:
    return PLANE.run(surface(broken, 0.0, 0.0)).data.loss.values


def filled_with_the_mean() -> Array:
    """The fault, as published."""
    z = measured()
    return np.where(np.isfinite(z), z, z[np.isfinite(z)].mean())


def filled_with_the_maximum() -> Array:
    """Another."""
    z = measured()
    return np.where(np.isfinite(z), z, z[np.isfinite(z)].max() + 0.01)


def keeps_them(found: Callable[[], Array]) -> None:
    """Equal to a run without the faults, point by point, except where the loss itself is not finite."""
    z, whole = found(), PLANE.run(surface(sound, 0.0, 0.0)).data.loss.values
    lost = ~np.isfinite(z)
    assert np.isnan(z).any()
    assert np.isposinf(z).any()
    np.testing.assert_array_equal(z[~lost], whole[~lost])


@pytest.mark.parametrize("fault", [filled_with_the_mean, filled_with_the_maximum])
def test_they_are_kept_and_a_fill_would_be_seen(fault: Callable[[], Array]) -> None:
    keeps_them(measured)
    with pytest.raises(AssertionError):
        keeps_them(fault)


def test_they_are_counted_and_hatched(tmp_path: Path) -> None:
    hatched = dict[str, bool]()
    for name, function in (("broken", broken), ("sound", sound)):
        reading = PLANE.run(surface(function, 0.0, 0.0))
        lost = int((~np.isfinite(reading.data.loss.values)).sum())
        assert reading.summary["not_finite"] == lost
        assert (f"{lost} points are not finite (hatched)" in reading.figure().note) == (name == "broken")
        reading.export(tmp_path / f"{name}.svg")
        hatched[name] = "<pattern" in (tmp_path / f"{name}.svg").read_text()
    assert hatched == {"broken": True, "sound": False}
