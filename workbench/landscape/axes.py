"""The two directions of a plane with their ticks, and what has to be said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.landscape.directions import Direction, Normalization, cosine, random_direction
from workbench.numerics.geometry import coordinates, principal_path
from workbench.numerics.krylov import lanczos
from workbench.numerics.sampling import Draw
from workbench.operators.hessian import Hessian
from workbench.subject import Subject

Array = NDArray[np.float64]
HELD = 2**29
"""Bytes of a recorded path that are kept in memory at once; a longer one is read from disk again and again."""


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


def _path_axes(subject: Subject, extent: float, points: int) -> PlaneAxes:
    """Principal axes of the recorded path, the grid reaching ``extent`` times as far as the path and a fifth more."""
    path = _recorded(subject)
    here = subject.flatten(subject.params)
    axes = principal_path(path, here)
    found, distance = coordinates(path, here, axes.directions)
    first, second = (subject.unflatten(d) for d in axes.directions)
    values = {
        "cosine": cosine(first, second),
        "explained_variance": axes.explained,
        "path_u": found[:, 0],
        "path_v": found[:, 1],
        "path_distance": distance,
    }
    walk = " and ".join(f"{share:.0%}" for share in axes.random_walk)
    said = (
        f"two components explain {axes.explained.sum():.1%} of the path of {len(path)} checkpoints; "
        f"a random walk of as many would show {walk}"
    )
    u, v = (_reach(c, extent, points) for c in found.T)
    return PlaneAxes(first, second, u, v, values, (said,))


def _reach(along: Array, extent: float, points: int) -> Array:
    low, high = min(along.min(), 0.0), max(along.max(), 0.0)
    middle, half = (low + high) / 2, extent * 1.2 * (high - low) / 2
    return np.linspace(middle - half, middle + half, points)


def _recorded(subject: Subject) -> Sequence[Tensor]:
    """The weights of every recorded step as vectors of the subject's chosen parameters."""
    path = getattr(subject, "path", None)
    if path is None:
        raise ValueError(
            "directions='pca' needs the path that led to the model: open the subject with trajectory.subject(step), or "
            "choose directions='random' or 'hessian'."
        )
    steps = _Steps(subject, path)
    held = len(steps) * subject.size * subject.dtype.itemsize
    return [steps[i] for i in range(len(steps))] if held <= HELD else steps


class _Steps(Sequence[Tensor]):
    """The recorded weights, read one at a time."""

    def __init__(self, subject: Subject, path: Any) -> None:
        self._subject, self._path = subject, path
        self._names = tuple(subject.params)

    def __len__(self) -> int:
        return len(self._path.steps)

    def __getitem__(self, index: Any) -> Any:
        weights = self._path.weights(self._path.steps[index])
        kept = {n: weights[n].to(device=self._subject.device, dtype=self._subject.dtype) for n in self._names}
        return self._subject.flatten(kept)
