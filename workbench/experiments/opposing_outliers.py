"""Outliers with opposing signals: one large feature that is of no use sharpens the loss, and swings past 2/η."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from workbench.dynamics.opposing import OpposingSignals
from workbench.experiments.descent import (
    VARIABLES,
    Descents,
    largest_ratio,
    loss_panel,
    readings_at,
    sharpness_panel,
)
from workbench.experiments.experiment import Experiment, Verdict
from workbench.figure import Axis, Figure, Line, Panel, Points, Rule, step_axis
from workbench.numerics.krylov import lanczos
from workbench.numerics.sampling import Draw
from workbench.operators.table import curvature
from workbench.pace import Pace
from workbench.probe import Cost, Reading, Value, Variable, drive
from workbench.schema import Doc, Range, Slow
from workbench.sources import Held
from workbench.subject import Subject
from workbench.trajectory import Trajectory
from workbench.zoo.outliers import Examples, linear_net, opposing_outliers, outlier_pairs

ARMS = ("two layers", "past 2/η", "one layer")
FIRST = 20
"""Steps at each of which the sharpness is read, as all begins with them."""
OVERSHOOT = 0.5
"""Ratio of sharpness to 2/η above which a step along the top eigenvector goes past the minimum: ηλ > 1."""
SWINGS = 16
"""Steps whose swings are drawn."""
_SIGNALS = ("opposition_before", "opposition_after", "turns_before", "turns_after", "cosine", "found")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OpposingOutliers(Experiment):
    """Outliers with opposing signals: a large feature that is of no use makes the sharpness grow, and swings past 2/η.

    The recipe (after Rosenfeld and Risteski 2023, arXiv:2311.04163): y = β·x + |o| with ``dimension`` Gaussian features
    x, and o, which is ``size`` on some examples, minus ``size`` on as many others, together ``share`` of all, and 0
    elsewhere. A linear map cannot use o, since y is even in it. It is learned by gradient descent on all examples
    from weights N(0, ``initial_scale``²), with half the mean square as loss, in float64. Three arms:
    ``two layers`` (a linear net of ``width`` hidden units), the same net with the larger rate ``past 2/η``, and ``one
    layer`` as control, whose Hessian never changes. Seeds decide β, x and the weights; all arms share the data.

    How to read it: learning β makes both layers of the two-layer net grow, and with them the curvature along o, of
    which ``outlier_share`` is how much of the top eigenvector's first layer belongs to o. The sharpness at the end is
    about |β| times the largest variance of a feature, some ``share`` · ``size``², and |β| at the start. Where that
    crosses 2/η, predictions swing along o: OpposingSignals, told nothing of o, names the examples whose losses change
    most, and ``group_loss`` shows one half rising while the other falls. ``opposition_after`` is the correlation of
    both groups' changes after the crossing, ``turns_after`` the share of steps at which the group that moves more turns
    around; ``opposition_before`` and ``turns_before`` are those up to half of 2/η, beyond which each step goes past the
    minimum along o. ``cosine`` is that of the groups' gradients, ``found`` the share of outliers in them.

    The verdict: with two layers the sharpness must grow to 3 times its start without a crossing, with one layer by less
    than 1.2; ``outlier_share`` must reach 0.95; past 2/η both ``cosine`` and ``opposition_after`` must lie at -0.9 or
    below, and ``turns_after`` at 0.9 or above, while ``turns_before`` is at most 0.5. The reproduction that this
    follows saw both groups fall together before. That is so where the weights begin alike along o; elsewhere one group
    rises slowly from the first step while the other falls (two of the seeds 200 to 204), but neither turns around.

    What it costs: three trainings of a small net with some products with the Hessian each, ten seconds.

    When it misleads: a rate far past 2/η diverges instead of swinging; a small one never crosses. The growth is
    bounded by what the task asks for, ``share`` · ``size``²: smaller outliers do not carry the top eigenvector. At the
    start the eigenvalues come in pairs of ±|β|, between which a power iteration never settles: it would report less,
    and a larger growth; the gauge's Lanczos run finds them.

    Errors: each eigenvalue lies within ``sharpness_error`` of a true one; the rest is exact for these examples.
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        *VARIABLES,
        Variable("outlier_share", ("arm",), "share of the top eigenvector's first layer on the outlier feature"),
        Variable("watched_step", ("watched",), "step whose losses were looked at one by one", "steps"),
        Variable("group_loss", ("watched", "group"), "mean loss of the group that OpposingSignals found"),
        Variable(
            "opposition_before", (), "correlation of both groups' changes until the sharpness reaches half of 2/η"
        ),
        Variable("opposition_after", (), "correlation of both groups' changes after the crossing"),
        Variable("turns_before", (), "share of steps at which the group that moves more turns, until half of 2/η"),
        Variable("turns_after", (), "share of steps at which the group that moves more turns, after the crossing"),
        Variable("cosine", (), "cosine between the groups' mean gradients"),
        Variable("found", (), "share of outliers among the examples of both groups"),
    )
    least_growth: ClassVar[float] = 3.0
    most_control: ClassVar[float] = 1.2
    least_share: ClassVar[float] = 0.95
    opposed: ClassVar[float] = -0.9
    turning: ClassVar[tuple[float, float]] = (0.5, 0.9)

    size: Annotated[float, Range(0.0, 100.0, soft=(1, 12)), Doc("Of the outlier feature, ±."), Slow()] = 6.0
    share: Annotated[float, Range(0.001, 1.0, soft=(0.01, 0.5)), Doc("Share of outliers."), Slow()] = 0.1
    teacher: Annotated[float, Range(0.01, 100.0, log=True, soft=(1, 10)), Doc("|β|."), Slow()] = 3.0
    learning_rate: Annotated[
        float, Range(1e-5, 10.0, log=True, soft=(0.01, 0.2)), Doc("Of two layers and of one."), Slow()
    ] = 0.1
    large_rate: Annotated[float, Range(1e-5, 10.0, log=True, soft=(0.05, 0.5)), Doc("Of the arm past 2/η."), Slow()] = (
        0.2
    )
    initial_scale: Annotated[
        float, Range(1e-4, 10.0, log=True, soft=(0.01, 0.5)), Doc("Of the initial weights."), Slow()
    ] = 0.05
    examples: Annotated[int, Range(4, 100_000, soft=(200, 5000)), Doc("Examples."), Slow()] = 2000
    dimension: Annotated[int, Range(1, 1000, soft=(5, 100)), Doc("Gaussian features."), Slow()] = 20
    width: Annotated[int, Range(1, 1000, soft=(2, 64)), Doc("Hidden units."), Slow()] = 16
    steps: Annotated[int, Range(2, 100_000, soft=(100, 10_000)), Doc("Steps of each arm."), Slow()] = 3000
    every: Annotated[int, Range(1, 10_000, soft=(5, 200)), Doc("Steps between sharpness readings."), Slow()] = 10
    watched: Annotated[
        int, Range(4, 10_000, soft=(10, 200)), Doc("Steps past the crossing that OpposingSignals looks at."), Slow()
    ] = 40

    def validate(self) -> None:
        """One rate is larger."""
        if not self.learning_rate < self.large_rate:
            raise ValueError(f"learning_rate={self.learning_rate:g} must lie below large_rate={self.large_rate:g}.")

    @property
    def pairs(self) -> int:
        """Outliers of either sign."""
        return outlier_pairs(self.examples, self.share)

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Train arm after arm; the groups are looked for as the second one is over."""
        data = opposing_outliers(self.examples, self.dimension, self.size, self.share, self.teacher, draw.seed)
        run, pace = _Run(self, data, draw), Pace()
        for arm in range(len(ARMS)):
            for done in run.train(arm):
                if pace.due():
                    yield run.report((arm + min(done, 0.999)) / len(ARMS))
            yield run.report((arm + 1) / len(ARMS))

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Growth with two layers and with one, the outlier's share of the eigenvector, and how groups oppose."""
        found: dict[str, Value] = {"growth": _growth(data, 0), "control_growth": _growth(data, 2)}
        found |= {"outlier_share": float(data.outlier_share[0]), "step_crossing": float(data.step_crossing[1])}
        return found | {name: float(data[name]) for name in _SIGNALS}

    def verdict(self, data: xr.Dataset) -> Verdict:
        """Growth of the sharpness with two layers but not with one, along the outlier, and groups that oppose."""
        growth, control, share = _growth(data, 0), _growth(data, 2), float(data.outlier_share[0])
        _, after, turns, swings, cosine, _ = (float(data[name]) for name in _SIGNALS)
        words = (
            f"growth of the sharpness with two layers; with one {control:.3g}, wanted below {self.most_control:g}; "
            f"outlier's share of the top eigenvector {share:.3f}, wanted {self.least_share:g}; past 2/η, groups' "
            f"gradients have cosine {cosine:.3f} and their losses' changes correlate by {after:.4f}, both wanted at "
            f"most {self.opposed:g}; losses turn at {swings:.0%} of the steps, wanted {self.turning[1]:.0%}, and "
            f"before at {turns:.0%}, wanted at most {self.turning[0]:.0%}"
        )
        sharpens = growth >= self.least_growth and control < self.most_control and largest_ratio(data, 0) < 1
        opposes = cosine <= self.opposed and after <= self.opposed
        swings_late = turns <= self.turning[0] and swings >= self.turning[1]
        passed = sharpens and opposes and swings_late and share >= self.least_share
        return Verdict(bool(passed), growth, self.least_growth, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """Sharpness and thresholds, losses, the groups' losses at the end of the window, and their changes."""
        x = step_axis()
        panels = (sharpness_panel(data, ARMS, x), loss_panel(data, x), _swings(data), _opposition(data))
        return Figure(panels, title="an outlier of no use sharpens, and swings past 2/η")

    def estimate(self, subject: Any) -> Cost:
        """The data, what a product with the Hessian keeps, the Lanczos run, and the weights that are kept."""
        weights = (self.dimension + 2) * self.width
        held = 8 * (self.examples * (4 * self.dimension + 24 * self.width) + (45 + 2 * self.watched) * weights)
        return Cost(held + 40 * self.steps, None, f"{len(ARMS)} trainings of {self.steps} steps")


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: OpposingOutliers
    data: Examples
    draw: Draw
    curves: Descents = field(init=False)
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])

    def __post_init__(self) -> None:
        probe = self.probe
        self.curves = Descents(len(ARMS), readings_at(probe.steps, probe.every, FIRST))
        rows = probe.watched // 2 + probe.watched + 1
        self.values: dict[str, Any] = {"outlier_share": np.full(len(ARMS), np.nan)}
        self.values |= {"watched_step": np.full(rows, np.nan), "group_loss": np.full((rows, 2), np.nan)}

    def report(self, done: float) -> Reading:
        """The reading of now."""
        values = self.curves.now() | {n: np.copy(v) for n, v in self.values.items()}
        coords = {"arm": np.array(ARMS), "group": np.array(["rising", "falling"])} | self.curves.coords
        coords["watched"] = np.arange(len(self.values["watched_step"]))
        notes = (f"of {self.probe.examples} examples {2 * self.probe.pairs} are outliers, the first ones",)
        return self.probe.reading(done, values, coords=coords, converged=done == 1, notes=notes)

    def train(self, arm: int) -> Iterator[float]:
        """Train one arm and look at its end; yields how far it is."""
        probe, past = self.probe, arm == 1
        widths = (probe.dimension + 1, 1) if arm == 2 else (probe.dimension + 1, probe.width, 1)
        net = linear_net(widths, probe.initial_scale, self.draw.seed + 1_000_003)
        rate = probe.large_rate if past else probe.learning_rate
        keep = (lambda step: self.keep(step, net)) if past else None
        for step in self.curves.descend(arm, net, self.data, rate, keep=keep):
            yield 0.9 * (step + 1) / (probe.steps + 1)
        if math.isfinite(self.curves.curves["sharpness"][arm, -1]):
            self.values["outlier_share"][arm] = _outlier_share(net, self.data, self.draw)
        if past:
            yield from self.oppose(net)

    def keep(self, step: int, net: nn.Module) -> None:
        """Keep the weights of the last steps before the crossing, as far as it is known, and of those after it."""
        ratios, half = self.curves.curves["stability_ratio"][1], self.probe.watched // 2
        crossed = self.curves.read_at[ratios >= 1]
        if crossed.size and step > crossed[0] + self.probe.watched:
            return
        self.kept[step] = {name: t.detach().clone() for name, t in net.state_dict().items()}
        oldest = (int(crossed[0]) if crossed.size else step) - half
        for one in [one for one in self.kept if one < oldest]:
            del self.kept[one]

    def oppose(self, net: nn.Module) -> Iterator[float]:
        """What OpposingSignals says of the weights that were kept; nothing where training diverged."""
        if not np.isfinite(self.curves.curves["train_loss"][1, list(self.kept)]).all():
            return
        path = Trajectory(Held(ARMS[1], (), self.kept)).using(net, self.data, "half_mse", max_examples=None)
        share = (self.probe.pairs - 0.5) / self.probe.examples  # the probe rounds up, whatever the division leaves
        found = None
        for reading in drive(OpposingSignals(share=share), path, seed=self.draw.seed):
            found = reading.data
            yield 0.9 + 0.1 * reading.done
        if found is not None:
            self.read(found)

    def read(self, found: xr.Dataset) -> None:
        """Both groups' losses, and how their changes go together before and after the crossing."""
        steps, losses = found["step"].values, found.group_loss.values
        self.values["watched_step"][: len(steps)], self.values["group_loss"][: len(steps)] = steps, losses
        curves, changes = self.curves.curves, np.diff(losses, axis=0)
        ratios, crossing = curves["stability_ratio"][1], float(curves["step_crossing"][1])
        before, after = _sides(self.curves.read_at, ratios, crossing, steps)
        self.values["opposition_before"] = _correlation(changes[before])
        self.values["opposition_after"] = _correlation(changes[after])
        self.values |= {"turns_before": _turns(changes[before]), "turns_after": _turns(changes[after])}
        self.values |= {"cosine": float(found.cosine), "found": float((found.example < 2 * self.probe.pairs).mean())}


