"""The spectrum of a loss's curvature: its extreme eigenvalues, its trace and the density of all the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import Axis, Figure, Line, Panel, Points, Rule, Stems
from workbench.numerics import trace as traces
from workbench.numerics.basis import norm
from workbench.numerics.density import grid_length, spectral_density
from workbench.numerics.factorisation import Precision
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.sampling import Draw
from workbench.numerics.trace import Deflation, TraceEstimate
from workbench.operators.curvature import Curvature
from workbench.operators.table import OPERATORS
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import check_symmetry, self_test, test_bytes
from workbench.subject import Subject

Floats = NDArray[np.float64]
DEPTH = 30
"""Products that a density takes at least: its error falls with depth, and fewer leave it shapeless."""
NEAR_ZERO = 0.05
"""The minimum need not be known better than the tolerance times this share of the spectrum's scale."""
CANCELLING = 1.0
"""The trace need not be known better than the tolerance times this share of Σ|λ| over the known eigenvalues."""
MOST_ROWS, CHEAP_BYTES = 256, 2**24
"""Basis vectors that a small model gets, as far as they fit into so many bytes: a processor's cache."""
MOST_PRODUCTS = 1000
"""Products that the eigenvalues may take, beside twenty for each one that is wanted."""
MOST_SAMPLES = 1000
"""Random vectors that a trace may take where its exact sum is out of reach."""


