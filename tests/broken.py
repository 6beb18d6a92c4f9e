"""A probe that keeps every promise, and one for each way of breaking one: the contract must tell them apart."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr

from workbench.figure import Axis, Figure, Line, Panel, Points
from workbench.numerics.sampling import Draw
from workbench.plan import Plan
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject


@dataclass(frozen=True)
class Honest(Probe[Subject]):
    """Slopes of the loss along random directions, and their mean square, which is the gradient's squared norm."""

    vectors: Annotated[int, Range(2, 50), Doc("Random directions.")] = 4
    kind: Annotated[Literal["normal", "rademacher"], Doc("Law of the directions."), Choice({"normal": "Gaussian"})] = (
        "normal"
    )
    shift: Annotated[float | None, Range(-1.0, 1.0), Doc("Added to every slope.")] = None

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("slope", ("vector",), "slope of the loss"),
        Variable("mean_square", (), "mean squared slope", error="mean_square_error"),
        Variable("mean_square_error", (), "standard error of the mean squared slope"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        slopes = np.full(self.vectors, np.nan)
        for i in range(self.vectors):
            gradient = subject.flatten(subject.gradient())
            slopes[i] = float(gradient @ draw(i, kind=self.kind)) + (self.shift or 0.0)
            yield self.report(slopes, i + 1)

    def report(self, slopes: np.ndarray, count: int) -> Reading:
        squares = slopes[:count] ** 2
        error = squares.std(ddof=1) / count**0.5 if count > 1 else np.nan
        values = {"slope": slopes, "mean_square": squares.mean(), "mean_square_error": error}
        return self.reading(count / self.vectors, values, converged=count == self.vectors)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        return {"mean_square": float(data.mean_square), "mean_square_error": float(data.mean_square_error)}

    def figure(self, data: xr.Dataset) -> Figure:
        at = np.arange(data.sizes["vector"])
        marks = (Points(at, data.slope.values), Line(at, at * 0.0, role="reference"))
        return Figure((Panel(marks, Axis("direction"), Axis("slope")),))

    def estimate(self, subject: Subject) -> Cost:
        return Cost(8 * subject.size * 4, self.vectors, f"{self.vectors} gradients")


class Before(Honest):
    """Does something to the subject, or to the world, before each reading."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        for reading in super().stream(subject, draw):
            self.meddle(subject)
            yield reading

    def meddle(self, subject: Subject) -> None:
        raise NotImplementedError


def users_model(subject: Subject) -> torch.nn.Module:
    """The model behind a subject's first parameter, found the way a careless probe would: it is shared storage."""
    import gc

    pointer = next(iter(subject.params.values())).data_ptr()
    found = [m for m in gc.get_objects() if type(m) is torch.nn.Sequential]
    return next(m for m in found if any(p.data_ptr() == pointer for p in m.parameters()) and m is not subject.module)


class WritesWeights(Before):
    """Moves a weight and moves it back."""

    def meddle(self, subject: Subject) -> None:
        with torch.no_grad():
            users_model(subject)[0].weight.data.add_(1e-3).sub_(1e-3)


class FlipsMode(Before):
    """Leaves the model in eval mode."""

    def meddle(self, subject: Subject) -> None:
        users_model(subject).eval()


class LeavesHooks(Before):
    """Forgets a hook."""

    def meddle(self, subject: Subject) -> None:
        users_model(subject)[0].register_forward_hook(lambda *_: None)


class ClearsGradients(Before):
    """Zeroes the user's gradients."""

    def meddle(self, subject: Subject) -> None:
        users_model(subject).zero_grad()


class Reseeds(Before):
    """Uses torch's global random state."""

    def meddle(self, subject: Subject) -> None:
        torch.manual_seed(0)


class DrawsGlobally(Before):
    """Uses Python's global random state."""

    def meddle(self, subject: Subject) -> None:
        random.random()


class ChangesDefaults(Before):
    """Has its own taste in figures."""

    def meddle(self, subject: Subject) -> None:
        import matplotlib as mpl

        mpl.rcParams["lines.linewidth"] = 7.0


class LeaksNoGrad(Honest):
    """Holds a context open while it yields."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        slopes = np.ones(self.vectors)
        with torch.no_grad():
            yield self.report(slopes, 1)
            subject.loss()
        yield self.report(slopes, self.vectors)


class HurtsWhenItFails(Honest):
    """Puts the model back, but not when something goes wrong on the way."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        model = users_model(subject)
        for count in range(1, self.vectors + 1):
            flags = [m.training for m in model.modules()]
            model[3].train(not model[3].training)
            slopes = np.full(self.vectors, subject.loss())
            for module, flag in zip(model.modules(), flags, strict=True):
                module.training = flag
            yield self.report(slopes, count)


class TellsTheTime(Honest):
    """Another answer each time."""

    def report(self, slopes: np.ndarray, count: int) -> Reading:
        return super().report(slopes + time.perf_counter_ns() * 1e-12, count)


class DependsOnChunks(Honest):
    """Averages batches without their weights."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        parts = [float(subject.batch_loss(subject.params, b).detach()) / b.size for b in subject.batches()]
        for count in range(1, self.vectors + 1):
            yield self.report(np.full(self.vectors, np.mean(parts)), count)


class IgnoresThePlan(Honest):
    """Cuts the examples as it was cut last time."""

    memory: ClassVar[list[Any]] = []

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        self.memory.append(0.0)
        other = subject.with_plan(Plan(chunk=1 + len(self.memory) % 5))
        yield from super().stream(other, draw)


class NamesNoError(Honest):
    """Points at an error that does not exist."""

    variables = (*Honest.variables[:1], Variable("mean_square", (), "mean", error="sigma"), Honest.variables[2])


class FillsIn(Honest):
    """Says zero where the net gives no number."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        slopes = np.full(self.vectors, np.nan)
        for i in range(self.vectors):
            with suppress(ValueError):
                slopes[i] = float(subject.flatten(subject.gradient()) @ draw(i))
            slopes[i] = np.nan_to_num(slopes[i])
            yield self.report(slopes, i + 1)


class Grows(Honest):
    """Its arrays grow."""

    def report(self, slopes: np.ndarray, count: int) -> Reading:
        return super().report(slopes[:count], count)


class Rewrites(Honest):
    """Changes what it has yielded."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        earlier: list[Reading] = []
        for reading in super().stream(subject, draw):
            for old in earlier:
                old.data["slope"].values.setflags(write=True)
                old.data["slope"].values[:] = reading.data["slope"].values
            earlier.append(reading)
            yield reading


class GoesBack(Honest):
    """Its progress is not one."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        found = list(super().stream(subject, draw))
        yield from (found[1], found[0], *found[2:])


class NeverEnds(Honest):
    """Stops short of the end."""

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        yield from list(super().stream(subject, draw))[:-1]


class SaysTooMuch(Honest):
    """Calls itself converged from the start."""

    def report(self, slopes: np.ndarray, count: int) -> Reading:
        found = super().report(slopes, count)
        return Reading(self, found.data.assign_attrs(converged=1), found.done)


@dataclass(frozen=True)
class LosesSettings(Honest):
    """Changes its settings after they were set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "vectors", min(self.vectors + 1, 50))


@dataclass(frozen=True)
class ChecksNothing(Honest):
    """Takes any settings."""

    def __post_init__(self) -> None:
        """Forgets to call the checks of its base."""


@dataclass(frozen=True)
class HasNoWords(Honest):
    """Has a setting that nobody explains."""

    mystery: Annotated[int, Range(1, 2)] = 1


class CannotDrawYet(Honest):
    """Draws only what is complete."""

    def figure(self, data: xr.Dataset) -> Figure:
        if not np.isfinite(data.slope.values).all():
            raise ValueError("nothing to draw yet")
        return super().figure(data)


class KnowsNoSize(Honest):
    """Has no idea of its memory."""

    def estimate(self, subject: Subject) -> Cost:
        return Cost()


class StartsAnyway(Honest):
    """Says that it needs next to nothing, whatever is there."""

    def estimate(self, subject: Subject) -> Cost:
        return Cost(1, 1, "a little")


class HidesItsContext(Honest):
    """Its readings depend on the hour."""

    def context(self, subject: Subject) -> str:
        return str(time.perf_counter_ns())
