"""Gradient noise against curvature: whether stochastic gradients scatter along the directions that are curved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.figure import AnyMark, Axis, Bars, Figure, Line, Panel, Points, Rule
from workbench.numerics.alignment import SUMS, forms, jackknife, joined, ratios, variance_spread
from workbench.numerics.basis import dot, norm
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.overlap import cosines, span_sines
from workbench.numerics.sampling import Draw
from workbench.numerics.trace import FIRST_PROBE
from workbench.operators.curvature import Curvature
from workbench.operators.noise import GradientNoise, stores_rows
from workbench.operators.table import curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.selftest import test_bytes
from workbench.spectra.run import Aim, SpectralRun
from workbench.subject import Subject

Floats = NDArray[np.float64]

RESAMPLES = 200
"""Bootstrap resamples of the examples."""
FEWEST_SAMPLES = 8
"""Random vectors below which no interval may end a run."""
RESAMPLING = 2_000_000
"""Number of the random vector whose generator resamples examples: far from those of other purposes."""
ROUNDING = 100
"""Spread of equal gradients over their length, in units of the precision: less is no noise."""
_RATIOS = ("alignment", "relative_alignment")


@dataclass(frozen=True)
class NoiseAlignment(Probe[Subject]):
    """Alignment of gradient noise with curvature: C, the covariance of examples' gradients, against the Hessian H.

    What it measures, with g_i = ∇ℓ_i, ḡ = ∇L, C = 1/(n-1) Σ (g_i - ḡ)(g_i - ḡ)ᵀ and H = ∇²L, both P x P:
    ``alignment`` = tr(HC) / (‖H‖_F ‖C‖_F), the cosine between the two matrices, 1 when C ∝ H;
    ``relative_alignment`` = P tr(HC) / (tr H tr C), 1 when noise is spread over directions as if by chance and up to
    P when it lies in the sharpest ones; ``noise_variance`` uᵀCu along the top k eigenvectors u of H beside their
    ``eigenvalue``, ``noise_share`` = Σ uᵀCu / tr C; ``subspace_overlap`` = ‖V_kᵀU_k‖_F² / k between the top k
    eigenvectors of H and of C; ``gradient_overlap`` = ‖V_kᵀḡ‖²/‖ḡ‖²; ``gradient_curvature`` = ḡᵀHḡ/‖ḡ‖² and
    ``gradient_noise`` = ḡᵀCḡ/‖ḡ‖². Each share has ``chance`` = k/P beside it.

    How to read it: the noise of a mini-batch of B examples has covariance C/B, so tr(HC)/(2B) times the squared step is
    what noise adds to the loss in one step. For a model that predicts its labels' distribution C comes near to the
    Fisher matrix and H, and the alignment near to 1; shares far above chance say that stochastic gradients explore
    the sharp directions and little else. In the first panel C ∝ H is a line of slope one.

    What it costs: two Lanczos runs (some 30 to 50 products with H, as many with C), 2k products with each on the
    directions found, and up to ``samples`` of each for the rest. A product with C is 5 gradients; where all examples'
    gradients fit into 256 MB they are stored instead. At most 4k + 2 ``samples`` parameters: all is exact. Memory: the
    Hessian's graphs, a Krylov basis, and 2k + 2 vectors.

    When it misleads: on a subset C's rank is below its number of examples, which raises shares and overlaps of small
    subsets. Near interpolation C is nearly zero, and says which examples are not fitted yet. ``noise_variance`` is that
    of one point and one batch policy; dropout and augmentation add noise that is not in C. Kinks carry no curvature
    here. A negative tr H makes ``relative_alignment`` meaningless.

    Errors: ratios and traces are exact on the directions found, and 95 % intervals from random vectors (Rademacher)
    outside of them; the ratios' by the jackknife. ``noise_variance_error`` is a standard error over examples, by the
    bootstrap. Shares and overlaps are off by at most their errors, which follow from residuals and gaps (Davis and
    Kahan 1970); nan where no gap after the kth eigenvalue is resolved. Converged: every pair, and both ratios within
    ``tolerance`` of themselves.

    Source: Zhu, Wu, Yu, Wu, Ma 2019 (tr(HC), anisotropic noise); Thomas et al. 2020 (C against H); Gur-Ari, Roberts,
    Dyer 2018 (gradient in the top subspace); Wu, Wang, Su 2022 (the alignment cosine and P tr(HC)/(tr H tr C)).
    """

    top: Annotated[int, Range(1, 200, step=1, soft=(1, 30)), Doc("How many leading directions k.")] = 10
    samples: Annotated[
        int, Range(30, 10_000, log=True, soft=(30, 1000)), Doc("At most so many random vectors for traces.")
    ] = 100
    tolerance: Annotated[
        float,
        Range(1e-4, 0.5, log=True, soft=(1e-3, 0.2)),
        Doc("What counts as converged: residual over eigenvalue, and the ratios' errors over the ratios."),
    ] = 0.05

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("alignment", (), "cosine tr(HC)/(‖H‖ ‖C‖)", error="alignment_error"),
        Variable("alignment_error", (), "half-width of its 95 % interval"),
        Variable("relative_alignment", (), "P tr(HC)/(tr H tr C); 1 by chance", error="relative_alignment_error"),
        Variable("relative_alignment_error", (), "half-width of its 95 % interval"),
        Variable("hessian_trace", (), "tr H", error="hessian_trace_error"),
        Variable("hessian_trace_error", (), "half-width of its 95 % interval"),
        Variable("noise_trace", (), "tr C", error="noise_trace_error"),
        Variable("noise_trace_error", (), "half-width of its 95 % interval"),
        Variable("product_trace", (), "tr(HC)", error="product_trace_error"),
        Variable("product_trace_error", (), "half-width of its 95 % interval"),
        Variable("hessian_norm", (), "Frobenius norm of H", error="hessian_norm_error"),
        Variable("hessian_norm_error", (), "half-width of its 95 % interval"),
        Variable("noise_norm", (), "Frobenius norm of C", error="noise_norm_error"),
        Variable("noise_norm_error", (), "half-width of its 95 % interval"),
        Variable("eigenvalue", ("rank",), "eigenvalue of H", error="residual"),
        Variable("residual", ("rank",), "its residual ‖Hu - λu‖"),
        Variable("noise_variance", ("rank",), "uᵀCu along H's eigenvector", error="noise_variance_error"),
        Variable("noise_variance_error", ("rank",), "its standard error over examples"),
        Variable("noise_eigenvalue", ("rank",), "eigenvalue of C", error="noise_residual"),
        Variable("noise_residual", ("rank",), "its residual"),
        Variable("noise_share", (), "share of tr C in H's top k directions", error="noise_share_error"),
        Variable("noise_share_error", (), "how far it may be off"),
        Variable("subspace_overlap", (), "overlap of the top k directions of H and C", error="subspace_overlap_error"),
        Variable("subspace_overlap_error", (), "how far it may be off"),
        Variable("gradient_overlap", (), "share of ‖ḡ‖² in H's top k directions", error="gradient_overlap_error"),
        Variable("gradient_overlap_error", (), "how far it may be off"),
        Variable("chance", (), "k/P, what random directions would share"),
        Variable("gradient_curvature", (), "curvature along the gradient, ḡᵀHḡ/‖ḡ‖²"),
        Variable("gradient_noise", (), "noise along the gradient, ḡᵀCḡ/‖ḡ‖²", error="gradient_noise_error"),
        Variable("gradient_noise_error", (), "its standard error over examples"),
        Variable("gradient_norm", (), "length of the gradient"),
        Variable("parameters", (), "number of parameters"),
        Variable("examples", (), "number of examples"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("products", (), "products with H"),
        Variable("noise_products", (), "products with C"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The leading directions of H, then of C, then forms on these, then random vectors outside of them."""
        with GradientNoise(subject) as noise, curvature(subject) as hessian:
            run = _Run(self, hessian, noise, draw)
            for _ in run.steps():
                yield run.report()
            yield run.report(last=True)

    @property
    def aim(self) -> Aim:
        """What each Lanczos run is to find: one pair more than is asked for, which ends the gap."""
        return Aim(self.top + 1, 0, self.tolerance, trace=False, density=False)

    def exact(self, size: int) -> bool:
        """Whether coordinates replace random vectors."""
        return size <= 4 * self.top + 2 * self.samples

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Both ratios, the shares in H's top directions with what chance gives, and the loss beside them."""
        sure = (*_RATIOS, "noise_share", "subspace_overlap", "gradient_overlap", "train_loss")
        names = [name + end for name in sure for end in ("", "_error")]
        return {name: float(data[name]) for name in (*names, "chance", "gradient_curvature")}

    def figure(self, data: xr.Dataset) -> Figure:
        """Noise against curvature, direction by direction, and shares against chance."""
        return Figure((_directions(data), _shares(data)))

    def estimate(self, subject: Subject) -> Cost:
        """The Hessian's graphs, one basis at a time, the directions found, and stored gradients."""
        size, itemsize, aim = subject.size, subject.dtype.itemsize, self.aim
        kept, working = curvature(subject).expected_bytes()
        directions = size if self.exact(size) else 2 * self.top
        vectors = (2 * self.top + 2 * directions + 8) * size * itemsize
        rows = subject.examples * size * itemsize if stores_rows(subject) else 0
        most = kept + max(aim.basis_bytes(size, itemsize) + 2 * working, test_bytes(subject)) + vectors + rows
        products = aim.steps(size) + directions + (0 if self.exact(size) else self.samples)
        words = f"up to {products} products each with the Hessian and the noise of {subject.examples} examples"
        return Cost(most, 2 * products, words)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: NoiseAlignment
    hessian: Curvature
    noise: GradientNoise
    draw: Draw
    done: float = 1e-6
    met: bool = False
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    sines: Floats = field(default_factory=lambda: np.full(2, math.nan))

    def __post_init__(self) -> None:
        self.subject, self.size = self.hessian.subject, self.hessian.size
        self.top = min(self.probe.top, self.size)
        self.spectrum = SpectralRun(self.probe.aim, self.hessian, self.hessian, self.draw)
        self.values |= {"parameters": self.size, "examples": self.subject.examples, "chance": self.top / self.size}

    def steps(self) -> Iterator[None]:
        """All that is done, with a pause after each product."""
        for _ in self.spectrum.eigenvalues():
            self.take_eigenvalues()
            yield
        assert self.spectrum.state is not None
        sharp = self.spectrum.state.vectors(range(self.top))
        self.take_gradient(sharp)
        yield from self.forms(sharp)
        noisy = yield from self.leading_noise()
        self.take_overlaps(sharp, noisy)
        yield from self.sums(self.directions(sharp, noisy))

    def advance(self, start: float, share: float, width: float) -> None:
        """Progress within a stage that began at ``start``."""
        self.done = max(self.done, min(start + width * min(share, 1.0), 0.999))

    # --- the Hessian's directions -----------------------------------------------------------------------------------

    def take_eigenvalues(self) -> None:
        """Eigenvalues so far; loss and gradient came with the first product."""
        found, top = self.spectrum.values, self.probe.top
        self.values |= {name: np.array(found[name])[:top] for name in ("eigenvalue", "residual")}
        for name in ("train_loss", "train_loss_error", "gradient_norm"):
            self.values[name] = found.get(name, math.nan)
        used = self.hessian.products
        self.advance(0.0, used / (used + max(self.spectrum.left, 0)), 0.3)

    def take_gradient(self, sharp: Tensor) -> None:
        """Where the gradient points, and how the loss bends there."""
        gradient = self.hessian.gradient.to(self.hessian.dtype)
        length = float(norm(gradient))
        self.along = gradient / length if length else None
        if self.along is not None:
            self.values["gradient_overlap"] = float((cosines(sharp, self.along[None]) ** 2).sum())
            self.values["gradient_curvature"] = float(dot(self.along, self.hessian.matvec(self.along)))

    def forms(self, sharp: Tensor) -> Iterator[None]:
        """Noise along each of these directions and along the gradient, with errors from resampled examples."""
        rows = [*sharp, *([] if self.along is None else [self.along])]
        found = np.full((2, self.probe.top + 1), math.nan)
        resampled = self.resampled()
        for i, row in enumerate(rows):
            at = self.probe.top if i == self.top else i
            along = self.noise.project(row).cpu().numpy()
            found[:, at] = along.var(ddof=1), variance_spread(along, resampled)
            self.values |= {"noise_variance": found[0, :-1].copy(), "noise_variance_error": found[1, :-1].copy()}
            self.advance(0.3, (i + 1) / len(rows), 0.1)
            yield
        self.values |= {"gradient_noise": found[0, -1], "gradient_noise_error": found[1, -1]}

    def resampled(self) -> Floats:
        """How often each example is drawn in each bootstrap resample, (RESAMPLES, n)."""
        n = self.noise.examples
        return self.draw.generator(RESAMPLING).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)

    # --- the noise's directions -------------------------------------------------------------------------------------

    def leading_noise(self) -> Iterator[None]:
        """Eigenvectors of C, returned as rows (k, size)."""
        aim, draw, state = self.probe.aim, replace(self.draw, key=f"{self.draw.key}/noise"), None
        rows = aim.rows(self.size, self.noise.dtype.itemsize)
        limit = 500 + 20 * aim.top
        how: dict[str, Any] = {
            "tolerance": aim.tolerance,
            "basis": rows,
            "limit": limit,
            "fresh": lambda i: draw(1 + i),
        }
        for state in lanczos(self.noise, draw(0), top=aim.top, bottom=0, **how):
            self.take_noise(state)
            self.advance(0.4, state.products / aim.steps(self.size), 0.15)
            yield
        assert state is not None
        self.met = bool(self.spectrum.converged and state.done)
        return state.vectors(range(self.top))

    def take_noise(self, state: Krylov) -> None:
        """Eigenvalues of C so far."""
        top = self.probe.top
        self.values |= {"noise_eigenvalue": state.top_values[:top], "noise_residual": state.top_residuals[:top]}
        self.sines[1] = self.sine(state.top_values, state.top_residuals)

    def sine(self, values: Floats, residuals: Floats) -> float:
        """How far the first k directions may be off; 0 where they are all there are."""
        if self.top == self.size:
            return 0.0
        return float(span_sines(np.array(values), np.array(residuals))[self.top - 1])

    def take_overlaps(self, sharp: Tensor, noisy: Tensor) -> None:
        """Shares between spans; P - P' of two projections is at most the sine between their spans."""
        found = self.spectrum.values
        self.sines[0] = self.sine(found["eigenvalue"], found["residual"])
        self.values |= {
            "subspace_overlap": float((cosines(sharp, noisy) ** 2).sum()) / self.top,
            "subspace_overlap_error": min(float(self.sines.sum()), 1.0) + 1e-6,
            "gradient_overlap_error": min(float(self.sines[0]), 1.0) + 1e-6,
        }

    # --- sums over all directions -----------------------------------------------------------------------------------

    def directions(self, sharp: Tensor, noisy: Tensor) -> Tensor:
        """Orthonormal rows on which sums are exact: those found, or every coordinate of a small model."""
        if self.probe.exact(self.size):
            return torch.eye(self.size, dtype=self.hessian.dtype, device=self.hessian.device)
        return joined(sharp, noisy)

    def sums(self, rows: Tensor) -> Iterator[None]:
        """Traces, norms and the trace of the product: inside the span of the rows, then outside by random vectors."""
        inside, samples = np.zeros(SUMS), np.empty((0, SUMS))
        for i, row in enumerate(rows):
            inside = inside + forms(self.hessian, self.noise, row)
            self.advance(0.55, (i + 1) / len(rows), 0.2)
            yield
        if len(rows) == self.size:
            self.conclude(inside, None)
            return
        while len(samples) < self.probe.samples and not (self.sure and len(samples) >= FEWEST_SAMPLES):
            probe = self.draw(FIRST_PROBE + len(samples), kind="rademacher")
            probe = probe - rows.T @ (rows @ probe)
            samples = np.vstack([samples, forms(self.hessian, self.noise, probe)])
            self.conclude(inside, samples)
            self.advance(0.75, len(samples) / self.probe.samples, 0.25)
            yield

    def conclude(self, inside: Floats, samples: Floats | None) -> None:
        """Everything that follows from the sums, with intervals by the jackknife (0 where nothing was sampled)."""
        exact, rounding = self.noise.trace, ROUNDING * torch.finfo(self.noise.dtype).eps
        nothing = (rounding * self.values["gradient_norm"]) ** 2

        def found(sums: Floats) -> dict[str, float]:
            known = np.array(sums if exact is None else [sums[0], exact, *sums[2:]])
            if known[1] <= nothing:
                known[[1, 3, 4]] = 0.0
            given = ratios(known, self.size)
            return {n.replace("first", "hessian").replace("second", "noise"): value for n, value in given.items()}

        value, error = jackknife(found, inside, samples)
        self.values |= value | {f"{name}_error": e for name, e in error.items()}
        self.take_share(value["noise_trace"], error["noise_trace"])

    def take_share(self, trace: float, error: float) -> None:
        """The share of the noise in the sharpest directions."""
        share = float(np.nansum(self.values["noise_variance"])) / trace if trace else math.nan
        slack = min(float(self.sines[0]), 1.0) + 1e-6
        self.values |= {"noise_share": share, "noise_share_error": slack + share * error / (trace or math.nan)}

    @property
    def sure(self) -> bool:
        """Whether both ratios' errors are within the tolerance."""
        found = [[self.values.get(name + end, math.nan) for end in ("", "_error")] for name in _RATIOS]
        return all(error <= self.probe.tolerance * abs(value) for value, error in found)

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        self.values |= {"products": self.hessian.products, "noise_products": self.noise.products}
        return self.probe.reading(
            1.0 if last else self.done,
            self.values,
            coords={"rank": np.arange(1, self.probe.top + 1)},
            converged=last and self.met and self.sure,
            notes=tuple(self.notes(last)),
        )

    def notes(self, last: bool) -> Iterator[str]:
        """What a reader must know about these numbers."""
        n, many = self.subject.examples, self.subject.available
        yield from (*self.subject.notes, *self.spectrum.notes())
        if self.noise.rows is not None:
            yield "examples' gradients are stored, so tr C is exact"
        if last and not self.values.get("noise_trace"):
            yield "all examples have the same gradient: there is no noise to align"
        if last and self.values.get("hessian_trace", 1.0) <= self.values.get("hessian_trace_error", 0.0):
            yield "tr H is not positive beyond its error: relative_alignment says nothing"
        for which, sine in zip(("H", "C"), self.sines if last else (), strict=False):
            if math.isnan(sine):
                yield f"no gap after eigenvalue {self.top} of {which} is resolved: its top {self.top} may be others"
        if n - 1 < 10 * self.top:
            yield f"C has rank {n - 1} at most: with so few examples its leading directions are those of single ones"
        yield f"on {n} of {many or 'unknown'} examples"


