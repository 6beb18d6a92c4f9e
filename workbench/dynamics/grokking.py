"""Grokking: how long after memorising its training set a network generalises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.dynamics.tasks import members_of
from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Role, Rule, step_axis
from workbench.numerics.crossings import CONFIRM, Crossing, below_geometric_mean, known, ratio, sustained
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.several import Runs
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
_NORMS = ("weight_norm", "weight_norm_ratio", "embedding_norm")
_HEADLINES = {
    "step_memorise": "first step at which the training score stays above the threshold",
    "step_generalise": "first step at which the test score stays above the threshold",
    "delay_ratio": "step of generalising over step of memorising",
    "loss_delay_ratio": "the same of the steps at which the losses are half-way down, on a log axis",
    "lead_time": "steps from the early-warning signal to generalising",
}
_SCORES: tuple[tuple[Literal["train", "test"], Role], ...] = (("train", "main"), ("test", "second"))
_UNITS = {"step_memorise": "steps", "step_generalise": "steps", "lead_time": "steps"}


def _numbers() -> Iterator[Variable]:
    for name, words in _HEADLINES.items():
        for prefix, dims, over in (("", (), " (median over runs)"), ("run_", ("run",), "")):
            of, unit = f"{prefix}{name}", _UNITS.get(name, "")
            yield Variable(of, dims, words + over, unit, f"{of}_error")
            yield Variable(f"{of}_error", dims, f"uncertainty of it: {words}", unit)


@dataclass(frozen=True)
class Grokking(Probe[Any]):
    """The delay between memorising and generalising, from recorded curves: of one training, or of many runs.

    What it measures: ``step_memorise`` and ``step_generalise``, the first evaluations at which the recorded score of
    training and of test examples reaches ``threshold`` and at the next 3 evaluations stays above it less 0.01;
    ``delay_ratio`` = step_generalise / step_memorise. ``loss_delay_ratio`` is the same of the steps at which each loss
    first lies below the geometric mean of its first and its last value: accuracy can jump while the loss glides.
    ``weight_norm`` is ‖θ‖ over tensors of two dims and more (norm scales and biases, which have no direction of decay
    in common with them, are left out), ``weight_norm_ratio`` that over its first value, ``embedding_norm`` the part of
    tensors whose names fit ``embeddings``. ``lead_time`` = step_generalise - the step at which the recorded ``signal``
    crosses ``signal_threshold``; ``false_alarms`` is the share of runs that never generalised in which it crossed.

    How to read it: a run has grokked (``run_grokked``) when the ratio is at least ``least_ratio``, the test score at
    memorising was at most half-way from its first value to its last, and its last reaches the threshold. A run that
    never generalises is censored: its ratio is nan, and ``run_delay_ratio_least`` says what it exceeds. Over runs the
    headline is the median, in which a censored ratio counts as infinite: nan where it falls among these.

    What it costs: the scalars, and one reading of each checkpoint for the norms.

    When it misleads: steps are known to the interval between evaluations; evaluate on log-spaced steps, at least 20 a
    decade. A small test set alone makes scores jump. A signal that is chosen, or whose threshold is, after the delay
    was seen warns of nothing: fix both first, and look at ``false_alarms`` on runs without weight decay.

    Errors: for one run, how much earlier the crossings may have been since the evaluation before; over runs, half the
    distance between quartiles where that is larger.

    Source: Power et al. 2022 (arXiv:2201.02177); Liu et al. 2023 (arXiv:2210.01117) for the norm.
    """

    looks_at: ClassVar[Look] = "trajectory"
    looks_also_at: ClassVar[tuple[Look, ...]] = ("runs",)
    variables: ClassVar[tuple[Variable, ...]] = (
        *_numbers(),
        Variable("run_delay_ratio_least", ("run",), "what the delay ratio is at least, where it ended before"),
        Variable("run_step_signal", ("run",), "step at which the early-warning signal crosses", "steps"),
        Variable("run_grokked", ("run",), "whether the run grokked", kind="bool"),
        Variable("false_alarms", (), "share of runs that never generalise in which the signal crosses"),
        Variable("train", ("run", "step"), "score of the training examples"),
        Variable("test", ("run", "step"), "score of the test examples"),
        Variable("weight_norm", ("run", "checkpoint"), "norm of the weights without norm scales and biases"),
        Variable("weight_norm_ratio", ("run", "checkpoint"), "that norm over its value at the first checkpoint"),
        Variable("embedding_norm", ("run", "checkpoint"), "norm of the embeddings"),
    )

    train: Annotated[str, Doc("Recorded score of the training examples; larger is better.")] = "train_accuracy"
    test: Annotated[str, Doc("Recorded score of the test examples.")] = "test_accuracy"
    threshold: Annotated[float, Range(0.0, 1.0, step=0.01), Doc("Score that counts as learned.")] = 0.99
    least_ratio: Annotated[float, Range(1.0, 1e6, soft=(2, 100)), Doc("Delay ratio from which it is grokking.")] = 10.0
    train_loss: Annotated[str, Doc("Recorded loss of the training examples; unknown where it is not recorded.")] = (
        "train_loss"
    )
    test_loss: Annotated[str, Doc("Recorded loss of the test examples.")] = "test_loss"
    signal: Annotated[str, Doc("Early-warning series: a recorded scalar, or weight_norm_ratio; empty for none.")] = ""
    signal_threshold: Annotated[float, Range(-1e12, 1e12, soft=(-10, 10)), Doc("Where it warns.")] = 0.5
    signal_side: Annotated[
        Literal["above", "below"],
        Doc("On which side of that it warns."),
        Choice({"above": "when it rises above it", "below": "when it falls below it"}),
    ] = "above"
    embeddings: Annotated[str, Doc("Glob that the names of embeddings fit.")] = "*embed*"

    def stream(self, subject: Trajectory | Runs, draw: Draw) -> Iterator[Reading]:
        """The curves and their crossings at once, then the norms checkpoint by checkpoint."""
        found = _Found(self, members_of(subject, self.name))
        total, pace = sum(len(m.steps) for m in found.members.values()), Pace()
        yield found.reading(1 / (total + 1), False)
        for seen, (run, path, step) in enumerate(found.places(), 2):
            found.put_norms(run, step, path.weights(step))
            if seen == total + 1 or pace.due():
                yield found.reading(seen / (total + 1), seen == total + 1)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Steps, delay and lead time with their errors, and how many runs grokked."""
        names = [n for n in _HEADLINES if n != "lead_time" or self.signal]
        made: dict[str, Value] = {}
        for name in names:
            made |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        return made | {"grokked": f"{int(data.run_grokked.sum())} of {data.sizes['run']}"}

    def figure(self, data: xr.Dataset) -> Figure:
        """Both scores over steps on a log axis with the two crossings, and the norm of the weights below them."""
        marks: list[AnyMark] = []
        for i in range(data.sizes["run"]):
            for name, role in _SCORES:
                at, values = known(data["step"].values, data[name].values[i])
                marks.append(Line(at, values, "" if i else self._score(name), role))
        steps = (float(data[name]) for name in ("step_memorise", "step_generalise"))
        marks += [Rule(step, "x") for step in steps if np.isfinite(step)]
        return Figure((Panel(tuple(marks), step_axis(), Axis("score")), _norm_panel(data)), title=_title(data))

    def _score(self, name: Literal["train", "test"]) -> str:
        return (self.train if name == "train" else self.test).replace("_", " ")

    def estimate(self, subject: Trajectory | Runs) -> Cost:
        """One checkpoint at a time, and the curves of every run."""
        members = members_of(subject, self.name)
        path = next(iter(members.values()))
        one = sum(t.numel() * t.element_size() for t in path.weights(path.steps[0]).values())
        curves = 16 * len(members) * sum(len(m.source.lines()) for m in members.values())
        return Cost(2 * one + curves, None, f"each of {sum(len(m.steps) for m in members.values())} checkpoints once")


