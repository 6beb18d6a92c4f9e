"""Critical learning periods in deep linear nets: what a pathway lost early it never gets back, the less the deeper."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from torch import Tensor

from workbench.dynamics.critical_periods import CriticalPeriods
from workbench.experiments.experiment import Experiment, Verdict
from workbench.figure import ROLES, AnyMark, Axis, Figure, Line, Panel, Points, Rule, fitting
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean
from workbench.pace import Pace
from workbench.probe import Cost, Reading, Value, Variable
from workbench.schema import Doc, Range, Slow
from workbench.several import Runs
from workbench.sources import Held
from workbench.trajectory import Trajectory
from workbench.zoo.pathways import Gate, PathwayStack, mapping, pathways

DEFICITS = ("none", "short", "long", "late")
PATHWAYS = ("open", "deprived")
KEPT = 16
"""Checkpoints of the longest training, beside those at which a deficit begins or ends."""
_MODES = 4
_DEPRIVED = 1


@dataclass(frozen=True)
class CriticalPeriodsInLinearNets(Experiment):
    """Critical periods in deep linear nets: a pathway that was closed early stays behind, the more the deeper it is.

    The recipe (Kleinman, Achille and Soatto 2024, arXiv:2308.12221): two pathways of D square matrices, orthogonal
    times ``scale``^(1/D) at the start, learn together a map of four modes, of singular values 4 to 2, by gradient
    descent on ½ ‖M - target‖². Depths are 1 to ``deepest``; each has four arms, told apart by when the second pathway
    is closed: ``none``; ``short``, for the first steps; ``long``, ``longer`` times that; ``late``, as many steps as
    ``long``, but when both have learned. All learn for ``clean`` steps after it. Every arm is trained from ``nets``
    initial weights; seeds decide these and the map, which all arms share.

    How to read it: ``share`` (depth, deficit) is what CriticalPeriods names the deprived pathway's final share of all
    modes, mean over nets; 0.5 is even. An open pathway takes over what is to be learned, and a late-comer finds no
    error left to learn from. At depth 1 both then still grow at one pace; deeper weights grow the faster the larger
    they are, so that a short deficit is as bad as a long one. The same long deficit costs little once modes are shared
    out: what is learned does not go. ``strength`` shows both pathways along training.

    The verdict: after the short deficit each doubling of the depth must divide the deprived pathway's share by 2 at
    least, and no depth leave more than the one before by twice their error; the long early deficit must leave at most
    0.02 from depth 2 on, the late one 0.2 at each depth, and without any the share must lie within 0.35 and 0.65. All
    nets must have learned the map to 1 % of their initial loss. A share below its error counts as that error.

    What it costs: four trainings of ``nets`` nets for each depth, side by side, some seconds together.

    When it misleads: with a deficit that is long enough even depth 1 stays behind, as nothing pulls the late-comer
    back: depth decides what a short deficit does. Single nets scatter: from some initial weights the deeper ones share
    0.6 to 0.4 without any deficit. With momentum or decay a closed pathway would not stay where it is.

    Errors: standard errors over nets.
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable(
            "share", ("depth", "deficit"), "deprived pathway's share of all modes at the end", error="share_error"
        ),
        Variable("share_error", ("depth", "deficit"), "its standard error over nets"),
        Variable("net_share", ("depth", "deficit", "net"), "deprived pathway's share in each net"),
        Variable(
            "strength",
            ("depth", "deficit", "pathway", "checkpoint"),
            "sum of the pathway's strengths along the modes over that of the map, mean over nets",
            error="strength_error",
        ),
        Variable("strength_error", ("depth", "deficit", "pathway", "checkpoint"), "its standard error over nets"),
        Variable("train_loss", ("depth", "deficit", "checkpoint"), "½ ‖M - target‖², of the worst net"),
        Variable("onset", ("deficit",), "steps before the deficit", "steps"),
        Variable("removal", ("deficit",), "steps after which the deficit ended", "steps"),
    )
    calibrated_on: ClassVar[tuple[int, ...]] = tuple(range(100, 125))
    least_fall: ClassVar[float] = 2.0
    most_long: ClassVar[float] = 0.02
    least_late: ClassVar[float] = 0.2
    even: ClassVar[tuple[float, float]] = (0.35, 0.65)
    learned: ClassVar[float] = 0.01

    deepest: Annotated[int, Range(2, 8), Doc("Matrices of a pathway at most; depths are 1 to this."), Slow()] = 4
    short: Annotated[int, Range(1, 100_000, soft=(10, 200)), Doc("Steps of the short deficit."), Slow()] = 50
    longer: Annotated[int, Range(2, 100), Doc("Long deficits over the short one."), Slow()] = 4
    late: Annotated[int, Range(1, 100_000, soft=(50, 1000)), Doc("Steps before the late deficit."), Slow()] = 200
    clean: Annotated[int, Range(1, 100_000, soft=(100, 4000)), Doc("Steps after the deficit."), Slow()] = 400
    rate: Annotated[float, Range(1e-6, 1.0, log=True, soft=(1e-3, 0.03)), Doc("Learning rate."), Slow()] = 0.01
    scale: Annotated[
        float, Range(1e-6, 10.0, log=True, soft=(0.03, 1)), Doc("Initial singular values of each pathway."), Slow()
    ] = 0.3
    size: Annotated[int, Range(_MODES, 256, soft=(8, 64)), Doc("Rows and columns of each matrix."), Slow()] = 16
    nets: Annotated[int, Range(2, 1000, soft=(4, 100)), Doc("Initial weights of each arm."), Slow()] = 24

    @property
    def windows(self) -> dict[str, tuple[int, int]]:
        """Steps before and until which the second pathway is closed, by the deficit's name."""
        long = self.longer * self.short
        return dict(zip(DEFICITS, ((0, 0), (0, self.short), (0, long), (self.late, self.late + long)), strict=True))

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps whose weights are kept, of any arm: evenly spread, and all at which something begins or ends."""
        ends = {at for window in self.windows.values() for at in (*window, window[1] + self.clean)}
        return tuple(sorted({*range(0, max(ends), max(1, max(ends) // KEPT)), *ends}))

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Train arm after arm; losses as they fall, strengths and shares as an arm is over."""
        run, pace, count = _Run(self, draw), Pace(), self.deepest * len(DEFICITS)
        for arm in range(count):
            for done in run.train(*divmod(arm, len(DEFICITS))):
                if pace.due():
                    yield run.report((arm + 0.9 * done) / count)
            yield run.report((arm + 1) / count)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The least fall of the share with depth, and the shares of the deepest nets with their errors."""
        found: dict[str, Value] = {"fall": _fall(data)}
        for name in DEFICITS:
            one = data.isel(depth=-1).sel(deficit=name)
            found |= {f"share_{name}": float(one.share), f"share_{name}_error": float(one.share_error)}
        return found

    def verdict(self, data: xr.Dataset) -> Verdict:
        """How much less a short deficit leaves with each doubling of the depth, and what the others leave."""
        share, fall = {name: data.share.sel(deficit=name).values for name in DEFICITS}, _fall(data)
        long, late, learned = share["long"][1:].max(), share["late"].min(), _learned(data)
        words = (
            f"least fall of the share with a doubling of the depth; after the short deficit {_listed(share['short'])}"
            f"{'' if _steady(data) else ', which rises in between'}; after the long one at most {long:.2g} from depth "
            f"2 on, wanted {self.most_long:g}; after the late one at least {late:.2g}, wanted {self.least_late:g}; "
            f"without any {_listed(share['none'])}, wanted {self.even[0]:g} to {self.even[1]:g}; of the loss "
            f"{learned:.2g} is left, wanted {self.learned:g}"
        )
        even = ((share["none"] >= self.even[0]) & (share["none"] <= self.even[1])).all()
        held = _steady(data) and long <= self.most_long and late >= self.least_late and even and learned <= self.learned
        return Verdict(bool(fall >= self.least_fall and held), fall, self.least_fall, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """Shares over depth for each deficit; both pathways along the short deficit by depth; losses of the deepest."""
        panels = (_shares(data), _strengths(data), _losses(data))
        return Figure(panels, title="what was missed early is not made up for")

    def estimate(self, subject: Any) -> Cost:
        """Weights of all nets with their gradients and products, and those that are kept of one arm."""
        one = 4 * len(PATHWAYS) * self.deepest * self.size**2
        steps = self.deepest * sum(until + self.clean for _, until in self.windows.values())
        return Cost(one * self.nets * (6 + len(self.checkpoints)), steps, f"{steps} steps of {self.nets} small nets")


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: CriticalPeriodsInLinearNets
    draw: Draw
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        probe = self.probe
        self.target, self.steps = mapping(size=probe.size, seed=self.draw.seed), np.array(probe.checkpoints)
        sizes = {"depth": probe.deepest, "deficit": len(DEFICITS), "net": probe.nets, "pathway": len(PATHWAYS)}
        sizes["checkpoint"] = len(self.steps)
        self.values |= {v.name: np.full([sizes[d] for d in v.dims], np.nan) for v in probe.variables}
        self.values["onset"], self.values["removal"] = np.array(list(probe.windows.values())).T

    def report(self, done: float) -> Reading:
        """The reading of now."""
        probe = self.probe
        coords = {"depth": np.arange(1, probe.deepest + 1), "deficit": np.array(DEFICITS), "net": np.arange(probe.nets)}
        coords |= {"pathway": np.array(PATHWAYS), "checkpoint": self.steps}
        notes = (f"{probe.nets} nets an arm; each arm has {probe.clean} steps after its deficit",)
        return probe.reading(done, self.values, coords=coords, converged=done == 1, notes=notes)

    def train(self, level: int, which: int) -> Iterator[float]:
        """Train one arm and measure it; yields how far it is at each checkpoint."""
        probe, seed = self.probe, self.draw.seed
        (onset, removal), widths = probe.windows[DEFICITS[which]], (probe.size,) * (level + 2)
        nets = [pathways(widths, scale=probe.scale, seed=seed + 1_000_003 * (k + 1)) for k in range(probe.nets)]
        stack = PathwayStack(nets, self.target, probe.rate)
        gate, last, kept = Gate(stack, _DEPRIVED, onset, removal), removal + probe.clean, dict[int, Any]()
        for step in range(last + 1):
            if step in probe.checkpoints:
                kept[step] = stack.weights()
                at = int(np.searchsorted(self.steps, step))
                self.values["train_loss"][level, which, at] = float(stack.losses().max())
                yield (step + 1) / (last + 1)
            if step < last:
                stack.descend()
                gate.after_step()
        self._measure((level, which), kept)

    def _measure(self, arm: tuple[int, int], kept: dict[int, list[dict[str, Tensor]]]) -> None:
        """What CriticalPeriods says of one arm that is over."""
        paths = {}
        for net in range(self.probe.nets):
            paths[f"{net}"] = Trajectory(Held(f"{net}", (), {step: held[net] for step, held in kept.items()}))
        found = CriticalPeriods(modes=_MODES).run(Runs(paths)).data
        each = found.final_share.values[:, _DEPRIVED]
        self.values["net_share"][arm], self.values["share"][arm] = each, each.mean()
        self.values["share_error"][arm] = error_of_mean(each)
        # (net, checkpoint, pathway): a sum over modes, as single ones of nearly equal value trade places.
        learned = found.strength.values.sum(-1) / float(self.target.svd().S.sum())
        at = np.searchsorted(self.steps, found["checkpoint"].values)
        self.values["strength"][arm][:, at] = learned.mean(0).T
        self.values["strength_error"][arm][:, at] = error_of_mean(learned).T


def _fall(data: xr.Dataset) -> float:
    """Share after the short deficit over that at twice the depth, the least; a share counts as its error at least."""
    share, error = data.share.sel(deficit="short").values, data.share_error.sel(deficit="short").values
    half = len(share) // 2
    return float((share[:half] / np.maximum(share, error)[1 : 2 * half : 2]).min())


def _steady(data: xr.Dataset) -> bool:
    """Whether no share after the short deficit lies above that of the depth before by twice their error, or more."""
    share, error = data.share.sel(deficit="short").values, data.share_error.sel(deficit="short").values
    return not (np.diff(share) > 2 * np.hypot(error[1:], error[:-1])).any()


def _learned(data: xr.Dataset) -> float:
    """The largest loss at the end of an arm over that at its start; nan until all have one."""
    ends = [row[~np.isnan(row)][[0, -1]] for arms in data.train_loss.values for row in arms if not np.isnan(row).all()]
    count = data.sizes["depth"] * data.sizes["deficit"]
    return max(float(last / first) for first, last in ends) if len(ends) == count else math.nan


def _listed(shares: Any) -> str:
    return ", ".join(f"{s:.2g}" for s in shares)


def _shares(data: xr.Dataset) -> Panel:
    marks: list[AnyMark] = []
    for name, role in zip(DEFICITS, ROLES, strict=True):
        one = data.sel(deficit=name)
        there = np.isfinite(one.share.values)
        x, y = data["depth"].values[there], one.share.values[there]
        marks += [Line(x, y, name, role), Points(x, y, one.share_error.values[there], role=role)]
    return Panel(tuple(marks), Axis("depth"), Axis("share of the deprived pathway"), title="deficit")


def _strengths(data: xr.Dataset) -> Panel:
    """Of the deprived pathway, a curve for each depth."""
    marks: list[AnyMark] = []
    for level, depth in enumerate(data["depth"].values):
        curve = data.strength.sel(deficit="short", pathway="deprived", depth=depth).values
        there = np.isfinite(curve)
        marks.append(Line(data["checkpoint"].values[there], curve[there], f"depth {depth}", ROLES[level % len(ROLES)]))
    marks.append(Rule(float(data.removal.sel(deficit="short")), "x", "opened"))
    return Panel(tuple(marks), Axis("step"), Axis("what the deprived pathway learned"), title="short deficit")


def _losses(data: xr.Dataset) -> Panel:
    """Of the deepest nets that have any."""
    known = np.isfinite(data.train_loss.values).any((1, 2))
    level = int(np.flatnonzero(known)[-1]) if known.any() else 0
    marks: list[AnyMark] = []
    for name, role in zip(DEFICITS, ROLES, strict=True):
        losses = data.train_loss.isel(depth=level).sel(deficit=name).values
        there = np.isfinite(losses)
        marks.append(Line(data["checkpoint"].values[there], losses[there], role=role))
    title = f"depth {data['depth'].values[level]}"
    return Panel(tuple(marks), Axis("step"), fitting("loss", "log", data.train_loss.values[level]), title=title)
