"""One task after another: arms that learn the same tasks side by side, and the signs of plasticity on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from workbench.dynamics.gauges.gauge import Training
from workbench.dynamics.gauges.norms import EffectiveRate
from workbench.dynamics.plasticity import Plasticity
from workbench.figure import AnyMark, Axis, Line, Panel, Role
from workbench.numerics.stats import error_of_mean
from workbench.probe import Variable
from workbench.sources import Held
from workbench.trajectory import Trajectory
from workbench.zoo.interventions import Intervention, NormProjection, normalised_dense
from workbench.zoo.nets import dense
from workbench.zoo.training import Examples, accuracy

Floats = NDArray[np.float64]
Score = Literal["online_accuracy", "end_accuracy"]
PIXELS, CLASSES = 64, 10
"""Of the digits."""

SIGNS = {
    "dead_fraction": ("total_dead_fraction", "share of hidden units that are 0 on every example of the task"),
    "dormant_fraction": ("total_dormant_fraction", "share of dormant hidden units"),
    "effective_rank": ("effective_rank", "exp(entropy(σ/Σσ)) of the last hidden features; 0 where all are 0"),
}
"""Estimates that Plasticity takes on the task at hand: its name of each, and words."""
NORMS = {"weight_mean": "mean of |θ| over all parameters", "weight_rms": "root mean square of the weight matrices"}
"""What Plasticity says of the weights, and has no error."""
VARIABLES = (
    Variable("online_accuracy", ("arm", "task"), "share right of each batch before it is learned, over the task"),
    Variable("end_accuracy", ("arm", "task"), "share of the task's examples that are right at its end"),
    *(
        made
        for end in ("first", "last")
        for made in (
            Variable(f"{end}_accuracy", ("arm",), f"mean over the {end} tenth of tasks", error=f"{end}_accuracy_error"),
            Variable(f"{end}_accuracy_error", ("arm",), "its standard error over tasks"),
        )
    ),
    *(
        made
        for name, (_, words) in SIGNS.items()
        for made in (
            Variable(name, ("arm", "checkpoint"), words, error=f"{name}_error"),
            Variable(f"{name}_error", ("arm", "checkpoint"), "its standard error over examples"),
        )
    ),
    *(Variable(name, ("arm", "checkpoint"), words) for name, words in NORMS.items()),
    Variable("effective_rate", ("arm", "checkpoint"), "learning rate over the norm of hidden weight matrices, mean"),
)
"""What a stream of tasks yields; a checkpoint is the number of tasks that are over."""


@dataclass(frozen=True)
class Arm:
    """One way to learn task after task.

    Args:
        name: as it is shown.
        build: the network by seed.
        rate: learning rate of Adam, whose moments are carried from task to task.
        keep: the intervention, made for a network and its optimizer.
        fresh: whether network and optimizer begin anew with each task.
    """

    name: str
    build: Callable[[int], nn.Module]
    rate: float
    keep: Callable[[nn.Module, torch.optim.Optimizer], Intervention] = lambda *_: Intervention()
    fresh: bool = False

    def begin(self, seed: int) -> Learner:
        """A network that has learned nothing."""
        net = self.build(seed)
        # One kernel for all tensors: small nets spend most of a step in the optimizer otherwise.
        optimizer = torch.optim.Adam(net.parameters(), lr=self.rate, fused=True)
        return Learner(net, optimizer, self.keep(net, optimizer))


@dataclass(frozen=True)
class DigitNets:
    """ReLU nets of ``depth`` hidden layers of ``width`` units on digits, and the arms that go by them alone."""

    width: int
    depth: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Pixels, units of each hidden layer, classes."""
        return PIXELS, *(self.width,) * self.depth, CLASSES

    @property
    def hidden(self) -> tuple[str, ...]:
        """Names of the weight matrices that lead to hidden units."""
        return tuple(f"linear{k}.weight" for k in range(1, self.depth + 1))

    def plain(self, seed: int) -> nn.Module:
        """The net as it is."""
        return dense(self.widths, "relu", seed=seed)

    def normalised(self, seed: int) -> nn.Module:
        """The net with layer norm before each non-linearity."""
        return normalised_dense(self.widths, seed=seed)

    def arms(self, rate: float) -> dict[str, Arm]:
        """By name: nothing done, begun anew for each task, with layer norm, and with that at fixed norms of weights."""
        every = (
            Arm("plain", self.plain, rate),
            Arm("fresh", self.plain, rate, fresh=True),
            Arm("layer norm", self.normalised, rate),
            Arm("project", self.normalised, rate, lambda net, _: NormProjection(net)),
        )
        return {arm.name: arm for arm in every}


