"""Whether two networks, or two moments of one, are curved along the same directions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.figure import Axis, Figure, Heat, Line, Panel, Points
from workbench.numerics.overlap import angles, cosines, overlaps, span_sines, vector_sines
from workbench.numerics.sampling import Draw
from workbench.operators.table import WORDS, OperatorName, curvature
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import test_bytes
from workbench.several import Pair
from workbench.spectra.run import Aim, SpectralRun, padded

EVERY = 4
"""Products between two looks at the overlap while the second spectrum is measured."""
ROUNDING = 16
"""By how many units of the working precision a cosine may be off."""
MODELS = ("first", "second")


@dataclass(frozen=True)
class EigenspaceOverlap(Probe[Pair]):
    """Overlap of the leading eigenspaces of two Hessians: of two checkpoints, or of two networks of one architecture.

    What it measures, with v_1, v_2, ... and w_1, w_2, ... the unit eigenvectors of the first and the second subject's
    Hessian, largest eigenvalues first, among P parameters: ``overlap`` = (1/k) Σ_{i,j<=k} ⟨v_i, w_j⟩²
    for k = 1, ..., ``top``; each principal ``angle`` between the spans for k = ``top``; and ``vector_overlap`` =
    ⟨v_i, w_j⟩² one by one.

    How to read it: 1 means that the same k directions carry the curvature at both points, ``chance`` = k/P what
    directions without any relation would show. Within one training the overlap is high from early on, between
    networks of different seeds it is near chance: parameters of different networks do not correspond. A low overlap at
    one k and a high one at the next says that eigenvectors changed places, not that the space turned.

    What it costs: two Lanczos runs for ``top`` + 1 pairs, some 4 to 6 products a pair; memory for one basis and twice
    ``top`` vectors of P entries.

    When it misleads: where the kth and the (k+1)th eigenvalue are close, "the first k directions" are a matter of
    chance: such k are drawn grey, their ``determined`` is false and their error unknown; choose k at a gap of the
    spectrum. In a cluster of close eigenvalues single vectors (and the overlap one by one) mean nothing although the
    cluster's span does. Networks at different losses differ in curvature for that reason alone. Permuting or rescaling
    hidden units turns the eigenspaces without changing the function.

    Errors: ``overlap_error`` bounds what unconverged vectors can do, by the theorem of Davis and Kahan: for each
    subject √(Σ_{i<=k} r_i²) / (gap √k) with residuals r_i and the gap below the kth eigenvalue; conditional on no
    eigenvalue having been missed. ``angle_error`` and ``vector_overlap_error`` likewise.

    Source: Gur-Ari, Roberts and Dyer 2018 (arXiv 1812.04754); Davis and Kahan 1970; Björck and Golub 1973.
    """

    operator: Annotated[OperatorName, Choice(WORDS), Doc("Which curvature matrix.")] = "hessian"
    top: Annotated[int, Range(1, 200, step=1, soft=(1, 30)), Doc("How many leading directions.")] = 10
    tolerance: Annotated[
        float,
        Range(1e-6, 0.1, log=True, soft=(1e-4, 0.02)),
        Doc("What counts as converged: a pair's residual over its eigenvalue. Vectors need more than eigenvalues."),
    ] = 1e-3

    looks_at: ClassVar[Look] = "pair"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("overlap", ("rank",), "overlap of the first k directions", error="overlap_error"),
        Variable("overlap_error", ("rank",), "bound on its error; unknown where the gap is not resolved"),
        Variable("determined", ("rank",), "whether both spectra have a resolved gap after the kth", kind="bool"),
        Variable("chance", ("rank",), "overlap of unrelated directions, k/P"),
        Variable("angle", ("rank",), "principal angles of the whole spans, ascending", "rad", error="angle_error"),
        Variable("angle_error", (), "bound on the error of each angle", "rad"),
        Variable("vector_overlap", ("rank", "other"), "squared cosine of single vectors", error="vector_overlap_error"),
        Variable("vector_overlap_error", ("rank", "other"), "bound on its error; unknown in clusters"),
        Variable("eigenvalue", ("model", "rank"), "eigenvalue", error="residual"),
        Variable("residual", ("model", "rank"), "residual ‖Hv - λv‖"),
        Variable("converged", ("model", "rank"), "residual within the tolerance", kind="bool"),
        Variable("vector_error", ("model", "rank"), "bound on the sine of the vector's angle to the eigenvector"),
        Variable("next_eigenvalue", ("model",), "eigenvalue after the last, which ends the gap", error="next_residual"),
        Variable("next_residual", ("model",), "its residual"),
        Variable("parameters", (), "number of parameters, P"),
        Variable("train_loss", ("model",), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", ("model",), "standard error of the loss over examples"),
        Variable("products", ("model",), "products with the matrix"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """The first subject's spectrum, then the second's with the overlap so far."""
        subject.check_alike()
        run = _Run(self, subject)
        for number in range(2):
            for _ in run.spectrum(number, replace(draw, key=f"{draw.key}/{MODELS[number]}")):
                yield run.report()
        yield run.report(last=True)

    @property
    def aim(self) -> Aim:
        """What each run is to find: one pair more than is asked for, which ends the gap."""
        return Aim(self.top + 1, 0, self.tolerance, trace=False, density=False)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The overlap of all directions with its error, what chance would give, and both losses."""
        known = np.flatnonzero(np.isfinite(data.chance.values))
        at = data.isel(rank=int(known[-1]))
        found: dict[str, Value] = {"directions": int(at["rank"])}
        found |= {name: float(at[name]) for name in ("overlap", "overlap_error", "chance")}
        found["gap"] = "resolved" if bool(at.determined) else "not resolved: these directions are not determined"
        for number, which in enumerate(MODELS):
            for name in ("train_loss", "train_loss_error"):
                found[name.replace("loss", f"loss_{which}")] = float(data[name][number])
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Overlap against the number of directions, single vectors against each other, and both spectra."""
        return Figure((_curve(data), _cells(data), _spectra(data)))

    def estimate(self, subject: Pair) -> Cost:
        """One graph and one basis at a time, and the vectors of both."""
        size, itemsize, aim = subject.size, subject.dtype.itemsize, self.aim
        needs = [curvature(one, self.operator).expected_bytes() for one in (subject.first, subject.second)]
        vectors = (2 * min(self.top, size) + 6) * size * itemsize
        most = max(kept + max(aim.basis_bytes(size, itemsize) + working, test_bytes(subject.first))
                   for kept, working in needs)  # fmt: skip
        return Cost(most + vectors, 2 * aim.products(size), f"two spectra of {size} parameters, one after the other")


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: EigenspaceOverlap
    pair: Pair
    first: Tensor | None = None
    done: float = 0.0
    met: tuple[bool, ...] = ()
    said: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        top, size = self.probe.top, self.pair.size
        ranks = np.arange(1, top + 1)
        self.coords = {"rank": ranks, "other": ranks, "model": np.array(MODELS)}
        both, each = ("eigenvalue", "residual", "vector_error"), ("next_eigenvalue", "next_residual")
        single = (*each, "train_loss", "train_loss_error", "products")
        self.values |= {name: np.full((2, top), np.nan) for name in both}
        self.values |= {name: np.full(2, np.nan) for name in single}
        self.values["converged"] = np.zeros((2, top), dtype=bool)
        self.values |= {"parameters": size, "chance": np.where(ranks <= size, ranks / size, np.nan)}
        self.spans = np.full((2, top), np.nan)

    def spectrum(self, number: int, draw: Draw) -> Iterator[None]:
        """One subject's run; its vectors are kept (the first) or compared (the second)."""
        subject = (self.pair.first, self.pair.second)[number]
        with curvature(subject, self.probe.operator) as matrix:
            run = SpectralRun(self.probe.aim, matrix, matrix, draw)
            for _ in run.eigenvalues():
                self.take(number, run)
                if number and run.curvature.products % EVERY == 0:
                    self.compare(self.vectors(run))
                yield
            self.take(number, run)
            self.met = (*self.met, run.converged)
            if number:
                self.compare(self.vectors(run))
            else:
                self.first = self.vectors(run)
        self.said = tuple(dict.fromkeys((*self.said, *run.notes())))

    def vectors(self, run: SpectralRun) -> Tensor:
        """The leading Ritz vectors, (at most top, size)."""
        assert run.state is not None
        return run.state.vectors(range(min(self.probe.top, len(run.state.values))))

    def take(self, number: int, run: SpectralRun) -> None:
        """One subject's pairs and loss, and how far its vectors may be off."""
        top, size, found = self.probe.top, self.pair.size, run.values
        values, residuals = np.array(found["eigenvalue"]), np.array(found["residual"])
        for name in ("eigenvalue", "residual", "converged"):
            self.values[name][number] = found[name][:top]
        self.values["next_eigenvalue"][number], self.values["next_residual"][number] = values[top], residuals[top]
        for name in ("train_loss", "train_loss_error", "products"):
            self.values[name][number] = found.get(name, math.nan)
        values[size:], residuals[size:] = -np.inf, 0.0  # nothing lies below the last eigenvalue of all
        with np.errstate(invalid="ignore"):
            self.values["vector_error"][number] = vector_sines(values, residuals)
            self.spans[number] = span_sines(values, residuals)
        used = run.curvature.products
        self.done = 0.5 * (number + used / (used + run.left))

    def compare(self, second: Tensor) -> None:
        """The overlap with the second subject's vectors as they are now."""
        assert self.first is not None
        count, top = min(len(self.first), len(second)), self.probe.top
        inner = cosines(self.first[:count], second[:count])
        ranks, off = self.coords["rank"], self.spans.sum(axis=0)
        single = self.values["vector_error"][0][:, None] + self.values["vector_error"][1][None, :]
        cells = np.full((top, top), np.nan)
        cells[:count, :count] = inner**2
        slack = ROUNDING * torch.finfo(self.pair.dtype).eps
        sines = np.minimum(self.spans[:, count - 1], 1.0)
        self.values |= {
            "overlap": padded(overlaps(inner), top),
            "overlap_error": np.minimum(off / np.sqrt(ranks) + slack, 1.0),
            "determined": np.isfinite(off) & (ranks <= self.pair.size),
            "angle": padded(angles(inner), top),
            "angle_error": float(np.arcsin(sines).sum() + np.sqrt(2 * slack)),
            "vector_overlap": cells,
            "vector_overlap_error": np.minimum(single + slack, 1.0),
        }

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        done = 1.0 if last else min(max(self.done, 1e-6), 0.999)
        return self.probe.reading(
            done, self.values, coords=self.coords, converged=last and all(self.met), notes=self.notes(last)
        )

    def notes(self, last: bool) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        first = self.pair.first
        on = f"both on the same {first.examples} of {first.available or 'unknown'} examples"
        said = [*self.pair.notes, *self.said, on]
        if last:
            said += [*self.clusters(), *self.losses()]
        return tuple(said)

    def clusters(self) -> Iterator[str]:
        """Where single vectors are not determined."""
        for number, which in enumerate(MODELS):
            loose = np.flatnonzero(np.isnan(self.values["vector_error"][number][: self.pair.size])) + 1
            if loose.size:
                yield (
                    f"{which}: eigenvectors {', '.join(map(str, loose))} lie in clusters closer than their errors, so "
                    "they are not determined one by one; spans that end at a gap are"
                )

    def losses(self) -> Iterator[str]:
        """Whether the two are at different losses."""
        (one, two), errors = self.values["train_loss"], self.values["train_loss_error"]
        if abs(one - two) > 0.1 * max(abs(one), abs(two)):
            yield (
                f"the train losses differ, {one:.3g} ± {errors[0]:.1g} and {two:.3g} ± {errors[1]:.1g}: "
                "curvature changes with the loss alone"
            )


