"""The loss-landscapes package (3.0) on a subject: its planes and lines, along given directions or its own.

Its function moves the parameters in place and leaves them moved, with gradients switched off; here it gets copies.
Its random numbers come from a generator of their own. Its arithmetic is left as it is.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from workbench.landscape.directions import Direction, norm
from workbench.subject import Subject

Array = NDArray[np.float64]
NAME = "loss-landscapes"


def along(subject: Subject, first: Direction, second: Direction, steps: int, deadline: float = math.inf) -> Array:
    """Its surface (steps, steps) along two directions, each given as the move of one step.

    The package divides each direction by its length; it is told one with which nothing is left to scale. The array is
    as it returns it: see :func:`put_right`.

    Args:
        subject: whose loss; its parameters are the middle.
        first: one step along the array's first index.
        second: one step along its second index.
        steps: points on each axis.
        deadline: points after this time (``time.monotonic``) are NaN.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2; got {steps}.")
    parts = [_said(_parameters().ModelParameters([t.clone() for t in d.values()]), 1.0) for d in (first, second)]
    replaced = {"rand_u_like": lambda _: parts[0], "orthogonal_to": lambda _: parts[1]}
    return _plane(subject, steps, None, deadline, float(steps), **replaced)


def between(start: Subject, end: Direction, steps: int, deadline: float = math.inf) -> Array:
    """Its losses (steps,) by ``linear_interpolation`` from a subject's parameters to others, as it returns them.

    It steps before it evaluates: the first is one step from the start, the last at the end.

    Args:
        start: whose loss; its parameters are the start.
        end: the parameters at the end.
        steps: how many points.
        deadline: points after this time (``time.monotonic``) are NaN.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")
    copies, ends = _Copies(start), _Copies(start.at(end))
    with torch.no_grad():
        found = _package().linear_interpolation(_wrapped(copies), _wrapped(ends), copies.until(deadline), steps)
    return np.asarray(found, dtype=np.float64)


def alone(subject: Subject, steps: int, seed: int = 0, deadline: float = math.inf) -> Array:
    """Its surface (steps, steps) by itself: uniform directions, its filter normalisation, its default distance 1.

    Raises:
        TypeError: the subject has a parameter without dims, on which its normalisation fails.
        ValueError: all weights are zero.
    """
    uniform = _uniform(subject, seed)
    crossed = _rebound(_parameters().orthogonal_to, rand_u_like=uniform)
    return _plane(subject, steps, "filter", deadline, None, rand_u_like=uniform, orthogonal_to=crossed)


def alone_along(subject: Subject, steps: int, seed: int = 0, deadline: float = math.inf) -> Array:
    """Its losses (steps,) by ``random_line`` by itself: a uniform direction, filter normalisation, its distance 0.1.

    Raises:
        TypeError: the subject has a parameter without dims, on which its normalisation fails.
        ValueError: all weights are zero.
    """
    call = _rebound(_package().random_line, rand_u_like=_uniform(subject, seed))
    copies = _Copies(subject)
    with torch.no_grad():
        return np.asarray(call(_wrapped(copies), copies.until(deadline), steps=steps), dtype=np.float64)


def _uniform(subject: Subject, seed: int) -> Callable[[Any], Any]:
    """Its random numbers from a generator of their own; refuses what its normalisation cannot do."""
    if any(p.ndim == 0 for p in subject.params.values()):
        raise TypeError("loss-landscapes cannot normalise parameters without dims; use along() with directions.")
    if not norm(subject.params) > 0:
        raise ValueError("loss-landscapes takes the length of all weights for its unit; they are all zero.")
    module, generator = _parameters(), torch.Generator().manual_seed(seed)

    def uniform(like: Any) -> Any:
        drawn = [torch.rand(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in like]
        return module.ModelParameters(drawn)

    return uniform


def put_right(surface: Array) -> Array:
    """Its surface (steps, steps) on the grid (steps + 1, steps + 1) around the model; NaN elsewhere.

    It walks to and fro and steps before it evaluates, so that rows with an even index lie one column further than
    those with an odd one. The last row, and one end of each row, it does not evaluate.
    """
    steps = len(surface)
    placed = np.full((steps + 1, steps + 1), np.nan)
    placed[0:steps:2, 1:] = surface[0::2]
    placed[1:steps:2, :-1] = surface[1::2]
    return placed


def _plane(
    subject: Subject, steps: int, normalization: str | None, deadline: float, length: float | None, **replaced: Any
) -> Array:
    """``length``: what the weights say is their length; None: the truth."""
    copies = _Copies(subject)
    wrapper = _wrapped(copies)
    if length is not None:
        start = _said(wrapper.get_module_parameters(), length)
        wrapper.get_module_parameters = lambda: start
    call = _rebound(_package().random_plane, **replaced)
    with torch.no_grad():
        return np.asarray(call(wrapper, copies.until(deadline), 1, steps, normalization), dtype=np.float64)


class _Copies(nn.Module):
    """Copies of a subject's parameters, in its order, for another package to move."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        self.copies = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in subject.params.values()])

    def loss(self) -> float:
        """The subject's loss where the copies are."""
        point = {name: p.detach() for name, p in zip(self.subject.params, self.copies, strict=True)}
        return float(self.subject.loss(point))

    def until(self, deadline: float) -> Callable[[Any], float]:
        """The same as a metric of the package; NaN when time is up."""
        return lambda _: math.nan if time.monotonic() > deadline else self.loss()


def _wrapped(copies: _Copies) -> Any:
    _package()
    return importlib.import_module("loss_landscapes.model_interface.model_wrapper").SimpleModelWrapper(copies)


def _said(parameters: Any, length: float) -> Any:
    """Parameters that say that they are ``length`` long."""
    parameters.model_norm = lambda *_: length
    return parameters


def _rebound(function: Any, **replaced: Callable[[Any], Any]) -> Any:
    """The same function, which sees other globals."""
    return FunctionType(
        function.__code__, {**function.__globals__, **replaced}, function.__name__, function.__defaults__
    )


def _package() -> Any:
    try:
        return importlib.import_module("loss_landscapes.main")
    except ImportError as problem:
        raise ImportError(f"loss-landscapes cannot be imported ({problem}); pip install loss-landscapes.") from problem


def _parameters() -> Any:
    _package()
    return importlib.import_module("loss_landscapes.model_interface.model_parameters")
