"""Frames, subspaces and paths in high-dimensional space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.basis import dot, norm

Floats = NDArray[np.float64]

Rows = Tensor | Sequence[Tensor]
"""Vectors as a tensor (n, size) or as a sequence of n tensors (size,), which may load each when it is asked for."""


def simplex_frame(classes: int, dimension: int | None = None) -> Tensor:
    """The simplex equiangular tight frame: rows (classes, dimension) of length 1, pairwise cosines -1 / (classes - 1).

    Float64; ``dimension`` (default ``classes``) must be at least ``classes``, the columns beyond are zero.
    """
    dimension = classes if dimension is None else dimension
    if classes < 2 or dimension < classes:
        raise ValueError(
            f"A frame of >= 2 classes in at least as many dimensions is wanted; got {classes} in {dimension}."
        )
    frame = torch.zeros(classes, dimension, dtype=torch.float64)
    frame[:, :classes] = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return frame * math.sqrt(classes / (classes - 1))


def subspace_angles(first: Tensor, second: Tensor) -> Floats:
    """Principal angles in radians, ascending, between the spans of the rows of (k, size) and (l, size): (min(k, l),).

    Small angles come from sines and large ones from cosines, so both are accurate to about 1e-15 (for float64 rows).
    Float64 copies of both are made; cost O(size (k + l)²). Source: Björck and Golub 1973.
    """
    a, b = _orthonormal(first), _orthonormal(second)
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    inner = a.T @ b
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    sines = torch.linalg.svdvals(b - a @ inner).clamp(max=1.0).flip(0)
    angles = torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))
    return angles.cpu().numpy()


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles: 1 when the smaller span lies in the larger, 0 when orthogonal."""
    return float(np.mean(np.cos(subspace_angles(first, second)) ** 2))


def _orthonormal(rows: Tensor) -> Tensor:
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[0] > rows.shape[1]:
        raise ValueError(f"Rows (k, size) with 1 <= k <= size are wanted; got shape {tuple(rows.shape)}.")
    columns, triangle = torch.linalg.qr(rows.detach().double().T)
    diagonal = triangle.diagonal().abs()
    if bool((diagonal <= 1e-12 * torch.linalg.vector_norm(triangle, dim=0)).any()):
        raise ValueError("The rows are linearly dependent, so their span has fewer dimensions than rows; drop some.")
    return columns


@dataclass(frozen=True, eq=False)
class PathAxes:
    """Principal axes of a path of n points.

    ``directions`` (k, size) are orthonormal, ``coordinates`` (n, k) those of the points, with the reference point at
    0. ``explained`` (k,) are the axes' shares of the squared distances from the path's mean; ``random_walk`` (k,) is
    what a random walk of as many points in many dimensions would show: a share is a finding only beyond that.
    """

    directions: Tensor
    coordinates: Floats
    explained: Floats
    random_walk: Floats


def principal_path(points: Rows, reference: Tensor, components: int = 2) -> PathAxes:
    """Principal axes of a path, by the n × n Gram matrix of its points relative to ``reference``, which is the origin.

    The axes are those of the mean-centred points. Cost O(n² size), float64 sums; of a lazy sequence two points are
    held at a time. Raises ValueError where the path has fewer dimensions than ``components``. Each direction's sign
    is such that its largest coordinate is positive.
    """
    count = len(points)
    if not 1 <= components < count:
        raise ValueError(
            f"{components} axes of a path of {count} points: between 1 and {max(count - 1, 1)} are possible."
        )
    gram = _gram(points, reference)
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centring @ gram @ centring)
    values, vectors = values[::-1][:components].clip(0), vectors[:, ::-1][:, :components]
    total = float(np.trace(centring @ gram @ centring))
    if not values[-1] > 1e-12 * total:
        raise ValueError(f"The path spans fewer than {components} dimensions; ask for fewer axes.")
    weights = (centring @ vectors) / np.sqrt(values)
    coordinates = gram @ weights
    signs = np.sign(coordinates[np.abs(coordinates).argmax(axis=0), np.arange(components)])
    directions = _combine(points, reference, weights * signs)
    return PathAxes(directions, coordinates * signs, values / total, random_walk_explained(components, count))


def _gram(points: Rows, reference: Tensor) -> Floats:
    count = len(points)
    gram = np.empty((count, count))
    for i in range(count):
        row = points[i].detach() - reference
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = float(dot(row, row if i == j else points[j].detach() - reference))
    return gram


def _combine(points: Rows, reference: Tensor, weights: Floats) -> Tensor:
    out = torch.zeros(weights.shape[1], reference.numel(), dtype=torch.float64, device=reference.device)
    for i in range(len(points)):
        row = (points[i].detach() - reference).double()
        for axis, weight in enumerate(weights[i]):
            out[axis].add_(row, alpha=float(weight))
    return (out / torch.linalg.vector_norm(out, dim=1, keepdim=True)).to(reference.dtype)


def random_walk_explained(components: int, points: int | None = None) -> Floats:
    """Shares (components,) of variance on the principal axes of a random walk of ``points`` points in many dimensions.

    Proportional to 1 / (1 - cos(πk / points)) for k = 1, ..., points - 1; for long walks (None) 6 / (π² k²).
    Source: Antognini and Sohl-Dickstein 2018.
    """
    k = np.arange(1, components + 1)
    if points is None:
        return 6 / (np.pi * k) ** 2
    shares = 1 / (1 - np.cos(np.pi * np.arange(1, points) / points))
    return (shares / shares.sum())[:components]


def coordinates(points: Rows, reference: Tensor, directions: Tensor) -> tuple[Floats, Floats]:
    """Least-squares coordinates (n, k) of points in a plane through ``reference``, and their distances (n,) from it.

    ``directions`` (k, size) need not be orthogonal nor of unit length: reference + coordinates @ directions is the
    nearest point of the plane.
    """
    gram = np.array([[float(dot(a, b)) for b in directions] for a in directions])
    found, distances = [], []
    for i in range(len(points)):
        row = points[i].detach() - reference
        solution = np.linalg.solve(gram, [float(dot(row, direction)) for direction in directions])
        rest = row - torch.as_tensor(solution, dtype=directions.dtype, device=directions.device) @ directions
        found.append(solution)
        distances.append(float(norm(rest)))
    return np.array(found).reshape(-1, len(directions)), np.array(distances)
