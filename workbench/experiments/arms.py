"""Trainings side by side, one for each value of a knob: their curves as they grow, and their delays by Grokking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from workbench.dynamics.grokking import Grokking
from workbench.figure import ROLES, AnyMark, Axis, Line, Panel, Scale, fitting
from workbench.numerics.crossings import CONFIRM
from workbench.probe import Variable
from workbench.record import Line as Scalars
from workbench.several import Runs
from workbench.sources import Held
from workbench.trajectory import Trajectory

CURVES = ("train_score", "test_score", "train_loss", "test_loss")
DELAYS = ("step_memorise", "step_generalise", "delay_ratio")
VARIABLES = (
    Variable("train_score", ("arm", "step"), "score of the training examples"),
    Variable("test_score", ("arm", "step"), "score of the test examples"),
    Variable("train_loss", ("arm", "step"), "loss of the training examples"),
    Variable("test_loss", ("arm", "step"), "loss of the test examples"),
    Variable("step_memorise", ("arm",), "step at which the training score is reached", "steps", "step_memorise_error"),
    Variable("step_memorise_error", ("arm",), "steps since the evaluation before", "steps"),
    Variable("step_generalise", ("arm",), "step at which the test score is reached", "steps", "step_generalise_error"),
    Variable("step_generalise_error", ("arm",), "steps since the evaluation before", "steps"),
    Variable("delay_ratio", ("arm",), "step of generalising over step of memorising", error="delay_ratio_error"),
    Variable("delay_ratio_error", ("arm",), "what the evaluations leave open"),
    Variable("delay_ratio_least", ("arm",), "what the delay ratio is at least, where training ended before"),
)
"""What arms yield: curves, and what Grokking makes of each arm that is over."""


def evaluation_steps(last: int, per_decade: int = 40) -> tuple[int, ...]:
    """0 and log-spaced steps up to ``last``, each step where these are closer than one."""
    count = int(np.ceil(per_decade * np.log10(max(last, 2)))) + 1
    return tuple(np.unique([0, *np.round(np.geomspace(1, last, count)).astype(int)]).tolist())


class Arms:
    """The curves of some trainings, (arm, step), nan where nothing was evaluated yet."""

    def __init__(self, values: Sequence[float], steps: Sequence[int], grokking: Grokking) -> None:
        self.values, self.steps, self.grokking = tuple(values), tuple(steps), grokking
        self.curves = {name: np.full((len(self.values), len(self.steps)), np.nan) for name in CURVES}
        self.weights: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.values]
        self.delays = {v.name: np.full(len(self.values), np.nan) for v in VARIABLES if v.dims == ("arm",)}

    def put(self, arm: int, step: int, scores: Mapping[str, float]) -> None:
        """What one evaluation of one arm gave, by the names of :data:`CURVES`."""
        column = self.steps.index(step)
        for name, value in scores.items():
            self.curves[name][arm, column] = value

    def settled(self, arm: int) -> bool:
        """Whether the test score was reached, and as many evaluations have confirmed it as can."""
        there = self.curves["test_score"][arm]
        seen = there[~np.isnan(there)][-CONFIRM - 1 :]
        return len(seen) > CONFIRM and bool((seen >= self.grokking.threshold).all())

    def trajectory(self, arm: int) -> Trajectory:
        """One arm as a trajectory, held in memory."""
        lines = tuple(
            Scalars(step, 0.0, values={n: float(self.curves[n][arm, k]) for n in CURVES})
            for k, step in enumerate(self.steps)
        )
        return Trajectory(Held(f"{self.values[arm]:g}", lines, self.weights[arm]))

    def finish(self, arm: int) -> Any:
        """Read the delay of an arm that is over; returns Grokking's data over the arms so far."""
        found = self.grokking.run(Runs({f"{k}": self.trajectory(k) for k in range(arm + 1)}))  # type: ignore[arg-type]
        for name in self.delays:
            self.delays[name][: arm + 1] = found.data[f"run_{name}"].values
        return found.data

    def now(self) -> dict[str, Any]:
        """Every variable so far, for a reading."""
        return {name: held.copy() for name, held in (self.curves | self.delays).items()}


def arms_grokking(threshold: float) -> Grokking:
    """Grokking as it reads :data:`CURVES`."""
    return Grokking("train_score", "test_score", threshold, train_loss="train_loss", test_loss="test_loss")


def curves_panel(
    data: Any, knob: str, score: str, names: Sequence[str] = ("train_score", "test_score"), scale: Scale = "linear"
) -> Panel:
    """Scores over steps on a log axis: test in the arm's role, training as reference."""
    marks: list[AnyMark] = []
    for arm, value in enumerate(data["arm"].values):
        for name in names:
            curve = data[name].values[arm]
            there = ~np.isnan(curve)
            test = name.startswith("test")
            role = ROLES[arm % len(ROLES)] if test else "reference"
            label = f"{knob} {value:g}" if test else ("" if arm else "training")
            marks.append(Line(data["step"].values[there], curve[there], label, role))
    return Panel(
        tuple(marks),
        Axis("step", "symlog", threshold=1.0),
        fitting(score, scale, *(data[name].values for name in names)),
    )
