"""The curvature of mini-batches beside that of all examples: how far sampling noise lifts the largest eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr

from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Rule
from workbench.numerics.basis import dot, norm
from workbench.numerics.batch_noise import Additive, Fit, Law, Multiplicative, fit, inverse_size, mean_and_error
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.sampling import Draw
from workbench.operators.curvature import Curvature
from workbench.operators.table import WORDS, OperatorName, curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import test_bytes
from workbench.spectra.run import NEAR_ZERO, Aim, SpectralRun, finite
from workbench.subject import Subject

MOST_PRODUCTS = 300
"""Products that one batch may take."""
POOR = 3.0
"""Standard errors by which a law may miss the means before the notes say so."""
EACH = 15
"""Products that one end of a batch's spectrum usually takes."""


@dataclass(frozen=True)
class BatchCurvature(Probe[Subject]):
    """Largest and smallest eigenvalue of the Hessian of random mini-batches, against that of all examples.

    What it measures, for batches of B of the subject's n examples, drawn without replacement, H_B the Hessian of the
    batch's mean loss and b = B/(1 - B/n): λ_1(H_B) as ``eigenvalue``, λ_P(H_B) as ``eigenvalue_min``, and
    g_Bᵀ H_B g_B / ‖g_B‖² as ``gradient_curvature``, for ``batches`` batches of each of ``sizes`` sizes, evenly spaced
    on a logarithmic scale from ``smallest`` to n. Two laws are fitted to λ_1(H_B) against 1/b. Additive: H_B = H + E,
    E with independent entries of variance ``noise``/b, so that λ_1(H_B) = λ_1 + ``slope``/b with slope = noise · P/λ_1,
    until λ_1 drowns in E's bulk of radius 2√(noise · P/b), ``bulk_radius``. Multiplicative: H_B like a sample
    covariance whose other P - 1 eigenvalues are all ``bulk``.

    How to read it: the distance of the points from the line of all examples is the bias of a sharpness that was
    measured on one batch. ``swallowed`` counts those of the ``top`` eigenvalues of all examples that the additive law
    says no batch of that size can show. What SGD feels is the curvature along its own batch's gradient: it, not λ_1,
    sits near 2/η at the edge of stability of SGD. The law with the smaller ``misfit`` (near 1 where a law holds)
    describes the noise better; Gauss-Newton matrices are nearer to the multiplicative one.

    What it costs: the full spectrum's 15 to 60 products, and for each batch about 30 products (15 without ``minimum``)
    on its B examples: 30 · batches · Σ B/n in units of full products. One batch of every size comes first, then the
    second, and so on.

    When it misleads: n examples are not the population: where the subject holds a subset, "full" is itself a batch.
    The noise of a network is concentrated in few directions, so P in the laws stands for more than it is, and
    ``noise`` is a number for this network only. With BatchNorm's own batch statistics each batch is another function.
    Largest eigenvalues of batches exceed that of all examples on average by convexity, whatever the noise.

    Errors: each eigenvalue lies within its residual; means have standard errors over batches, and so have the fitted
    numbers, by least squares weighted with the laws' own variances, with the observed spread. Batches of a size share
    examples when B is a good part of n; they are independent draws all the same.

    Source: Granziol, Zohren and Roberts 2022 (arXiv 2006.09092); Baik and Silverstein 2006.
    """

    operator: Annotated[OperatorName, Choice(WORDS), Doc("Which curvature matrix.")] = "hessian"
    sizes: Annotated[int, Range(1, 20, step=1, soft=(2, 10)), Doc("How many batch sizes, below all examples.")] = 5
    batches: Annotated[int, Range(2, 1000, step=1, soft=(5, 50)), Doc("Random batches of each size.")] = 10
    smallest: Annotated[int, Range(1, 10**6, log=True, soft=(1, 256)), Doc("The smallest batch size.")] = 8
    top: Annotated[int, Range(1, 100, step=1, soft=(1, 20)), Doc("Eigenvalues of all examples to compare with.")] = 3
    tolerance: Annotated[
        float,
        Range(1e-6, 0.5, log=True, soft=(1e-4, 0.2)),
        Doc("What counts as converged: a pair's residual over its eigenvalue."),
    ] = 0.02
    minimum: Annotated[bool, Doc("Whether to find the most negative eigenvalues too.")] = True

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("eigenvalue", ("batch_size", "batch"), "largest eigenvalue of the batch", error="residual"),
        Variable("residual", ("batch_size", "batch"), "its residual"),
        Variable("converged", ("batch_size", "batch"), "whether residuals are within the tolerance", kind="bool"),
        Variable("eigenvalue_min", ("batch_size", "batch"), "smallest eigenvalue of the batch", error="residual_min"),
        Variable("residual_min", ("batch_size", "batch"), "its residual"),
        Variable("gradient_curvature", ("batch_size", "batch"), "curvature along the batch's own gradient"),
        Variable("mean", ("batch_size",), "mean largest eigenvalue", error="mean_error"),
        Variable("mean_error", ("batch_size",), "its standard error over batches"),
        Variable("mean_min", ("batch_size",), "mean smallest eigenvalue", error="mean_min_error"),
        Variable("mean_min_error", ("batch_size",), "its standard error over batches"),
        Variable("mean_gradient_curvature", ("batch_size",), "mean curvature along the batch's gradient",
                 error="mean_gradient_curvature_error"),
        Variable("mean_gradient_curvature_error", ("batch_size",), "its standard error over batches"),
        Variable("inverse_size", ("batch_size",), "1/b = 1/B - 1/n"),
        Variable("full_eigenvalue", ("rank",), "eigenvalue of all examples", error="full_residual"),
        Variable("full_residual", ("rank",), "its residual"),
        Variable("full_converged", ("rank",), "residual within the tolerance", kind="bool"),
        Variable("full_eigenvalue_min", (), "smallest eigenvalue of all examples", error="full_residual_min"),
        Variable("full_residual_min", (), "its residual"),
        Variable("slope", (), "additive law: rise of the largest eigenvalue with 1/b", error="slope_error"),
        Variable("slope_error", (), "its standard error over batches"),
        Variable("noise", (), "additive law: variance of one entry for one example", error="noise_error"),
        Variable("noise_error", (), "its standard error over batches"),
        Variable("noise_misfit", (), "additive law: distance from the means, in standard errors"),
        Variable("bulk_radius", ("batch_size",), "additive law: radius of the noise's bulk", error="bulk_radius_error"),
        Variable("bulk_radius_error", ("batch_size",), "its standard error over batches"),
        Variable("swallowed", ("batch_size",), "eigenvalues of all examples that drown in the bulk",
                 error="swallowed_error"),
        Variable("swallowed_error", ("batch_size",), "how many of them lie within two errors of where they drown"),
        Variable("bulk", (), "multiplicative law: the other eigenvalues", error="bulk_error"),
        Variable("bulk_error", (), "its standard error over batches"),
        Variable("bulk_misfit", (), "multiplicative law: distance from the means, in standard errors"),
        Variable("parameters", (), "number of parameters, P"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("products", (), "products with the matrix of all examples"),
        Variable("batch_products", (), "products with matrices of batches"),
    )  # fmt: skip

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """All examples first; then one batch of every size, a second one of every size, and so on."""
        if subject.examples < 2:
            raise ValueError("BatchCurvature compares batches with all examples, so it needs two at least; got 1.")
        run = _Run(self, subject, draw)
        for step in (run.whole(), run.batches()):
            for changed in step:
                yield run.report(changed)
        yield run.report(changed=True, last=True)

    @property
    def bottom(self) -> int:
        """How many of the smallest eigenvalues are sought: only Hessians have negative ones."""
        return int(self.minimum and self.operator == "hessian")

    def chosen(self, examples: int) -> list[int]:
        """The batch sizes: distinct, ascending, below the number of examples."""
        low = min(self.smallest, max(examples // 4, 1))
        found = np.geomspace(low, examples, self.sizes + 1)[:-1].round().astype(int)
        return sorted({int(size) for size in found if size < examples})

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Sharpness of all examples and of the smallest batches, the fitted law, and the loss."""
        first = data.isel(rank=0, batch_size=0)
        names = ("slope", "slope_error", "noise", "noise_error", "train_loss", "train_loss_error")
        smallest: dict[str, Value] = {
            "sharpness": float(first.full_eigenvalue),
            "sharpness_error": float(first.full_residual),
            "smallest_batch": int(data["batch_size"].values[0]),
            "batch_sharpness": float(first["mean"]),
            "batch_sharpness_error": float(first.mean_error),
        }
        return smallest | {name: float(data[name]) for name in names}

    def figure(self, data: xr.Dataset) -> Figure:
        """Largest eigenvalues against 1/b with both laws; smallest ones and curvature along gradients beside them."""
        return Figure((_largest(data), _others(data)))

    def estimate(self, subject: Subject) -> Cost:
        """The full data's graph and basis; batches need less."""
        aim, size, itemsize = self.aim, subject.size, subject.dtype.itemsize
        kept, working = curvature(subject, self.operator).expected_bytes()
        most = kept + max(aim.basis_bytes(size, itemsize) + 8 * size * itemsize + working, test_bytes(subject))
        each, share = EACH * (1 + self.bottom), self.batches * sum(self.chosen(subject.examples)) / subject.examples
        words = f"as {each * share:.0f} products with all {subject.examples} examples, by their work, for the batches"
        return Cost(most, aim.products(size) + round(each * share), words)

    @property
    def aim(self) -> Aim:
        """What the run on all examples is to find."""
        return Aim(self.top, self.bottom, self.tolerance, trace=False, density=False)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: BatchCurvature
    subject: Subject
    draw: Draw
    done: float = 0.0
    met: bool = True
    said: tuple[str, ...] = ()
    last: Reading | None = None
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.sizes = self.probe.chosen(self.subject.examples)
        shape = (len(self.sizes), self.probe.batches)
        arrays = ("eigenvalue", "residual", "eigenvalue_min", "residual_min", "gradient_curvature")
        self.values |= {name: np.full(shape, np.nan) for name in arrays} | {"converged": np.zeros(shape, dtype=bool)}
        self.inverse = inverse_size(self.sizes, self.subject.examples)
        self.values |= {"inverse_size": self.inverse, "batch_products": 0}
        self.coords = {
            "batch_size": np.array(self.sizes),
            "batch": np.arange(self.probe.batches),
            "rank": np.arange(1, self.probe.top + 1),
        }
        self.work = 1 + self.probe.batches * sum(self.sizes) / self.subject.examples

    # --- measuring --------------------------------------------------------------------------------------------------

    def whole(self) -> Iterator[bool]:
        """The spectrum's ends on all examples."""
        probe = self.probe
        with curvature(self.subject, probe.operator) as matrix:
            run = SpectralRun(probe.aim, matrix, matrix, self.draw)
            for _ in run.eigenvalues():
                self.take(run)
                used = run.curvature.products
                self.done = used / (used + run.left) / self.work
                yield True
            self.take(run)
            self.met = run.converged
            self.done = 1 / self.work

    def take(self, run: SpectralRun) -> None:
        """The full data's values under this probe's names."""
        names = {
            "full_eigenvalue": "eigenvalue",
            "full_residual": "residual",
            "full_converged": "converged",
            "full_eigenvalue_min": "eigenvalue_min",
            "full_residual_min": "eigenvalue_min_residual",
        } | {name: name for name in ("parameters", "train_loss", "train_loss_error", "products")}
        self.values |= {ours: run.values[theirs] for ours, theirs in names.items() if theirs in run.values}
        self.said = run.notes()

    def batches(self) -> Iterator[bool]:
        """One batch after another; says whether there is something new."""
        for number in range(self.probe.batches):
            for place, size in enumerate(self.sizes):
                matrix = curvature(self.subject.selected(self.members(place, number)), self.probe.operator)
                with matrix:
                    for state in self.extremes(matrix, number * len(self.sizes) + place):
                        self.put((place, number), state)
                        yield False
                    self.values["gradient_curvature"][place, number] = _along_gradient(matrix)
                self.met = self.met and bool(self.values["converged"][place, number])
                self.values["batch_products"] += matrix.products
                self.done += size / self.subject.examples / self.work
                self.values |= self.laws()
                yield True

    def members(self, place: int, number: int) -> list[int]:
        """Which examples batch ``number`` of a size holds: drawn without replacement, independently of all others."""
        rng = replace(self.draw, key=f"{self.draw.key}/members").generator(number, place)
        return rng.choice(self.subject.examples, self.sizes[place], replace=False).tolist()

    def extremes(self, matrix: Curvature, number: int) -> Iterator[Krylov]:
        """The Lanczos run of one batch, from a random vector of its own."""
        probe, draw = self.probe, replace(self.draw, key=f"{self.draw.key}/batch {number}")
        states = lanczos(
            matrix,
            draw(0),
            top=1,
            bottom=probe.bottom,
            tolerance=probe.tolerance,
            near_zero=NEAR_ZERO,
            basis=Aim(1, probe.bottom).rows(matrix.size, matrix.dtype.itemsize),
            limit=MOST_PRODUCTS,
            fresh=lambda i: draw(1 + i),
        )
        return finite(states, matrix)

    def put(self, at: tuple[int, int], state: Krylov) -> None:
        """A batch's pairs as far as they are known."""
        values = self.values
        values["eigenvalue"][at], values["residual"][at] = state.top_values[0], state.top_residuals[0]
        values["converged"][at] = state.done
        if self.probe.bottom:
            values["eigenvalue_min"][at] = state.bottom_values[0]
            values["residual_min"][at] = state.bottom_residuals[0]

    # --- what it says -----------------------------------------------------------------------------------------------

    def laws(self) -> dict[str, Any]:
        """Means over the batches so far, and both laws fitted to them."""
        found: dict[str, Any] = {}
        for ours, theirs in _MEANS.items():
            found[ours], found[f"{ours}_error"] = mean_and_error(self.values[theirs])
        largest, size = float(self.values["full_eigenvalue"][0]), self.subject.size
        if not largest > 0:
            return found
        additive = fit(Additive(largest, size), self.values["eigenvalue"], self.inverse)
        other = fit(Multiplicative(largest, size), self.values["eigenvalue"], self.inverse)
        found |= {"bulk": other.scale, "bulk_error": other.error, "bulk_misfit": other.misfit}
        found |= {"noise": additive.scale, "noise_error": additive.error, "noise_misfit": additive.misfit}
        found |= {"slope": additive.scale * size / largest, "slope_error": additive.error * size / largest}
        return found | (self.bulk(additive) if additive.scale > 0 else {})

    def bulk(self, additive: Fit) -> dict[str, Any]:
        """The additive law's bulk, and what drowns in it."""
        radius = 2 * np.sqrt(additive.scale * self.subject.size * self.inverse)
        error = radius * additive.error / (2 * additive.scale)
        full = np.asarray(self.values["full_eigenvalue"])[:, None]
        with np.errstate(invalid="ignore"):
            close = np.abs(full - radius / 2) <= error  # two standard errors of half the radius
            return {
                "bulk_radius": radius,
                "bulk_radius_error": error,
                "swallowed": (full <= radius / 2).sum(axis=0),
                "swallowed_error": close.sum(axis=0),
            }

    def report(self, changed: bool, last: bool = False) -> Reading:
        """The reading of now; the one before where nothing is new."""
        if changed or self.last is None:
            done = 1.0 if last else min(max(self.done, 1e-6), 0.999)
            if self.last is not None and not last:
                done = max(done, self.last.done)
            self.last = self.probe.reading(
                done, self.values, coords=self.coords, converged=last and self.met, notes=self.notes()
            )
        return self.last

    def notes(self) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        subject = self.subject
        said = [*subject.notes, *self.said, f"all examples are {subject.examples} of {subject.available or 'unknown'}"]
        if subject.norm != "eval":
            said.append("BatchNorm's statistics are each batch's own, so batches differ by more than their examples")
        if "noise" in self.values and not self.values["noise"] > 0:
            said.append("batches are not sharper than all examples so far: the additive law does not apply")
        if min(self.values.get("noise_misfit", 0.0), self.values.get("bulk_misfit", 0.0)) > POOR:
            said.append(f"neither law fits: the means of sizes are off by more than {POOR:.0f} standard errors")
        return tuple(said)


_MEANS = {"mean": "eigenvalue", "mean_min": "eigenvalue_min", "mean_gradient_curvature": "gradient_curvature"}


def _along_gradient(matrix: Curvature) -> float:
    """gᵀHg / ‖g‖² of a batch, by one more product; nan where the gradient is zero."""
    gradient = matrix.gradient
    length = norm(gradient)
    unit = (gradient / length).to(matrix.dtype)
    return float(dot(unit, matrix.matvec(unit))) if float(length) > 0 else math.nan


def _largest(data: xr.Dataset) -> Panel:
    at, full = data.inverse_size.values, float(data.full_eigenvalue[0])
    x = np.repeat(at, data.sizes["batch"])
    met, y = data.converged.values.ravel(), data.eigenvalue.values.ravel()
    sure = bool(data.full_converged[0])
    marks: list[AnyMark] = [
        Points(x, np.where(met, y, np.nan), label="one batch", role="second"),
        Points(x, np.where(met, np.nan, y), label="not converged", role="unconverged"),
        Points(at, data["mean"].values, data.mean_error.values, "mean of a size"),
        *_curve(Additive, data, "noise", "additive law"),
        *_curve(Multiplicative, data, "bulk", "multiplicative law"),
    ]
    if math.isfinite(full):
        marks.append(Rule(full, "y", "all examples", "reference" if sure else "unconverged"))
    return Panel(tuple(marks), Axis("1/b = 1/B - 1/n"), Axis("largest eigenvalue"), title="batches and all examples")


def _curve(law: type[Law], data: xr.Dataset, scale: str, label: str) -> tuple[Line, ...]:
    full, found = float(data.full_eigenvalue[0]), float(data[scale])
    if not (full > 0 and found > 0):
        return ()
    x = np.linspace(0.0, float(data.inverse_size.max()), 100)
    role = "third" if law is Additive else "fourth"
    return (Line(x, law(full, int(data.parameters)).predict(found, x), label, role),)


def _others(data: xr.Dataset) -> Panel:
    at, low = data.inverse_size.values, float(data.full_eigenvalue_min)
    marks: list[AnyMark] = [
        Rule(0.0),
        Points(at, data.mean_gradient_curvature.values, data.mean_gradient_curvature_error.values,
               "along the batch's gradient"),
        Points(at, data.mean_min.values, data.mean_min_error.values, "smallest eigenvalue", "second"),
    ]  # fmt: skip
    if math.isfinite(low):
        marks.append(Rule(low, "y", "smallest, all examples", "second"))
    return Panel(tuple(marks), Axis("1/b = 1/B - 1/n"), Axis("curvature"), title="means over batches")
