"""Normalise and project: a network whose weights cannot grow keeps learning new labels as a fresh one does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr

from workbench.experiments.experiment import Experiment, Verdict
from workbench.experiments.task_stream import CLASSES, VARIABLES, DigitNets, Floats, TaskStream, arms_panel
from workbench.figure import Axis, Figure, Role
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Reading, Value, Variable
from workbench.schema import Doc, Range, Slow
from workbench.zoo.digits import IMAGES, standardised
from workbench.zoo.training import Examples

ROLES: dict[str, Role] = {"plain": "main", "fresh": "reference", "layer norm": "third", "project": "second"}
"""The arms, and how each is drawn."""


@dataclass(frozen=True)
class NormalizeAndProject(Experiment):
    """Normalise-and-project keeps a network plastic: it memorises the last labels as well as the first.

    The recipe (after Lyle et al. 2024, arXiv:2407.01800): ``examples`` digits, each pixel standardised, get new random
    labels for each of ``tasks`` tasks, which Adam learns in ``epochs`` epochs, its moments carried on. Four arms share
    data, labels, order and seeds: ``plain``, a ReLU net of ``depth`` hidden layers; ``fresh``, the same with network
    and optimizer made anew for each task; ``layer norm`` before each non-linearity; ``project``, that with each weight
    matrix scaled back to its initial norm after each step.

    How to read it: ``end_accuracy`` (arm, task) is the share of the labels known at the end of a task. The plain net
    learns less and less, the fresh one does not: what is lost is plasticity, the tasks are equally hard. Layer norm
    alone lets ``weight_rms`` grow, by which ``effective_rate``, lr/‖w‖ of the hidden matrices, falls; projection keeps
    both. Units and ranks of the plain net say what went wrong there: few directions of features are left.

    The verdict: accuracy of ``project``, mean over the last tenth of tasks, must reach 0.97, while ``plain`` ends at
    0.5 or less, the weights of ``layer norm`` grow more than twofold, and norms and effective learning rates of
    ``project`` change by less than 1e-4 of themselves.

    What it costs: four trainings of ``tasks`` · ``epochs`` epochs of a small net, some twenty seconds.

    When it misleads: with few tasks, or few epochs, nothing is lost yet; with a small learning rate it takes longer.
    Layer norm alone does nearly as well for so few tasks: what its growing weights cost comes later. ``effective_rate``
    means what it says only of the two arms with normalisation. Memorising is trainability: it says nothing of
    generalisation.

    Errors: standard error over the tasks of a tenth; of units and ranks, over examples.
    """

    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    least_accuracy: ClassVar[float] = 0.97
    most_plain: ClassVar[float] = 0.5
    least_growth: ClassVar[float] = 2.0
    most_change: ClassVar[float] = 1e-4

    tasks: Annotated[int, Range(4, 10_000, soft=(10, 100)), Doc("Tasks, each with new random labels."), Slow()] = 40
    epochs: Annotated[int, Range(1, 10_000, soft=(5, 100)), Doc("Epochs for each task."), Slow()] = 30
    examples: Annotated[int, Range(4, IMAGES, soft=(64, 1024)), Doc("Digits whose labels are learned."), Slow()] = 256
    batch: Annotated[int, Range(1, IMAGES, soft=(16, 256)), Doc("Examples in a batch."), Slow()] = 64
    width: Annotated[int, Range(1, 4096, soft=(16, 256)), Doc("Units of each hidden layer."), Slow()] = 64
    depth: Annotated[int, Range(1, 20, soft=(1, 6)), Doc("Hidden layers."), Slow()] = 3
    lr: Annotated[float, Range(1e-6, 10.0, log=True, soft=(1e-4, 0.03)), Doc("Learning rate of Adam."), Slow()] = 3e-3

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Train on task after task, all arms at each."""
        run, pace = self.tasks_of(draw.seed), Pace()
        notes = (f"{self.examples} digits with random labels", "Adam's moments are carried from task to task")
        for done in run.run():
            if done == 1 or pace.due():
                yield self.reading(done, run.values, coords=run.coords, converged=done == 1, notes=notes)

    def tasks_of(self, seed: int) -> TaskStream:
        """Arms and tasks."""
        inputs, _ = standardised(self.examples, seed)
        nets = DigitNets(self.width, self.depth)

        def task(number: int) -> Examples:
            labels = torch.Generator().manual_seed(seed + 3_000_017 * number)
            return inputs, torch.randint(CLASSES, (len(inputs),), generator=labels)

        arms = tuple(nets.arms(self.lr).values())
        return TaskStream(arms, task, self.tasks, self.epochs, self.batch, seed, nets.hidden, "end_accuracy")

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Last accuracy of each arm with its error, and how the weights of the normalised ones grew."""
        found: dict[str, Value] = {}
        for arm in ROLES:
            one, name = data.sel(arm=arm), f"accuracy_{arm.replace(' ', '_')}"
            found |= {name: float(one.last_accuracy), f"{name}_error": float(one.last_accuracy_error)}
        growth = _ratio(data.weight_rms)
        return found | {f"growth_{a.replace(' ', '_')}": float(growth.sel(arm=a)) for a in ("layer norm", "project")}

    def verdict(self, data: xr.Dataset) -> Verdict:
        """Last accuracy of the projected net, where the plain one lost it and only layer norm's weights grew."""
        share, plain = (float(data.last_accuracy.sel(arm=arm)) for arm in ("project", "plain"))
        growth = float(_ratio(data.weight_rms).sel(arm="layer norm"))
        moved = _change(data[["weight_rms", "effective_rate"]].sel(arm="project").to_array().values)
        words = (
            f"accuracy of project; plain {plain:.3g}, wanted at most {self.most_plain:g}; weights of layer norm grow "
            f"{growth:.3g} times, wanted more than {self.least_growth:g}; norm and rate of project move by {moved:.2g}"
        )
        held = plain <= self.most_plain and growth > self.least_growth and moved < self.most_change
        return Verdict(bool(share >= self.least_accuracy and held), share, self.least_accuracy, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """Accuracy over tasks; size of the weights, effective learning rates and ranks over the tasks that are over."""
        panels = (
            arms_panel(data, "end_accuracy", Axis("share of labels memorised"), ROLES, key=True),
            arms_panel(data, "weight_rms", Axis("rms of the weights"), ROLES),
            arms_panel(data, "effective_rate", Axis("effective learning rate", "log"), ROLES),
            arms_panel(data, "effective_rank", Axis("rank of last features"), ROLES),
        )
        return Figure(panels, columns=2)

    def estimate(self, subject: Any) -> Cost:
        """Data, weights with Adam's moments, and one batch's activations."""
        weights = 64 * self.width + (self.depth - 1) * self.width**2 + CLASSES * self.width
        steps = len(ROLES) * self.tasks * self.epochs * -(-self.examples // self.batch)
        held = 4 * (4 * len(ROLES) * weights + 64 * IMAGES + 4 * self.examples * (64 + self.depth * self.width))
        return Cost(held, steps, f"{steps} steps of a small net")


def _ratio(signs: xr.DataArray) -> xr.DataArray:
    """Last over first, by arm."""
    return signs.isel(checkpoint=-1) / signs.isel(checkpoint=0)


def _change(curves: Floats) -> float:
    """Largest relative distance of some curves (curve, checkpoint) from their first; nan until all is known."""
    return float(np.abs(curves / curves[:, :1] - 1).max())