@dataclass(frozen=True)
class HessianSpectrum(Probe[Subject]):
    """Extreme eigenvalues, trace and spectral density of a loss's Hessian (or Gauss-Newton matrix) at a point.

    What it measures, for H = ∇²L (P x P, L the mean loss): ``eigenvalue``, the algebraically largest
    λ_1 >= λ_2 >= ..., each with its ``residual`` ‖H v - λ v‖; ``eigenvalue_min``, the most negative; ``trace`` = Σ λ;
    and the density of all eigenvalues as quadrature ``node`` and ``weight``, drawn as ``density`` after smoothing by
    ``smoothing_width``. One Lanczos run with full reorthogonalisation gives eigenvalues, density and the directions in
    which the trace is exact; Hutchinson's estimator does the rest of the trace (Ghorbani, Krishnan, Xiao 2019; Meyer
    et al. 2021).

    How to read it: λ_1 is the sharpness; gradient descent with step η is stable while λ_1 < 2/η. A few outliers above
    a bulk near zero are usual, about as many as classes. A negative minimum is a direction of descent that the
    gradient does not show; when it does not exceed its residual, no negative curvature was resolved.

    What it costs: 35 to 45 products (each 2 to 5 gradients) for ten eigenvalues, the minimum and the density, some 80
    for the trace; 8 to 11 for the first eigenvalue alone (``minimum``, ``trace`` and ``density`` off). Memory: about
    40 vectors of P entries, and the gradient's graph.

    When it misleads: on a subset of the examples λ_1 is biased upwards, by a factor of several for few examples, so
    compare only readings on equally many. Differentiation ignores kinks: the numbers are those of the smooth piece
    that the weights lie in. Sharpness changes under rescalings that leave the network's function as it is.
    BatchNorm's policy changes the function itself.

    Errors: some eigenvalue lies within ``residual`` of each one shown, and the first is never above λ_1 (but for the
    rounding of products, about 1e-6 λ_1 in float32).
    ``trace_error`` is the half-width of a 95 % interval (0: the exact sum), ``density_error`` a Wasserstein-1 distance
    in units of eigenvalues: to the density of half as many products, with the sampling error of one random start.
    """

    operator: Annotated[
        Literal["hessian", "ggn"],
        Choice({"hessian": "the Hessian of the loss", "ggn": "the Gauss-Newton matrix: no curvature of the model"}),
        Doc("Which curvature matrix."),
    ] = "hessian"
    top: Annotated[int, Range(1, 500, step=1, soft=(1, 30)), Doc("How many of the largest eigenvalues.")] = 10
    tolerance: Annotated[
        float,
        Range(1e-6, 0.5, log=True, soft=(1e-4, 0.2)),
        Doc("What counts as converged: a pair's residual over its eigenvalue, the trace's error over the trace."),
    ] = 0.02
    minimum: Annotated[bool, Doc("Whether to find the most negative eigenvalue.")] = True
    trace: Annotated[bool, Doc("Whether to estimate the trace.")] = True
    density: Annotated[bool, Doc("Whether to estimate the density of all eigenvalues.")] = True

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("eigenvalue", ("rank",), "eigenvalue", error="residual"),
        Variable("residual", ("rank",), "residual ‖Hv - λv‖"),
        Variable("converged", ("rank",), "residual within the tolerance", kind="bool"),
        Variable("eigenvalue_min", (), "most negative eigenvalue", error="eigenvalue_min_residual"),
        Variable("eigenvalue_min_residual", (), "residual of the most negative eigenvalue"),
        Variable("eigenvalue_min_converged", (), "minimum's residual within the tolerance", kind="bool"),
        Variable("negative_curvature", (), "whether the minimum is negative beyond its residual", kind="bool"),
        Variable("trace", (), "trace", error="trace_error"),
        Variable("trace_error", (), "half-width of the trace's 95 % interval"),
        Variable("node", ("node_index",), "quadrature node", error="density_error"),
        Variable("weight", ("node_index",), "share of the eigenvalues at the node", error="density_error"),
        Variable("density", ("value",), "density of the eigenvalues, smoothed", error="density_error"),
        Variable("density_error", (), "error of the density, a Wasserstein-1 distance"),
        Variable("smoothing_width", (), "standard deviation of the smoothing"),
        Variable("parameters", (), "number of parameters, and of eigenvalues"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("gradient_norm", (), "length of the gradient"),
        Variable("products", (), "products with the matrix"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """One Lanczos run for eigenvalues and density, then the trace outside its basis; a reading a product."""
        with OPERATORS[self.operator](subject) as curvature:
            run = _Run(self, curvature, draw)
            yield from run.eigenvalues()
            if self.trace:
                yield from run.sum()
            yield run.report(last=True)

    @property
    def bottom(self) -> int:
        """How many of the smallest eigenvalues are sought; the Gauss-Newton matrix has no negative ones."""
        return int(self.minimum and self.operator == "hessian")

    def rows(self, subject: Subject) -> int:
        """Vectors in the Lanczos basis before it restarts: more for small models, since restarts cost products."""
        cheap = min(MOST_ROWS, CHEAP_BYTES // (subject.size * subject.dtype.itemsize))
        return max(32, 2 * (self.top + self.bottom) + 10, cheap)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Sharpness, minimum, trace and loss with their errors, and what they cost."""
        first = data.isel(rank=0)
        found: dict[str, Value] = {"sharpness": float(first.eigenvalue), "sharpness_error": float(first.residual)}
        if self.bottom:
            found |= {
                "eigenvalue_min": float(data.eigenvalue_min),
                "eigenvalue_min_error": float(data.eigenvalue_min_residual),
                "negative_curvature": "resolved" if bool(data.negative_curvature) else "no negative curvature resolved",
            }
        if self.trace:
            found |= {"trace": float(data.trace), "trace_error": float(data.trace_error)}
        if self.density:
            found["density_error"] = float(data.density_error)
        loss = {"train_loss": float(data.train_loss), "train_loss_error": float(data.train_loss_error)}
        return found | loss | {"products": int(data.products)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Eigenvalues by rank with their residuals, and the density of all on a logarithmic scale."""
        return Figure((_ranks(data), _density(data)) if self.density else (_ranks(data),))

    def estimate(self, subject: Subject) -> Cost:
        """The basis and the kept graphs, and on top what a product needs, or the self-test before the basis fills."""
        size, wanted = subject.size, self.top + self.bottom
        rows = min(self.rows(subject) + 1, size)
        kept, working = OPERATORS[self.operator](subject).expected_bytes()
        vector = size * subject.dtype.itemsize
        most = kept + max((rows + 6) * vector + working, 6 * vector + test_bytes(subject))
        products = min(size, max(8 + 2 * wanted, DEPTH if self.density else 0)) + (80 if self.trace else 0)
        words = f"{rows} basis vectors of {size} parameters, and the gradient's graph of {subject.examples} examples"
        return Cost(most, products, words)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: HessianSpectrum
    curvature: Curvature
    draw: Draw
    state: Krylov | None = None
    estimate: TraceEstimate | None = None
    tested: tuple[str, ...] = ()
    rounded: str = ""
    done: float = 0.0
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    coords: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        probe, atoms = self.probe, self.probe.top + self.probe.bottom
        self.coords = {
            "rank": np.arange(1, probe.top + 1),
            "node_index": np.arange(probe.rows(self.curvature.subject) + 1 + atoms),
            "value": np.full(grid_length(atoms), np.nan),
        }

    def eigenvalues(self) -> Iterator[Reading]:
        """The Lanczos run: a reading after each product; self-test and standard error after the first."""
        probe = self.probe
        states = lanczos(
            self.curvature,
            self.draw(0),
            top=probe.top,
            bottom=probe.bottom,
            tolerance=probe.tolerance,
            least=DEPTH if probe.density else 0,
            near_zero=NEAR_ZERO,
            basis=probe.rows(self.curvature.subject),
            limit=MOST_PRODUCTS + 20 * (probe.top + probe.bottom),
            fresh=lambda i: self.draw(1 + i),
        )
        for state in self.finite(states):
            self.state = state
            self.values |= self.extremes(state) | (self.spread(state) if probe.density else {})
            yield self.report()
            self.rounded = check_symmetry(state.asymmetry)
            if not self.tested:
                self.test()

    def finite(self, states: Iterator[Krylov]) -> Iterator[Krylov]:
        """The same states; a loss that is not finite is named before the products that it spoils."""
        try:
            yield from states
        except ArithmeticError as problem:
            if math.isfinite(self.curvature.loss):
                raise
            raise ValueError(
                f"the loss at the model's own point is {self.curvature.loss}, so it has no curvature; look at the "
                "weights (did training diverge?), the inputs and the targets."
            ) from problem

    def test(self) -> None:
        """What is asked once: is this a second derivative, and how sure is the loss."""
        self.tested = (self_test(self.curvature).words,)
        found = self.curvature.subject.evaluate(metrics=("loss",))
        self.values["train_loss_error"] = found.get("loss_error", math.nan)

    def extremes(self, state: Krylov) -> dict[str, Any]:
        """The wanted pairs as variables; loss and gradient came with the first product."""
        found: dict[str, Any] = {
            "eigenvalue": state.top_values,
            "residual": state.top_residuals,
            "converged": state.top_converged,
        }
        if "train_loss" not in self.values:
            gradient = float(norm(self.curvature.gradient))
            found |= {"train_loss": self.curvature.loss, "gradient_norm": gradient, "parameters": self.curvature.size}
        if self.probe.bottom:
            low, residual = float(state.bottom_values[0]), float(state.bottom_residuals[0])
            floor = Precision.of(self.curvature.dtype).floor * float(np.abs(state.values).max())
            found |= {
                "eigenvalue_min": low,
                "eigenvalue_min_residual": residual,
                "eigenvalue_min_converged": bool(state.bottom_converged[0]),
                "negative_curvature": low < -max(residual, floor),
            }
        return found

    def spread(self, state: Krylov) -> dict[str, Any]:
        """The density as variables, once the run has two steps."""
        if state.alpha.size < 2 and not state.complete:
            return {}
        found = spectral_density(state, self.curvature.size, self.probe.tolerance)
        length = self.coords["node_index"].size
        self.coords["value"] = found.grid
        return {
            "node": _padded(found.measure.nodes, length),
            "weight": _padded(found.measure.weights, length),
            "density": found.density,
            "density_error": found.error,
            "smoothing_width": found.width,
        }

    def sum(self) -> Iterator[Reading]:
        """Exactly inside the basis, by random vectors (or, when cheaper, by the whole diagonal) outside it."""
        state = self.state
        assert state is not None
        if state.complete:
            self.estimate = TraceEstimate(math.fsum(state.values), 0.0, 0, 0, exact=True)
            self.values |= {"trace": self.estimate.value, "trace_error": 0.0}
            return
        estimates = traces.trace(
            self.curvature,
            self.draw,
            tolerance=self.probe.tolerance,
            scale=self.scale(state),
            deflation=Deflation(state.span(), state.values),
            limit=None if self.curvature.size <= traces.LARGEST_EXACT else MOST_SAMPLES,
            near_zero=CANCELLING,
        )
        reading = self.report()
        for estimate in estimates:
            self.estimate = estimate
            self.values |= {"trace": estimate.value, "trace_error": estimate.error}
            # Late samples change little: most are passed on as the reading before them, which costs nothing to make.
            if estimate.samples <= 16 or estimate.samples % 4 == 0:
                reading = self.report()
            yield reading

    def scale(self, state: Krylov) -> float:
        """Σ|λ| over what is known: the size of what may cancel in a trace."""
        return float(np.abs(state.values).sum())

    def allowed(self) -> float:
        """The error at which the trace counts as converged."""
        assert self.state is not None
        value = self.estimate.value if self.estimate else math.nan
        return traces.allowed_error(value, self.probe.tolerance, self.scale(self.state), CANCELLING)

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        self.values["products"] = self.curvature.products
        self.done = 1.0 if last else max(self.done, self.progress())
        return self.probe.reading(
            self.done, self.values, coords=self.coords, converged=last and self.converged(), notes=self.notes(last)
        )

    def converged(self) -> bool:
        """Whether every rule that was asked for is met."""
        summed = not self.probe.trace or (
            self.estimate is not None and (self.estimate.exact or self.estimate.error <= self.allowed())
        )
        return self.state is not None and self.state.done and summed

    def progress(self) -> float:
        """Products so far over those expected in all; below 1 until the end."""
        used = self.curvature.products
        return min(used / (used + self.left()), 0.99)

    def left(self) -> float:
        """How many products are probably still to come."""
        size, probe, state, estimate = self.curvature.size, self.probe, self.state, self.estimate
        assert state is not None
        if estimate is None:
            wanted = 8 + 2 * (probe.top + probe.bottom)
            expected = min(max(wanted, DEPTH if probe.density else 0) + 10 * (probe.top > 1), size)
            ahead = 0.0 if state.done else max(expected - state.products, 1 + 0.2 * state.products)
            return ahead + (0 if state.complete or not probe.trace else min(size, 80))
        samples = traces.samples_needed(estimate, self.allowed()) if estimate.samples > 1 else 80.0
        return max(min(samples, size + estimate.samples) - estimate.products, 1.0)

    def notes(self, last: bool) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        subject, state = self.curvature.subject, self.state
        said = [*subject.notes, *self.tested, _KINKS]
        if subject.available is None or subject.examples < subject.available:
            said.append(f"on {subject.examples} of {subject.available or 'unknown'} examples: {_SUBSET}")
        if self.rounded:
            said.append(self.rounded)
        if self.probe.top > self.curvature.size:
            said.append(f"there are only {self.curvature.size} eigenvalues, fewer than the {self.probe.top} asked for")
        if self.probe.minimum and not self.probe.bottom:
            said.append("the minimum was not sought: a convex loss's Gauss-Newton matrix has no negative eigenvalues")
        if last and self.probe.bottom and not self.values["negative_curvature"]:
            said.append("no negative curvature resolved")
        if last and state and state.checked:
            said.append(f"{state.checked} products looked for repeated eigenvalues that one Lanczos run cannot show")
        return tuple(said)


_KINKS = "differentiation ignores kinks (ReLU, max): these are numbers of the smooth piece that the weights lie in"
_SUBSET = "the largest eigenvalue of a subset is biased upwards"


def _padded(array: Floats, length: int) -> Floats:
    return np.append(array, np.full(length - array.size, np.nan))


def _ranks(data: xr.Dataset) -> Panel:
    rank, value, met = data["rank"].values.astype(float), data.eigenvalue.values, data.converged.values
    kept, open_ = np.where(met, value, np.nan), np.where(met, np.nan, value)
    low, residual = float(data.eigenvalue_min), float(data.eigenvalue_min_residual)
    marks: list[Any] = [
        Rule(0.0),
        Points(rank, kept, np.where(met, data.residual.values, np.nan), "eigenvalue ± residual"),
        Points(rank, open_, np.where(met, np.nan, data.residual.values), "not converged", "unconverged"),
    ]
    if math.isfinite(low):
        sure = bool(data.eigenvalue_min_converged)
        words = f"minimum {low:.3g} ± {residual:.1g}" + ("" if sure else ", not converged")
        marks.append(Rule(low, "y", words, "second" if sure else "unconverged"))
    return Panel(tuple(marks), Axis("rank"), Axis("eigenvalue"), title="largest eigenvalues")


def _density(data: xr.Dataset) -> Panel:
    width, size = float(data.smoothing_width), float(data.parameters)
    x, y = data["value"].values, data.density.values
    if not math.isfinite(width):
        return Panel((Line(x, y),), Axis("eigenvalue"), Axis("density"), title="spectral density")
    height = 1 / (size * width * math.sqrt(2 * math.pi))
    floor = 0.03 * height
    atoms = data.eigenvalue.values[data.converged.values]
    if bool(data.eigenvalue_min_converged):
        atoms = np.append(atoms, float(data.eigenvalue_min))
    marks = (
        Line(x, np.where(y >= floor, y, np.nan), "all eigenvalues"),
        Stems(atoms, np.full(atoms.size, height), "single eigenvalues", "second", base=floor),
    )
    limits = (floor, 3 * max(float(np.max(y)), height))
    return Panel(
        marks,
        Axis("eigenvalue", "symlog", threshold=width),
        Axis("density", "log", limits=limits),
        title=f"spectral density, smoothed by {width:.2g}",
    )
