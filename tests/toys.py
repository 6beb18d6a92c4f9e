"""Tiny subjects and probes in float64, shared by tests: known exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr

from workbench.figure import Axis, Figure, Line, Panel, Points
from workbench.fingerprint import digest
from workbench.numerics.sampling import Draw
from workbench.plan import Plan
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Range, Slow


@dataclass
class ToySubject:
    """A quadratic loss ½ Σ a_i x_i² at ``weights``; everything that a probe, a job or a store asks of a subject."""

    weights: torch.Tensor = field(default_factory=lambda: torch.linspace(-1, 1, 12, dtype=torch.float64))
    label: str = "quadratic"
    plan: Plan = field(default_factory=Plan)
    room: int = 2**30
    fingerprints: int = 0

    kind: ClassVar[str] = "subject"
    dtype: ClassVar[torch.dtype] = torch.float64
    device: ClassVar[torch.device] = torch.device("cpu")

    @property
    def size(self) -> int:
        return self.weights.numel()

    @property
    def curvature(self) -> torch.Tensor:
        return torch.arange(1, self.size + 1, dtype=torch.float64)

    def loss(self) -> float:
        return float((self.curvature * self.weights**2).sum() / 2)

    def fingerprint(self) -> str:
        self.fingerprints += 1
        return digest(self.weights)

    def describe(self) -> dict[str, Any]:
        return {"on": "on 1 of 1 examples", "model": self.label, "dtype": "float64", "device": "cpu"}

    def version(self) -> tuple[int, ...]:
        return (self.weights._version,)

    def with_plan(self, plan: Any) -> ToySubject:
        return replace(self, plan=plan if isinstance(plan, Plan) else Plan(**plan))

    def available_memory(self) -> int:
        return self.room


@dataclass(frozen=True)
class Trace(Probe[ToySubject]):
    """Trace of the toy's Hessian by random vectors, one reading each: ``trace = mean(v · a v)``.

    With Gaussian vectors the standard error shrinks with the square root of their number.
    """

    vectors: Annotated[int, Range(2, 5000), Doc("Random vectors to draw.")] = 5
    pause: Annotated[float, Range(0.0, 10.0), Doc("Seconds to sleep before each reading."), Slow()] = 0.0
    kind: Annotated[
        Literal["normal", "rademacher"],
        Doc("Law of the vectors."),
        Choice({"normal": "Gaussian entries", "rademacher": "plus and minus one"}),
    ] = "normal"
    log: Annotated[bool, Doc("Draw the samples on a log axis."), Display()] = False

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("sample", ("vector",), "one sample of the trace"),
        Variable("trace", (), "mean of the samples", error="trace_error"),
        Variable("trace_error", (), "standard error of the mean"),
    )

    def stream(self, subject: ToySubject, draw: Draw) -> Iterator[Reading]:
        samples = np.full(self.vectors, np.nan)
        for i in range(self.vectors):
            time.sleep(self.pause)
            v = draw(i, kind=self.kind)
            samples[i] = float(v @ (subject.curvature * v))
            yield self.report(samples, i + 1)

    def report(self, samples: np.ndarray, count: int) -> Reading:
        known = samples[:count]
        values = {"sample": samples, "trace": known.mean()}
        if count > 1:
            values["trace_error"] = known.std(ddof=1) / count**0.5
        return self.reading(count / self.vectors, values, converged=count == self.vectors)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        return {"trace": float(data["trace"]), "trace_error": float(data["trace_error"])}

    def figure(self, data: xr.Dataset) -> Figure:
        at = np.arange(data.sizes["vector"])
        marks = (Points(at, data["sample"].values), Line(at, np.full(len(at), float(data["trace"])), role="reference"))
        return Figure((Panel(marks, Axis("vector"), Axis("trace", "log" if self.log else "linear")),))

    def estimate(self, subject: ToySubject) -> Cost:
        return Cost(8 * (subject.size + self.vectors), self.vectors, f"{self.vectors} products")


@dataclass(frozen=True)
class Failing(Trace):
    """Raises after its second reading."""

    def stream(self, subject: ToySubject, draw: Draw) -> Iterator[Reading]:
        for count, reading in enumerate(super().stream(subject, draw)):
            if count == 2:
                raise ArithmeticError("the third vector is cursed")
            yield reading


def fill(store: Any) -> Any:
    """Four readings in a store: two seeds of a small net, one of a large one, and the toy's own."""
    for label, seed in (("small net", 0), ("small net", 1), ("large net", 0)):
        subject = ToySubject(label=label, weights=torch.full((3,), float(ord(label[0])), dtype=torch.float64))
        store.save(Trace(vectors=3).run(subject, seed=seed))
    store.save(Trace(vectors=7).run(ToySubject()))
    return store
