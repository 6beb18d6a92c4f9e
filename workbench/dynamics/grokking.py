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

from workbench.dynamics.delays import (
    RESAMPLED,
    Retested,
    grokked,
    numbers_of,
    over_runs,
    phase,
    phases_in_words,
    retested,
)
from workbench.dynamics.described import TAKEN
from workbench.dynamics.grokking_panels import interval, norm_panel, title
from workbench.dynamics.tasks import members_of
from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Role, Rule, fitting, step_axis
from workbench.numerics.crossings import CONFIRM, Crossing, below_geometric_mean, known, sustained
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
    "delay": "steps from memorising to generalising",
    "delay_ratio": "step of generalising over step of memorising",
    "loss_delay": "steps between those at which the losses are half-way down, on a log axis",
    "loss_delay_ratio": "ratio of the steps at which the losses are half-way down, on a log axis",
    "lead_time": "steps from the early-warning signal to generalising",
}
_SCORES: tuple[tuple[Literal["train", "test"], Role], ...] = (("train", "main"), ("test", "second"))
_UNITS: dict[str, str] = dict.fromkeys(
    ("step_memorise", "step_generalise", "delay", "loss_delay", "lead_time"), "steps"
)
_ENDS = tuple(f"run_{name}_{end}" for name in RESAMPLED for end in ("low", "high"))
_RESAMPLING = 4_000_000
"""Number of the draw that resamples the first run's test examples: far from those of other purposes."""
DECADE = 20
"""Evaluations for each factor of ten in steps that a delay wants."""


def _numbers() -> Iterator[Variable]:
    for name, words in _HEADLINES.items():
        for prefix, dims, over in (("", (), " (median over runs)"), ("run_", ("run",), "")):
            of, unit = f"{prefix}{name}", _UNITS.get(name, "")
            yield Variable(of, dims, words + over, unit, f"{of}_error")
            yield Variable(f"{of}_error", dims, f"uncertainty of it: {words}", unit)
    for name in RESAMPLED:
        for end in ("low", "high"):
            words = f"{end} end of its 95 % interval over test sets: {_HEADLINES[name]}"
            yield Variable(f"run_{name}_{end}", ("run",), words, _UNITS.get(name, ""))


