"""Probes and targets without a network, for tests of the front ends: quick, slow or faulty as they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from workbench.experiments.experiment import Experiment, Verdict
from workbench.figure import Axis, Figure, Line, Panel, Points
from workbench.probe import Probe, Reading, Variable
from workbench.schema import Choice, Display, Doc, Range, Slow


@dataclass(frozen=True)
class Wave(Probe[Any]):
    """A sine whose height is the subject's, sampled point by point. It has a setting of every kind."""

    points: Annotated[int, Range(2, 400, soft=(2, 40)), Doc("How many points.")] = 8
    frequency: Annotated[float, Range(1e-3, 1e3, log=True), Doc("Periods on the axis."), Slow()] = 1.0
    shift: Annotated[float, Range(-1.0, 1.0), Doc("Where it starts.")] = 0.25
    offset: Annotated[float, Doc("Added to all values.")] = 0.0
    shape: Annotated[Literal["sine", "square"], Doc("Which wave."), Choice({"sine": "smooth", "square": "abrupt"})] = (
        "sine"
    )
    parts: Annotated[tuple[Literal["real", "imaginary", "phase"], ...], Doc("What to keep.")] = ("real", "phase")
    noisy: Annotated[bool, Doc("Add noise from the seed.")] = False
    limit: Annotated[int | None, Range(1, 50), Doc("Cut off at so many.")] = None
    layer: Annotated[str | None, Doc("A name, or nothing.")] = None
    style: Annotated[Literal["line", "points"], Doc("How it is drawn."), Display()] = "line"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("height", ("x",), "height of the wave", "m", "height_error"),
        Variable("height_error", ("x",), "its error", "m"),
    )

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        x = np.arange(self.points, dtype=float)
        y = np.full(self.points, np.nan)
        for i in range(self.points):
            y[i] = subject.height * np.sin(self.frequency * i + self.shift) + self.offset
            yield self.reading(
                (i + 1) / self.points, {"height": y, "height_error": 0.1 + 0 * y}, coords={"x": x}, converged=True
            )

    def summary(self, data: Any) -> dict[str, Any]:
        known = data.height.values[np.isfinite(data.height.values)]
        return {"top": float(known.max()), "top_error": 0.1, "count": int(known.size)}

    def figure(self, data: Any) -> Figure:
        kind = Line if self.style == "line" else Points
        mark = kind(data["x"].values, data.height.values, label="wave")
        return Figure((Panel((mark,), Axis("place"), Axis("height", unit="m")),), title=f"{self.points} points")


@dataclass(frozen=True)
class Endless(Probe[Any]):
    """Yields a little more every few milliseconds, for a minute."""

    pace: Annotated[float, Range(0.001, 1.0), Doc("Seconds a step.")] = 0.01
    variables: ClassVar[tuple[Variable, ...]] = (Variable("count", (), "steps"),)

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        for i in range(6000):
            time.sleep(self.pace)
            yield self.reading((i + 1) / 6000, {"count": float(i)})

    def summary(self, data: Any) -> dict[str, Any]:
        return {"count": float(data["count"])}

    def figure(self, data: Any) -> Figure:
        return Figure((Panel((Points([0.0], [float(data["count"])]),), Axis("x"), Axis("count")),))


@dataclass(frozen=True)
class Broken(Endless):
    """Fails at once, with words that a page must not take for its own."""

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        raise ArithmeticError("<b>no</b> such number & no other")
        yield


@dataclass(frozen=True)
class Nested(Wave):
    """Holds another probe."""

    looks_at: ClassVar[Any] = "trajectory"
    probe: Annotated[Probe[Any], Doc("The probe inside.")] = Wave(points=3)


@dataclass(frozen=True)
class Crowd(Wave):
    """A wave that looks at one path, or at all runs at once, and is as high as there are members."""

    looks_at: ClassVar[Any] = "trajectory"
    looks_also_at: ClassVar[Any] = ("runs",)

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        yield from super().stream(Still(float(len(subject)) if subject.kind == "runs" else 1.0), draw)


@dataclass(frozen=True)
class Climb(Experiment):
    """An experiment without a net: a line that rises by ``slope`` at each of five points, and shall reach 1."""

    slope: Annotated[float, Range(0.0, 1.0), Doc("Rise at each point.")] = 0.5
    variables: ClassVar[tuple[Variable, ...]] = (Variable("height", ("x",), "height"),)

    def stream(self, subject: Any, draw: Any) -> Iterator[Reading]:
        y = np.full(5, np.nan)
        for i in range(5):
            y[i] = self.slope * i + draw.seed
            yield self.reading((i + 1) / 5, {"height": y}, coords={"x": np.arange(5.0)}, converged=True)

    def summary(self, data: Any) -> dict[str, Any]:
        return {"end": float(data.height[-1])}

    def verdict(self, data: Any) -> Verdict:
        end = float(data.height[-1])
        return Verdict(end >= 1, end, 1.0, "how <high> it climbed")

    def figure(self, data: Any) -> Figure:
        return Figure((Panel((Line(data["x"].values, data.height.values),), Axis("place"), Axis("height")),))


class Still:
    """A subject that is nothing but a height."""

    kind: ClassVar[str] = "subject"
    plan = None

    def __init__(self, height: float = 1.0) -> None:
        self.height = height

    def fingerprint(self) -> str:
        return f"still-{self.height!r}"

    def version(self) -> tuple[float, ...]:
        return (self.height,)

    def describe(self) -> dict[str, Any]:
        return {"on": f"at height {self.height:g}", "dtype": "float64", "device": "cpu"}

    def available_memory(self) -> int:
        return 2**30

    def __repr__(self) -> str:
        return f"<Still: height {self.height:g}>"


class Path(Still):
    """A trajectory whose checkpoints differ in height; it counts how often each was opened, and where."""

    kind: ClassVar[str] = "trajectory"
    steps = (0, 1, 2, 5, 10, 20, 50)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.opened: list[tuple[int, str]] = []

    def subject(self, step: int) -> Still:
        self.opened.append((step, threading.current_thread().name))
        return Still(self.height * step)
