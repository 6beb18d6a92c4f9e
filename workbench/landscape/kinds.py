"""The kinds of directions that span a plane, each axis of its own: random, curvature's, the optimizer's, a path's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.landscape.directions import Direction, Normalization, OneDim, norm, random_direction
from workbench.numerics.geometry import coordinates, principal_path
from workbench.numerics.krylov import lanczos
from workbench.numerics.sampling import Draw
from workbench.operators.table import OperatorName, curvature
from workbench.optimizers import averaged_steps
from workbench.subject import Subject

Array = NDArray[np.float64]
Kind = Literal["random", "hessian", "ggn", "gradient", "adam", "pca"]
Second = Literal["same", "random", "hessian", "ggn", "gradient", "adam", "pca"]
WORDS: Mapping[str, str] = {
    "random": "Gaussian, normalised as below",
    "hessian": "leading eigenvector of the Hessian, unit length",
    "ggn": "leading eigenvector of the Gauss-Newton matrix, unit length",
    "gradient": "uphill, unit length",
    "adam": "against Adam's step (first moment over root of the second), unit length; needs its optimizer",
    "pca": "principal component of the recorded path; needs a trajectory",
}
"""What each kind is, for forms."""
_SINGLE = ("gradient", "adam")
_NAMES = {"hessian": "Hessian", "ggn": "Gauss-Newton"}
HELD = 2**29
"""Bytes of a recorded path that are kept in memory at once; a longer one is read from disk again and again."""


@dataclass(frozen=True, eq=False)
class Along:
    """One axis: its direction, what must be said about it, the share of a path's variance, and the path's ends."""

    direction: Direction
    notes: tuple[str, ...] = ()
    share: float = float("nan")
    reach: tuple[float, float] | None = None


def kinds(first: Kind, second: Second) -> tuple[Kind, Kind]:
    """Both axes' kinds: "same" is the next of the first axis's kind, or a random one where there is only one."""
    if second == "same":
        return first, "random" if first in _SINGLE else first
    return first, second


def chosen(
    subject: Subject,
    draw: Draw,
    wanted: tuple[Kind, Kind],
    normalization: Normalization,
    one_dim: OneDim,
) -> tuple[Along, Along]:
    """The two axes; a kind that is wanted twice gives its two leading directions."""
    queues: dict[Kind, list[Along]] = {}
    for kind in dict.fromkeys(wanted):
        places = [k for k in (0, 1) if wanted[k] == kind]
        if kind == "random":
            queues[kind] = _random(subject, draw, places, normalization, one_dim)
        else:
            queues[kind] = _MAKERS[kind](subject, draw, len(places))
    first = queues[wanted[0]].pop(0)
    return first, queues[wanted[1]].pop(0)


def axis_words(wanted: tuple[Kind, Kind], normalization: Normalization, shares: Sequence[float]) -> tuple[str, str]:
    """What stands along each axis, with the unit."""
    units = {"filter": "filter lengths", "layer": "layer lengths", "weight": "of N(0, 1) times each weight"}
    units |= {"dfilter": "distance in each filter", "dlayer": "distance in each tensor"}

    def words(k: int) -> str:
        kind, twice = wanted[k], wanted[0] == wanted[1]
        number = f" {k + 1}" if twice else " 1"
        if kind == "random":
            name = f"direction{number}" if twice else "random direction"
            return f"{name} ({units.get(normalization, 'of N(0, 1) in each weight')})"
        if kind == "pca":
            return f"component{number} ({shares[k]:.0%} of variance)"
        if kind in _NAMES:
            return f"along {_NAMES[kind]} eigenvector{number} (distance)"
        return f"{'along the gradient' if kind == 'gradient' else 'against the step of Adam'} (distance)"

    return words(0), words(1)


# ----------------------------------------------------------------------------------------------- how each is made


def _random(
    subject: Subject, draw: Draw, places: list[int], normalization: Normalization, one_dim: OneDim
) -> list[Along]:
    said = (random_words(normalization, one_dim),)
    return [Along(random_direction(subject, draw, k, normalization, one_dim), said) for k in places]


def random_words(normalization: Normalization, one_dim: OneDim = "zero") -> str:
    """How a random direction was scaled, in words."""
    if normalization == "none":
        return "random directions are plain Gaussian, biases included"
    scaled = {"dfilter": "have length 1 in each filter", "dlayer": "have length 1 in each tensor"}
    fixed = {"zero": "do not move", "copy": "move along themselves, by their own length"}[one_dim]
    how = scaled.get(normalization, f"are scaled to each {normalization}")
    return f"random directions {how}; biases and norm parameters {fixed}"


def _eigenvectors(operator: OperatorName) -> Callable[[Subject, Draw, int], list[Along]]:
    """The leading eigenvectors of a curvature, unit length, signed so that the loss first rises along them."""

    def made(subject: Subject, draw: Draw, count: int) -> list[Along]:
        if operator == "ggn" and not subject.has_outputs:
            raise ValueError(
                "directions='ggn' needs outputs and a loss of them, which a subject made with objective= does not "
                "tell apart; make it with loss=, or choose 'hessian'."
            )
        with curvature(subject, operator) as matrix:
            *_, last = lanczos(matrix, draw(0), top=count, bottom=0, tolerance=0.01, fresh=lambda i: draw(100 + i))
            vectors = last.vectors(list(range(count)))
            slopes = vectors.double() @ matrix.gradient
        signs = torch.where(slopes < 0, -1.0, 1.0).to(vectors.dtype)
        pairs = zip(last.top_residuals[:count], last.top_values[:count], strict=True)
        ratio = max(float(r) / max(abs(float(t)), 1e-300) for r, t in pairs)
        values = " and ".join(f"{value:.4g}" for value in last.top_values[:count])
        said = (
            f"{_NAMES[operator]} eigenvectors to a relative residual of {ratio:.1g}, eigenvalues {values}; the "
            "normalisation setting does not apply to them"
        )
        return [Along(subject.unflatten(s * x), (said,)) for s, x in zip(signs, vectors, strict=True)]

    return made


def _gradient(subject: Subject, draw: Draw, count: int) -> list[Along]:
    gradient = subject.gradient()
    length = norm(gradient)
    if not length > 0:
        raise ValueError("the gradient is zero here, so it has no direction; choose directions='random'.")
    found = {name: g / length for name, g in gradient.items()}
    return [Along(found, ("along the gradient of the examples, uphill, unit length",))] * count


def _adam(subject: Subject, draw: Draw, count: int) -> list[Along]:
    found = adam_direction(subject)
    return [Along(found, ("against the optimizer's step, averaged gradient over its scale, unit length",))] * count


def adam_direction(subject: Subject) -> Direction:
    """The optimizer's averaged gradient over its preconditioner, unit length: training goes the other way.

    Raises:
        ValueError: no optimizer, one that has not stepped, or one that averages no gradients.
    """
    if subject.optimizer is None:
        raise ValueError(
            "directions='adam' needs the optimizer: make the subject with wb.Subject(model, data, "
            "optimizer=optimizer), or open it from a trajectory recorded with Recorder(..., optimizer, "
            "keep_optimizer=True)."
        )
    own = dict(subject.module.named_parameters())
    steps = averaged_steps(subject.optimizer, {name: own[name] for name in subject.params})
    length = norm(steps)
    if not length > 0:
        raise ValueError("the optimizer's averaged gradient is zero, so it has no direction; choose 'random'.")
    return {name: (d / length).to(subject.params[name]) for name, d in steps.items()}


def _components(subject: Subject, draw: Draw, count: int) -> list[Along]:
    """Principal components of the recorded path, its own ends along each."""
    path, here = recorded(subject), subject.flatten(subject.params)
    axes = principal_path(path, here, count)
    found, _ = coordinates(path, here, axes.directions)
    walk = " and ".join(f"{share:.0%}" for share in axes.random_walk)
    named = "two components explain" if count == 2 else "the leading component explains"
    said = (
        f"{named} {axes.explained.sum():.1%} of the path of {len(path)} checkpoints; "
        f"a random walk of as many would show {walk}"
    )
    ends = [(min(c.min(), 0.0), max(c.max(), 0.0)) for c in found.T]
    return [
        Along(subject.unflatten(d), (said,), float(share), end)
        for d, share, end in zip(axes.directions, axes.explained, ends, strict=True)
    ]


_MAKERS: Mapping[Kind, Callable[[Subject, Draw, int], list[Along]]] = {
    "hessian": _eigenvectors("hessian"),
    "ggn": _eigenvectors("ggn"),
    "gradient": _gradient,
    "adam": _adam,
    "pca": _components,
}


# ----------------------------------------------------------------------------------------------- the recorded path


def recorded(subject: Subject) -> Sequence[Tensor]:
    """The weights of every recorded step as vectors of the subject's chosen parameters.

    Raises:
        ValueError: a subject that was not opened from a trajectory.
    """
    path = getattr(subject, "path", None)
    if path is None:
        raise ValueError(
            "directions='pca' needs the path that led to the model: open the subject with trajectory.subject(step), or "
            "choose directions='random' or 'hessian'."
        )
    steps = _Steps(subject, path)
    held = len(steps) * subject.size * subject.dtype.itemsize
    return [steps[i] for i in range(len(steps))] if held <= HELD else steps


def displacement(subject: Subject) -> Direction | None:
    """How far the model has come since the first recorded step; None without a path, or where it has not moved."""
    path = getattr(subject, "path", None)
    if path is None:
        return None
    start = subject.unflatten(_Steps(subject, path)[0])
    moved = {name: p - start[name] for name, p in subject.params.items()}
    return moved if norm(moved) > 0 else None


class _Steps(Sequence[Tensor]):
    """The recorded weights, read one at a time."""

    def __init__(self, subject: Subject, path: Any) -> None:
        self._subject, self._path = subject, path
        self._names = tuple(subject.params)

    def __len__(self) -> int:
        return len(self._path.steps)

    def __getitem__(self, index: Any) -> Any:
        weights = cast("Mapping[str, Tensor]", self._path.weights(self._path.steps[index]))
        kept = {n: weights[n].to(device=self._subject.device, dtype=self._subject.dtype) for n in self._names}
        return self._subject.flatten(kept)