def _directions(data: xr.Dataset) -> Panel:
    value, variance, error = data.eigenvalue.values, data.noise_variance.values, data.noise_variance_error.values
    drawn = np.where(value > 0, value, np.nan)
    marks: list[AnyMark] = [Points(drawn, variance, error, "eigenvectors")]
    ends = np.array([np.nanmin(drawn), np.nanmax(drawn)]) if np.isfinite(drawn).any() else np.full(2, np.nan)
    ratio = float(data.noise_trace) / float(data.hessian_trace) if float(data.hessian_trace) > 0 else math.nan
    marks.append(Line(ends, ratio * ends, "C ∝ H", "reference"))
    bend = float(data.gradient_curvature)
    if bend > 0:
        at, off = float(data.gradient_noise), float(data.gradient_noise_error)
        marks.append(Points([bend], [at], [off], "gradient", "second"))
    return Panel(tuple(marks), Axis("curvature uᵀHu", "log"), Axis("noise variance uᵀCu", "log"), title="directions")


def _shares(data: xr.Dataset) -> Panel:
    names = ("alignment", "noise_share", "subspace_overlap", "gradient_overlap")
    value, error = ([float(data[n + end]) for n in names] for end in ("", "_error"))
    labels = ("cosine", "noise", "subspace", "gradient")
    marks = (Bars(np.arange(len(names)), value, error, names=labels), Rule(float(data.chance), label="chance"))
    return Panel(marks, Axis(""), Axis("share"), title="shares")
