"""The two directions of a plane with their ticks, and what has to be said about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.landscape.directions import Direction, Normalization, OneDim, cosine, norm
from workbench.landscape.kinds import Along, Kind, Second, chosen, displacement, kinds, recorded
from workbench.landscape.quadratic import Quadratic, quadratic
from workbench.numerics.geometry import coordinates
from workbench.numerics.sampling import Draw
from workbench.subject import Subject

Array = NDArray[np.float64]
RISE = 1.0
"""With an automatic range, the predicted rise of the loss per example at the end of each axis."""
PARALLEL = 1e-6
"""Directions span a plane where 1 - |cosine| is more than this."""


@dataclass(frozen=True, eq=False)
class PlaneAxes:
    """Two directions, the coordinates of the grid along each, values that go into the reading, and notes.

    ``quadratic`` where the range rests on it, so that it is not computed twice.
    """

    first: Direction
    second: Direction
    u: Array
    v: Array
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    quadratic: Quadratic | None = None


@dataclass(frozen=True)
class Span:
    """How a plane is spanned beyond its first kind: the second axis's, 1-D tensors, where the grid lies, and its range.

    ``centre`` is added to the coordinates of the grid's middle. With ``reach="auto"`` half-widths are ``extent`` times
    the distance at which the quadratic predicts a rise of :data:`RISE`.
    """

    second: Second = "same"
    one_dim: OneDim = "zero"
    centre: tuple[float, float] = (0.0, 0.0)
    reach: Literal["given", "auto"] = "given"


def plane_axes(
    subject: Subject,
    draw: Draw,
    kind: Kind,
    normalization: Normalization,
    extent: float,
    points: int,
    span: Span | None = None,
) -> PlaneAxes:
    """The axes of a plane through ``subject``; ticks run over [-extent, extent], or over the path for ``"pca"``.

    Raises:
        ValueError: directions that are zero or parallel, or that need a path, an optimizer or outputs not there.
    """
    span = span or Span()
    wanted = kinds(kind, span.second)
    pair = chosen(subject, draw, wanted, normalization, span.one_dim)
    first, second = (a.direction for a in pair)
    _check_plane(first, second)
    found = quadratic(subject, first, second) if span.reach == "auto" else None
    halves, said = _halves(subject, pair, extent, found)
    u, v = (_ticks(a, h, extent, c, points) for a, h, c in zip(pair, halves, span.centre, strict=True))
    values, measured = _measured(subject, first, second)
    if "pca" in wanted:
        values |= _on_path(subject, pair)
    notes = dict.fromkeys((*pair[0].notes, *pair[1].notes, *measured, *said))
    return PlaneAxes(first, second, u, v, values, tuple(notes), found)


def _check_plane(first: Direction, second: Direction) -> None:
    for name, direction in (("first", first), ("second", second)):
        if not norm(direction) > 0:
            raise ValueError(
                f"the {name} direction is zero: its weights are all zero, or have at most one dim, which that "
                "normalization does not move. Choose normalization='none' or one_dim='copy', or other directions."
            )
    if 1 - abs(cosine(first, second)) <= PARALLEL:
        raise ValueError("the two directions are parallel, so they span no plane; choose another second direction.")


def _measured(subject: Subject, first: Direction, second: Direction) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Cosines between the axes, and to the way that training has come."""
    between, moved = cosine(first, second), displacement(subject)
    along = [math.nan] * 2 if moved is None else [cosine(d, moved) for d in (first, second)]
    said = (f"the axes are not orthogonal (cosine {between:.2f})",) if abs(between) > 0.1 else ()
    return {"cosine": between, "cosine_displacement": along}, said


def _on_path(subject: Subject, pair: tuple[Along, Along]) -> dict[str, Any]:
    """The recorded path in the plane, by least squares."""
    rows = torch.stack([subject.flatten(a.direction) for a in pair])
    found, distance = coordinates(recorded(subject), subject.flatten(subject.params), rows)
    return {
        "explained_variance": [a.share for a in pair],
        "path_u": found[:, 0],
        "path_v": found[:, 1],
        "path_distance": distance,
    }


def _halves(
    subject: Subject, pair: tuple[Along, Along], extent: float, found: Quadratic | None
) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Half-widths of the axes that do not run along a path, and what must be said of an automatic range."""
    if found is None:
        return (extent, extent), ()
    most = [_farthest(subject, a.direction) for a in pair]
    natural = [found.half_width(k, RISE, far) for k, far in enumerate(most)]
    said = f"half-widths {extent:g} times the distance to a predicted rise of {RISE:g} in the loss per example"
    flat = [str(k + 1) for k in (0, 1) if natural[k] == most[k]]
    cut = f"; axis {' and '.join(flat)} is so flat that it was cut at the weights' own length" if flat else ""
    return (extent * natural[0], extent * natural[1]), (said + cut,)


def _farthest(subject: Subject, direction: Direction) -> float:
    """The step that is as long as the weights that it moves; of length 1 where these are zero."""
    moved = {name: p for name, p in subject.params.items() if bool(direction[name].any())}
    return (norm(moved) or 1.0) / norm(direction)


def _ticks(along: Along, half: float, extent: float, centre: float, points: int) -> Array:
    """Even ticks around the middle, which is the model's place, or that of the path's ends on its own component."""
    middle = 0.0
    if along.reach is not None:
        low, high = along.reach
        middle, half = (low + high) / 2, extent * 1.2 * (high - low) / 2
    steps = np.linspace(-half, half, points)
    if points % 2:
        steps[points // 2] = 0.0  # rounding would keep the grid from meeting the model itself
    return steps + (middle + centre)