@dataclass(frozen=True)
class Grokking(Probe[Any]):
    """The delay between memorising and generalising, from recorded curves: of one training, or of many runs.

    What it measures: ``step_memorise`` and ``step_generalise``, the first evaluations at which the recorded score of
    training and of test examples reaches ``threshold`` and at the next 3 evaluations stays above it less 0.01;
    ``delay`` = step_generalise - step_memorise, ``delay_ratio`` = step_generalise / step_memorise. ``loss_delay`` and
    ``loss_delay_ratio`` are the same of the steps at which each loss first lies below the geometric mean of its first
    and its last value: accuracy can jump while the loss glides, so both are drawn.
    ``weight_norm`` is ‖θ‖ over tensors of two dims and more (norm scales and biases, which have no direction of decay
    in common with them, are left out), ``weight_norm_ratio`` that over its first value, ``embedding_norm`` the part of
    tensors whose names fit ``embeddings``. ``lead_time`` = step_generalise - the step at which the recorded ``signal``
    crosses ``signal_threshold``; ``false_alarms`` is the share of runs that never generalised in which it crossed.

    How to read it: a run has grokked (``run_grokked``) when the ratio is at least ``least_ratio``, the test score at
    memorising was at most half-way from ``chance`` to its last value, and its last reaches the threshold;
    ``run_grokked_share`` is the share of resampled test sets on which it would have, where ``test_examples`` is given:
    far from 0 and 1, the test set is too small to tell. ``run_phase`` is coarser, as the effective theory has it:
    confusion (never memorises), memorisation (never generalises), grokking (more than ``soon`` steps later), or
    comprehension; there, ``threshold`` is 0.9. A run that never generalises is censored: its delay and ratio
    are nan, and ``run_delay_least`` and ``run_delay_ratio_least`` say what they exceed. Over runs the headline is the
    median, in which a censored one counts as infinite: nan where it falls among these.

    What it costs: the scalars, and one reading of each checkpoint for the norms.

    When it misleads: steps are known to the interval between evaluations; evaluate on log-spaced steps, at least 20 a
    decade (a note says where there are fewer). A small test set alone makes scores jump: give ``test_examples``. Only
    their number is used, with one order in which they are learnt: where examples are learnt and lost in turns, the
    scores jump more than the interval says. Steps must be optimizer steps throughout. A training score of augmented
    batches is no training score. A signal that is chosen, or whose threshold is, after the delay was seen warns of
    nothing: fix both first, and look at ``false_alarms`` on runs without weight decay.

    Errors: for one run, how much earlier the crossings may have been since the evaluation before, and with
    ``test_examples`` the distance to the farther end of the 95 % interval over 1000 test sets drawn from that one
    (``run_delay_low`` to ``run_delay_high``, likewise for the others; infinite where 2.5 % of them never generalise);
    over runs, half the distance between quartiles where that is larger.

    Source: Power et al. 2022 (arXiv:2201.02177); Liu et al. 2023 (arXiv:2210.01117) for the norm; Liu et al. 2022
    (arXiv:2205.10343) for phases; the bootstrap of Efron 1979.
    """

    looks_at: ClassVar[Look] = "trajectory"
    looks_also_at: ClassVar[tuple[Look, ...]] = ("runs",)
    variables: ClassVar[tuple[Variable, ...]] = (
        *_numbers(),
        Variable("run_delay_least", ("run",), "what the delay is at least, where it ended before", "steps"),
        Variable("run_delay_ratio_least", ("run",), "what the delay ratio is at least, where it ended before"),
        Variable("run_step_signal", ("run",), "step at which the early-warning signal crosses", "steps"),
        Variable("run_phase", ("run",), "0 confusion, 1 memorisation, 2 grokking, 3 comprehension"),
        Variable("run_grokked", ("run",), "whether the run grokked", kind="bool"),
        Variable("run_grokked_share", ("run",), "share of resampled test sets on which it grokked"),
        Variable("false_alarms", (), "share of runs that never generalise in which the signal crosses"),
        Variable("train", ("run", "step"), "score of the training examples"),
        Variable("test", ("run", "step"), "score of the test examples"),
        Variable("loss_train", ("run", "step"), "loss of the training examples"),
        Variable("loss_test", ("run", "step"), "loss of the test examples"),
        Variable("weight_norm", ("run", "checkpoint"), "norm of the weights without norm scales and biases"),
        Variable("weight_norm_ratio", ("run", "checkpoint"), "that norm over its value at the first checkpoint"),
        Variable("embedding_norm", ("run", "checkpoint"), "norm of the embeddings"),
    )

    train: Annotated[str, Doc("Recorded score of the training examples; larger is better.")] = "train_accuracy"
    test: Annotated[str, Doc("Recorded score of the test examples.")] = "test_accuracy"
    threshold: Annotated[float, Range(0.0, 1.0, step=0.01), Doc("Score that counts as learned.")] = 0.99
    least_ratio: Annotated[float, Range(1.0, 1e6, soft=(2, 100)), Doc("Delay ratio from which it is grokking.")] = 10.0
    soon: Annotated[int, Range(0, 10**9, soft=(10, 10_000)), Doc("Delay in steps up to which it is comprehension.")] = (
        1000
    )
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
    test_examples: Annotated[
        int | None, Range(1, 10**9, log=True), Doc("Examples in the test set, to resample them; nothing: not known.")
    ] = None
    chance: Annotated[
        float | None, Range(0.0, 1.0, step=0.01), Doc("Score of guessing; nothing: the first recorded test score.")
    ] = None

    def stream(self, subject: Trajectory | Runs, draw: Draw) -> Iterator[Reading]:
        """The curves and their crossings at once, then the norms checkpoint by checkpoint."""
        found = _Found(self, members_of(subject, self.name), draw)
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
        if self.test_examples is not None:
            made["grokked_share"] = float(data.run_grokked_share.mean())
        made["phase"] = phases_in_words(data.run_phase.values)
        return made | {"grokked": f"{int(data.run_grokked.sum())} of {data.sizes['run']}"}

    def figure(self, data: xr.Dataset) -> Figure:
        """Scores on a log axis with both crossings (a band: 95 % of test sets), losses, and the norm of the weights."""
        marks = [*interval(data), *self._lines(data, "", (self.train, self.test))]
        steps = (float(data[name]) for name in ("step_memorise", "step_generalise"))
        marks += [Rule(step, "x") for step in steps if np.isfinite(step)]
        scores = Panel(tuple(marks), step_axis(), Axis("score"))
        curves = self._lines(data, "loss_", (self.train_loss, self.test_loss))
        losses = [data[f"loss_{name}"].values for name, _ in _SCORES]
        low = Panel(tuple(curves), step_axis(), fitting("loss", "log", *losses))
        seen = any(np.isfinite(values).any() for values in losses)
        return Figure((scores, *((low,) if seen else ()), norm_panel(data)), title=title(data))

    def _lines(self, data: xr.Dataset, prefix: str, names: tuple[str, str]) -> list[AnyMark]:
        marks: list[AnyMark] = []
        for i in range(data.sizes["run"]):
            for (name, role), recorded in zip(_SCORES, names, strict=True):
                at, values = known(data["step"].values, data[prefix + name].values[i])
                marks.append(Line(at, values, "" if i else recorded.replace("_", " "), role))
        return marks

    def estimate(self, subject: Trajectory | Runs) -> Cost:
        """One checkpoint at a time, and the curves of every run."""
        members = members_of(subject, self.name)
        path = next(iter(members.values()))
        one = sum(t.numel() * t.element_size() for t in path.weights(path.steps[0]).values())
        curves = 16 * len(members) * sum(len(m.source.lines()) for m in members.values())
        return Cost(2 * one + curves, None, f"each of {sum(len(m.steps) for m in members.values())} checkpoints once")


