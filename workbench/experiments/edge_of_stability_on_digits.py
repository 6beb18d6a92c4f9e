"""The edge of stability: gradient descent sharpens up to what its step size bears, and stays there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from torch.nn import functional

from workbench.experiments.descent import (
    LATE,
    VARIABLES,
    Descents,
    largest_ratio,
    loss_panel,
    readings_at,
    sharpness_panel,
)
from workbench.experiments.experiment import Experiment, Verdict
from workbench.figure import Axis, Figure
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range, Slow
from workbench.zoo.digits import IMAGES, standardised
from workbench.zoo.nets import dense
from workbench.zoo.training import Examples

CLASSES = 10


@dataclass(frozen=True)
class EdgeOfStabilityOnDigits(Experiment):
    """Progressive sharpening, and the edge of stability: at large steps the sharpness rises to 2/η and stays there.

    The recipe (Cohen, Kaur, Li, Kolter, Talwalkar 2021, arXiv:2103.00065): a tanh net learns ``examples`` digits, each
    pixel standardised, by gradient descent on all of them, with half the squared distance to the one-hot targets as
    loss. The arms have learning rates from ``largest`` down to ``smallest``, evenly spaced on a log axis, and share
    data and initial weights, which the seed decides. The last arm is the control, whose step is too small for this
    net to reach its edge in ``steps`` steps.

    How to read it: ``sharpness`` (arm, checkpoint) beside its arm's threshold, 2 (1 + momentum)/η. It grows while
    the loss falls (progressive sharpening); where it meets the threshold it stops, ``stability_ratio`` stays about 1,
    and the loss goes on falling, but not at every step: ``loss_rises`` is the share of steps at which it rose since
    ``step_crossing``. The control sharpens too, stays below its threshold, and its loss never rises.

    The verdict: ``ratio_late``, the mean over the last readings, must reach 0.95 in each arm but the control and must
    not exceed 1.1 there; the control's ratio must stay below 1 all along with a loss that falls at each step; and each
    arm's loss must end under a twentieth of where it began.

    What it costs: a training for each arm, with a few products with the Hessian at each reading; ten seconds or so.

    When it misleads: with pixels that are not standardised the Hessian begins with an outlier eigenvalue, by the
    mean image, and even the control is unstable then. A factor of two in the loss moves the edge by as much. Between
    readings the sharpness swings, so that single ratios lie some per cent around 1.

    Errors: each eigenvalue lies within ``sharpness_error`` of a true one; ``ratio_late_error`` joins the scatter of the
    last readings with that.
    """

    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    least_ratio: ClassVar[float] = 0.95
    most_ratio: ClassVar[float] = 1.1
    most_loss: ClassVar[float] = 0.05

    largest: Annotated[float, Range(1e-4, 10.0, log=True, soft=(0.05, 1)), Doc("Largest learning rate."), Slow()] = 0.4
    smallest: Annotated[
        float, Range(1e-4, 10.0, log=True, soft=(0.01, 0.5)), Doc("Smallest one, of the control."), Slow()
    ] = 0.1
    arms: Annotated[int, Range(2, 4), Doc("Learning rates, the control's among them."), Slow()] = 3
    momentum: Annotated[
        float, Range(0.0, 0.99, soft=(0, 0.9)), Doc("Of the heavy ball, which moves the threshold."), Slow()
    ] = 0.0
    activation: Annotated[
        Literal["tanh", "gelu", "relu"],
        Doc("Of the hidden layers."),
        Choice({"tanh": "smooth, the paper's", "gelu": "smooth", "relu": "has kinks, which its Hessian does not see"}),
    ] = "tanh"
    width: Annotated[int, Range(1, 2048, soft=(16, 256)), Doc("Units of each hidden layer."), Slow()] = 64
    depth: Annotated[int, Range(1, 10, soft=(1, 5)), Doc("Hidden layers."), Slow()] = 3
    examples: Annotated[int, Range(2, IMAGES, soft=(100, IMAGES)), Doc("Digits to learn."), Slow()] = 500
    steps: Annotated[int, Range(2, 200_000, soft=(200, 10_000)), Doc("Steps of each arm."), Slow()] = 2500
    every: Annotated[int, Range(1, 10_000, soft=(5, 200)), Doc("Steps between sharpness readings."), Slow()] = 50

    def validate(self) -> None:
        """The control has the smallest step."""
        if not self.smallest < self.largest:
            raise ValueError(f"smallest={self.smallest:g} must lie below largest={self.largest:g}.")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates, the control's last."""
        return tuple(float(r) for r in np.geomspace(self.largest, self.smallest, self.arms))

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Train arm after arm, the largest step first."""
        data, pace = self._examples(draw.seed), Pace()
        curves = Descents(self.arms, readings_at(self.steps, self.every))
        for arm, rate in enumerate(self.rates):
            widths = (data[0].shape[1], *[self.width] * self.depth, CLASSES)
            net = dense(widths, self.activation, seed=draw.seed + 1_000_003)
            for step in curves.descend(arm, net, data, rate, self.momentum):
                if pace.due():
                    yield self._report(curves, (arm + (step + 1) / (self.steps + 2)) / self.arms)
            yield self._report(curves, (arm + 1) / self.arms)

    def _examples(self, seed: int) -> Examples:
        inputs, labels = standardised(self.examples, seed)
        return inputs, functional.one_hot(labels, CLASSES).to(inputs.dtype)

    def _report(self, curves: Descents, done: float) -> Reading:
        notes = (
            f"on {self.examples} of {IMAGES} digits, pixels standardised; ratio_late is of the last {LATE} readings",
        )
        coords = {"arm": np.array(self.rates)} | curves.coords
        return self.reading(done, curves.now(), coords=coords, converged=done == 1, notes=notes)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The late ratios' range over the arms at the edge, the control's largest ratio, and the losses left."""
        late = data.ratio_late.values[:-1]
        return {
            "ratio_late_least": float(late.min()),
            "ratio_late_most": float(late.max()),
            "first_crossing": float(data.step_crossing[0]),
            "first_crossing_error": float(data.step_crossing_error[0]),
            "first_loss_rises": float(data.loss_rises[0]),
            "control_ratio": largest_ratio(data, -1),
            "control_loss_rises": float(data.loss_rises[-1]),
            "loss_left": _loss_left(data),
        }

    def verdict(self, data: xr.Dataset) -> Verdict:
        """The least late ratio of the arms at the edge, none of which is far above, with a control below its own."""
        late, crossings = data.ratio_late.values[:-1], data.step_crossing.values[:-1]
        control, rising, left = largest_ratio(data, -1), float(data.loss_rises[-1]), _loss_left(data)
        each = ", ".join(
            f"{r:.3g} from step {c:g} at {e:g}" for r, c, e in zip(late, crossings, data["arm"].values, strict=False)
        )
        words = (
            f"sharpness over its threshold: {each}, at most {self.most_ratio:g}; control at most {control:.2f}, its "
            f"loss rises in {100 * rising:.3g} % of steps; losses end at {100 * left:.2g} % or less, wanted "
            f"{100 * self.most_loss:g} %"
        )
        within = (late >= self.least_ratio) & (late <= self.most_ratio) & np.isfinite(crossings)
        passed = within.all() and control < 1 and rising == 0 and left < self.most_loss
        return Verdict(bool(passed), float(late.min()), self.least_ratio, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """Sharpness with the thresholds, and the loss, of each arm over steps."""
        names = [f"η = {rate:g}" for rate in data["arm"].values]
        panels = (sharpness_panel(data, names, Axis("step")), loss_panel(data, Axis("step")))
        return Figure(panels, title="sharpness rises to 2/η and stays")

    def estimate(self, subject: Any) -> Cost:
        """Activations that a product with the Hessian keeps, and the Lanczos run's vectors, in float32."""
        weights = (64 + self.depth * self.width) * self.width + CLASSES * self.width
        held = 4 * (24 * self.examples * (self.depth * self.width + 64) + 45 * weights)
        return Cost(held + 8 * self.arms * self.steps, None, f"{self.arms} trainings of {self.steps} steps")


def _loss_left(data: xr.Dataset) -> float:
    """The largest share of its first loss that an arm ended with; nan until all are over."""
    losses = data.train_loss.values
    return float((losses[:, -1] / losses[:, 0]).max()) if not np.isnan(losses[:, -1]).any() else math.nan