def _curve(data: xr.Dataset) -> Panel:
    rank, found, sure = data["rank"].values.astype(float), data.overlap.values, data.determined.values
    marks = (
        Line(rank, data.chance.values, "chance, k/P", "reference"),
        Points(rank, np.where(sure, found, np.nan), np.where(sure, data.overlap_error.values, np.nan), "overlap"),
        Points(rank, np.where(sure, np.nan, found), label="no resolved gap after k", role="unconverged"),
    )
    return Panel(marks, Axis("directions k"), Axis("overlap", limits=(-0.02, 1.05)), title="overlap of the first k")


def _cells(data: xr.Dataset) -> Panel:
    rank = data["rank"].values.astype(float)
    heat = Heat(rank, rank, data.vector_overlap.values)
    z = Axis("squared cosine", limits=(0.0, 1.0))
    return Panel((heat,), Axis("rank in the second"), Axis("rank in the first"), z, title="single vectors", square=True)


def _spectra(data: xr.Dataset) -> Panel:
    rank, met = data["rank"].values.astype(float), data.converged.values
    marks = [
        Points(rank, np.where(met[i], data.eigenvalue.values[i], np.nan), data.residual.values[i], which, role)
        for i, (which, role) in enumerate(zip(MODELS, ("main", "second"), strict=True))
    ]
    open_ = np.where(met, np.nan, data.eigenvalue.values)
    marks += [Points(rank, row, label="not converged", role="unconverged") for row in open_ if np.isfinite(row).any()]
    return Panel(tuple(marks), Axis("rank"), Axis("eigenvalue"), title="spectra")