@dataclass(frozen=True, eq=False)
class Learner:
    """A network, its optimizer and what keeps it plastic."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    keep: Intervention

    def learn(self, task: Examples, epochs: int, batch: int, order: torch.Generator) -> float:
        """Train on a task; returns the share right of all batches, each before it was learned; nan once it diverged."""
        inputs, targets = task
        right, finite = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=order).split(batch):
                outputs, wanted = self.net(inputs[rows]), targets[rows]
                right += (outputs.detach().argmax(1) == wanted).sum()
                finite &= outputs.detach().isfinite().all()
                self._step(functional.cross_entropy(outputs, wanted))
        return right.item() / (epochs * len(inputs)) if bool(finite) else float("nan")

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.keep.before_step()
        self.optimizer.step()
        self.keep.after_step()

    @torch.no_grad()
    def effective_rate(self, tensors: Sequence[str]) -> float:
        """What EffectiveRate reads of some weight matrices."""
        meter = EffectiveRate(tensors=tuple(tensors)).start(Training(self.net, self.optimizer, dict))
        return float(meter.read()["effective_rate"])


@dataclass(eq=False)
class TaskStream:
    """Arms that learn the same tasks in the same order of examples, each from the same initial seed.

    Args:
        arms: what is compared.
        task: the examples of a task by its number, from 1.
        tasks: how many.
        epochs: passes over each.
        batch: examples in a batch.
        seed: of the networks and of the order of examples.
        rated: globs of the weight matrices whose effective learning rate is read.
        score: the accuracy that first and last tenth are taken of.
        values: every variable of :data:`VARIABLES` so far, nan where nothing is known.
    """

    arms: tuple[Arm, ...]
    task: Callable[[int], Examples]
    tasks: int
    epochs: int
    batch: int
    seed: int
    rated: tuple[str, ...]
    score: Score
    values: dict[str, Floats] = field(default_factory=dict[str, Floats])

    def __post_init__(self) -> None:
        self.checkpoints = checkpoints(self.tasks)
        sizes = {"arm": len(self.arms), "task": self.tasks, "checkpoint": len(self.checkpoints)}
        self.values = {v.name: np.full([sizes[d] for d in v.dims], np.nan) for v in VARIABLES}
        self.learners = [arm.begin(self._seed(1)) for arm in self.arms]

    @property
    def coords(self) -> dict[str, Any]:
        """Coordinates of the values."""
        names = [arm.name for arm in self.arms]
        return {"arm": names, "task": np.arange(1, self.tasks + 1), "checkpoint": self.checkpoints}

    def _seed(self, number: int) -> int:
        """Of the network that begins with a task."""
        return self.seed + 1_000_003 * number

    def run(self) -> Iterator[float]:
        """All tasks, all arms at each; yields how much is done."""
        data = self.task(1)
        for arm in range(len(self.arms)):
            self._measure(arm, 0, data)
            yield 0.5 * (arm + 1) / len(self.arms) / (self.tasks + 1)
        for number in range(1, self.tasks + 1):
            data = self.task(number)
            for arm in range(len(self.arms)):
                self._learn(arm, number, data)
                yield min((number + (arm + 1) / len(self.arms)) / (self.tasks + 1), 0.999)
        self._conclude()
        yield 1.0

    def _learn(self, arm: int, number: int, data: Examples) -> None:
        """One arm on one task."""
        if self.arms[arm].fresh and number > 1:
            self.learners[arm] = self.arms[arm].begin(self._seed(number))
        learner, order = self.learners[arm], torch.Generator().manual_seed(self.seed + 7_000_003 * number)
        online = learner.learn(data, self.epochs, self.batch, order)
        self.values["online_accuracy"][arm, number - 1] = online
        self.values["end_accuracy"][arm, number - 1] = accuracy(learner.net, data) if online == online else np.nan
        if number in self.checkpoints:
            self._measure(arm, number, data)
        learner.keep.between_tasks()

    def _measure(self, arm: int, number: int, data: Examples) -> None:
        """Signs of plasticity on the task at hand; unknown where the network has diverged."""
        learner, at = self.learners[arm], (arm, int(np.searchsorted(self.checkpoints, number)))
        self.values["effective_rate"][at] = learner.effective_rate(self.rated)
        try:
            found = signs(learner.net, self.arms[arm].build(0), data)
        except ValueError:
            return
        for name, value in found.items():
            self.values[name][at] = value

    def _conclude(self) -> None:
        """First and last tenth of the tasks, of which there are at least two for an error."""
        scores, tenth = self.values[self.score], max(self.tasks // 10, 2)
        for end, part in (("first", scores[:, :tenth]), ("last", scores[:, -tenth:])):
            self.values[f"{end}_accuracy"][:] = part.mean(1)
            self.values[f"{end}_accuracy_error"][:] = error_of_mean(part.T)


def signs(net: nn.Module, alike: nn.Module, data: Examples) -> dict[str, float]:
    """What Plasticity finds in a network on some examples: the names of :data:`SIGNS` with errors, and :data:`NORMS`.

    Args:
        net: as it is, with whatever hooks an intervention has put on it.
        alike: a network of the same shape without hooks, in which the weights are measured.
        data: the task at hand.

    Raises:
        ValueError: the network's features are not finite.
    """
    weights = {name: t.detach().clone() for name, t in net.state_dict().items()}
    path = Trajectory(Held("", (), {0: weights})).using(alike, data, "cross_entropy")
    one = Plasticity(refits=0).run(path).data.isel(run=0, checkpoint=0, layer=-1)
    found = {name: float(one[name]) for name in NORMS}
    for name, (theirs, _) in SIGNS.items():
        found |= {name: float(one[theirs]), f"{name}_error": float(one[f"{theirs}_error"])}
    if float(one.dead_fraction) == 1:  # features that are all 0 have no spectrum to take an entropy of
        found |= {"effective_rank": 0.0, "effective_rank_error": 0.0}
    return found


def checkpoints(tasks: int) -> NDArray[np.int64]:
    """How many tasks are over where signs are measured: none, one, and ten evenly spread up to all."""
    return np.unique([0, *np.linspace(1, tasks, 11).round().astype(int)])


def arms_panel(
    data: Any, name: str, axis: Axis, roles: Mapping[str, Role], key: bool = False, title: str = ""
) -> Panel:
    """One variable by arm over tasks or checkpoints; ``roles`` says which arms, ``key`` whether they are named."""
    marks: list[AnyMark] = []
    for arm, role in roles.items():
        curve = data[name].sel(arm=arm)
        there = np.isfinite(curve.values)
        marks.append(Line(data[curve.dims[0]].values[there], curve.values[there], arm if key else "", role))
    return Panel(tuple(marks), Axis("task"), axis, title=title)
