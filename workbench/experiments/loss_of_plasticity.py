"""Loss of plasticity: a network that learns task after task learns each worse, while a fresh one does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import nn

from workbench.experiments.experiment import Experiment, Verdict
from workbench.experiments.task_stream import CLASSES, PIXELS, VARIABLES, Arm, DigitNets, TaskStream, arms_panel
from workbench.figure import Axis, Figure, Role
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range, Slow
from workbench.zoo.digits import IMAGES, standardised
from workbench.zoo.interventions import ContinualBackprop, WeightPenalty
from workbench.zoo.training import Examples

Name = Literal["plain", "fresh", "slow", "continual backprop", "penalty", "layer norm", "project"]
NEEDED: tuple[Name, ...] = ("plain", "fresh", "slow", "continual backprop")
"""The arms without which there is no verdict."""
FAST: dict[str, Role] = {
    "plain": "main", "fresh": "reference", "penalty": "second", "layer norm": "third", "project": "fourth",
}  # fmt: skip
"""Those that learn by ``lr``, and how each is drawn."""
SLOW: dict[str, Role] = {"slow": "main", "continual backprop": "second"}
"""Those that learn by ``slow_lr``."""


@dataclass(frozen=True)
class LossOfPlasticity(Experiment):
    """Loss of plasticity: online accuracy falls from task to task, although each is as easy as the first.

    The recipe (after Dohare et al. 2024, Nature 632:768, with digits instead of MNIST): each of ``tasks`` tasks
    permutes the standardised pixels of ``examples`` digits anew and passes over them once, in batches, with Adam, whose
    moments are carried on. Arms share data, permutations, order and seeds: ``plain``, a ReLU net of ``depth`` hidden
    layers; ``fresh``, the same with network and optimizer made anew for each task; ``slow``, the plain net with
    ``slow_lr``; ``continual backprop`` with the same, where now and then the least useful units begin anew. Not needed
    for the verdict, with ``lr``: ``penalty`` (L2), ``layer norm``, and ``project``, that with weights of fixed norm.

    How to read it: ``online_accuracy`` (arm, task), the share of each batch that is right before it is learned. The
    plain net first learns better than at the beginning, then worse and worse, and the fresh one stays: what is lost is
    the ability to learn. Meanwhile ``dead_fraction`` and ``weight_mean`` grow and ``effective_rank`` falls, measured
    on the task at hand.

    The verdict: the share of its accuracy that the plain net has lost in the last tenth of tasks, against its own
    first tenth or against the fresh net, whichever is less, must reach 0.4; its dead units must have grown threefold
    since the end of the first task, and its rank have halved. Continual backprop must keep 0.9 of its first accuracy,
    and the plain net with the same learning rate 0.75 at most.

    What it costs: a training of ``tasks`` passes for each arm, some twenty seconds together.

    When it misleads: with a small learning rate or few tasks nothing is lost yet, and for some tasks it looks like a
    gain. How much is lost varies from seed to seed: ``lr`` of 1e-2 loses between 0.4 and 0.8, and ``slow_lr`` of 3e-3
    leaves about 0.75 of the first accuracy, both too close to what is asked. Continual backprop has rates of its own:
    replacing 1e-3 of the units at each step keeps only 0.8 with a learning rate of 5e-3. Compare arms of one learning
    rate only.

    Errors: standard error over the tasks of a tenth; of units and ranks, over examples.
    """

    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    least_lost: ClassVar[float] = 0.4
    least_dead: ClassVar[float] = 3.0
    most_rank: ClassVar[float] = 0.5
    least_kept: ClassVar[float] = 0.9
    most_kept: ClassVar[float] = 0.75

    tasks: Annotated[int, Range(4, 10_000, soft=(20, 400)), Doc("Tasks, each with its permutation."), Slow()] = 150
    examples: Annotated[int, Range(4, IMAGES, soft=(200, IMAGES)), Doc("Digits in a task, seen once."), Slow()] = 1400
    batch: Annotated[int, Range(1, IMAGES, soft=(8, 128)), Doc("Examples in a batch."), Slow()] = 32
    width: Annotated[int, Range(1, 4096, soft=(16, 256)), Doc("Units of each hidden layer."), Slow()] = 64
    depth: Annotated[int, Range(1, 20, soft=(1, 6)), Doc("Hidden layers."), Slow()] = 3
    lr: Annotated[float, Range(1e-6, 10.0, log=True, soft=(1e-4, 0.03)), Doc("Learning rate of Adam."), Slow()] = 1.2e-2
    slow_lr: Annotated[
        float,
        Range(1e-6, 10.0, log=True, soft=(1e-4, 0.03)),
        Doc("Learning rate of Adam for continual backprop and the slow net."),
        Slow(),
    ] = 4e-3
    replaced: Annotated[
        float,
        Range(1e-8, 1.0, log=True, soft=(1e-5, 0.01)),
        Doc("Share of old units that continual backprop replaces at each step."),
        Slow(),
    ] = 4e-3
    maturity: Annotated[
        int, Range(0, 1_000_000, soft=(0, 1000)), Doc("Steps for which a replaced unit is protected."), Slow()
    ] = 50
    decay: Annotated[float, Range(0.0, 0.99999), Doc("Of the running mean of a unit's utility."), Slow()] = 0.99
    strength: Annotated[float, Range(1e-8, 1.0, log=True), Doc("Of the L2 penalty."), Slow()] = 1e-3
    arms: Annotated[
        tuple[Name, ...],
        Choice(
            {
                "plain": "nothing done",
                "fresh": "a new network for each task",
                "slow": "nothing done, slow_lr",
                "continual backprop": "least useful units begin anew, slow_lr",
                "penalty": "L2",
                "layer norm": "before each non-linearity",
                "project": "layer norm, and weights of fixed norm",
            }
        ),
        Doc("What is compared; the verdict needs the first four."),
        Slow(),
    ] = NEEDED

    def validate(self) -> None:
        """There is something to train."""
        if not self.arms:
            raise ValueError(f"arms is empty; choose from {', '.join(get_args(Name))}.")

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Train on task after task, all arms at each."""
        run, pace = self.tasks_of(draw.seed), Pace()
        notes = (f"{self.examples} digits, pixels permuted", "Adam's moments are carried from task to task")
        for done in run.run():
            if done == 1 or pace.due():
                yield self.reading(done, run.values, coords=run.coords, converged=done == 1, notes=notes)

    def tasks_of(self, seed: int) -> TaskStream:
        """Arms and tasks."""
        inputs, labels = standardised(self.examples, seed)

        def task(number: int) -> Examples:
            order = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(seed + 3_000_017 * number))
            return inputs[:, order], labels

        every = self.possible(seed)
        chosen = tuple(every[name] for name in every if name in self.arms)
        hidden = DigitNets(self.width, self.depth).hidden
        return TaskStream(chosen, task, self.tasks, 1, self.batch, seed, hidden, "online_accuracy")

    def possible(self, seed: int) -> Mapping[str, Arm]:
        """All arms by name."""
        nets = DigitNets(self.width, self.depth)
        usual = nets.arms(self.lr)

        def replacing(net: nn.Module, optimizer: torch.optim.Optimizer) -> ContinualBackprop:
            return ContinualBackprop(net, optimizer, self.replaced, self.maturity, self.decay, seed + 9_000_011)

        every = (
            usual["plain"],
            usual["fresh"],
            Arm("slow", nets.plain, self.slow_lr),
            Arm("continual backprop", nets.plain, self.slow_lr, replacing),
            Arm("penalty", nets.plain, self.lr, lambda net, _: WeightPenalty(net, self.strength)),
            usual["layer norm"],
            usual["project"],
        )
        return {arm.name: arm for arm in every}

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Last accuracy of each arm with its error, and what the verdict asks of the plain net and of its remedy."""
        found: dict[str, Value] = {}
        for arm in data["arm"].values:
            one, name = data.sel(arm=arm), f"accuracy_{arm.replace(' ', '_')}"
            found |= {name: float(one.last_accuracy), f"{name}_error": float(one.last_accuracy_error)}
        return found

    def verdict(self, data: xr.Dataset) -> Verdict:
        """What the plain net lost, with its signs, and what continual backprop keeps."""
        known = data.reindex(arm=list(NEEDED))
        kept = {arm: float((known.last_accuracy / known.first_accuracy).sel(arm=arm)) for arm in NEEDED}
        against_fresh = float(known.last_accuracy.sel(arm="plain") / known.last_accuracy.sel(arm="fresh"))
        lost = float(np.min([1 - kept["plain"], 1 - against_fresh]))
        dead, rank = (known[name].sel(arm="plain").values[[1, -1]] for name in ("dead_fraction", "effective_rank"))
        remedy, slow = kept["continual backprop"], kept["slow"]
        words = (
            f"share of accuracy that the plain net lost; its dead units go from {dead[0]:.2g} to {dead[1]:.2g}, wanted "
            f"{self.least_dead:g} times, its rank from {rank[0]:.3g} to {rank[1]:.3g}, wanted half; continual backprop "
            f"keeps {remedy:.3g}, at least {self.least_kept:g}, without it {slow:.3g}, at most {self.most_kept:g}"
        )
        signs = dead[1] >= max(self.least_dead * dead[0], 1e-9) and rank[1] <= self.most_rank * rank[0]
        held = signs and remedy >= self.least_kept and slow <= self.most_kept
        return Verdict(bool(lost >= self.least_lost and held), lost, self.least_lost, words)

    def figure(self, data: xr.Dataset) -> Figure:
        """Online accuracy over tasks, dead units and ranks over the tasks that are over; a column a learning rate."""
        each = ((self.lr, _among(FAST, data)), (self.slow_lr, _among(SLOW, data)))
        columns = [(f"lr {rate:g}", roles) for rate, roles in each if roles]
        accuracy = Axis("online accuracy", limits=(0.0, 1.0))
        panels = [arms_panel(data, "online_accuracy", accuracy, roles, True, title) for title, roles in columns]
        for name, words in (("dead_fraction", "dead units"), ("effective_rank", "effective rank")):
            panels += [arms_panel(data, name, Axis(words), roles) for _, roles in columns]
        return Figure(tuple(panels), columns=len(columns))

    def estimate(self, subject: Any) -> Cost:
        """Data, weights with Adam's moments, and the activations of a task."""
        weights = PIXELS * self.width + (self.depth - 1) * self.width**2 + CLASSES * self.width
        steps = len(self.arms) * self.tasks * -(-self.examples // self.batch)
        held = 4 * (4 * len(self.arms) * weights + PIXELS * IMAGES + 4 * self.examples * self.depth * self.width)
        return Cost(held, steps, f"{steps} steps of a small net")


def _among(roles: dict[str, Role], data: xr.Dataset) -> dict[str, Role]:
    """Those arms that were trained."""
    there: list[str] = data["arm"].values.tolist()
    return {arm: role for arm, role in roles.items() if arm in there}
