"""How much of the gradient lies along the sharpest directions of the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr

from workbench.figure import Axis, Bars, Figure, Line, Panel, Points
from workbench.numerics.sampling import Draw
from workbench.operators.curvature import Curvature
from workbench.operators.table import WORDS, OperatorName, curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import test_bytes
from workbench.spectra.energy import energies
from workbench.spectra.run import Aim, SpectralRun, padded
from workbench.subject import Subject

EVERY = 4
"""Products between two looks at the shares while the spectrum is measured."""
_SHARES = ("energy", "energy_error", "share", "share_error")


@dataclass(frozen=True)
class GradientEnergy(Probe[Subject]):
    """Share of the squared gradient that lies along the leading eigenvectors of the Hessian.

    What it measures, with g = ∇L and unit eigenvectors v_1, v_2, ... of the Hessian, largest eigenvalues first, among P
    parameters: ``energy`` = (v_jᵀg)²/‖g‖² one by one, and ``share`` = Σ_{j<=k} (v_jᵀg)²/‖g‖² for k = 1, ..., ``top``;
    ``gradient_share`` is the last of these.

    How to read it: ``chance`` = k/P is what directions without any relation to the gradient would hold. A share near 1
    says that the gradient lies in the few sharpest directions, as it does early and at the edge of stability, where
    training swings along v_1: look at it at every checkpoint with ``Along(GradientEnergy())``. That a gradient lies
    there does not say that the loss falls there: a swing to and fro has a large share and goes nowhere.

    What it costs: one Lanczos run for ``top`` + 1 pairs, some 4 to 6 products a pair; memory, its basis and ``top``
    vectors.

    When it misleads: the gradient is that of the examples at hand: on a subset the noise of its examples lies in the
    sharp directions too, and raises the share; on mini-batches more so (NoiseAlignment says how much). Near a minimum
    the gradient is small and turns with every step. Where the kth and the (k+1)th eigenvalue are close, the first k
    directions are a matter of chance, and the error is unknown: choose ``top`` at a gap of the spectrum. Momentum,
    preconditioners and weight decay make the update another vector than g.

    Errors: bounds on what unconverged vectors can do: residuals over gaps bound the angle θ by which a span is off
    (Davis and Kahan), and the gradient's angle to it changes by θ at most; if no eigenvalue was missed. Converged:
    every residual within ``tolerance`` of its eigenvalue, and ``gradient_share_error`` known.

    Source: Gur-Ari, Roberts and Dyer 2018 (arXiv 1812.04754); Davis and Kahan 1970.
    """

    operator: Annotated[OperatorName, Choice(WORDS), Doc("Which curvature matrix.")] = "hessian"
    top: Annotated[int, Range(1, 200, step=1, soft=(1, 30)), Doc("How many leading directions.")] = 10
    tolerance: Annotated[
        float,
        Range(1e-6, 0.1, log=True, soft=(1e-4, 0.02)),
        Doc("What counts as converged: a pair's residual over its eigenvalue. Vectors need more than eigenvalues."),
    ] = 1e-3

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("energy", ("rank",), "share of ‖g‖² along the eigenvector", error="energy_error"),
        Variable("energy_error", ("rank",), "bound on its error; unknown in clusters of eigenvalues"),
        Variable("share", ("rank",), "share of ‖g‖² along the first k eigenvectors", error="share_error"),
        Variable("share_error", ("rank",), "bound on its error; unknown where the gap after the kth is not resolved"),
        Variable("chance", ("rank",), "share of unrelated directions, k/P"),
        Variable("gradient_share", (), "share of ‖g‖² along all of them", error="gradient_share_error"),
        Variable("gradient_share_error", (), "bound on its error"),
        Variable("eigenvalue", ("rank",), "eigenvalue", error="residual"),
        Variable("residual", ("rank",), "residual ‖Hv - λv‖"),
        Variable("converged", ("rank",), "residual within the tolerance", kind="bool"),
        Variable("gradient_norm", (), "length of the gradient"),
        Variable("parameters", (), "number of parameters, P"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("products", (), "products with the matrix"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The spectrum, with the shares so far."""
        with curvature(subject, self.operator) as matrix:
            run = _Run(self, matrix, SpectralRun(self.aim, matrix, matrix, draw))
            for _ in run.spectrum.eigenvalues():
                run.take()
                if matrix.products % EVERY == 0:
                    run.project()
                yield run.report()
            run.take()
            run.project()
            yield run.report(last=True)

    @property
    def aim(self) -> Aim:
        """What the run is to find: one pair more than is asked for, which ends the gap."""
        return Aim(self.top + 1, 0, self.tolerance, trace=False, density=False)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The share of all directions and of the first with their errors, what chance would give, and the loss."""
        names = [f"{name}{end}" for name in ("gradient_share", "train_loss") for end in ("", "_error")]
        found: dict[str, Value] = {name: float(data[name]) for name in names}
        found["chance"] = float(np.nanmax(data.chance.values))
        first = {"first_direction": data.energy, "first_direction_error": data.energy_error}
        return found | {name: float(values[0]) for name, values in first.items()}

    def figure(self, data: xr.Dataset) -> Figure:
        """The share of the first k directions, of each one, and the spectrum."""
        return Figure((_shares(data), _energies(data), _spectrum(data)))

    def estimate(self, subject: Subject) -> Cost:
        """The graphs, one basis, and the vectors."""
        size, itemsize, aim = subject.size, subject.dtype.itemsize, self.aim
        kept, working = curvature(subject, self.operator).expected_bytes()
        most = kept + max(aim.basis_bytes(size, itemsize) + working, test_bytes(subject))
        vectors = (min(self.top, size) + 6) * size * itemsize
        return Cost(
            most + vectors, aim.products(size), f"a spectrum of {size} parameters on {subject.examples} examples"
        )


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: GradientEnergy
    matrix: Curvature
    spectrum: SpectralRun
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        top, size = self.probe.top, self.matrix.size
        self.ranks = np.arange(1, top + 1)
        self.values |= {name: np.full(top, np.nan) for name in _SHARES}
        self.values |= {"gradient_share": math.nan, "gradient_share_error": math.nan, "parameters": size}
        self.values["chance"] = np.where(self.ranks <= size, self.ranks / size, np.nan)

    def take(self) -> None:
        """The pairs as they are now; loss and gradient came with the first product."""
        found = self.spectrum.values
        self.values |= {name: found[name][: self.probe.top] for name in ("eigenvalue", "residual", "converged")}
        for name in ("train_loss", "train_loss_error", "gradient_norm"):
            self.values[name] = found.get(name, math.nan)

    def project(self) -> None:
        """The gradient along the vectors as they are now."""
        state, top = self.spectrum.state, self.probe.top
        assert state is not None
        if not self.values["gradient_norm"] > 0:
            return
        count = min(top, len(state.values))
        found = self.spectrum.values
        pairs = (np.array(found[name], dtype=np.float64) for name in ("eigenvalue", "residual"))
        seen = energies(state.vectors(range(count)), self.matrix.gradient, *pairs)
        self.values |= {name: padded(getattr(seen, name), top) for name in _SHARES}
        if count == min(top, self.matrix.size):
            self.values |= {"gradient_share": seen.share[-1], "gradient_share_error": seen.share_error[-1]}

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        used = self.matrix.products
        done = min(max(used / (used + self.spectrum.left), 1e-6), 0.999)
        met = self.spectrum.converged and math.isfinite(self.values["gradient_share_error"])
        return self.probe.reading(
            1.0 if last else done,
            self.values | {"products": used},
            coords={"rank": self.ranks},
            converged=last and met,
            notes=tuple(self.notes(last)),
        )

    def notes(self, last: bool) -> Iterator[str]:
        """What a reader must know about these numbers."""
        subject, top = self.matrix.subject, min(self.probe.top, self.matrix.size)
        yield from (*subject.notes, *self.spectrum.notes())
        if last and self.values["gradient_norm"] == 0:
            yield "the gradient is zero: it has no direction"
        elif last and math.isnan(self.values["gradient_share_error"]):
            yield f"no gap after eigenvalue {top} is resolved: the first {top} directions may be others"
        yield subject.on


def _shares(data: xr.Dataset) -> Panel:
    rank, found, off = data["rank"].values.astype(float), data.share.values, data.share_error.values
    sure = np.isfinite(off)
    marks = (
        Line(rank, data.chance.values, "chance, k/P", "reference"),
        Points(rank, np.where(sure, found, np.nan), off, "share"),
        Points(rank, np.where(sure, np.nan, found), label="no resolved gap after k", role="unconverged"),
    )
    limits = (-0.02, 1.05)
    return Panel(marks, Axis("directions k"), Axis("share of ‖g‖²", limits=limits), title="along the first k")


def _energies(data: xr.Dataset) -> Panel:
    rank, found, off = data["rank"].values.astype(float), data.energy.values, data.energy_error.values
    sure = np.isfinite(off)
    marks = (
        Bars(rank, np.where(sure, found, np.nan), off, "energy"),
        Points(rank, np.where(sure, np.nan, found), label="not determined one by one", role="unconverged"),
    )
    return Panel(marks, Axis("rank"), Axis("share of ‖g‖²"), title="along each eigenvector")


def _spectrum(data: xr.Dataset) -> Panel:
    rank, met = data["rank"].values.astype(float), data.converged.values
    values = data.eigenvalue.values
    marks = (
        Points(rank, np.where(met, values, np.nan), data.residual.values, "eigenvalue"),
        Points(rank, np.where(met, np.nan, values), label="not converged", role="unconverged"),
    )
    return Panel(marks, Axis("rank"), Axis("eigenvalue"), title="spectrum")
