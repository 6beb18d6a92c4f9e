"""Trainings that differ in batch size and learning rate: how many steps each batch size needs to reach one loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workbench.dynamics.critical_batch import CriticalBatch
from workbench.numerics.sampling import Draw
from workbench.probe import Reading
from workbench.record import Line as Scalars
from workbench.several import Runs
from workbench.sources import Held
from workbench.trajectory import Trajectory
from workbench.zoo.stacked import Stack
from workbench.zoo.training import Examples

Floats = NDArray[np.float64]


class Batches:
    """Rows of mini-batches without end: every example once an epoch, in the orders that ``rng`` gives."""

    def __init__(self, examples: int, size: int, rng: np.random.Generator) -> None:
        self.examples, self.size, self.rng = examples, size, rng
        self.left = torch.empty(0, dtype=torch.long)

    def __call__(self) -> Tensor:
        """The next batch's rows (size,); one that an epoch's end would cut goes on into the next epoch."""
        while len(self.left) < self.size:
            self.left = torch.cat([self.left, torch.from_numpy(self.rng.permutation(self.examples))])
        rows, self.left = self.left[: self.size], self.left[self.size :]
        return rows


@dataclass(frozen=True)
class Goal:
    """What trainings are for: the train ``loss`` to reach, the learning ``rates`` to try, when to look at the loss."""

    loss: float
    rates: tuple[float, ...]
    looks: tuple[int, ...]


class Trial:
    """One batch size: all learning rates, each with all repeats, side by side until it is known which is quickest.

    ``losses`` (rate, repeat, look) of all training examples, nan where nothing was looked at; ``reached`` (rate,
    repeat) the step of the look at which the goal was first met, infinite where it was not. The learning rates of one
    repeat share initial weights and batches.
    """

    def __init__(self, nets: Sequence[nn.Module], data: Examples, batch: int, goal: Goal, draw: Draw) -> None:
        self.data, self.batch, self.goal = data, batch, goal
        shape = (len(goal.rates), len(nets))
        self.stack = Stack([net for _ in goal.rates for net in nets], np.repeat(goal.rates, len(nets)).tolist())
        self.sources = [Batches(len(data[0]), batch, draw.generator(batch, k)) for k in range(len(nets))]
        self.losses = np.full((*shape, len(goal.looks)), np.nan)
        self.reached = np.full(shape, np.inf)

    def train(self) -> Iterator[int]:
        """Take steps; yields the step of each look, and ends when the quickest learning rate is known, or none is."""
        columns = {step: k for k, step in enumerate(self.goal.looks)}
        for step in range(self.goal.looks[-1] + 1):
            if step in columns:
                self._look(step, columns[step])
                yield step
                if self._decided(step):
                    return
            rows = torch.stack([source() for source in self.sources]).repeat(len(self.goal.rates), 1)
            self.stack.descend(self.data[0][rows], self.data[1][rows])

    def _look(self, step: int, column: int) -> None:
        losses = self.stack.losses(*self.data).double().cpu().numpy().reshape(self.reached.shape)
        self.losses[:, :, column] = losses
        self.reached[np.isinf(self.reached) & (losses <= self.goal.loss)] = step

    def _decided(self, step: int) -> bool:
        """Whether no learning rate that is still under way can overtake the quickest that is through, or all broke."""
        through = np.isfinite(self.reached).all(1)
        least = _mean_log(np.where(np.isfinite(self.reached), self.reached, step))
        ahead = least[through].min(initial=np.inf) <= least[~through].min(initial=np.inf)
        lost = ~np.isfinite(self.losses[:, :, self.goal.looks.index(step)]).any()
        return bool((through.any() and ahead) or lost)

    @property
    def steps(self) -> Floats:
        """Steps to the goal by learning rate, geometric mean over repeats; nan where a repeat did not get there."""
        return np.where(np.isfinite(self.reached).all(1), np.exp(_mean_log(self.reached)), np.nan)

    @property
    def error(self) -> Floats:
        """Standard error of :attr:`steps` over repeats; nan with one repeat."""
        count = self.reached.shape[1]
        if count < 2:
            return np.full(len(self.reached), np.nan)
        sure = np.where(np.isfinite(self.reached), np.maximum(self.reached, 1), np.nan)
        return self.steps * np.log(sure).std(axis=1, ddof=1) / math.sqrt(count)

    @property
    def best(self) -> int:
        """The learning rate that needs the fewest steps; before one got there, the one with the lowest loss."""
        if np.isfinite(self.steps).any():
            return int(np.nanargmin(self.steps))
        looked = self.losses.mean(1)[:, ~np.isnan(self.losses).all((0, 1))]
        last = np.where(np.isfinite(looked[:, -1]), looked[:, -1], np.inf) if looked.size else np.zeros(1)
        return int(np.argmin(last))

    def records(self) -> dict[str, Trajectory]:
        """The repeats at the best learning rate as records, by labels that tell the batch size."""
        return {f"batch {self.batch}, repeat {k}": self._record(k) for k in range(self.reached.shape[1])}

    def _record(self, repeat: int) -> Trajectory:
        curve = self.losses[self.best, repeat]
        pairs = [(s, float(v)) for s, v in zip(self.goal.looks, curve, strict=True) if not math.isnan(v)]
        lines = tuple(Scalars(step, 0.0, values={"train_loss": value}) for step, value in pairs)
        return Trajectory(Held(f"batch {self.batch}", lines))


def _mean_log(steps: Floats) -> Floats:
    """Mean over repeats of log steps (rate, repeat) -> (rate,); a goal met before the first step counts as one step."""
    return np.log(np.maximum(steps, 1)).mean(1)


def fitted(trials: Sequence[Trial], target: float) -> Reading:
    """CriticalBatch's reading of all repeats of these trials at their best learning rates."""
    runs: Any = Runs({label: record for trial in trials for label, record in trial.records().items()})
    return CriticalBatch(target=target).run(runs)
