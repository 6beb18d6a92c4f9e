"""Distance from initialisation along a training: whether it grows as the logarithm of time, or as a power."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Rule
from workbench.numerics.growth import Growth, fit_growth
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.trajectory import Trajectory

_STATISTICS = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)$")
_LOSSES = ("train_loss", "loss")
_FITTED = tuple(f.name for f in dataclasses.fields(Growth))
_WORDS = {
    "slope": "a of a log t + c", "slope_error": "half-width of its 95 % interval", "offset": "c of a log t + c",
    "log_r2": "R² of a log t + c", "scale": "A of A t^ν", "exponent": "ν of A t^ν",
    "exponent_error": "half-width of its 95 % interval", "power_r2": "R² of A t^ν",
    "evidence": "for the logarithm against the power law",
}  # fmt: skip


def _fits() -> Iterator[Variable]:
    for prefix, dims, words in (("", (), ""), ("tensor_", ("tensor",), ", by tensor")):
        for name in _FITTED:
            error = f"{prefix}{name}_error" if name in ("slope", "exponent") else "exact"
            yield Variable(f"{prefix}{name}", dims, _WORDS[name] + words, "nat" if name == "evidence" else "", error)


@dataclass(frozen=True)
class DistanceFromInit(Probe[Trajectory]):
    """Distance of the weights from initialisation along a training, with a logarithmic law and a power law.

    What it measures: d_t = ‖θ_t - θ_0‖ at each checkpoint, of all parameters (``distance``, ``relative`` to ‖θ_0‖) and
    of each tensor; and, over checkpoints from step ``start`` to the first fall of the learning rate (or ``until``),
    least-squares fits of d = a log t + c (``slope``, ``log_r2``) and d = A t^ν (``exponent``, ``power_r2``) on the same
    points, with ``evidence``, the nats in favour of the logarithm.

    How to read it: a random walk in a flat potential gives ν = 1/2; steady drift ν = 1; ultra-slow diffusion over a
    rough landscape the logarithm (Hoffer, Hubara and Soudry 2017), with a slope that grows with learning rate over
    batch size. |evidence| below 2 decides nothing.

    What it costs: each checkpoint is read once; no example is looked at.

    When it misleads: t is optimizer steps: epochs of unlike batch sizes do not compare. Weights before a normalisation
    drift as √t whatever the landscape. Running statistics of BatchNorm are left out.

    Errors: distances are exact; those of the fits are 95 % intervals for independent residuals. Those along a path are
    not, so that they are too small, and evidence too large. nan with fewer than three checkpoints in the window.

    Source: Hoffer, Hubara and Soudry 2017.
    """

    start: Annotated[
        int, Range(1, 10_000_000, log=True, soft=(1, 1000)), Doc("First step after the initialisation that is fitted.")
    ] = 10
    until: Annotated[
        int | None, Range(1, 100_000_000), Doc("Last step that is fitted; None: before the learning rate first falls.")
    ] = None

    looks_at: ClassVar[Look] = "trajectory"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("distance", ("step",), "‖θ - θ₀‖"),
        Variable("relative", ("step",), "‖θ - θ₀‖ / ‖θ₀‖"),
        Variable("tensor_distance", ("step", "tensor"), "‖θ - θ₀‖ of the tensor"),
        Variable("fitted", ("step",), "whether the checkpoint is in the fits", kind="bool"),
        Variable("loss", ("step",), "recorded training loss, the latest by each step"),
        *_fits(),
    )

    def stream(self, subject: Trajectory, draw: Draw) -> Iterator[Reading]:
        """Checkpoint after checkpoint."""
        if len(subject.steps) < 2:
            raise ValueError(f"{subject.label} holds one checkpoint; a distance needs another: record more steps.")
        run = _Run(self, subject)
        for place in range(1, len(subject.steps)):
            run.add(place)
            yield run.report(place / (len(subject.steps) - 1))

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The last distance, and both laws."""
        found: dict[str, Value] = {"distance": float(data.distance[-1]), "relative": float(data.relative[-1])}
        names = ("exponent", "exponent_error", "slope", "slope_error", "log_r2", "power_r2", "evidence")
        return found | {name: float(data[name]) for name in names}

    def figure(self, data: xr.Dataset) -> Figure:
        """The distance against the logarithm of time with both laws, and each tensor's exponent."""
        t = data["step"].values - float(data["step"][0])
        later, inside = t > 0, data.fitted.values
        marks: list[AnyMark] = [Points(t[later], data.distance.values[later], label="checkpoints")]
        if inside.any() and math.isfinite(float(data.exponent)):
            at = np.geomspace(t[inside].min(), t[inside].max(), 100)
            log = float(data.slope) * np.log(at) + float(data.offset)
            power = float(data.scale) * at ** float(data.exponent)
            marks += [Line(at, log, "a log t + c", "second"), Line(at, power, "A t^ν", "third")]
        places = np.arange(1, data.sizes["tensor"] + 1)
        exponents = Points(places, data.tensor_exponent.values, data.tensor_exponent_error.values, "of each tensor")
        tensors = Panel((exponents, Rule(0.5, label="random walk")), Axis("tensor"), Axis("exponent ν"))
        return Figure((Panel(tuple(marks), Axis("t", "log", "steps"), Axis("‖θ - θ₀‖")), tensors))

    def estimate(self, subject: Trajectory) -> Cost:
        """Two checkpoints, and one tensor in float64."""
        sizes = [(t.numel(), t.numel() * t.element_size()) for t in subject.weights(subject.steps[0]).values()]
        most = 2 * sum(b for _, b in sizes) + 16 * max((n for n, _ in sizes), default=0)
        return Cost(most, len(subject.steps), f"reading {len(subject.steps)} checkpoints")


