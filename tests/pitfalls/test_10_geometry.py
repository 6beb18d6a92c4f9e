"""Pitfall 10: z[i, j] is the loss at (u_i, v_j), with the model at (0, 0) and direction 1 along the drawn x axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from surfaces import surface
from torch import Tensor

from workbench.figure import Contour
from workbench.interop.of_plane import compared
from workbench.landscape.plane import Plane
from workbench.probe import Reading
from workbench.subject import Subject

Array = NDArray[np.float64]


def steep(w: Tensor) -> Tensor:
    """Curvatures 100 and 1."""
    return 50 * w[0] ** 2 + 0.5 * w[1] ** 2


def exact(u: Array, v: Array) -> Array:
    """(len(u), len(v)) along the eigenvectors."""
    return 50 * u[:, None] ** 2 + 0.5 * v[None, :] ** 2


def has_its_geometry(z: Array, u: Array, v: Array) -> None:
    """The exact values, symmetric about a minimum as near (0, 0) as the grid has points."""
    np.testing.assert_allclose(z, exact(u, v), atol=1e-9)
    np.testing.assert_allclose(z, z[::-1, ::-1], atol=1e-9)
    i, j = np.unravel_index(z.argmin(), z.shape)
    assert abs(u[i]) == pytest.approx(np.abs(u).min())
    assert abs(v[j]) == pytest.approx(np.abs(v).min())


def measured(points: int) -> tuple[Subject, Reading]:
    subject = surface(steep, 0.0, 0.0)
    return subject, Plane(points=points, directions="hessian").run(subject)


def shifted(z: Array) -> Array:
    """Odd rows one step off."""
    return np.where(np.arange(len(z))[:, None] % 2 == 1, np.roll(z, 1, axis=1), z)


def off_centre(z: Array) -> Array:
    return np.roll(z, 1, axis=0)


def swapped(z: Array) -> Array:
    return z.T


@pytest.mark.parametrize("points", [7, 8])
@pytest.mark.parametrize("fault", [shifted, off_centre, swapped])
def test_the_grid_is_where_it_says(points: int, fault: Callable[[Array], Array]) -> None:
    data = measured(points)[1].data
    u, v, z = data["u"].values, data["v"].values, data.loss.values
    has_its_geometry(z, u, v)
    assert float(data.loss_here) == 0.0
    with pytest.raises(AssertionError):
        has_its_geometry(fault(z), u, v)


@pytest.mark.parametrize("points", [7, 8])
def test_what_a_package_returns_is_seen_to_be_elsewhere(points: int) -> None:
    subject, reading = measured(points)
    returned = compared(reading, subject).returned.values
    ticks = (reading.data[name].values[:-1] for name in ("u", "v"))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(returned, exact(*ticks), atol=1e-6)


@pytest.mark.parametrize("points", [7, 8])
def test_the_drawn_x_axis_is_the_first_direction(points: int) -> None:
    drawn = next(m for m in measured(points)[1].figure().panels[0].marks if isinstance(m, Contour))
    x, y = np.asarray(drawn.x), np.asarray(drawn.y)
    np.testing.assert_allclose(np.asarray(drawn.z), exact(x, y).T, atol=1e-9)
    assert not np.allclose(drawn.z, exact(x, y), atol=1e-9)
