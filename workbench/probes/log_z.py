"""The logarithm of the softmax's normaliser: drift of all logits together, which the loss does not see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.special import logsumexp

from workbench.decisions import Decisions, decisions, shape_of
from workbench.figure import Axis, Figure, Line, Panel, Rule
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

Floats = NDArray[np.float64]
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Shares of the predictions below the values that are listed."""
_MEANS = ("log_z", "log_z_square", "mean_logit", "excess")


@dataclass(frozen=True)
class LogZ(Probe[Subject]):
    """Output log Z = log Σ_c exp z_c of a classifier's logits, their mean, and the z-loss.

    What it measures, over the N predictions (tokens whose target is ignored left out): ``log_z`` mean of log Z,
    ``log_z_square`` mean of its square, ``log_z_std``, ``log_z_quantile`` (0 and 1 are minimum and maximum),
    ``mean_logit`` mean over predictions and classes, ``excess`` = log Z - mean logit - log C, which is 0 for equal
    logits and which a common shift leaves alone, ``max_logit``, and ``z_loss`` = ``coefficient`` · mean (log Z)².

    How to read it: cross-entropy does not change when all logits of a prediction move together, so nothing but z-loss,
    weight decay or luck holds log Z near 0. Where ``log_z`` and ``mean_logit`` drift apart from 0 together, half
    precision loses digits of the softmax, and training at large learning rates diverges. A rise of ``excess`` alone is
    confidence.

    What it costs: one forward pass; logits are read in batches, in float64.

    When it misleads: rows of a padded vocabulary are never trained: say how many ``classes`` are real. Of a single
    logit (binary losses) the other class has logit 0. For the loss nll outputs are log-probabilities, and log Z is 0.

    Errors: standard errors over examples, all tokens of one together; none for extremes and quantiles.

    Source: Chowdhery et al. 2022 (z-loss, coefficient 10⁻⁴); Wortsman et al. 2023 (divergence of output logits).
    """

    coefficient: Annotated[float, Range(0.0, 1.0, soft=(1e-5, 1e-2)), Doc("What z-loss is multiplied by.")] = 1e-4
    classes: Annotated[
        int | None, Range(1, 10_000_000), Doc("Only the first so many logits are classes; None: all.")
    ] = None

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("log_z", (), "log Z, mean over predictions", "nat", "log_z_error"),
        Variable("log_z_error", (), "its standard error over examples", "nat"),
        Variable("log_z_square", (), "mean of (log Z)²", error="log_z_square_error"),
        Variable("log_z_square_error", (), "its standard error over examples"),
        Variable("log_z_std", (), "standard deviation of log Z over predictions", "nat"),
        Variable("log_z_quantile", ("quantile",), "log Z below which this share of predictions lies", "nat"),
        Variable("mean_logit", (), "mean logit", error="mean_logit_error"),
        Variable("mean_logit_error", (), "its standard error over examples"),
        Variable("excess", (), "log Z - mean logit - log C", "nat", "excess_error"),
        Variable("excess_error", (), "its standard error over examples", "nat"),
        Variable("max_logit", (), "largest logit"),
        Variable("z_loss", (), "coefficient times mean (log Z)²", error="z_loss_error"),
        Variable("z_loss_error", (), "its standard error over examples"),
        Variable("predictions", (), "predictions that were measured"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Batch after batch."""
        total = subject.examples
        known = shape_of(subject)[1]
        if self.classes is not None and self.classes > known:
            raise ValueError(f"LogZ(classes={self.classes}): the outputs have {known}; give that or fewer, or None.")
        run = _Run(self, subject)
        for part in decisions(subject):
            if len(part.labels):
                run.add(part)
            yield run.report(0.99 * min(1.0, (int(part.examples.max(initial=0)) + 1) / total))
        if not run.rows:
            raise ValueError("every target is ignored by the loss, so there is nothing to measure; give other targets.")
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Means of log Z and of the logits, and the z-loss."""
        names = ("log_z", "mean_logit", "excess", "z_loss")
        found: dict[str, Value] = {n + end: float(data[n + end]) for n in names for end in ("", "_error")}
        return found | {"log_z_largest": float(data.log_z_quantile[-1]), "predictions": int(data.predictions)}

    def figure(self, data: xr.Dataset) -> Figure:
        """The distribution function of log Z over predictions, with the means."""
        marks = (
            Line(data.log_z_quantile.values, data["quantile"].values, "predictions"),
            Rule(float(data.log_z), "x", "mean log Z"),
            Rule(float(data.mean_logit), "x", "mean logit"),
        )
        return Figure((Panel(marks, Axis("log Z", unit="nat"), Axis("share of predictions below")),))

    def estimate(self, subject: Subject) -> Cost:
        """One batch of logits on the host, and five numbers of each prediction."""
        rows, classes = shape_of(subject)
        each = max(rows // max(subject.examples, 1), 1)
        chunk = min(subject.plan.chunk or subject.examples, subject.examples)
        return Cost(subject.memory() + 24 * chunk * each * classes + 48 * rows, 1, "one pass over the examples")


class _Run:
    """Log Z and mean logit of every prediction so far."""

    def __init__(self, probe: LogZ, subject: Subject) -> None:
        self.probe, self.subject = probe, subject
        self.rows: list[Floats] = []
        self.owners: list[NDArray[np.int64]] = []
        self.largest = -math.inf

    def add(self, part: Decisions) -> None:
        """One batch of logits."""
        logits = part.logits[:, : self.probe.classes]
        log_z, mean = logsumexp(logits, axis=1), logits.mean(axis=1)
        excess = log_z - mean - math.log(logits.shape[1])
        self.rows.append(np.stack([log_z, log_z**2, mean, excess], axis=1))
        self.owners.append(part.examples)
        self.largest = max(self.largest, float(logits.max()))

    def report(self, done: float) -> Reading:
        """The reading of now."""
        values: dict[str, Any] = {}
        if self.rows:
            rows, owners = np.concatenate(self.rows), np.concatenate(self.owners)
            for name, column in zip(_MEANS, rows.T, strict=True):
                values[name], values[f"{name}_error"] = _mean(column, owners)
            values |= {f"z_loss{e}": self.probe.coefficient * values[f"log_z_square{e}"] for e in ("", "_error")}
            values["log_z_std"] = rows[:, 0].std(ddof=1) if len(rows) > 1 else math.nan
            values |= {"log_z_quantile": np.quantile(rows[:, 0], QUANTILES), "max_logit": self.largest}
            values["predictions"] = len(rows)
        subject = self.subject
        notes = (*subject.notes, subject.on)
        coords = {"quantile": np.array(QUANTILES)}
        return self.probe.reading(done, values, coords=coords, converged=done == 1, notes=notes)


def _mean(values: Floats, owners: NDArray[np.int64]) -> tuple[float, float]:
    """Mean over predictions, and its standard error over the examples that they belong to (a ratio of two means)."""
    mean = float(values.mean())
    _, places = np.unique(owners, return_inverse=True)
    off = np.bincount(places, weights=values - mean)
    n = len(off)
    return mean, math.sqrt(n / (n - 1) * float((off**2).sum())) / len(values) if n > 1 else math.nan
