"""In which order a grid is filled, and which part of it can already be drawn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def levels(points: int) -> list[NDArray[np.int64]]:
    """Ever finer sets of indices on one axis of ``points``: both ends first, the centre with them, then between.

    The last level is all of them. Each holds 2^k + 1 indices spread as evenly as whole numbers allow.
    """
    sizes = [m for m in (3, 5, 9, 17, 33, 65, 129) if m < points] + [points]
    return [np.unique(np.round(np.linspace(0, points - 1, m)).astype(np.int64)) for m in sizes]


def coarse_to_fine(points: int) -> Iterator[tuple[int, int]]:
    """Every (i, j) of a points × points grid once, level by level; within a level from the centre outwards."""
    seen: set[tuple[int, int]] = set()
    middle = (points - 1) / 2
    for level in levels(points):
        new = [(int(i), int(j)) for i in level for j in level if (int(i), int(j)) not in seen]
        seen.update(new)
        yield from sorted(new, key=lambda p: (max(abs(p[0] - middle), abs(p[1] - middle)), p))


def drawable(evaluated: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices (on both axes) of the finest level that is complete; of the coarsest when none is yet."""
    known = [level for level in levels(len(evaluated)) if evaluated[np.ix_(level, level)].all()]
    return known[-1] if known else levels(len(evaluated))[0]


def drawn(evaluated: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices on both axes of what can be drawn of a grid (n, m): its finest complete level, see :func:`drawable`.

    All of them where the points were filled in another order, as other programs do, or the sides differ; what is
    missing is then left open.
    """
    rows, columns = evaluated.shape
    if rows == columns:
        at = drawable(evaluated)
        finer = [level for level in levels(rows) if level.size > at.size] if evaluated[np.ix_(at, at)].all() else [at]
        level = finer[0] if finer else at
        if evaluated[np.ix_(level, level)].sum() == evaluated.sum():
            return at, at
    return np.arange(rows), np.arange(columns)
