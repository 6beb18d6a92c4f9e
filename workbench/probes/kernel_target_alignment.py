"""How a tangent kernel is aligned with the targets: all together, class by class, and eigenvector by eigenvector."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.figure import AnyMark, Axis, Band, Bars, Figure, Line, Panel, Rule
from workbench.numerics import kernel_numbers as numbers
from workbench.numerics.kernel_pairs import Estimate, blank_alignment, one_less_cosine, target_kernel
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import jackknife_error
from workbench.operators.tangent_examples import picked, targets
from workbench.operators.tangent_kernel import TangentKernel as Kernel
from workbench.operators.tangent_kernel import at_once
from workbench.operators.tangent_named import OUTPUTS, Outputs, blocks, named, naming, reported, rounding
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

GLANCE = 32
"""Examples of a first look."""


@dataclass(frozen=True)
class KernelTargetAlignment(Probe[Subject]):
    """Alignment of the empirical tangent kernel with the targets: how much of the kernel points where learning must go.

    What it measures, for n examples with targets Y (n, C) and the class-trace kernel K = (1/C) Σ_c J_c J_cᵀ (n x n):
    ``alignment`` = ⟨HKH, HYYᵀH⟩ / (‖HKH‖ ‖HYYᵀH‖) with H = I - 11ᵀ/n, and ``alignment_uncentred`` without H; for
    ``outputs="full"`` the full kernel and y yᵀ of all targets in a row. ``class_alignment``: of each output alone, its
    column of Y with the same kernel (with its own J_c J_cᵀ for "full"), centred. ``power`` c(k) = Σ_{i<=k} (u_i · y)² /
    ‖y‖², the share of the centred targets in the first k eigenvectors u_i of the centred kernel (those with
    eigenvalue 0 hold nothing). Targets are one-hot for classes, ±1 for one yes or no, else the values. ``identity`` and
    ``identity_uncentred``: what K = I has with these n and these classes (√((C-1)/(n-1)) and √(C/n) for C balanced
    ones).

    How to read it: at the identity's value the kernel knows nothing of the targets; at 1 it is made of them and one
    step of gradient descent would learn them. Feature learning raises it along training. c(k) that is high at once
    says that few, fast modes hold the targets. A class that lags behind is learned late.

    What it costs: C backward passes, the Gram, one decomposition of n (nC) entries in float64 and ten more without a
    tenth of the examples.

    When it misleads: n, classes and their balance move it: compare equal examples only, and differences to
    ``identity``. One-hot and ±1 targets of one problem give different values. Without centring the constant part of the
    kernel, which any net has, inflates it.

    Errors: standard errors over examples by the jackknife: each left out for alignments, each tenth for c(k); for this
    n, not for larger ones. nan where the centred kernel or the targets are constant.

    Source: Cristianini et al. 2001; Cortes, Mohri and Rostamizadeh 2012; Baratin et al. 2021.
    """

    examples: Annotated[
        int, Range(2, 20_000, step=1, log=True, soft=(16, 1024)), Doc("Examples, of each class equally many.")
    ] = 256
    outputs: Annotated[Outputs, Choice(OUTPUTS), Doc("Which kernel.")] = "trace"
    top: Annotated[int, Range(1, 1000, step=1, soft=(5, 200)), Doc("Eigenvectors of the power curve.")] = 50

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("alignment", (), "alignment with the targets, centred", error="alignment_error"),
        Variable("alignment_error", (), "its standard error over examples"),
        Variable(
            "alignment_uncentred", (), "alignment with the targets, as they are", error="alignment_uncentred_error"
        ),
        Variable("alignment_uncentred_error", (), "its standard error over examples"),
        Variable("identity", (), "centred alignment of the identity"),
        Variable("identity_uncentred", (), "alignment of the identity, as it is"),
        Variable("class_alignment", ("output",), "centred alignment of each class", error="class_alignment_error"),
        Variable("class_alignment_error", ("output",), "its standard error over examples"),
        Variable("power", ("rank",), "share of the targets in eigenvectors up to this one", error="power_error"),
        Variable("power_error", ("rank",), "its standard error over examples"),
        Variable("used_examples", (), "examples in this reading"),
        Variable("parameters", (), "parameters that vary"),
        Variable("train_loss", (), "loss on these examples", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """A glance at a few examples, then the kernel, its alignments, and its eigenvectors without each tenth.

        Raises:
            ValueError: targets that are not of the outputs' shape.
        """
        yield from _Run(self, picked(subject, self.examples)).measured()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Both alignments with errors and what the identity has, and the class that lags."""
        found: dict[str, Value] = {}
        for name in ("alignment", "alignment_uncentred"):
            found |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        found["identity"] = float(data.identity)
        each = data.class_alignment.values
        if len(each) > 1 and np.isfinite(each).any():
            found["least_aligned"] = int(np.nanargmin(each))
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Alignment by class with that of all and of the identity, and the power curve with its error."""
        each, errors = data.class_alignment.values, data.class_alignment_error.values
        rules = ((data.alignment, "all outputs"), (data.identity, "identity"))
        bars: list[AnyMark] = [Bars(data["output"].values, each, errors)]
        bars += [Rule(float(v), "y", words) for v, words in rules if np.isfinite(float(v))]
        rank, power, error = data["rank"].values.astype(float), data.power.values, data.power_error.values
        curve: list[AnyMark] = [Band(rank, power - error, power + error)] if np.isfinite(error).any() else []
        curve.append(Line(rank, power))
        return Figure(
            (
                Panel(tuple(bars), Axis("output"), Axis("alignment, centred")),
                Panel(tuple(curve), Axis("rank", "log"), Axis("share of targets", limits=(0.0, 1.02))),
            )
        )

    def estimate(self, subject: Subject) -> Cost:
        """The kernel, that of the targets, both centred, and a decomposition in float64."""
        kernel = Kernel(picked(subject, self.examples))
        side = kernel.examples * (1 if self.outputs == "trace" else kernel.outputs)
        words = f"the {self.outputs} kernel of {kernel.examples} examples, {side} x {side}, decomposed 11 times"
        return Cost(kernel.expected_bytes(self.outputs) + 8 * 8 * side**2, kernel.outputs, words)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: KernelTargetAlignment, subject: Subject) -> None:
        self.probe, self.subject, self.kernel = probe, subject, Kernel(subject)
        self.together = probe.outputs == "trace"
        found = targets(subject, self.kernel.outputs)
        if found is None:
            raise ValueError(
                f"the targets are not {self.kernel.outputs} numbers or one class an example, which a kernel of "
                f"{self.kernel.outputs} outputs is aligned with; give class numbers, or values of the outputs' shape."
            )
        self.targets = found
        loss = subject.evaluate(None, ("loss",))
        gap = self.kernel.check()
        self.values: dict[str, Any] = {"train_loss": loss["loss"], "train_loss_error": loss["loss_error"]}
        self.values["parameters"] = subject.size
        self.notes = (
            *subject.notes,
            subject.on,
            f"products on a few examples differ from the kernel by {gap:.0e}",
        )

    def measured(self) -> Iterator[Reading]:
        """A glance, the kernel, alignments, and the curve's errors."""
        few = list(range(min(GLANCE, max(self.kernel.examples // 2, 2))))
        if len(few) < self.kernel.examples:
            glance = at_once(blocks(Kernel(self.subject.selected(few)), self.probe.outputs))
            self.align(glance, self.targets[few])
            yield self.report(0.02)
        theta = yield from self.formed()
        self.align(theta, self.targets)
        yield self.report(0.6)
        parts = list[np.ndarray]()
        folds = min(numbers.FOLDS, len(theta))
        place = torch.arange(len(theta), device=theta.device) % folds
        for fold in range(folds):
            kept = (place != fold).nonzero()[:, 0]
            parts.append(self.power(theta[kept][:, :, kept], self.targets[kept]))
            yield self.report(0.6 + 0.39 * len(parts) / folds)
        self.values["power_error"] = jackknife_error(np.array(parts))
        yield self.report(1.0)

    def formed(self) -> Generator[Reading, None, Tensor]:
        """The kernel, with readings on the way."""
        return reported(blocks(self.kernel, self.probe.outputs), lambda share: self.report(0.03 + 0.5 * share))

    def align(self, theta: Tensor, y: Tensor) -> None:
        """All numbers of a kernel (n, C, n, C) and its targets but the curve's errors."""
        least, aim = rounding(self.kernel), target_kernel(y, self.together)
        for name, centre in (("alignment", True), ("alignment_uncentred", False)):
            found = Estimate.of(1 - one_less_cosine(theta, aim, centre, least))
            self.values |= {name: found.value, f"{name}_error": found.error}
        self.values["identity"], self.values["identity_uncentred"] = blank_alignment(y, self.together)
        each = [self.of_class(theta, y, c) for c in range(y.shape[1])]
        self.values |= {"class_alignment": [e.value for e in each], "class_alignment_error": [e.error for e in each]}
        self.values |= {"power": self.power(theta, y), "used_examples": len(y)}

    def of_class(self, theta: Tensor, y: Tensor, c: int) -> Estimate:
        """Centred alignment of one output's column with the kernel of all, or of that output."""
        at = 0 if self.together else c
        own = theta[:, at : at + 1, :, at : at + 1]
        return Estimate.of(1 - one_less_cosine(own, target_kernel(y[:, c : c + 1], True), True, rounding(self.kernel)))

    def power(self, theta: Tensor, y: Tensor) -> np.ndarray:
        """c(k) for the first ``top`` eigenvectors of the centred kernel, nan where there are fewer.

        Where eigenvalues are rounding, eigenvectors are any basis of what the kernel does not reach: they add nothing.
        """
        size, out = theta.shape[0] * theta.shape[1], np.full(self.probe.top, np.nan)
        aim = y - y.mean(0)
        if not bool(aim.any()):
            return out
        values, basis = torch.linalg.eigh(numbers.centred(theta).reshape(size, size))
        leading = basis * (values > size * rounding(self.kernel) * values[-1])
        leading = leading.flip(1)[:, : len(out)]
        out[: leading.shape[1]] = numbers.power(leading, aim if self.together else aim.reshape(size, 1))
        return out

    def report(self, done: float) -> Reading:
        """The reading of now, which names its kernel."""
        count = self.kernel.outputs
        coords = {"rank": np.arange(1, self.probe.top + 1), "output": np.arange(count)}
        made = self.probe.reading(min(done, 1.0), self.values, coords=coords, converged=done >= 1, notes=self.notes)
        return naming(made, named(self.kernel, self.probe.outputs))