def _title(data: xr.Dataset) -> str:
    value, error = float(data.delay_ratio), float(data.delay_ratio_error)
    return f"delay ratio {value:.3g} ± {error:.2g}" if np.isfinite(value) else "delay ratio unknown"


def _norm_panel(data: xr.Dataset) -> Panel:
    marks: list[AnyMark] = []
    for i in range(data.sizes["run"]):
        at, values = known(data["checkpoint"].values, data.weight_norm.values[i])
        marks.append(Points(at, values) if len(at) == 1 else Line(at, values))
    return Panel(tuple(marks), step_axis(), Axis("weight norm"))


class _Found:
    """Everything known so far of some runs."""

    def __init__(self, probe: Grokking, members: Mapping[str, Trajectory]) -> None:
        self.probe, self.members = probe, members
        tables = {label: member.scalars for label, member in members.items()}
        for label, table in tables.items():
            self._check(label, [str(c) for c in table.columns])
        self.curves = {
            label: {str(name): known(table.index, table[name]) for name in table.columns}
            for label, table in tables.items()
        }
        every = [self.curves[label][name][0] for label in members for name in (probe.train, probe.test)]
        self.step = np.unique(np.concatenate(every)) if any(map(len, every)) else np.zeros(1)
        self.checkpoint = np.unique(np.concatenate([np.array(m.steps) for m in members.values()]))
        self.norms = {name: np.full((len(members), len(self.checkpoint)), np.nan) for name in _NORMS}
        self.runs = {label: self._crossings(label) for label in members}

    def _check(self, label: str, there: list[str]) -> None:
        wanted = [self.probe.train, self.probe.test, *filter(None, [self.probe.signal])]
        for name in wanted:
            if name not in there and not (name == self.probe.signal and name in _NORMS):
                recorded = ", ".join(n for n in there if n not in ("wall_time", "recorder_seconds")) or "no scalars"
                raise ValueError(f"{label} has no recorded {name!r}; it has {recorded}. Name one of these in settings.")

    def _curve(self, label: str, name: str) -> tuple[Floats, Floats]:
        if name in _NORMS and name not in self.curves[label]:
            return known(self.checkpoint, self.norms[name][list(self.members).index(label)])
        return self.curves[label].get(name, (np.zeros(0), np.zeros(0)))

    def _crossings(self, label: str) -> dict[str, Crossing]:
        probe = self.probe
        sign = 1.0 if probe.signal_side == "above" else -1.0
        at, signal = self._curve(label, probe.signal) if probe.signal else self._curve(label, " ")
        return {
            "train": sustained(*self._curve(label, probe.train), probe.threshold),
            "test": sustained(*self._curve(label, probe.test), probe.threshold),
            "train_loss": below_geometric_mean(*self._curve(label, probe.train_loss)),
            "test_loss": below_geometric_mean(*self._curve(label, probe.test_loss)),
            "signal": sustained(at, sign * signal, sign * probe.signal_threshold, slack=0.0),
        }

    def places(self) -> Iterator[tuple[int, Trajectory, int]]:
        """(row, trajectory, step) of each checkpoint."""
        for run, path in enumerate(self.members.values()):
            yield from ((run, path, step) for step in path.steps)

    def put_norms(self, run: int, step: int, weights: Mapping[str, Tensor]) -> None:
        """Take the norms of one checkpoint; tied tensors count once."""
        chosen = {t.data_ptr(): (name, t) for name, t in weights.items() if t.ndim > 1 and t.is_floating_point()}
        squares = {name: torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for name, t in chosen.values()}
        embedded = [s for name, s in squares.items() if fnmatchcase(name, self.probe.embeddings)]
        column = int(np.searchsorted(self.checkpoint, step))
        norms = self.norms
        norms["weight_norm"][run, column] = _root(list(squares.values()))
        norms["embedding_norm"][run, column] = _root(embedded)
        first = next((v for v in norms["weight_norm"][run] if not np.isnan(v)), np.nan)
        norms["weight_norm_ratio"][run, column] = norms["weight_norm"][run, column] / first if first else np.nan

    def reading(self, done: float, last: bool) -> Reading:
        """The reading so far."""
        if last and self.probe.signal in _NORMS:
            self.runs = {label: self._crossings(label) for label in self.members}
        each = {label: _numbers_of(found) for label, found in self.runs.items()}
        values: dict[str, Any] = {name: norms.copy() for name, norms in self.norms.items()}
        for name in _HEADLINES:
            pairs = np.array([each[label][name] for label in self.runs])
            values[f"run_{name}"], values[f"run_{name}_error"] = pairs.T
            values[name], values[f"{name}_error"] = _over_runs(pairs, self._never(name))
        values |= {name: self._joined(name) for name in ("train", "test")}
        values |= {
            "run_delay_ratio_least": [self._least(label) for label in self.runs],
            "run_step_signal": [found["signal"].step for found in self.runs.values()],
            "run_grokked": [self._grokked(label) for label in self.runs],
            "false_alarms": self._false_alarms(),
        }
        coords = {"run": list(self.runs), "step": self.step, "checkpoint": self.checkpoint}
        return self.probe.reading(done, values, coords=coords, converged=last, notes=self._notes())

    def _never(self, name: str) -> NDArray[np.bool_]:
        """Which runs were evaluated, came as far as to start the clock of ``name``, and did not reach its end."""
        first = {"step_memorise": None, "step_generalise": None, "loss_delay_ratio": "train_loss"}.get(name, "train")
        second = {"step_memorise": "train", "loss_delay_ratio": "test_loss"}.get(name, "test")
        source = {"train": self.probe.train, "test": self.probe.test, "test_loss": self.probe.test_loss}[second]
        return np.array(
            [
                name != "lead_time"
                and (first is None or found[first].step > 0)
                and np.isnan(found[second].step)
                and len(self._curve(label, source)[0]) > 0
                for label, found in self.runs.items()
            ]
        )

    def _joined(self, name: str) -> Floats:
        joined = np.full((len(self.runs), len(self.step)), np.nan)
        for row, label in enumerate(self.runs):
            at, values = self._curve(label, getattr(self.probe, name))
            joined[row, np.searchsorted(self.step, at)] = values
        return joined

    def _least(self, label: str) -> float:
        """The ratio, or what it exceeds where the run ended before it generalised."""
        found, (at, _) = self.runs[label], self._curve(label, self.probe.test)
        if not found["train"].step > 0 or not len(at):
            return np.nan
        end = found["test"].step if np.isfinite(found["test"].step) else at[-1]
        return float(end / found["train"].step)

    def _grokked(self, label: str) -> bool:
        found, (at, score) = self.runs[label], self._curve(label, self.probe.test)
        value, _ = ratio(found["train"], found["test"])
        if not value >= self.probe.least_ratio:
            return False
        then = score[max(int(np.searchsorted(at, found["train"].step, "right")) - 1, 0)]
        return bool(then <= (score[0] + score[-1]) / 2 and score[-1] >= self.probe.threshold)

    def _false_alarms(self) -> float:
        quiet = [found for found in self.runs.values() if np.isnan(found["test"].step)]
        if not quiet or not self.probe.signal:
            return np.nan
        return float(np.mean([np.isfinite(found["signal"].step) for found in quiet]))

    def _notes(self) -> tuple[str, ...]:
        said = [f"at or above {self.probe.threshold:g}, confirmed by {CONFIRM} evaluations, slack 0.01"]
        for label, found in self.runs.items():
            late = min((c.confirmed for c in (found["train"], found["test"]) if np.isfinite(c.step)), default=CONFIRM)
            if late < CONFIRM:
                said.append(f"{label} ends {late} evaluations after a crossing, which confirm it")
            if np.isnan(found["test"].step) and np.isfinite(self._least(label)):
                said.append(f"{label} did not generalise: its delay ratio is more than {self._least(label):.3g}")
        return tuple(said)