class _Found:
    """Everything known so far of some runs."""

    def __init__(self, probe: Grokking, members: Mapping[str, Trajectory], draw: Draw) -> None:
        self.probe, self.members = probe, members
        tables = {label: member.scalars for label, member in members.items()}
        for label, table in tables.items():
            self._check(label, [str(c) for c in table.columns])
        self.curves = {
            label: {str(name): known(table.index, table[name]) for name in table.columns}
            for label, table in tables.items()
        }
        wanted = (probe.train, probe.test, probe.train_loss, probe.test_loss)
        every = [self._curve(label, name)[0] for label in members for name in wanted]
        self.step = np.unique(np.concatenate(every)) if any(map(len, every)) else np.zeros(1)
        self.checkpoint = np.unique(np.concatenate([np.array(m.steps) for m in members.values()]))
        self.norms = {name: np.full((len(members), len(self.checkpoint)), np.nan) for name in _NORMS}
        self.runs = {label: self._crossings(label) for label in members}
        self.tests = {label: self._retested(label, draw.generator(_RESAMPLING + i)) for i, label in enumerate(members)}

    def _check(self, label: str, there: list[str]) -> None:
        wanted = [self.probe.train, self.probe.test, *filter(None, [self.probe.signal])]
        for name in wanted:
            if name not in there and not (name == self.probe.signal and name in _NORMS):
                recorded = ", ".join(n for n in there if n not in TAKEN) or "no scalars"
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

    def _retested(self, label: str, rng: np.random.Generator) -> Retested | None:
        """Crossings on resampled test sets; None where their number is not given, or the scores are no shares."""
        probe, (at, scores) = self.probe, self._curve(label, self.probe.test)
        if probe.test_examples is None or not len(at) or not ((scores >= 0) & (scores <= 1)).all():
            return None
        return retested(
            at, scores, probe.test_examples, rng, threshold=probe.threshold, train=self.runs[label]["train"],
            least_ratio=probe.least_ratio, chance=probe.chance,
        )  # fmt: skip

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
        each = {label: numbers_of(found, self.tests[label]) for label, found in self.runs.items()}
        values: dict[str, Any] = {name: norms.copy() for name, norms in self.norms.items()}
        for name in _HEADLINES:
            pairs = np.array([each[label][name] for label in self.runs])
            values[f"run_{name}"], values[f"run_{name}_error"] = pairs.T
            values[name], values[f"{name}_error"] = over_runs(pairs, self._never(name))
        values |= {name: self._joined(getattr(self.probe, name)) for name, _ in _SCORES}
        values |= {f"loss_{name}": self._joined(getattr(self.probe, f"{name}_loss")) for name, _ in _SCORES}
        values |= dict(zip(_ENDS, np.array([self._ends(label) for label in self.runs]).T, strict=True))
        values |= {
            "run_grokked_share": [np.nan if t is None else t.grokked.mean() for t in self.tests.values()],
            "run_delay_least": [self._least(label)[0] for label in self.runs],
            "run_delay_ratio_least": [self._least(label)[1] for label in self.runs],
            "run_step_signal": [found["signal"].step for found in self.runs.values()],
            "run_phase": [self._phase(label) for label in self.runs],
            "run_grokked": [self._grokked(label) for label in self.runs],
            "false_alarms": self._false_alarms(),
        }
        coords = {"run": list(self.runs), "step": self.step, "checkpoint": self.checkpoint}
        return self.probe.reading(done, values, coords=coords, converged=last, notes=self._notes())

    def _never(self, name: str) -> NDArray[np.bool_]:
        """Which runs were evaluated, came as far as to start the clock of ``name``, and did not reach its end."""
        loss = name.startswith("loss")
        first = None if name.startswith("step") else "train_loss" if loss else "train"
        second = "test_loss" if loss else "train" if name == "step_memorise" else "test"
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
            at, values = self._curve(label, name)
            joined[row, np.searchsorted(self.step, at)] = values
        return joined

    def _least(self, label: str) -> tuple[float, float]:
        """Delay and ratio, or what they exceed where the run ended before it generalised."""
        found, (at, _) = self.runs[label], self._curve(label, self.probe.test)
        if not found["train"].step > 0 or not len(at):
            return np.nan, np.nan
        end = float(found["test"].step if np.isfinite(found["test"].step) else at[-1])
        return end - found["train"].step, end / found["train"].step

    def _ends(self, label: str) -> list[float]:
        """Both ends of each interval over test sets."""
        tests, train = self.tests[label], self.runs[label]["train"]
        return [e for n in RESAMPLED for e in ((np.nan,) * 2 if tests is None else tests.interval(n, train))]

    def _grokked(self, label: str) -> bool:
        probe, found, (at, score) = self.probe, self.runs[label], self._curve(label, self.probe.test)
        return grokked(at, score, found["test"], found["train"], probe.threshold, probe.least_ratio, probe.chance)

    def _phase(self, label: str) -> float:
        found, names = self.runs[label], (self.probe.train, self.probe.test)
        evaluated = all(len(self._curve(label, name)[0]) for name in names)
        return float(phase(found["train"], found["test"], self.probe.soon)) if evaluated else np.nan

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
            least = self._least(label)
            if np.isnan(found["test"].step) and np.isfinite(least[1]):
                said.append(
                    f"{label} did not generalise: its delay is more than {least[0]:.6g} steps, "
                    f"its delay ratio more than {least[1]:.3g}"
                )
            said += self._sparse(label)
            if self.probe.test_examples is not None and self.tests[label] is None:
                said.append(f"{label}: test scores outside of 0 to 1 are no shares of examples, and are not resampled")
        return tuple(said)

    def _sparse(self, label: str) -> list[str]:
        """Whether the test set was evaluated too seldom within the delay."""
        found, (at, _) = self.runs[label], self._curve(label, self.probe.test)
        first, last = found["train"].step, found["test"].step
        if not last > first > 0:
            return []
        seen, decades = int(((at > first) & (at <= last)).sum()), float(np.log10(last / first))
        if seen >= min(DECADE * decades, last - first):
            return []
        return [f"{label} was evaluated {seen / decades:.3g} times a decade within the delay; {DECADE} are wanted"]


def _root(squares: list[Tensor]) -> float:
    return float(torch.stack(squares).sum().sqrt()) if squares else np.nan
