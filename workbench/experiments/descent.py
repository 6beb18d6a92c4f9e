"""Full-batch gradient descents side by side: the loss at every step, and sharpness by its gauge on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.dynamics.edge_of_stability import at_the_edge, rises
from workbench.dynamics.gauges.gauge import Meter, Training
from workbench.dynamics.gauges.sharpness import Sharpness
from workbench.figure import ROLES, AnyMark, Axis, Line, Panel, Rule, fitting
from workbench.probe import Variable
from workbench.zoo.training import Examples

TOLERANCE = 0.01
"""Residual over eigenvalue at which the gauge stops."""
LATE = 10
"""Readings at the end that the late ratio averages."""
_EDGE = ("step_crossing", "step_crossing_error", "ratio_late", "ratio_late_error")
_GAUGED = ("sharpness", "sharpness_error", "stability_threshold", "stability_ratio", "stability_ratio_error")
VARIABLES = (
    Variable("train_loss", ("arm", "step"), "half the squared distance, mean over examples"),
    Variable("sharpness", ("arm", "checkpoint"), "largest eigenvalue of the Hessian", error="sharpness_error"),
    Variable("sharpness_error", ("arm", "checkpoint"), "its residual"),
    Variable("stability_threshold", ("arm", "checkpoint"), "sharpness at which the update is unstable on a quadratic"),
    Variable("stability_ratio", ("arm", "checkpoint"), "sharpness over that threshold", error="stability_ratio_error"),
    Variable("stability_ratio_error", ("arm", "checkpoint"), "residual over that threshold"),
    Variable("step_crossing", ("arm",), "first step of a sustained crossing", "steps", "step_crossing_error"),
    Variable("step_crossing_error", ("arm",), "steps since the reading before", "steps"),
    Variable("ratio_late", ("arm",), "mean ratio of the last readings", error="ratio_late_error"),
    Variable("ratio_late_error", ("arm",), "standard deviation over these, with their mean error"),
    Variable("loss_rises", ("arm",), "share of steps at which the loss rises: of those after the crossing, if any"),
)
"""What descents yield; a checkpoint is a step at which the sharpness was read."""


class Descents:
    """The curves of some descents, nan where training has not come yet."""

    def __init__(self, arms: int, read_at: Sequence[int]) -> None:
        self.read_at, self.steps = np.array(read_at), np.arange(read_at[-1] + 1)
        sizes = {"arm": arms, "step": len(self.steps), "checkpoint": len(self.read_at)}
        self.curves = {v.name: np.full([sizes[d] for d in v.dims], np.nan) for v in VARIABLES}

    @property
    def coords(self) -> dict[str, Any]:
        """Steps, and those at which sharpness is read."""
        return {"step": self.steps, "checkpoint": self.read_at}

    def now(self) -> dict[str, Any]:
        """Every variable so far, for a reading."""
        return {name: held.copy() for name, held in self.curves.items()}

    def descend(
        self,
        arm: int,
        net: nn.Module,
        data: Examples,
        rate: float,
        momentum: float = 0.0,
        keep: Callable[[int], None] | None = None,
    ) -> Iterator[int]:
        """Train one arm in place; yields each step whose sharpness was read, and ends early where the loss diverges.

        Args:
            arm: its row in the curves.
            net: trained in place.
            data: all of it, in every step.
            rate: the learning rate.
            momentum: of the heavy ball.
            keep: called with each step before it is taken.
        """
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
        meter = Sharpness(examples=None, tolerance=TOLERANCE).start(_training(net, optimizer, data))
        due, losses = set(self.read_at.tolist()), torch.full((len(self.steps),), math.nan, dtype=torch.float64)
        for step in self.steps.tolist():
            loss = half_square(net, data)
            losses[step] = loss.detach()
            if keep is not None:
                keep(step)
            if step in due:
                self._put(arm, step, meter, losses)
                yield step
                if step == self.steps[-1] or not math.isfinite(self.curves["train_loss"][arm, step]):
                    return
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _put(self, arm: int, step: int, meter: Meter, losses: Tensor) -> None:
        curves, column = self.curves, int(np.searchsorted(self.read_at, step))
        curves["train_loss"][arm] = losses.numpy()
        found = {name: float(value) for name, value in meter.read().items()}
        found["stability_ratio"] = found["stability"]
        found["stability_ratio_error"] = found["sharpness_error"] / found["stability_threshold"]
        for name in _GAUGED:
            curves[name][arm, column] = found[name]
        ratios, errors = curves["stability_ratio"][arm], curves["stability_ratio_error"][arm]
        edge = at_the_edge(self.read_at, ratios, errors, curves["train_loss"][arm, self.read_at], LATE)
        for name in _EDGE:
            curves[name][arm] = edge[name]
        curves["loss_rises"][arm] = rises(self.steps, curves["train_loss"][arm], edge["step_crossing"])


def _training(net: nn.Module, optimizer: torch.optim.Optimizer, data: Examples) -> Training:
    def start() -> dict[str, Tensor]:
        raise NotImplementedError("the sharpness gauge asks for no weights of step 0")

    return Training(net, optimizer, start, data, "half_mse")


def half_square(net: nn.Module, data: Examples) -> Tensor:
    """½ |f(x) - y|², mean over examples: the loss "half_mse", whose factor the thresholds rest on."""
    return (net(data[0]) - data[1]).square().sum(1).mean() / 2


def readings_at(last: int, every: int, first: int = 0) -> tuple[int, ...]:
    """Each of the first steps, then every so many, and the last."""
    return tuple(sorted({*range(min(first, last) + 1), *range(0, last + 1, every), last}))


def largest_ratio(data: Any, arm: int) -> float:
    """The largest ratio of an arm so far; nan without any."""
    ratios = data.stability_ratio.values[arm]
    return float(np.nanmax(ratios)) if np.isfinite(ratios).any() else math.nan


def sharpness_panel(data: Any, names: Sequence[str], x: Axis) -> Panel:
    """Sharpness of each arm over steps in its colour, with the threshold of each as a line across."""
    marks: list[AnyMark] = []
    for arm, (name, role) in enumerate(zip(names, ROLES, strict=False)):
        there = np.isfinite(data.sharpness.values[arm])
        limits = data.stability_threshold.values[arm][there]
        marks.append(Line(data["checkpoint"].values[there], data.sharpness.values[arm][there], name, role))
        if limits.size and math.isfinite(limits[0]):
            marks.append(Rule(float(limits[0])))
    return Panel(tuple(marks), x, fitting("sharpness", "log", data.sharpness.values))


def loss_panel(data: Any, x: Axis) -> Panel:
    """The loss of each arm over steps on a log axis, in the colours of :func:`sharpness_panel`."""
    marks: list[AnyMark] = []
    for losses, role in zip(data.train_loss.values, ROLES, strict=False):
        there = np.isfinite(losses)
        marks.append(Line(data["step"].values[there], losses[there], role=role))
    return Panel(tuple(marks), x, fitting("loss", "log", data.train_loss.values))