class _Run:
    """Distances so far."""

    def __init__(self, probe: DistanceFromInit, subject: Trajectory) -> None:
        self.probe, self.subject, self.steps = probe, subject, np.array(subject.steps)
        weights = subject.weights(subject.steps[0])
        self.first = {n: t for n, t in weights.items() if t.is_floating_point() and not _STATISTICS.search(n)}
        self.length = math.sqrt(sum(float(t.double().square().sum()) for t in self.first.values()))
        self.apart = np.full((len(self.steps), len(self.first)), np.nan)
        self.apart[0], self.read = 0.0, 0
        self.until, self.words = (probe.until, "") if probe.until else _first_fall(subject)

    def add(self, place: int) -> None:
        """One more checkpoint."""
        now = self.subject.weights(int(self.steps[place]))
        self.read = place
        self.apart[place] = [_between(now[name], first) for name, first in self.first.items()]

    def report(self, done: float) -> Reading:
        """The reading of now."""
        total, t = np.sqrt((self.apart**2).sum(1)), (self.steps - self.steps[0]).astype(float)
        inside = (t >= self.probe.start) & (self.steps <= (self.until or np.inf)) & np.isfinite(total)
        relative = total / self.length if self.length else np.full_like(total, np.nan)
        values: dict[str, Any] = {"distance": total, "relative": relative, "tensor_distance": self.apart}
        values |= {"fitted": inside, "loss": _loss(self.subject)}
        values |= dataclasses.asdict(fit_growth(t[inside], total[inside]))
        each = [dataclasses.asdict(fit_growth(t[inside], column)) for column in self.apart[inside].T]
        values |= {f"tensor_{name}": [found[name] for found in each] for name in _FITTED}
        notes = ("weights only: no example was looked at", f"{int(inside.sum())} checkpoints are fitted{self.words}")
        lost = self.steps[: self.read + 1][~np.isfinite(total[: self.read + 1])]
        notes += (f"weights are not finite from step {lost[0]} on",) if len(lost) else ()
        coords = {"step": self.steps, "tensor": np.array(list(self.first))}
        return self.probe.reading(done, values, coords=coords, converged=done == 1, notes=notes)


def _between(now: Tensor, first: Tensor) -> float:
    return float(torch.linalg.vector_norm(now.double() - first.double()))


def _loss(subject: Trajectory) -> NDArray[np.float64]:
    table = subject.scalars
    name = next((n for n in _LOSSES if n in table), None)
    if name is None:
        return np.full(len(subject.steps), np.nan)
    return table[name].ffill().reindex(list(subject.steps), method="ffill").to_numpy(dtype=np.float64)


def _first_fall(subject: Trajectory) -> tuple[int | None, str]:
    """The last checkpoint before the recorded learning rate first falls; None where it never does or is not known."""
    highest, before = 0.0, subject.steps[0]
    for step in subject.steps:
        held = subject.optimizer(step)
        if held is None or not held["groups"]:
            return None, "; learning rates were not recorded, so that the window has no end: say until="
        rate = float(held["groups"][0]["lr"])
        if rate < 0.999 * highest:
            return before, f", up to step {before}, before the learning rate falls"
        highest, before = max(highest, rate), step
    return None, ""
