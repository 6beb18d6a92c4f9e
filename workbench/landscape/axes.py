"""The two directions of a plane with their ticks, and what has to be said about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.landscape.directions import Direction, Normalization, cosine, random_direction
from workbench.numerics.krylov import lanczos
from workbench.numerics.sampling import Draw
from workbench.operators import Hessian
from workbench.subject import Subject

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PlaneAxes:
    """Two directions, the coordinates of the grid along each, values that go into the reading, and notes."""

    first: Direction
    second: Direction
    u: Array
    v: Array
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()


def plane_axes(
    subject: Subject, draw: Draw, kind: str, normalization: Normalization, extent: float, points: int
) -> PlaneAxes:
    """The axes of a plane through ``subject``; ticks run over [-extent, extent], or over the path for ``"pca"``."""
    if kind == "pca":
        return _path_axes(subject, extent, points)
    ticks = np.linspace(-extent, extent, points)
    if kind == "hessian":
        first, second, notes = _eigenvectors(subject, draw)
    else:
        first, second = (random_direction(subject, draw, k, normalization) for k in (0, 1))
        notes = _random_words(normalization)
    return PlaneAxes(first, second, ticks, ticks.copy(), {"cosine": cosine(first, second)}, notes)


def _random_words(normalization: Normalization) -> tuple[str, ...]:
    if normalization == "none":
        return ("random directions are plain Gaussian, biases included",)
    return (f"random directions are scaled to each {normalization}; biases and norm parameters do not move",)


def _eigenvectors(subject: Subject, draw: Draw) -> tuple[Direction, Direction, tuple[str, ...]]:
    """The two leading Hessian eigenvectors, unit length, signed so that the loss first rises along them."""
    with Hessian(subject) as hessian:
        *_, last = lanczos(hessian, draw(0), top=2, bottom=0, tolerance=0.01, fresh=lambda i: draw(100 + i))
        vectors = last.vectors([0, 1])
    uphill = subject.flatten(subject.gradient())
    signs = torch.where(vectors @ uphill < 0, -1.0, 1.0).to(vectors.dtype)
    first, second = (subject.unflatten(s * x) for s, x in zip(signs, vectors, strict=True))
    ratio = max(r / max(abs(t), 1e-300) for r, t in zip(last.top_residuals, last.top_values, strict=True))
    said = (
        f"Hessian eigenvectors to a relative residual of {ratio:.1g}, eigenvalues {last.top_values[0]:.4g} and "
        f"{last.top_values[1]:.4g}; the normalisation setting does not apply to them"
    )
    return first, second, (said,)
