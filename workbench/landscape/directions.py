"""Directions in weight space: random ones scaled like the weights, curvature's own, and those of a recorded path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from workbench.numerics.sampling import Draw
from workbench.parameters import filter_axes
from workbench.subject import Subject

Normalization = Literal["filter", "layer", "weight", "dfilter", "dlayer", "none"]
OneDim = Literal["zero", "copy"]
Direction = dict[str, Tensor]


def random_direction(
    subject: Subject, draw: Draw, vector: int, normalization: Normalization, one_dim: OneDim = "zero"
) -> Direction:
    """A Gaussian direction scaled to the weights (Li et al. 2018, arXiv:1712.09913).

    ``"filter"``: each filter f of the direction is scaled to d_f ‖θ_f‖ / ‖d_f‖, so that plots of networks that differ
    only by a rescaling of their filters agree; ``"layer"``: the same for whole tensors; ``"weight"``: each entry is
    multiplied with |θ|; ``"dfilter"`` and ``"dlayer"``: each filter, or tensor, of the direction has length 1;
    ``"none"``: plain N(0, 1), and ``one_dim`` does not matter. Under all the others, tensors with at most one dim
    (biases, norm scales) are zero, as in the paper, or for ``one_dim="copy"`` the weights themselves, as its code can.
    A filter whose weights are zero gets zero. Axis of a filter: see :func:`~workbench.parameters.filter_axes`.
    """
    raw = subject.unflatten(draw(vector))
    if normalization == "none":
        return raw
    axes = filter_axes(subject.module) if normalization.endswith("filter") else {}

    def scaled(name: str, weight: Tensor) -> Tensor:
        if weight.ndim <= 1:
            return torch.zeros_like(weight) if one_dim == "zero" else weight.clone()
        return _scaled(raw[name], weight, axes.get(name, 0), normalization)

    return {name: scaled(name, weight) for name, weight in subject.params.items()}


def _scaled(direction: Tensor, weight: Tensor, axis: int, normalization: Normalization) -> Tensor:
    if normalization == "weight":
        return direction * weight.abs()
    over = tuple(d for d in range(weight.ndim) if d != axis or normalization.endswith("layer"))
    lengths = torch.linalg.vector_norm(direction, dim=over, keepdim=True)
    unit = normalization.startswith("d")
    wanted = torch.ones_like(lengths) if unit else torch.linalg.vector_norm(weight, dim=over, keepdim=True)
    return torch.where(lengths > 0, direction * (wanted / lengths.clamp_min(torch.finfo(weight.dtype).tiny)), 0.0)


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """⟨a, b⟩ over all tensors, summed in float64."""
    return float(sum(torch.dot(a[k].flatten().double(), b[k].flatten().double()) for k in a))


def norm(a: Mapping[str, Tensor]) -> float:
    """‖a‖ over all tensors."""
    return inner(a, a) ** 0.5


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Cosine of the angle between two directions; nan when one of them is zero."""
    lengths = norm(a) * norm(b)
    return inner(a, b) / lengths if lengths > 0 else float("nan")


def mover(subject: Subject, u: Direction, v: Direction) -> Callable[[float, float], Direction]:
    """The weights at coordinates (a, b): θ + a·u + b·v, without touching θ."""
    here = subject.params

    def at(a: float, b: float) -> Direction:
        return {name: torch.add(torch.add(w, u[name], alpha=a), v[name], alpha=b) for name, w in here.items()}

    return at


def unmoved_share(here: Mapping[str, Tensor], there: Mapping[str, Tensor], along: Mapping[str, Tensor]) -> float:
    """Share of the coordinates with a non-zero step that rounding left where they were (θ + ε·d == θ)."""
    asked = sum(int((along[k] != 0).sum()) for k in here)
    stuck = sum(int(((along[k] != 0) & (there[k] == here[k])).sum()) for k in here)
    return stuck / asked if asked else 0.0