def _root(squares: list[Tensor]) -> float:
    return float(torch.stack(squares).sum().sqrt()) if squares else np.nan


def _numbers_of(found: Mapping[str, Crossing]) -> dict[str, tuple[float, float]]:
    """(value, error) of each headline number of one run."""
    train, test, signal = found["train"], found["test"], found["signal"]
    return {
        "step_memorise": (train.step, train.error),
        "step_generalise": (test.step, test.error),
        "delay_ratio": ratio(train, test),
        "loss_delay_ratio": ratio(found["train_loss"], found["test_loss"]),
        "lead_time": (test.step - signal.step, test.error + signal.error),
    }


def _over_runs(pairs: Floats, never: NDArray[np.bool_]) -> tuple[float, float]:
    """Median of (value, error) over runs, those that never got there as infinite; nan where it is not finite."""
    if len(pairs) == 1:
        return float(pairs[0, 0]), float(pairs[0, 1])
    values = np.where(never, np.inf, pairs[:, 0])
    there = ~np.isnan(values)
    if not there.any() or not np.isfinite(middle := float(np.median(values[there]))):
        return np.nan, np.nan
    ends = [np.quantile(values[there], (0.25, 0.75), method=side) for side in ("lower", "higher")]
    reach = float(np.diff(sum(ends) / 2)[0]) / 2 if np.isfinite(ends).all() else np.nan  # half between quartiles
    return middle, max(reach, float(np.nanmedian(pairs[:, 1]))) if np.isfinite(reach) else np.nan
