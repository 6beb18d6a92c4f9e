"""A bent path of low loss between two models, found by training its middle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.figure import AnyMark, Axis, Band, Figure, Panel, Points
from workbench.figure import Line as Curve
from workbench.landscape.barrier import barriers
from workbench.landscape.grid import levels
from workbench.landscape.points import EVALUATED
from workbench.numerics.basis import norm
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range, Slow
from workbench.several import Pair

Array = NDArray[np.float64]
Weights = Mapping[str, Tensor]
LOOKS = 10
"""How often the bent path is looked at while it is trained."""


@dataclass(frozen=True)
class ModeConnectivity(Probe[Pair]):
    """A curve of low loss between two models, φ(0) = θ_a and φ(1) = θ_b, whose middle θ_m is trained.

    What it measures: θ_m minimises E_t L(φ(t)), t uniform in [0, 1], by Adam from the midpoint, one t for each
    mini-batch (Garipov et al. 2018, arXiv:1802.10026); φ(t) = (1-t)² θ_a + 2t(1-t) θ_m + t² θ_b (``bezier``) or two
    straight pieces (``polygon``). Then the loss on the curve and on the straight line at ``points`` values of t,
    ``loss_max``, ``loss_integral`` = ∫ L ds / ∫ ds along the curve's own length, ``barrier`` above the chord of the
    ends, and ``length_ratio``, the curve's length over the distance of its ends.

    How to read it: a curve without a barrier, where the straight line has one, joins the two models in one connected
    region of low loss.

    What it costs: ``steps`` gradients of ``batch`` examples, and two forward passes over all examples for each point.
    Memory: the two models, θ_m and Adam's two moments.

    When it misleads: a barrier that stays may be training that was too short: compare ``loss_max`` at more steps. The
    curve is trained on the examples it is measured on; give the pair held-out examples to see it elsewhere. No weight
    decay is added. BatchNorm: batch statistics in training, then estimated anew at each point.

    Errors: ``loss_error`` is the standard error over examples at each point; the training's own randomness is the
    seed's, and not in any error bar.
    """

    looks_at: ClassVar[Literal["pair"]] = "pair"

    steps: Annotated[
        int, Range(1, 100_000, log=True, soft=(50, 5000)), Doc("Training steps for the middle."), Slow()
    ] = 200
    batch: Annotated[int, Range(1, 8192, log=True, soft=(16, 512)), Doc("Examples in each step.")] = 64
    learning_rate: Annotated[float, Range(1e-5, 1.0, log=True), Doc("Adam's, falling to zero as a cosine.")] = 0.02
    curve: Annotated[
        Literal["bezier", "polygon"],
        Doc("What the middle bends."),
        Choice({"bezier": "a quadratic Bezier curve", "polygon": "two straight pieces"}),
    ] = "bezier"
    points: Annotated[int, Range(5, 201, soft=(11, 61)), Doc("Points on the curve and on the line.")] = 21

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("t",), "mean loss on the curve", "loss per example", "loss_error"),
        Variable("loss_error", ("t",), "standard error of the loss over examples", "loss per example"),
        Variable("error_rate", ("t",), "share of examples classified wrongly on the curve", "", "error_rate_error"),
        Variable("error_rate_error", ("t",), "standard error of the error rate over examples"),
        Variable("line_loss", ("t",), "mean loss on the straight line", "loss per example", "line_loss_error"),
        Variable("line_loss_error", ("t",), "standard error of line_loss over examples", "loss per example"),
        Variable("middle_loss", ("look",), "loss at the curve's middle during training", "loss per example"),
        Variable("middle_step", ("look",), "training steps taken by then"),
        Variable("loss_max", (), "largest loss on the curve", "loss per example", "loss_max_error"),
        Variable("loss_max_error", (), "standard error of loss_max over examples", "loss per example"),
        Variable("loss_integral", (), "mean loss along the curve's length", "loss per example"),
        Variable("barrier", (), "curve's height above the chord of its ends", "loss per example"),
        Variable("line_barrier", (), "straight line's height above the chord of its ends", "loss per example"),
        Variable("length_ratio", (), "length of the curve over the distance of its ends"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """Train the middle, looking ten times; then both ways from coarse to fine."""
        subject.check_alike()
        bent = _Bent(self, subject, draw)
        for step in range(self.steps):
            if step * LOOKS // self.steps != (step - 1) * LOOKS // self.steps:
                yield bent.look(step)
            bent.train(step)
        for i in dict.fromkeys(int(i) for level in levels(self.points) for i in (level[0], level[-1], *level)):
            yield bent.measure(i)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Highest loss, barriers of curve and line, and how long the detour is."""
        return {
            "loss_max": float(data.loss_max),
            "loss_max_error": float(data.loss_max_error),
            "barrier": float(data.barrier),
            "line_barrier": float(data.line_barrier),
            "loss_integral": float(data.loss_integral),
            "length_ratio": float(data.length_ratio),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """Loss on the curve and on the straight line; beside it the middle's loss during training."""
        t, loss, error, line = (data[n].values for n in ("t", "loss", "loss_error", "line_loss"))
        seen = np.isfinite(loss)
        marks: tuple[AnyMark, ...] = (
            Band(t[seen], (loss - error)[seen], (loss + error)[seen], "± standard error"),
            Curve(t[seen], loss[seen], "curve"),
            Curve(t[seen], line[seen], "straight line", "second"),
        )
        ways = Panel(marks, Axis("from the first model (0) to the second (1)"), Axis("loss"))
        step, middle = data.middle_step.values, data.middle_loss.values
        looks = Panel((Curve(step, middle), Points(step, middle)), Axis("training step"), Axis("loss at the middle"))
        return Figure((ways, looks))

    def estimate(self, subject: Pair) -> Cost:
        """Two models, the middle with its moments, and the forward pass of a chunk."""
        first, passes = subject.first, 2 * self.points + LOOKS
        size = 10 * first.size * first.dtype.itemsize + 3 * first.memory()
        words = f"{self.steps} gradients of {self.batch} examples, {passes} passes over {first.examples}"
        return Cost(size, passes, words)


@dataclass(eq=False)
class _Bent:
    """The curve while its middle is trained and it is measured."""

    probe: ModeConnectivity
    pair: Pair
    draw: Draw
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        first, n = self.pair.first, self.probe.points
        self.ground, self.practice = first.under("recompute"), first.under("batch")
        self.ends = (self.pair.first.snapshot().tensors(), self.pair.second.snapshot().tensors())
        self.middle = {k: (self.ends[0][k] + self.ends[1][k].to(p)) / 2 for k, p in first.params.items()}
        self.moments = [{k: torch.zeros_like(p) for k, p in self.middle.items()} for _ in range(2)]
        self.t = np.arange(n) / (n - 1)
        self.values |= {name: np.full(n, np.nan) for name in (*EVALUATED, "line_loss", "line_loss_error")}
        self.values |= {name: np.full(LOOKS, np.nan) for name in ("middle_loss", "middle_step")}
        self.looks = self.measured = 0

    def train(self, step: int) -> None:
        """One step of Adam on the middle, at one t, on some examples."""
        rng = self.draw.generator(step)
        t, count = float(rng.uniform()), min(self.probe.batch, self.pair.first.examples)
        rows = rng.choice(self.pair.first.examples, count, replace=False).tolist()
        gradient = self.practice.selected(rows).gradient(self.at(t))
        share = self.shares(t)[1]
        rate = self.probe.learning_rate * (1 + math.cos(math.pi * step / self.probe.steps)) / 2
        for name, g in gradient.items():
            self._adam(name, share * g, step + 1, rate)

    def _adam(self, name: str, gradient: Tensor, count: int, rate: float) -> None:
        """The usual update (Kingma and Ba 2015) with β = (0.9, 0.999) and ε = 1e-8."""
        first, second = (m[name] for m in self.moments)
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        spread = (second / (1 - 0.999**count)).sqrt_().add_(1e-8)
        self.middle[name] = torch.addcdiv(self.middle[name], first / (1 - 0.9**count), spread, value=-rate)

    def shares(self, t: float) -> tuple[float, float, float]:
        """The weights of θ_a, θ_m and θ_b in φ(t)."""
        if self.probe.curve == "bezier":
            return (1 - t) ** 2, 2 * t * (1 - t), t**2
        return max(1 - 2 * t, 0.0), 1 - abs(1 - 2 * t), max(2 * t - 1, 0.0)

    def at(self, t: float) -> Weights:
        """φ(t); the models themselves, to the last bit, at the ends."""
        a, m, b = self.shares(t)
        if m == 0:
            return {k: self.ends[0 if a else 1][k].to(p) for k, p in self.middle.items()}
        first, second = self.ends
        return {k: a * first[k] + m * p + b * second[k].to(p) for k, p in self.middle.items()}

    def whole(self, t: float, weights: Weights | None = None) -> Weights:
        """All tensors of a model at t: φ(t), and what does not vary from the nearer end."""
        return {**self.ends[0 if t < 0.5 else 1], **(self.at(t) if weights is None else weights)}

    def look(self, step: int) -> Reading:
        """How the middle does, during training."""
        found = self.ground.at(self.whole(0.5)).evaluate(metrics=("loss",))
        self.values["middle_loss"][self.looks], self.values["middle_step"][self.looks] = found["loss"], step
        self.looks += 1
        return self._reading(0.7 * (step + 1) / self.probe.steps)

    def measure(self, i: int) -> Reading:
        """The loss at point i of the curve and of the straight line."""
        t = float(self.t[i])
        found = self.ground.at(self.whole(t)).evaluate()
        for name in EVALUATED:
            self.values[name][i] = found.get(name, np.nan)
        straight = {k: (1 - t) * self.ends[0][k] + t * self.ends[1][k].to(p) for k, p in self.middle.items()}
        line = found if t in (0.0, 1.0) else self.ground.at(self.whole(t, straight)).evaluate(metrics=("loss",))
        self.values["line_loss"][i], self.values["line_loss_error"][i] = line["loss"], line["loss_error"]
        self.measured += 1
        self._sum_up()
        return self._reading(0.7 + 0.3 * self.measured / self.probe.points)

    def _sum_up(self) -> None:
        """The headline numbers from the points that are known."""
        known = np.isfinite(self.values["loss"])
        if not known[[0, -1]].all():
            return
        loss, t = self.values["loss"][known], self.t[known]
        top = int(loss.argmax())
        self.values |= {
            "loss_max": loss[top],
            "loss_max_error": self.values["loss_error"][known][top],
            "barrier": barriers(t, loss).linear,
            "line_barrier": barriers(t, self.values["line_loss"][known]).linear,
        }
        if known.all():
            places = (self.at(float(a)) for a in t)  # two of them are held at a time
            lengths = np.array([self._between(a, b) for a, b in itertools.pairwise(places)])
            self.values["loss_integral"] = float((lengths * (loss[:-1] + loss[1:]) / 2).sum() / lengths.sum())
            self.values["length_ratio"] = float(lengths.sum()) / self._between(self.at(0.0), self.at(1.0))

    def _between(self, first: Weights, second: Weights) -> float:
        flats = [self.pair.first.flatten(w).double() for w in (first, second)]
        return float(norm(flats[0] - flats[1]))

    def _reading(self, done: float) -> Reading:
        finished = self.measured == self.probe.points
        return self.probe.reading(
            1.0 if finished else min(done, 0.99),
            self.values,
            coords={"t": self.t},
            converged=finished,
            notes=(*self.ground.notes, f"the middle was trained for {self.probe.steps} steps by Adam, no weight decay"),
        )