def _sides(read_at: Any, ratios: Floats, crossing: float, steps: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which changes between neighbouring steps lie before steps overshoot, and which after the crossing."""
    overshooting = read_at[ratios >= OVERSHOOT]
    before = steps[:-1] < (overshooting[0] if overshooting.size else math.inf)
    return before, steps[:-1] >= crossing


def _correlation(changes: Floats) -> float:
    """Of the two columns of (n, 2); nan under three rows, or where one does not change."""
    if len(changes) < 3 or not (changes.std(0) > 0).all():
        return math.nan
    one, two = (column - column.mean() for column in changes.T)
    return float(one @ two / math.sqrt(float(one @ one) * float(two @ two)))


def _turns(changes: Floats) -> float:
    """The share of rows of (n, 2) whose sign differs from the next's, in the larger column; nan under three rows."""
    if len(changes) < 3:
        return math.nan
    larger = changes[:, np.abs(changes).sum(0).argmax()]
    return float((larger[1:] * larger[:-1] < 0).mean())


def _outlier_share(net: nn.Module, data: Examples, draw: Draw) -> float:
    """Of the top eigenvector's part in the first layer, the share ‖v[:, -1]‖² / ‖v‖²."""
    subject = Subject(net, data, "half_mse", max_examples=None)
    start = Draw(draw.seed, "OpposingOutliers", subject.size, subject.dtype, subject.device)
    with curvature(subject, "hessian") as matrix:
        *_, last = lanczos(matrix, start(0), top=1, bottom=0, tolerance=1e-6, fresh=lambda i: start(1 + i))
        first = next(iter(subject.unflatten(last.vectors([0])[0]).values()))
    return float(first[:, -1].square().sum() / first.square().sum())


def _growth(data: xr.Dataset, arm: int) -> float:
    """Sharpness at an arm's end over that at its start; nan before."""
    sharpness = data.sharpness.values[arm]
    return float(sharpness[-1] / sharpness[0])


def _watched(data: xr.Dataset) -> tuple[Floats, Floats]:
    """The steps that were looked at one by one, and both groups' losses there."""
    there = np.isfinite(data.watched_step.values)
    return data.watched_step.values[there], data.group_loss.values[there]


def _swings(data: xr.Dataset) -> Panel:
    """Both groups' losses over the last of these steps, few enough to tell each swing."""
    steps, losses = (held[-SWINGS:] for held in _watched(data))
    marks = (Line(steps, losses[:, 0], role="second"), Line(steps, losses[:, 1], role="reference"))
    return Panel(marks, Axis("step"), Axis("loss of either group"))


def _opposition(data: xr.Dataset) -> Panel:
    """The change of one group against that of the other, before steps overshoot and after the crossing."""
    steps, losses = _watched(data)
    changes = np.diff(losses, axis=0)
    before, after = _sides(data.checkpoint.values, data.stability_ratio.values[1], float(data.step_crossing[1]), steps)
    marks = (
        Points(changes[after, 0], changes[after, 1], label="past 2/η", role="second"),
        Points(changes[before, 0], changes[before, 1], label="before"),
    )
    return Panel((*marks, Rule(0.0), Rule(0.0, "x")), Axis("change of one group"), Axis("of the other"))
