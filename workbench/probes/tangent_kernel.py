"""The tangent kernel of a net at a point: its spectrum, its effective rank, and how it is aligned with the targets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, fitting
from workbench.numerics import kernel_numbers as numbers
from workbench.numerics.kernel_pairs import blank_alignment
from workbench.numerics.krylov import lanczos
from workbench.numerics.operator import Operator
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import jackknife_error
from workbench.operators.tangent_examples import picked, targets
from workbench.operators.tangent_kernel import TangentKernel as Kernel
from workbench.operators.tangent_kernel import at_once
from workbench.operators.tangent_named import OUTPUTS, Outputs, blocks, named, naming, reported
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

GLANCE = 32
"""Examples of a first look."""
LIMIT = 500
"""Products at most, where the kernel is not formed."""


@dataclass(frozen=True)
class TangentKernel(Probe[Subject]):
    """Spectrum and target alignment of the empirical tangent kernel Θ = J Jᵀ, J the Jacobian of the outputs in θ.

    What it measures, for n examples with C outputs and targets y (n, C): ``eigenvalue`` λ_1 >= λ_2 >= ... of the full
    kernel (nC x nC), or of the class-trace kernel (1/C) Σ_c J_c J_cᵀ (n x n) for ``outputs="trace"``, each with its
    ``residual`` ‖Θu - λu‖; not divided by n. ``effective_rank`` = exp of the entropy of λ / Σλ; ``alignment`` =
    ⟨K, yyᵀ⟩ / (‖K‖ ‖yyᵀ‖) of K and y centred over examples, ``alignment_uncentred`` of both as they are (for the
    class-trace kernel ⟨K, YYᵀ⟩), beside ``alignment_identity``, that of K = I, centred; ``target_power`` = Σ_{i<=k}
    (u_i · y)² / ‖y‖², the share of the targets in the first k eigenvectors. ``exponent`` α of λ_i ~ i^-α from
    κ_m = 1/tr(K_m⁻¹) ~ m^-α over sub-samples; ``exponent_direct`` by a line through ln λ. Targets are one-hot for
    classes, ±1 for one yes or no, else the values.

    How to read it: gradient flow on squared error learns the part of y along u_i at rate λ_i (over n), as long as Θ
    stays: targets in the first eigenvectors are learned first. Feature learning turns Θ towards the targets, so that
    alignment and target power rise along training while the effective rank falls. Alignment near
    ``alignment_identity`` says that the kernel knows nothing of the targets. For loss ½‖f - y‖² the λ_i / n are the
    eigenvalues of the Gauss-Newton matrix.

    What it costs: C backward passes, some (nC)² Σ(widths) multiplications, and a dozen eigendecompositions of nC
    entries in float64: nC = 1280 takes seconds, 5000 minutes. ``outputs="trace"`` is C times smaller.
    ``solver="products"`` never forms the kernel: J (Jᵀ v) and Lanczos, for large n; then eigenvalues are all there is.

    When it misleads: values depend on n, on which examples, and on the parametrisation (in standard parametrisation Θ
    grows with width); compare equal ones only. The uncentred kernel is dominated by a constant part: then λ_1 and the
    effective rank say little, and ``centred`` says more. Return logits: after a softmax Θ is another kernel. The
    class-trace kernel is not that of the sum of outputs. Exponents need many examples; nan below 16 or where the
    kernel has no inverse.

    Errors: residuals are rounding, or what Lanczos left. ``effective_rank`` and alignments: standard errors over
    examples by the jackknife, each tenth of them left out; for n as it is, not for larger ones. ``exponent_error``:
    standard error of the fitted slope; sub-samples share examples, so that it is too small rather than too large.

    Source: Jacot, Gabriel, Hongler 2018; Cortes, Mohri, Rostamizadeh 2012; Baratin et al. 2021; Simon et al. 2024.
    """

    examples: Annotated[
        int, Range(2, 100_000, step=1, log=True, soft=(16, 1024)), Doc("Examples, of each class equally many.")
    ] = 128
    outputs: Annotated[Outputs, Choice(OUTPUTS), Doc("Which kernel.")] = "full"
    centred: Annotated[bool, Doc("Whether eigenvalues are those of the kernel centred over examples.")] = False
    top: Annotated[int, Range(1, 1000, step=1, soft=(1, 100)), Doc("How many of the largest eigenvalues.")] = 20
    solver: Annotated[
        Literal["exact", "products"],
        Choice({"exact": "the kernel itself", "products": "products with it, for many examples"}),
        Doc("How the eigenvalues are found."),
    ] = "exact"
    tolerance: Annotated[
        float, Range(1e-6, 0.5, log=True, soft=(1e-4, 0.1)), Doc("For products: residual over eigenvalue.")
    ] = 0.01
    keep: Annotated[bool, Doc("Whether the kernel itself is part of the reading.")] = False

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("eigenvalue", ("rank",), "eigenvalue", error="residual"),
        Variable("residual", ("rank",), "residual ‖Θu - λu‖"),
        Variable("target_power", ("rank",), "share of the targets in eigenvectors up to this one"),
        Variable("alignment", (), "alignment with the targets, centred", error="alignment_error"),
        Variable("alignment_error", (), "its standard error over examples"),
        Variable(
            "alignment_uncentred", (), "alignment with the targets, as they are", error="alignment_uncentred_error"
        ),
        Variable("alignment_uncentred_error", (), "its standard error over examples"),
        Variable("alignment_identity", (), "centred alignment of the identity"),
        Variable("effective_rank", (), "exp(entropy) of the eigenvalues", error="effective_rank_error"),
        Variable("effective_rank_error", (), "its standard error over examples"),
        Variable("trace", (), "sum of the eigenvalues"),
        Variable("frobenius", (), "Frobenius norm"),
        Variable("exponent", (), "power law of the spectrum, by sub-samples", error="exponent_error"),
        Variable("exponent_error", (), "standard error of the fit"),
        Variable("exponent_direct", (), "power law of the spectrum, by ranks", error="exponent_direct_error"),
        Variable("exponent_direct_error", (), "standard error of the line"),
        Variable("kernel", ("row", "column"), "kernel, examples by outputs"),
        Variable("used_examples", (), "examples in this reading"),
        Variable("used_outputs", (), "outputs of each example"),
        Variable("parameters", (), "parameters that vary"),
        Variable("train_loss", (), "loss on these examples", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("products", (), "products with the kernel"),
    )

    def validate(self) -> None:
        if self.solver == "products" and (self.outputs == "trace" or self.keep):
            raise ValueError('solver="products" knows only the full kernel\'s eigenvalues: outputs="full", keep=False.')

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """A glance at a few examples, then the kernel, its numbers, and these without each tenth of the examples."""
        run = _Run(self, picked(subject, self.examples), draw)
        yield from run.by_products() if self.solver == "products" else run.exact()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Largest eigenvalue, alignments, effective rank and exponent with their errors."""
        first = data.isel(rank=0)
        found: dict[str, Value] = {"largest": float(first.eigenvalue), "largest_error": float(first.residual)}
        if self.solver == "products":
            return found | {"products": int(np.nan_to_num(data.products))}
        for name in ("alignment", "alignment_uncentred", "effective_rank", "exponent"):
            found |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        return found | {"trace": float(data.trace), "examples": int(np.nan_to_num(data.used_examples))}

    def figure(self, data: xr.Dataset) -> Figure:
        """Eigenvalues by rank, and the share of the targets that their eigenvectors hold."""
        rank, values = data["rank"].values.astype(float), data.eigenvalue.values
        marks: list[AnyMark] = [Points(rank, values, data.residual.values)]
        alpha = float(data.exponent)
        if math.isfinite(alpha) and values[0] > 0:
            middle = int(np.isfinite(values).sum()) // 2
            marks.append(Line(rank, values[middle] * (rank / rank[middle]) ** -alpha, "power law", "reference"))
        spectrum = Panel(tuple(marks), Axis("rank", "log"), fitting("eigenvalue", "log", values))
        power = Panel(
            (Line(rank, data.target_power.values),), Axis("rank", "log"), Axis("share of targets", limits=(0.0, 1.0))
        )
        return Figure((spectrum,) if self.solver == "products" else (spectrum, power))

    def estimate(self, subject: Subject) -> Cost:
        """The kernel, what is kept of layers, and its decomposition in float64; or graphs and a Krylov basis."""
        chosen = picked(subject, self.examples)
        kernel = Kernel(chosen)
        if self.solver == "products":
            rows, working = max(32, 2 * self.top + 10), kernel.product_bytes()
            return Cost(
                rows * kernel.size * kernel.dtype.itemsize + working + 2 * chosen.memory(),
                4 * self.top,
                f"Lanczos with products of {kernel.size} entries",
            )
        side = chosen.examples * (1 if self.outputs == "trace" else kernel.outputs)
        words = f"the {self.outputs} kernel of {chosen.examples} examples, {side} x {side}"
        return Cost(kernel.expected_bytes(self.outputs) + 6 * 8 * side**2, kernel.outputs, words)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: TangentKernel
    subject: Subject
    draw: Draw
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.kernel = Kernel(self.subject)
        self.targets = targets(self.subject, self.kernel.outputs)
        loss = self.subject.evaluate(None, ("loss",))
        self.values = {"train_loss": loss["loss"], "train_loss_error": loss["loss_error"]}
        self.values |= {"parameters": self.subject.size, "used_outputs": self.kernel.outputs}
        gap = self.kernel.check()
        self.notes = (
            *self.subject.notes,
            self.subject.on,
            f"products on a few examples differ from the kernel by {gap:.0e}",
        )
        if self.targets is None:
            self.notes += ("the targets are not of the outputs' shape: no alignment",)
        self.named = named(self.kernel, f"{self.probe.outputs}, {'centred' if self.probe.centred else 'not centred'}")

    @property
    def side(self) -> int:
        """Rows of the kernel in the reading."""
        each = 1 if self.probe.outputs == "trace" else self.kernel.outputs
        return self.kernel.examples * each if self.probe.keep else 1

    def report(self, done: float, converged: bool = False) -> Reading:
        """The reading of now, which names its kernel."""
        top, keep = self.probe.top, self.side
        made = self.probe.reading(
            min(done, 1.0),
            self.values,
            coords={"rank": np.arange(1, top + 1)},
            converged=converged,
            notes=self.notes,
            sizes={"row": keep, "column": keep},
        )
        return naming(made, self.named)

    # --- the kernel itself ------------------------------------------------------------------------------------------

    def exact(self) -> Iterator[Reading]:
        """A glance, the kernel, and errors."""
        n = self.kernel.examples
        if n >= 4:
            few = list(range(min(GLANCE, n // 2)))
            glance = self.subject.selected(few)
            part = None if self.targets is None else self.targets[few]
            self.measure(at_once(blocks(Kernel(glance), self.probe.outputs)), part)
            yield self.report(0.02)
        steps = blocks(self.kernel, self.probe.outputs)
        theta = yield from reported(steps, lambda share: self.report(0.02 + 0.5 * share))
        self.measure(theta, self.targets)
        if self.probe.keep:
            self.values["kernel"] = theta.reshape(self.side, self.side)
        yield self.report(0.6)
        yield from self.errors(theta)
        yield self.report(1.0, converged=True)

    def measure(self, theta: Tensor, y: Tensor | None) -> None:
        """All numbers without errors."""
        size = theta.shape[0] * theta.shape[1]
        used = numbers.centred(theta) if self.probe.centred else theta
        flat = used.reshape(size, size)
        found, vectors = torch.linalg.eigh(flat)
        values, top = found.flip(0), min(self.probe.top, size)
        leading = vectors.flip(1)[:, :top]
        residual = torch.linalg.vector_norm(flat @ leading - leading * values[:top], dim=0)
        spectrum = values.cpu().numpy()
        self.values |= vars(numbers.Numbers.of(theta, spectrum, y))
        self.values |= {"eigenvalue": self.padded(values[:top]), "residual": self.padded(residual)}
        self.values |= {"trace": float(flat.trace()), "frobenius": float(torch.linalg.matrix_norm(flat))}
        direct = numbers.direct_exponent(spectrum)
        self.values |= {"exponent_direct": direct[0], "exponent_direct_error": direct[1]}
        self.values |= {"used_examples": len(theta), "products": 0}
        if y is not None:
            aim = y - y.mean(0) if self.probe.centred else y
            aim = aim if theta.shape[1] == 1 else aim.reshape(size, 1)
            self.values["target_power"] = self.padded(torch.from_numpy(numbers.power(leading, aim)))
            together = theta.shape[1] == 1
            self.values["alignment_identity"] = blank_alignment(y, together)[0]

    def padded(self, values: Tensor) -> np.ndarray:
        """``top`` numbers, nan where there are fewer."""
        out = np.full(self.probe.top, np.nan)
        out[: len(values)] = values.cpu().numpy()
        return out

    def errors(self, theta: Tensor) -> Iterator[Reading]:
        """What leaving out examples does, and the exponent over sub-samples."""
        used = numbers.centred(theta) if self.probe.centred else theta
        found = numbers.exponent(used, numbers.eigenvalues(used), self.draw.generator(0))
        self.values |= {"exponent": found[0], "exponent_error": found[1]}
        parts = list[numbers.Numbers]()
        for part in numbers.left_out(theta, self.targets, self.probe.centred):
            parts.append(part)
            yield self.report(0.7 + 0.29 * len(parts) / numbers.FOLDS)
        for name in ("effective_rank", "alignment", "alignment_uncentred"):
            self.values[f"{name}_error"] = float(jackknife_error(np.array([getattr(part, name) for part in parts])))

    # --- products ---------------------------------------------------------------------------------------------------

    def by_products(self) -> Iterator[Reading]:
        """Lanczos without the kernel."""
        probe, n = self.probe, self.kernel.examples
        self.notes += ("the kernel was not formed: eigenvalues are all that is known of it",)
        self.values["used_examples"] = n
        operator = Centred(self.kernel) if probe.centred else self.kernel
        top = min(probe.top, operator.size)
        start = self.draw(0, size=operator.size)
        fresh = lambda i: self.draw(i + 1, size=operator.size)  # noqa: E731
        done = False
        with self.kernel:
            for state in lanczos(
                operator, start, top=top, bottom=0, tolerance=probe.tolerance, limit=LIMIT, fresh=fresh
            ):
                self.values |= {
                    "eigenvalue": self.padded(torch.from_numpy(state.top_values.copy())),
                    "residual": self.padded(torch.from_numpy(state.top_residuals.copy())),
                    "products": self.kernel.products,
                }
                done = state.done
                if done:
                    break
                yield self.report(min(0.99, state.products / (state.products + 4 * top)))
            yield self.report(1.0, converged=done)


class Centred(Operator):
    """(H ⊗ I) Θ (H ⊗ I): a kernel by products, centred over examples."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.size, self.dtype, self.device = kernel, kernel.size, kernel.dtype, kernel.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self._less_mean(self.kernel.matvec(self._less_mean(vector)))

    def _less_mean(self, vector: Tensor) -> Tensor:
        table = vector.view(self.kernel.examples, -1)
        return (table - table.mean(0)).reshape(-1)
