"""The trade of steps against examples over batch sizes, and the noise scale that predicts where it turns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch.nn import functional

from workbench.dynamics.critical_batch import trade_panel
from workbench.experiments.arms import evaluation_steps
from workbench.experiments.batch_sweep import Batches, Goal, Trial, fitted
from workbench.experiments.experiment import Experiment, Verdict
from workbench.figure import AnyMark, Axis, Band, Figure, Line, Panel, Points, Rule, fitting, step_axis
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Reading, Value, Variable
from workbench.probes.gradient_noise import GradientNoise
from workbench.schema import Doc, Range, Slow
from workbench.subject import Subject
from workbench.zoo.digits import IMAGES, standardised
from workbench.zoo.nets import dense
from workbench.zoo.training import Examples

LOOKS = 80
"""Looks at the loss for each decade of steps: 3 % apart, each step below about thirty."""
GROUP = 8
"""Examples in each gradient of the noise scale: half the cost of single ones, and nearly the same error."""
_FIT = ("fewest_steps", "fewest_examples", "critical_batch")
_NOISE = ("noise_scale", "noise_trace", "gradient_square")
Floats = NDArray[np.float64]


def _pairs(names: Sequence[str], dims: tuple[str, ...], words: Sequence[str]) -> Iterator[Variable]:
    for name, long in zip(names, words, strict=True):
        yield Variable(name, dims, long, error=f"{name}_error")
        yield Variable(f"{name}_error", dims, "half the width of its 95 % interval")


@dataclass(frozen=True)
class LargeBatchModel(Experiment):
    """Steps against examples over batch sizes: a hyperbola, whose corner the gradient noise scale predicts.

    The recipe (McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162): nets with a hidden layer of ``width`` ReLU
    units learn ``examples`` standardised digits by plain SGD until the loss of all training examples is ``target``. For
    batch sizes 1, 2, 4 ... ``largest_batch`` all ``rates`` learning rates are tried, each from ``repeats`` initial
    weights and orders of the data, and the quickest rate counts. Then one more net learns at ``noise_batch`` and the
    best rate for it until the loss is ``noise_until``; on the way GradientNoise measures the noise scale.

    How to read it: ``steps`` and ``examples`` = batch size x steps lie on (S/S_min - 1)(E/E_min - 1) = 1, which
    CriticalBatch fits. Small batches need the fewest examples, large ones the fewest steps; ``critical_batch`` =
    E_min/S_min needs twice both. ``noise_scale`` tells it beforehand, without any sweep, to a factor that the paper
    puts at order one; it grows while the loss falls, so that the mean on the way to the target is compared.

    The verdict: the noise scale must rise at least tenfold along its run (an unresolved last one counts with what it
    exceeds), steps at each batch size must lie within 20 % of the hyperbola, and the critical batch size within a
    factor 3 of the mean noise scale from the start to the target.

    What it costs: ``rates`` x ``repeats`` trainings for each batch size, stacked into one, each as long as the quickest
    learning rate needs; most of the time goes into looks at the loss and into the noise scale.

    When it misleads: best rates at an end of the grid bend the curve: ``best_rate`` tells. Steps are counted from
    the start and not from where the loss has begun to fall as a power, so that the corner is sharper than a hyperbola's
    and all batch sizes lie off it by about a tenth. Small batches jump about the loss that they have reached: the first
    look below the target ends a training, and the noise scale along a run of small batches scatters.

    Errors: ``steps_error`` is the standard error over repeats; the fit's 95 % intervals come from the scatter of all
    repeats, those of the noise scale from the jackknife over gradients. Looks are 3 % of the steps apart.
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("train_loss", ("batch_size", "rate", "step"), "loss of all training examples, mean over repeats"),
        Variable("steps_by_rate", ("batch_size", "rate"), "steps to the target, geometric mean over repeats", "steps"),
        Variable("learning_rate", ("rate",), "learning rates"),
        Variable("best_rate", ("batch_size",), "learning rate that needs the fewest steps"),
        Variable("steps", ("batch_size",), "steps to the target at the best rate", "steps", "steps_error"),
        Variable("steps_error", ("batch_size",), "its standard error over repeats", "steps"),
        Variable("examples", ("batch_size",), "examples to the target at the best rate", "examples", "examples_error"),
        Variable("examples_error", ("batch_size",), "its standard error over repeats", "examples"),
        Variable("misfit", ("batch_size",), "steps over those of the hyperbola, less one"),
        *_pairs(_FIT, (), ("S_min", "E_min", "E_min/S_min")),
        Variable("noise_step", ("point",), "step of the run along which noise is measured", "steps"),
        Variable("noise_loss", ("point",), "loss of all training examples there"),
        *_pairs(_NOISE, ("point",), ("noise scale tr Σ/‖G‖²", "tr Σ of one example", "‖G‖², unbiased")),
        Variable("noise_scale_low", ("point",), "lower end of its 95 % interval", "examples"),
        Variable("noise_scale_high", ("point",), "upper end of its 95 % interval", "examples"),
        Variable("mean_noise_scale", (), "mean noise scale from the start to the target", "examples"),
        Variable("noise_rise", (), "noise scale at the end of its run over that at the start, at least"),
    )
    least_rise: ClassVar[float] = 10.0
    most_misfit: ClassVar[float] = 0.2
    most_apart: ClassVar[float] = 3.0

    examples: Annotated[int, Range(20, IMAGES - 7, soft=(200, 1700)), Doc("Training digits."), Slow()] = 1400
    width: Annotated[int, Range(1, 4096, soft=(8, 256)), Doc("Units of the hidden layer."), Slow()] = 64
    target: Annotated[float, Range(1e-3, 2.0, log=True, soft=(0.1, 1)), Doc("Loss to be reached."), Slow()] = 0.25
    largest_batch: Annotated[
        int, Range(2, 1024, log=True, soft=(16, 512)), Doc("Batch sizes are the powers of two up to this."), Slow()
    ] = 256
    smallest_rate: Annotated[float, Range(1e-5, 10.0, log=True), Doc("Smallest learning rate."), Slow()] = 0.02
    largest_rate: Annotated[float, Range(1e-5, 10.0, log=True), Doc("Largest learning rate."), Slow()] = 1.6
    rates: Annotated[int, Range(2, 24), Doc("Learning rates, evenly spaced on a log axis."), Slow()] = 7
    repeats: Annotated[int, Range(1, 16), Doc("Trainings for each learning rate."), Slow()] = 6
    steps: Annotated[int, Range(2, 100_000, soft=(100, 10_000)), Doc("Steps at most of a training."), Slow()] = 4000
    noise_batch: Annotated[
        int, Range(1, 1024, log=True), Doc("Batch size of the run along which noise is measured."), Slow()
    ] = 256
    noise_until: Annotated[
        float, Range(1e-4, 2.0, log=True, soft=(0.01, 0.3)), Doc("Loss at which that run ends."), Slow()
    ] = 0.1
    noise_points: Annotated[int, Range(3, 100, soft=(5, 20)), Doc("Noise scales along it, at most."), Slow()] = 8

    def validate(self) -> None:
        """Rates ascend, batches fit into the data, and the noise is followed past the target."""
        if not self.smallest_rate < self.largest_rate:
            raise ValueError(f"smallest_rate={self.smallest_rate:g} must lie below largest_rate={self.largest_rate:g}.")
        if max(self.largest_batch, self.noise_batch) > self.examples:
            raise ValueError(f"a batch cannot be larger than examples={self.examples}; take smaller batches.")
        if self.noise_until > self.target:
            raise ValueError(f"noise_until={self.noise_until:g} must not lie above target={self.target:g}.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes, ascending."""
        return tuple(2**k for k in range(self.largest_batch.bit_length()))

    @property
    def goal(self) -> Goal:
        """What the trainings are for."""
        rates = np.geomspace(self.smallest_rate, self.largest_rate, self.rates).tolist()
        return Goal(self.target, tuple(rates), evaluation_steps(self.steps, LOOKS))

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Batch size after batch size, the largest and quickest first, then the noise scale along one more run."""
        data, run = standardised(self.examples, draw.seed, floor=0.1), _Run(self)
        nets = [_net(draw, k, self.width) for k in range(self.repeats)]
        trials: list[Trial] = []
        for k, batch in reversed(list(enumerate(self.sizes))):
            trials.append(Trial(nets, data, batch, self.goal, draw))
            for _ in trials[-1].train():
                if run.pace.due():
                    run.tried(k, trials[-1])
                    yield run.report(len(trials) / (len(self.sizes) + 2))
            run.tried(k, trials[-1])
            run.fitted(trials)
            yield run.report(len(trials) / (len(self.sizes) + 2))
        for point in run.along(data, draw):
            yield run.report((len(trials) + 2 * point / self.noise_points) / (len(trials) + 2))
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Both ends of the hyperbola with the corner, the largest misfit, and what the noise scale says."""
        found: dict[str, Value] = {n + end: float(data[n + end]) for n in _FIT for end in ("", "_error")}
        noise = {n: float(data[n]) for n in ("mean_noise_scale", "noise_rise")}
        return found | {"largest_misfit": _largest_misfit(data)} | noise

    def verdict(self, data: xr.Dataset) -> Verdict:
        """The noise scale's rise, with a hyperbola that fits and whose corner it predicts."""
        rise, misfit = float(data.noise_rise), _largest_misfit(data)
        corner, mean = float(data.critical_batch), float(data.mean_noise_scale)
        apart = max(corner / mean, mean / corner) if corner > 0 and mean > 0 else math.nan
        words = (
            f"rise of the noise scale; steps {100 * misfit:.0f} % off the hyperbola at most, wanted "
            f"{100 * self.most_misfit:.0f} %; critical batch size {corner:.3g} and mean noise scale {mean:.3g} are a "
            f"factor {apart:.2g} apart, wanted {self.most_apart:g}"
        )
        passed = rise >= self.least_rise and misfit <= self.most_misfit and apart <= self.most_apart
        return Verdict(bool(passed), rise, self.least_rise, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """The loss at each batch size's best rate, steps against examples, and the noise scale over the loss."""
        return Figure((_curves(data, self.target), trade_panel(data), _noise(data)), title="steps against examples")

    def estimate(self, subject: Any) -> Cost:
        """All stacked nets with their gradients, and the activations of all examples in each of them."""
        weights, copies = 75 * self.width + 10, self.rates * self.repeats
        held = 4 * copies * (3 * weights + 4 * self.examples * (self.width + 16))
        words = f"{len(self.sizes)} batch sizes of {copies} trainings side by side, at most {self.steps} steps each"
        return Cost(held, None, words)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: LargeBatchModel) -> None:
        self.probe, self.goal, self.pace = probe, probe.goal, Pace()
        self.coords = {
            "batch_size": np.array(probe.sizes), "rate": np.arange(probe.rates), "step": np.array(self.goal.looks),
            "point": np.arange(probe.noise_points),
        }  # fmt: skip
        self.values: dict[str, Any] = {
            v.name: np.full([len(self.coords[d]) for d in v.dims], np.nan) for v in probe.variables
        }
        self.values["learning_rate"] = np.array(self.goal.rates)

    def report(self, done: float) -> Reading:
        """The reading of now."""
        notes = (f"on {self.probe.examples} of {IMAGES} digits",)
        return self.probe.reading(
            min(done, 1.0), self.values, coords=self.coords, converged=done >= 1, notes=(*notes, *self._edges())
        )

    def _edges(self) -> Iterator[str]:
        ends = self.goal.rates[0], self.goal.rates[-1]
        known = ~np.isnan(self.values["steps"])
        for batch in np.array(self.probe.sizes)[known & np.isin(self.values["best_rate"], ends)]:
            yield f"the best learning rate at batch {batch} is at an end of the grid"

    def tried(self, row: int, trial: Trial) -> None:
        """What is known of one batch size."""
        best, values = trial.best, self.values
        values["train_loss"][row] = trial.losses.mean(1)
        values["steps_by_rate"][row] = trial.steps
        values["best_rate"][row] = self.goal.rates[best]
        values["steps"][row], values["steps_error"][row] = trial.steps[best], trial.error[best]
        for end in ("", "_error"):
            values[f"examples{end}"][row] = trial.batch * values[f"steps{end}"][row]

    def fitted(self, trials: Sequence[Trial]) -> None:
        """The hyperbola through all batch sizes that are over."""
        found = fitted(trials, self.goal.loss).data
        self.values |= {n + end: float(found[n + end]) for n in _FIT for end in ("", "_error")}
        expected = self.values["fewest_steps"] + self.values["fewest_examples"] / np.array(self.probe.sizes)
        self.values["misfit"] = self.values["steps"] / expected - 1

    def along(self, data: Examples, draw: Draw) -> Iterator[int]:
        """The noise scale along one more run; yields how many points are in."""
        values, count = self.values, self.probe.noise_points
        for point, (step, loss, net) in enumerate(self._descent(data, draw)):
            found = GradientNoise(examples=len(data[0]), batch=min(GROUP, len(data[0]) // 3)).run(
                Subject(net, data, max_examples=None), seed=draw.seed
            )
            values["noise_step"][point], values["noise_loss"][point] = step, loss
            for name in (n + end for n in _NOISE for end in ("", "_error")):
                values[name][point] = float(found.data[name])
            for end in ("low", "high"):
                values[f"noise_scale_{end}"][point] = float(found.data[f"noise_scale_{end}"])
            before = values["noise_loss"] >= self.goal.loss
            values["mean_noise_scale"] = values["noise_scale"][before].mean()
            yield min(point + 1, count)
        last = values["noise_loss"] <= self.probe.noise_until
        if last.any():
            ends = values["noise_scale"][last], values["noise_scale_low"][last]
            values["noise_rise"] = float(np.where(np.isnan(ends[0]), ends[1], ends[0])[0] / values["noise_scale"][0])

    def _descent(self, data: Examples, draw: Draw) -> Iterator[tuple[int, float, torch.nn.Module]]:
        """One net's training, halting at the start and as each of evenly spaced logarithms of the loss is passed."""
        rate = self._rate()
        if math.isnan(rate):
            return
        net = _net(draw, 0, self.probe.width)
        source = Batches(len(data[0]), self.probe.noise_batch, draw.generator(2**20))
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        levels: list[float] = []
        for step in range(self.probe.steps + 1):
            with torch.no_grad():
                loss = functional.cross_entropy(net(data[0]), data[1]).item()
            levels = levels if step else np.geomspace(loss, self.probe.noise_until, self.probe.noise_points).tolist()
            if loss <= levels[0]:
                yield step, loss, net
                levels = [level for level in levels if level < loss]
            if not levels or not math.isfinite(loss):
                return
            rows = source()
            optimizer.zero_grad()
            functional.cross_entropy(net(data[0][rows]), data[1][rows]).backward()
            optimizer.step()

    def _rate(self) -> float:
        """The best learning rate of the batch size that is nearest to that of the noise's run."""
        nearest = int(np.abs(np.log2(np.array(self.probe.sizes) / self.probe.noise_batch)).argmin())
        return float(self.values["best_rate"][nearest]) if self.values["steps"][nearest] > 0 else math.nan


def _net(draw: Draw, number: int, width: int) -> torch.nn.Sequential:
    """A net with the initial weights of one repeat."""
    return dense((64, width, 10), "relu", seed=int(draw.generator(0, number).integers(2**31)))


def _largest_misfit(data: xr.Dataset) -> float:
    """The largest relative distance of steps from the hyperbola; nan until all batch sizes have reached the target."""
    return float(np.abs(data.misfit.values).max())


def _curves(data: xr.Dataset, target: float) -> Panel:
    marks: list[AnyMark] = [Rule(target, "y", "target")]
    sizes, last = data["batch_size"].values, data.sizes["batch_size"] - 1
    for k, best in enumerate(data.best_rate.values):
        if np.isnan(best):
            continue
        curve = data.train_loss.values[k, int(np.abs(data.learning_rate.values - best).argmin())]
        there = np.isfinite(curve)
        label = f"batch {sizes[k]}" if k in (0, last) else ""
        marks.append(Line(data["step"].values[there], curve[there], label, "main" if k == last else "second"))
    lines = [mark.y for mark in marks if isinstance(mark, Line)]
    return Panel(tuple(marks), step_axis(), fitting("train loss", "log", *lines))


def _noise(data: xr.Dataset) -> Panel:
    there = ~np.isnan(data.noise_loss.values)
    loss, scale, low, high = (
        data[n].values[there] for n in ("noise_loss", "noise_scale", "noise_scale_low", "noise_scale_high")
    )
    marks: list[AnyMark] = [Band(loss, low, high), Line(loss, scale, "noise scale"), Points(loss, scale)]
    open_end = np.isnan(scale) & np.isfinite(low)
    if open_end.any():
        marks.append(Points(loss[open_end], low[open_end], label="more than this", role="unconverged"))
    corner = float(data.critical_batch)
    if math.isfinite(corner):
        marks.append(Rule(corner, "y", "critical batch"))
    return Panel(tuple(marks), Axis("train loss", "log"), Axis("noise scale", "log", "examples"))
