"""How many directions of weight space are curved, and whether examples pull in directions of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Rule, fitting
from workbench.numerics.basis import dot, norm
from workbench.numerics.curvature_rank import covered, mean_cosine, negative_part, rank_of, share_of
from workbench.numerics.density import spectral_measure
from workbench.numerics.sampling import Draw
from workbench.operators.curvature import Curvature
from workbench.operators.gradients import check_apart, gradients_of_examples
from workbench.operators.table import WORDS, OperatorName, curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import test_bytes
from workbench.spectra.opening import restricted
from workbench.spectra.run import Aim, SpectralRun, padded
from workbench.subject import Subject

TOLERANCE = 0.01
"""Residual over eigenvalue of the extreme pairs."""
EVERY = 8
"""Products, or gradients, between two readings."""
_NUMBERS = ("threshold_rank", "relative_rank", "flat_share", "negative_part", "sharpness", "gradient_cosine")


@dataclass(frozen=True)
class CurvatureRank(Probe[Subject]):
    """Rank of the curvature, whose collapse comes with lost plasticity, and interference between examples' gradients.

    What it measures, with the P eigenvalues λ of the matrix, largest |λ| first: ``threshold_rank``, the least k with
    Σ_(i<=k) |λ_i| >= ``share`` · Σ|λ| (signs are dropped, as in the source), and ``relative_rank`` = k/P;
    ``flat_share``, the share of eigenvalues with |λ| < ``flat`` · λ_1, λ_1 = ``sharpness`` the largest;
    ``negative_part``, what negative eigenvalues hold of Σ|λ|, which those ranks do not tell. ``gradient_cosine`` is the
    mean cosine between the gradients of two examples: 1 where all pull together, below 0 where they undo each other.

    How to read it: measure at the start of each task, on the examples of that task, always as many steps after the
    switch. A network that becomes unable to learn has fewer and fewer curved directions: ``threshold_rank`` falls and
    ``flat_share`` rises from task to task, often before the loss shows it. Compare with a fresh network on the same
    examples, not with another width.

    What it costs: up to ``exact`` parameters, P products, and every eigenvalue is known; beyond, ``starts`` · ``depth``
    products for a spectral density. Memory: P or ``depth`` vectors. Twice ``examples`` gradients of one example.

    When it misleads: on old examples it is the rank of an old task. Beyond ``exact`` parameters the numbers rest on a
    density from few random starts, whose small eigenvalues are blurred: their errors are large for nets of few thousand
    parameters, and that of ``flat_share`` always; curves of one net are steadier than that, since the starts are the
    same. The rank grows with the number of examples and, for Gauss-Newton matrices, is at most that times the classes.
    A loss near zero has curvature near zero, in ratios that mean little.

    Errors: 0 where every eigenvalue is known; else what half the depth changes, for ``flat_share`` a bound on what any
    depth could, and two standard deviations of the random starts. Of ``gradient_cosine`` the standard error over
    examples, by the jackknife; examples without a gradient are left out. Converged: the outermost eigenvalues
    are, and the rank's error is known: look at it.

    Source: Lyle et al. 2023 (arXiv:2303.01486); Lewandowski et al. 2023 (arXiv:2312.00246).
    """

    operator: Annotated[OperatorName, Choice(WORDS), Doc("Which curvature matrix.")] = "hessian"
    layers: Annotated[str, Doc("Parameters, modules or globs, with commas between; empty for all.")] = ""
    share: Annotated[float, Range(0.5, 0.9999, step=0.01), Doc("Share of Σ|λ| that the rank holds.")] = 0.99
    flat: Annotated[
        float, Range(1e-8, 0.5, log=True, soft=(1e-5, 0.1)), Doc("Size over λ_1 below which an eigenvalue is flat.")
    ] = 1e-3
    exact: Annotated[
        int, Range(0, 1000, step=1, soft=(0, 1000)), Doc("Parameters up to which every eigenvalue is computed.")
    ] = 500
    depth: Annotated[
        int, Range(16, 500, step=1, soft=(30, 200)), Doc("Products of the density of a larger matrix.")
    ] = 80
    starts: Annotated[int, Range(1, 32, step=1, soft=(1, 8)), Doc("Random starts of that density.")] = 3
    examples: Annotated[
        int, Range(0, 100_000, soft=(0, 512)), Doc("Examples whose gradients are compared, drawn at random; 0: none.")
    ] = 64

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("threshold_rank", (), "least number of eigenvalues that hold the share of Σ|λ|",
                 error="threshold_rank_error"),
        Variable("threshold_rank_error", (), "its error"),
        Variable("relative_rank", (), "that number over the number of parameters", error="relative_rank_error"),
        Variable("relative_rank_error", (), "its error"),
        Variable("flat_share", (), "share of eigenvalues that are flat beside the largest", error="flat_share_error"),
        Variable("flat_share_error", (), "its error"),
        Variable("negative_part", (), "share of Σ|λ| in negative eigenvalues", error="negative_part_error"),
        Variable("negative_part_error", (), "its error"),
        Variable("sharpness", (), "largest eigenvalue λ_1", error="sharpness_error"),
        Variable("sharpness_error", (), "its residual"),
        Variable("gradient_cosine", (), "mean cosine between two examples' gradients", error="gradient_cosine_error"),
        Variable("gradient_cosine_error", (), "its standard error over examples"),
        Variable("gradients", (), "examples with a gradient that were compared"),
        Variable("counted", ("node_index",), "eigenvalues, largest |λ| first, up to this node"),
        Variable("covered", ("node_index",), "share of Σ|λ| that they hold"),
        Variable("known", (), "whether every eigenvalue is known", kind="bool"),
        Variable("parameters", (), "number of parameters, P"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("products", (), "products with the matrix"),
    )  # fmt: skip

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The spectrum, then the gradients."""
        subject = restricted(subject, self.layers)
        draw = replace(draw, size=subject.size)
        with curvature(subject, self.operator) as matrix:
            run = _Run(self, matrix, SpectralRun(self.aim(subject.size), matrix, matrix, draw))
            yield from run.spectral()
        yield from run.cosines(subject, draw)
        yield run.report(1.0)

    def aim(self, size: int) -> Aim:
        """What the run is to find: all of a small spectrum, the density of a large one."""
        depth = size if size <= self.exact else self.depth
        return Aim(
            1, int(self.operator == "hessian"), TOLERANCE, trace=False, density=True, depth=depth, starts=self.starts
        )

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """All numbers with their errors, beside the loss."""
        return {
            f"{name}{end}": float(data[f"{name}{end}"]) for name in (*_NUMBERS, "train_loss") for end in ("", "_error")
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """What the largest eigenvalues hold of Σ|λ|, against how many they are."""
        counted, share = data.counted.values, data.covered.values
        marks: list[AnyMark] = [Rule(self.share, "y", f"{self.share:g}"), Line(counted, share)]
        marks += [Points(counted, share)] if np.isfinite(counted).sum() < 40 else []
        rank, error = float(data.threshold_rank), float(data.threshold_rank_error)
        if math.isfinite(rank):
            marks.append(Rule(rank, "x", "rank"))
        title = f"rank {rank:.4g} ± {error:.2g} of {int(data.parameters)}" if math.isfinite(rank) else "rank unknown"
        x = fitting("eigenvalues, largest |λ| first", "log", counted)
        return Figure((Panel(tuple(marks), x, Axis("share of Σ|λ|", limits=(0.0, 1.02))),), title=title)

    def estimate(self, subject: Subject) -> Cost:
        """Graphs, the basis, and the gradients one by one."""
        subject = restricted(subject, self.layers)
        size, itemsize, aim = subject.size, subject.dtype.itemsize, self.aim(subject.size)
        kept, working = curvature(subject, self.operator).expected_bytes()
        most = kept + max(aim.basis_bytes(size, itemsize) + working, test_bytes(subject)) + 8 * size * itemsize
        words = f"{aim.depth} products for {size} parameters, and gradients of {self.examples} examples twice"
        return Cost(most, aim.products(size), words)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: CurvatureRank
    matrix: Curvature
    spectrum: SpectralRun
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    said: tuple[str, ...] = ()
    gradients: int = 0

    def spectral(self) -> Iterator[Reading]:
        """One reading now and then while the spectrum is measured."""
        for _ in self.spectrum.eigenvalues():
            if self.matrix.products % EVERY == 1:
                self.take()
                yield self.report(0.0)
        for _ in self.spectrum.further():
            yield self.report(0.0)
        self.take()
        self.values |= {name: self.spectrum.values[name] for name in ("train_loss", "train_loss_error")}
        yield self.report(0.0)

    def take(self) -> None:
        """The numbers as the run knows them now."""
        state, found, size = self.spectrum.state, self.spectrum.values, self.matrix.size
        others = self.spectrum.others
        assert state is not None
        top, residual = float(found["eigenvalue"][0]), float(found["residual"][0])
        self.values |= {"sharpness": top, "sharpness_error": residual, "parameters": size, "known": state.complete}
        if state.alpha.size < 2 and not state.complete:
            return
        rank, error = rank_of(state, size, TOLERANCE, self.probe.share, others)
        self.values |= {"threshold_rank": rank, "threshold_rank_error": error}
        self.values |= {"relative_rank": rank / size, "relative_rank_error": error / size}
        flat = share_of(state, size, TOLERANCE, self.probe.flat * top, others) if top > 0 else (math.nan, math.nan)
        self.values |= dict(zip(("flat_share", "flat_share_error"), flat, strict=True))
        negative = negative_part(state, size, TOLERANCE, others)
        self.values |= dict(zip(("negative_part", "negative_part_error"), negative, strict=True))
        measure, _ = spectral_measure(state, size, TOLERANCE, others)
        length = self.spectrum.coords["node_index"].size
        curve = covered(measure.nodes, size * measure.weights)
        self.values |= dict(zip(("counted", "covered"), (padded(c[:length], length) for c in curve), strict=True))

    def cosines(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The mean cosine of the examples' gradients: their sum first, then each against it."""
        count = min(self.probe.examples, subject.examples)
        if count < 2:
            return
        try:
            check_apart(subject)
        except ValueError as problem:
            self.said = (f"gradients were not compared: {problem}",)
            return
        subject = subject.selected(draw.generator(1).permutation(subject.examples)[:count].tolist())
        total = torch.zeros(subject.size, dtype=torch.float64, device=subject.device)
        along: list[Tensor] = []
        for turn in (0, 1):
            for unit in _units(subject):
                if turn:
                    along.append(torch.stack([dot(unit, total), (unit != 0).any().double()]))
                else:
                    total += unit
                self.gradients += 1
                if self.gradients % EVERY == 0:
                    yield self.report(self.gradients / (2 * count))
        pairs = torch.stack(along).cpu().numpy()
        there = pairs[pairs[:, 1] > 0, 0]
        value, error = mean_cosine(there, float(dot(total, total)))
        self.values |= {"gradient_cosine": value, "gradient_cosine_error": error, "gradients": len(there)}

    def report(self, share: float) -> Reading:
        """The reading of now; ``share`` of the gradients are taken."""
        used, left = self.matrix.products, 0.0 if self.spectrum.state is None else self.spectrum.left
        spectral = used / (used + left) if "train_loss" not in self.values else 1.0
        done = 1.0 if share == 1 else min(0.7 * spectral + 0.3 * share, 0.999)
        met = self.spectrum.converged and math.isfinite(self.values.get("threshold_rank_error", math.nan))
        notes = tuple(self.notes())
        values, coords = self.values | {"products": used}, {"node_index": self.spectrum.coords["node_index"]}
        return self.probe.reading(done, values, coords=coords, converged=share == 1 and met, notes=notes)

    def notes(self) -> Iterator[str]:
        """What a reader must know about these numbers."""
        subject = self.matrix.subject
        yield from (*subject.notes, *self.spectrum.notes(), *self.said)
        if not self.values.get("known", True) and "train_loss" in self.values:
            yield f"from a density of {self.matrix.size} eigenvalues: not all of them are known"
        if "sharpness" in self.values and not self.values["sharpness"] > 0:
            yield "no eigenvalue is positive: none is flat beside the largest"
        yield subject.on


def _units(subject: Subject) -> Iterator[Tensor]:
    """The gradient of each example over its length, in float64; zero where it has none."""
    for gradient in gradients_of_examples(subject):
        flat = subject.flatten(gradient).double()
        length = norm(flat)
        yield flat / torch.where(length > 0, length, 1.0)
