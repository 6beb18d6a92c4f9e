"""Geometry of grids with holes: cell edges, cells that touch an unknown value, and stretches without a gap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workbench.draw.rulers import Ruler
from workbench.figure import Array

Box = tuple[float, float, float, float]


def edges(centres: Array, r: Ruler) -> Array:
    """The n + 1 edges of n cells, half-way between centres as the axis shows them."""
    u = r.forward(centres)
    if u.size == 1:
        return r.inverse(np.array([u[0] - 0.5, u[0] + 0.5]))
    inner = 0.5 * (u[1:] + u[:-1])
    return r.inverse(np.concatenate([[1.5 * u[0] - 0.5 * u[1]], inner, [1.5 * u[-1] - 0.5 * u[-2]]]))


def open_quads(known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For each mesh of four neighbouring grid points: True when at least one of the four is not known."""
    return ~(known[:-1, :-1] & known[1:, :-1] & known[:-1, 1:] & known[1:, 1:])


def boxes(where: NDArray[np.bool_], x: Array, y: Array) -> list[Box]:
    """Rectangles (x0, x1, y0, y1) that cover the marked cells, neighbours in a row joined; x and y are edges."""
    return [(x[i], x[j], y[row], y[row + 1]) for row in range(where.shape[0]) for i, j in runs(where[row])]


def runs(where: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and end (exclusive) of each stretch of True."""
    steps = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)]


def outline(pieces: list[Box]) -> tuple[Array, Array]:
    """The boxes as one broken line of closed rectangles, NaN between them."""
    if not pieces:
        return np.empty(0), np.empty(0)
    box = np.array(pieces)
    gap = np.full(len(pieces), np.nan)
    x = np.stack([box[:, 0], box[:, 1], box[:, 1], box[:, 0], box[:, 0], gap], axis=1)
    y = np.stack([box[:, 2], box[:, 2], box[:, 3], box[:, 3], box[:, 2], gap], axis=1)
    return x.ravel()[:-1], y.ravel()[:-1]
