"""The spectrum of a loss's curvature: its extreme eigenvalues, its trace and the density of all the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import xarray as xr

from workbench.figure import Figure
from workbench.numerics.ritz import Judged
from workbench.numerics.sampling import Draw
from workbench.operators.preconditioned import preconditioner
from workbench.operators.table import WORDS, OperatorName, curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Range
from workbench.spectra import panels
from workbench.spectra.halves import ROWS, Halves
from workbench.spectra.measured import HALF_PRODUCTS, Measured
from workbench.spectra.opening import restricted
from workbench.spectra.price import keeps_graphs, peak_bytes, product_seconds
from workbench.spectra.run import DEPTH, Aim, Storage
from workbench.subject import Subject


@dataclass(frozen=True)
class HessianSpectrum(Probe[Subject]):
    """Extreme eigenvalues, trace and spectral density of a loss's Hessian (or another curvature matrix) at a point.

    What it measures, for H = ∇²L (P x P, L the mean loss), or the matrix that ``operator`` names: ``eigenvalue``, the
    algebraically largest λ_1 >= λ_2 >= ..., each with its ``residual`` ‖H v - λ v‖; ``eigenvalue_min``, the most
    negative; ``trace`` = Σ λ; and the density of all eigenvalues as quadrature ``node`` and ``weight``, drawn as
    ``density`` after smoothing by ``smoothing_width``. From the quadrature follow ``frobenius`` = √Σ λ², the
    ``effective_dimension`` Σ λ / (λ + z) over positive λ with z = λ_1 / 1000, and with the trace the ``participation``
    dimension (Σ λ)² / Σ λ². One Lanczos run with full reorthogonalisation gives eigenvalues, density and the directions
    in which the trace is exact; Hutchinson's estimator does the rest of the trace (Ghorbani, Krishnan, Xiao 2019; Meyer
    et al. 2021). ``layers`` looks at the diagonal block of some parameters; ``preconditioned`` at η P^(-1/2) H P^(-1/2)
    with the optimizer's preconditioner P and learning rate η (Cohen et al. 2022).

    Spikes and bulk: ``outliers_gap`` is the k <= 2 C (C ``classes``) with the largest ``gap_ratio`` λ_k / λ_{k+1};
    ``outliers_edge`` counts converged eigenvalues above ``bulk_edge``, the end of a semicircle or Marchenko-Pastur law
    fitted to the density below its 99 % quantile; ``outliers_tail`` is the density's own mass beyond it, as a check.

    How to read it: λ_1 is the sharpness; gradient descent with step η is stable while λ_1 < 2/η, and where the subject
    has an optimizer ``stability_threshold`` is its own limit. A few outliers above a bulk near zero are usual; softmax
    cross-entropy suggests C - 1 of them, which is a line to compare with and not a result. A large ``bulk_misfit``
    says that neither law describes this bulk. A negative minimum is a direction of descent that the gradient does not
    show; when it does not exceed its residual, no negative curvature was resolved.

    On a subset of the examples λ_1 is biased upwards. Then [``sharpness_low``, ``sharpness_high``] brackets that of all
    data: below, the quotient of one half's top eigenvector in the other half's matrix (both ways, averaged); above,
    λ_1 of the subset; both moved outwards by ``halves_spread``. It holds in the mean over subsets and is no confidence
    interval: in benchmarks/brackets.py it held the truth for 80 to 94 % of subsets.

    What it costs: 35 to 45 products (each 2 to 5 gradients) for ten eigenvalues, the minimum and the density, some 80
    for the trace, some 20 on half the examples for the bracket; 4 to 16 for the first eigenvalue alone (``minimum``,
    ``trace``, ``density`` and ``bracket`` off), the more the closer the second. Memory: about 40 vectors of P entries,
    fewer with ``storage``, and the gradient's graph.

    When it misleads: compare only readings on equally many examples. Differentiation ignores kinks: the numbers are
    those of the smooth piece that the weights lie in. Sharpness changes under rescalings that leave the network's
    function as it is. BatchNorm's policy changes the function itself. A top eigenvalue of a layer is not the layer's
    share of the whole one. The counts of outliers depend on ``top``, on class balance and on label noise.

    Errors: some eigenvalue lies within ``residual`` of each one shown, and the first is never above λ_1 (but for the
    rounding of products, about 1e-6 λ_1 in float32, 1e-3 λ_1 with a basis in bfloat16). That is a bound, and for an
    eigenvalue far from the others a large one; ``estimated_error`` is residual²/gap where that is less (Kato and
    Temple), with the gap to the next value found. It is no bound: where an eigenvalue a few percent larger has not been
    met yet, it says too little. With ``judged`` "estimate" it is what the tolerance asks of each pair:
    ``tolerance=1e-3`` then finds a lone first eigenvalue to about 1e-3 of itself.
    ``trace_error`` is the half-width of a 95 % interval (0: the exact sum), ``density_error`` a Wasserstein-1 distance
    in units of eigenvalues: to the density of half as many products, with the sampling error of random starts as its
    law gives it. How starts do differ is in ``density_spread``, which takes two or more of them; it knows nothing of
    depth, which is the larger part. Sums over the density have errors of depth and sampling.
    The trace converges when its error is within ``tolerance`` of the trace, or of Σ|λ| / 2 where positive and negative
    eigenvalues cancel (the notes then say so).
    """

    operator: Annotated[OperatorName, Choice(WORDS), Doc("Which curvature matrix.")] = "hessian"
    layers: Annotated[str, Doc("Parameters, modules or globs, with commas between; empty for all.")] = ""
    preconditioned: Annotated[
        bool, Doc("Whether to look through the optimizer's preconditioner and learning rate.")
    ] = False
    top: Annotated[int, Range(1, 500, step=1, soft=(1, 30)), Doc("How many of the largest eigenvalues.")] = 10
    tolerance: Annotated[
        float,
        Range(1e-6, 0.5, log=True, soft=(1e-4, 0.2)),
        Doc("What counts as converged: a pair's residual over its eigenvalue, the trace's error over the trace."),
    ] = 0.02
    judged: Annotated[
        Judged,
        Choice(
            {
                "residual": "its residual, which bounds its distance to an eigenvalue",
                "estimate": "its estimated error, residual²/gap: closer to the truth, but no bound",
            }
        ),
        Doc("What of an eigenvalue is to be within the tolerance."),
    ] = "residual"
    minimum: Annotated[bool, Doc("Whether to find the most negative eigenvalue.")] = True
    trace: Annotated[bool, Doc("Whether to estimate the trace.")] = True
    density: Annotated[bool, Doc("Whether to estimate the density of all eigenvalues.")] = True
    depth: Annotated[
        int, Range(8, 500, step=1, soft=(20, 100)), Doc("Lanczos steps of the density at least; each keeps a vector.")
    ] = DEPTH
    starts: Annotated[
        int, Range(1, 32, step=1, soft=(1, 5)), Doc("Random starts of the density; 3 of depth 100 for a paper.")
    ] = 1
    bracket: Annotated[bool, Doc("On a subset: whether to bracket the sharpness of all data by two halves.")] = True
    storage: Annotated[
        Storage,
        Choice(
            {
                "operator": "beside the model, in its precision",
                "bfloat16": "in half precision: half the memory, a relative accuracy of 1e-3",
                "host": "in the host's memory: for large models on a small device",
            }
        ),
        Doc("Where the basis of the Lanczos run lies."),
    ] = "operator"
    view: Annotated[
        Literal["density", "cumulative", "both"],
        Choice(
            {
                "density": "the density, smoothed",
                "cumulative": "the share of eigenvalues below each value, not smoothed",
                "both": "both, side by side",
            }
        ),
        Display(),
        Doc("What is drawn beside the largest eigenvalues."),
    ] = "density"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("eigenvalue", ("rank",), "eigenvalue", error="residual"),
        Variable("residual", ("rank",), "residual ‖Hv - λv‖"),
        Variable("estimated_error", ("rank",), "estimated error, residual²/gap where that is less: no bound"),
        Variable("converged", ("rank",), "what is judged within the tolerance", kind="bool"),
        Variable("eigenvalue_min", (), "most negative eigenvalue", error="eigenvalue_min_residual"),
        Variable("eigenvalue_min_residual", (), "residual of the most negative eigenvalue"),
        Variable("eigenvalue_min_converged", (), "the same of the minimum", kind="bool"),
        Variable("negative_curvature", (), "whether the minimum is negative beyond its residual", kind="bool"),
        Variable("sharpness_low", (), "lower end of the bracket of all data's sharpness", error="halves_spread"),
        Variable("sharpness_high", (), "upper end of the bracket of all data's sharpness", error="halves_spread"),
        Variable("halves_spread", (), "half the difference between halves, by which the bracket is widened"),
        Variable("half_examples", (), "examples in a half; unknown where no bracket is made"),
        Variable("half_products", (), "products with the matrices of halves"),
        Variable("stability_threshold", (), "eigenvalue at which the optimizer becomes unstable on a quadratic"),
        Variable("stability_ratio", (), "sharpness over that threshold", error="stability_ratio_error"),
        Variable("stability_ratio_error", (), "residual over that threshold"),
        Variable("trace", (), "trace", error="trace_error"),
        Variable("trace_error", (), "half-width of the trace's 95 % interval"),
        Variable("node", ("node_index",), "quadrature node", error="density_error"),
        Variable("weight", ("node_index",), "share of the eigenvalues at the node", error="density_error"),
        Variable("density", ("value",), "density of the eigenvalues, smoothed", error="density_error"),
        Variable("density_error", (), "error of the density, a Wasserstein-1 distance"),
        Variable("density_spread", ("value",), "standard error of the density over random starts"),
        Variable("smoothing_width", (), "standard deviation of the smoothing"),
        Variable("frobenius", (), "Frobenius norm", error="frobenius_error"),
        Variable("frobenius_error", (), "error of the Frobenius norm"),
        Variable("effective_dimension", (), "Σ λ/(λ + λ_1/1000), positive λ", error="effective_dimension_error"),
        Variable("effective_dimension_error", (), "error of the effective dimension"),
        Variable("participation", (), "participation dimension (Σ λ)²/Σ λ²", error="participation_error"),
        Variable("participation_error", (), "error of the participation dimension"),
        Variable("classes", (), "number of classes"),
        Variable("outliers_gap", (), "eigenvalues above the largest gap"),
        Variable("gap_ratio", (), "ratio across that gap"),
        Variable("outliers_edge", (), "converged eigenvalues above the bulk's edge", error="outliers_edge_error"),
        Variable("outliers_edge_error", (), "converged eigenvalues that the edge's error leaves undecided"),
        Variable("bulk_edge", (), "upper edge of the bulk", error="bulk_edge_error"),
        Variable("bulk_edge_error", (), "error of the edge, the law taken as given"),
        Variable("bulk_misfit", (), "distance between bulk and law, over the bulk's standard deviation"),
        Variable("outliers_tail", (), "eigenvalues above the edge by the density", error="outliers_tail_error"),
        Variable("outliers_tail_error", (), "error of that mass"),
        Variable("parameters", (), "number of parameters, and of eigenvalues"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("gradient_norm", (), "length of the gradient"),
        Variable("products", (), "products with the matrix"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """One Lanczos run for eigenvalues and density, then halves of a subset, then the trace outside its basis."""
        subject = restricted(subject, self.layers)
        scaling = preconditioner(subject) if self.preconditioned else None
        found = Measured(self.aim, subject, replace(draw, size=subject.size), self.operator, scaling, self.bracket)
        reading = None
        for changed in found.steps():
            if changed or reading is None:
                reading = self.at(found)
            yield reading
        yield self.at(found, last=True)

    def at(self, found: Measured, last: bool = False) -> Reading:
        """The reading of now."""
        done, notes = found.progress(last), found.notes(last)
        if self.minimum and not self.bottom:
            notes += (f"the minimum was not sought: {_NO_MINIMUM}",)
        return self.reading(done, found.values, coords=found.coords, converged=last and found.converged, notes=notes)

    @property
    def bottom(self) -> int:
        """How many of the smallest eigenvalues are sought: only Hessians have negative ones."""
        return int(self.minimum and self.operator == "hessian")

    @property
    def aim(self) -> Aim:
        """What the run is to find."""
        return Aim(
            self.top,
            self.bottom,
            self.tolerance,
            self.trace,
            self.density,
            self.storage,
            self.depth,
            self.starts,
            self.judged,
        )

    def context(self, subject: Subject) -> str:
        """A preconditioned spectrum depends on the optimizer's state."""
        return preconditioner(restricted(subject, self.layers)).fingerprint() if self.preconditioned else ""

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Sharpness with its bracket and threshold, minimum, trace, outliers and loss with their errors, and cost."""
        first = data.isel(rank=0)
        found: dict[str, Value] = {"sharpness": float(first.eigenvalue), "sharpness_error": float(first.residual)}
        if math.isfinite(data.half_examples):
            found |= _numbers(data, "sharpness_low", "sharpness_high")
        if math.isfinite(data.stability_threshold):
            found |= _numbers(data, "stability_ratio", "stability_ratio_error")
        if self.bottom:
            found |= {
                "eigenvalue_min": float(data.eigenvalue_min),
                "eigenvalue_min_error": float(data.eigenvalue_min_residual),
                "negative_curvature": "resolved" if bool(data.negative_curvature) else "no negative curvature resolved",
            }
        if self.trace:
            found |= _numbers(data, "trace", "trace_error")
        if self.density:
            found |= _numbers(data, "density_error", "bulk_edge", "bulk_edge_error")
        return found | _numbers(data, "train_loss", "train_loss_error") | {"products": int(data.products)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Eigenvalues by rank with their residuals, and the density of all on a logarithmic scale."""
        drawn = [panels.ranks(data)]
        if self.density and self.view != "cumulative":
            drawn.append(panels.density(data))
        if self.density and self.view != "density":
            drawn.append(panels.cumulative(data))
        return Figure(tuple(drawn))

    def estimate(self, subject: Subject) -> Cost:
        """Basis, vectors, kept graphs, a product on top of them and the self-test, as they lie in memory together."""
        whole, subject = subject, restricted(subject, self.layers)
        size, aim, itemsize = subject.size, self.aim, subject.dtype.itemsize
        rows, halves = min(aim.rows(size, itemsize) + 1, size), self.bracket and Halves.wanted(subject)
        found = curvature(subject, self.operator)
        _, working = found.expected_bytes()
        most = peak_bytes(found, aim, 6 + (ROWS + 6 if halves else 0) + self.preconditioned)
        words = f"{rows} basis vectors of {size} parameters, and the gradient's graph of {subject.examples} examples"
        products = aim.products(size) + (HALF_PRODUCTS // 2 if halves else 0)
        seconds = products * product_seconds(whole, self.operator, self.layers, keeps_graphs(subject, working))
        return Cost(most, products, words, seconds)


_NO_MINIMUM = "a convex loss's Gauss-Newton matrix, Fishers and covariances have no negative eigenvalues"


def _numbers(data: xr.Dataset, *names: str) -> dict[str, Value]:
    return {name: float(data[name]) for name in names}
