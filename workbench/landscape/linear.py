"""Linear mode connectivity: the barrier between two models, as they are and after their units have been matched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Band, Figure, Panel, Points, Role
from workbench.figure import Line as Curve
from workbench.landscape.alignment import Alignment, align
from workbench.landscape.grid import levels
from workbench.landscape.points import EVALUATED
from workbench.landscape.segment import ENDS, Segment
from workbench.landscape.settings import Metric, NormBetween
from workbench.numerics.basis import norm
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range, Slow
from workbench.several import Pair
from workbench.subject import Subject

Array = NDArray[np.float64]
ROWS = ("none", "weights")
"""The curves: of the two models as they are, and with the second's units in the order of the first's."""
_HEIGHTS = tuple(f"{e}barrier{k}{w}" for e in ("", "error_") for k in ("", "_mean", "_maximum") for w in ("", "_error"))


@dataclass(frozen=True)
class Barrier(Probe[Pair]):
    """Linear mode connectivity: how high the loss rises between two models, before and after matching their units.

    What it measures: E(α) at (1 - α) θ_a + α θ_b, E the mean loss and the error rate, over ``alignment``: ``none`` for
    the models as they are, ``weights`` for the second with its units permuted so that its weights come closest to the
    first's, which changes nothing that it computes. ``barrier`` = max_α [E(α) - (1-α) E(0) - α E(1)] (Entezari et al.
    2022, arXiv:2110.06296); ``barrier_mean`` = max_α E - (E(0) + E(1)) / 2 (Frankle et al. 2020, arXiv:1912.05671),
    which may be negative; ``barrier_maximum`` = max_α E - max(E(0), E(1)). ``error_barrier`` and so on are the same of
    the error rate. Points are added around the highest one.

    Matching is by coordinate ascent on Σ⟨W_a, πW_b⟩ (Ainsworth et al. 2023, arXiv:2209.04836), the best of ``starts``.
    Which units may be permuted is read off the operations of a forward pass: channels with their BatchNorm, channels
    before a flattening, residual streams as one, attention heads, entries of a head (alike in all heads), gates of
    recurrent layers. What is not understood stays in place; ``coverage`` is the share of the weights that are
    reached, and notes name the rest. The permuted model is checked on the examples: ``output_change``.

    How to read it: a barrier within its error means linearly mode connected on these examples; Frankle et al. call
    training stable where ``error_barrier_mean`` is below 0.02. A barrier that goes away with matching was one of
    names, not of shape.

    What it costs: two curves of ``points`` + ``refine`` forward passes, with ``norm="recompute"`` and BatchNorm twice
    as many; matching costs about width × weights for each step, and width³ for each assignment.

    When it misleads: matching finds a local optimum, so a barrier that stays proves little: narrow networks keep
    theirs. With few examples BatchNorm's statistics are poor. Sharp peaks between points are missed. Heads are matched
    as wholes; other bases within a head (rotations) are not tried. Units that are concatenated with others stay where
    they are, as in DenseNets and bidirectional recurrent layers.

    Errors: standard errors over the examples, of the loss with examples paired (nan where losses do not come apart);
    they ignore that the highest point was picked.
    """

    looks_at: ClassVar[Literal["pair"]] = "pair"

    alignment: Annotated[
        Literal["weights", "none"],
        Doc("Whether the second model's units are brought into the order of the first's."),
        Choice({"weights": "matched by their weights; both curves are shown", "none": "as they are"}),
    ] = "weights"
    points: Annotated[int, Range(3, 401, soft=(11, 101)), Doc("Evenly spaced points, both models included.")] = 31
    refine: Annotated[int, Range(0, 50, soft=(0, 20)), Doc("Points added around the highest one, on each curve.")] = 8
    starts: Annotated[int, Range(1, 50, soft=(1, 10)), Doc("Starts of the matching; the best is kept."), Slow()] = 4
    norm: NormBetween = "recompute"
    metric: Metric = "loss"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("alpha", ("alignment", "point"), "place from the first model (0) to the second (1), ascending"),
        Variable("loss", ("alignment", "point"), "mean loss", "loss per example", "loss_error"),
        Variable("loss_error", ("alignment", "point"), "standard error of the mean loss", "loss per example"),
        Variable("error_rate", ("alignment", "point"), "share classified wrongly", "", "error_rate_error"),
        Variable("error_rate_error", ("alignment", "point"), "standard error of the error rate"),
        Variable("barrier", ("alignment",), "height above the chord", "loss per example", "barrier_error"),
        Variable("barrier_error", ("alignment",), "standard error of barrier", "loss per example"),
        Variable(
            "barrier_mean", ("alignment",), "height above the ends' mean", "loss per example", "barrier_mean_error"
        ),
        Variable("barrier_mean_error", ("alignment",), "standard error of barrier_mean", "loss per example"),
        Variable(
            "barrier_maximum",
            ("alignment",),
            "height above the higher end",
            "loss per example",
            "barrier_maximum_error",
        ),
        Variable("barrier_maximum_error", ("alignment",), "standard error of barrier_maximum", "loss per example"),
        Variable("barrier_place", ("alignment",), "where the loss is highest above the chord, from 0 to 1"),
        Variable("error_barrier", ("alignment",), "error rate's height above the chord", "", "error_barrier_error"),
        Variable("error_barrier_error", ("alignment",), "standard error of error_barrier, examples unpaired"),
        Variable(
            "error_barrier_mean",
            ("alignment",),
            "error rate's height above the ends' mean",
            "",
            "error_barrier_mean_error",
        ),
        Variable("error_barrier_mean_error", ("alignment",), "standard error of error_barrier_mean, unpaired"),
        Variable(
            "error_barrier_maximum",
            ("alignment",),
            "error rate's height above the higher end",
            "",
            "error_barrier_maximum_error",
        ),
        Variable("error_barrier_maximum_error", ("alignment",), "standard error of error_barrier_maximum, unpaired"),
        Variable("distance", ("alignment",), "distance between the two models", "parameter distance"),
        Variable("start_distance", ("start",), "distance that each start of the matching reached, over all weights"),
        Variable("permuted_share", (), "share of the units that may move that were moved"),
        Variable("coverage", (), "share of the weights that some permutation reaches"),
        Variable("output_change", (), "largest change of an output by the permutation, relative to the largest"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """The ends, the matching, then both curves from coarse to fine, and last the points around the highest."""
        subject.check_alike()
        both = _Both(self, subject)
        for end in ENDS:
            both.evaluate(0, end)
            yield both.reading()
        if self.alignment == "weights":
            for found in align(subject, draw.generator(0), self.starts):
                both.take(found)
                yield both.reading()
            both.open()
        for row, alpha in both.places():
            both.evaluate(row, alpha)
            yield both.reading()
        if not both.finished:
            yield both.reading(last=True)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Barriers and distance of the models as they are, with ``aligned_`` after matching, and how far it reached."""
        found: dict[str, Value] = {}
        for prefix, row in (("", 0), ("aligned_", 1))[: 1 + (self.alignment == "weights")]:
            for name in ("barrier", "barrier_mean", "barrier_maximum", "error_barrier_mean"):
                found[prefix + name] = float(data[name][row])
                found[f"{prefix}{name}_error"] = float(data[f"{name}_error"][row])
            found[f"{prefix}distance"] = float(data.distance[row])
        if self.alignment == "weights":
            found |= {n: float(data[n]) for n in ("permuted_share", "coverage", "output_change")}
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Both curves with their error bands over the chord between the models."""
        words, marks = self.metric.replace("_", " "), list[AnyMark]()
        roles: tuple[tuple[str, Role], ...] = (("as they are", "main"), ("units matched", "second"))
        for row, (label, role) in enumerate(roles):
            x, y, e = (data[n].values[row] for n in ("alpha", self.metric, f"{self.metric}_error"))
            if (known := np.isfinite(x)).any():
                x, y, e = x[known], y[known], e[known]
                marks += [Band(x, y - e, y + e, role=role), Curve(x, y, f"{label}, {words}", role)]
        first = data.sel(alignment="none")
        x, y = first["alpha"].values, first[self.metric].values
        ends = [float(y[np.flatnonzero(x == end)[0]]) if (x == end).any() else math.nan for end in ENDS]
        marks += [Curve(ENDS, ends, "chord", "reference"), Points(ENDS, ends, label="the two models", role="reference")]
        return Figure((Panel(tuple(marks), Axis("from the first model (0) to the second (1)"), Axis(words)),))

    def estimate(self, subject: Pair) -> Cost:
        """Two models, the permuted one, one between them, copies in float64, and the forward pass of a chunk."""
        first, curves = subject.first, 1 + (self.alignment == "weights")
        size = 6 * first.size * first.dtype.itemsize + 16 * first.size + first.memory()
        passes = curves * (self.points + self.refine)
        return Cost(size, passes, f"{passes} forward passes over {first.examples} examples, and the matching of units")


@dataclass(eq=False)
class _Both:
    """Both curves while they are being evaluated."""

    probe: Barrier
    pair: Pair
    alignment: Alignment | None = None
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    settled: bool = True

    def __post_init__(self) -> None:
        self.ground = self.pair.first.under(self.probe.norm)
        self.first = self.pair.first.tensors()
        self.segments = [Segment(self.ground, self.first, self.pair.second.tensors())]
        self.distance = np.full(2, np.nan)
        self.distance[0] = self._distance(self.pair.second)
        self.values["start_distance"] = np.full(self.probe.starts, np.nan)

    def _distance(self, other: Subject) -> float:
        first = self.pair.first
        return float(norm(first.flatten(first.params).double() - first.flatten(other.params).double()))

    def evaluate(self, row: int, alpha: float) -> None:
        """One point of one curve."""
        self.segments[row].evaluate(alpha)

    def take(self, found: Alignment) -> None:
        """What the matching has found so far."""
        self.alignment = found
        self.distance[1] = self._distance(found.second)
        names = ("permuted_share", "coverage", "output_change")
        self.values |= {n: getattr(found, n) for n in names}
        if found.matching is not None:
            self.settled = found.matching.settled
            self.values["start_distance"][: len(found.matching.starts)] = found.matching.starts

    def open(self) -> None:
        """Begin the second curve, at the same first model."""
        if self.alignment is not None:
            self.segments.append(Segment(self.ground, self.first, self.alignment.second.tensors()))

    def places(self) -> Iterator[tuple[int, float]]:
        """(curve, α): both from coarse to fine, then around the highest point of each."""
        n, rows = self.probe.points, range(len(self.segments))
        grid = dict.fromkeys(int(i) for level in levels(n) for i in (level[0], level[-1], *level))
        for i, row in itertools.product(grid, rows):
            if i / (n - 1) not in self.segments[row].found:
                yield row, i / (n - 1)
        for _, row in itertools.product(range(self.probe.refine), rows):
            alpha = self.segments[row].finer()
            if alpha is not None:
                yield row, alpha

    @property
    def finished(self) -> bool:
        """Whether as many points are known as were asked for."""
        return self._seen() == self._asked()

    def _seen(self) -> int:
        return sum(len(s.found) for s in self.segments)

    def _asked(self) -> int:
        return (1 + (self.probe.alignment == "weights")) * (self.probe.points + self.probe.refine)

    def reading(self, last: bool = False) -> Reading:
        """What is known now."""
        room = self.probe.points + self.probe.refine
        arrays = {n: np.full((2, room), np.nan) for n in ("alpha", *EVALUATED)}
        heights = {n: np.full(2, np.nan) for n in (*_HEIGHTS, "barrier_place")}
        for row, segment in enumerate(self.segments):
            x = segment.inside()
            arrays["alpha"][row, : x.size] = x
            for name in EVALUATED:
                arrays[name][row, : x.size] = segment.values(name, x)
            for name, value in segment.heights().items():
                if name in heights:
                    heights[name][row] = value
        done = 1.0 if last else self._seen() / self._asked()
        return self.probe.reading(
            done,
            {**arrays, **heights, **self.values, "distance": self.distance},
            coords={"alignment": list(ROWS)},
            converged=self.finished and self.settled,
            notes=(*self.ground.notes, *(self.alignment.notes if self.alignment else ())),
        )
