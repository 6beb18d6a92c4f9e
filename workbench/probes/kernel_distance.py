"""How far the tangent kernel of a network moved between two moments."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import xarray as xr
from torch import Tensor

from workbench.figure import Axis, Bars, Figure, Panel
from workbench.numerics.kernel_pairs import kernel_distances
from workbench.numerics.sampling import Draw
from workbench.operators.tangent_examples import picked
from workbench.operators.tangent_kernel import TangentKernel as Kernel
from workbench.operators.tangent_kernel import at_once
from workbench.operators.tangent_named import OUTPUTS, Outputs, blocks, named, naming, reported, rounding
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.several import Pair
from workbench.subject import Subject

GLANCE = 16
"""Examples of a first look."""
_NAMES = ("distance", "centred_distance", "relative_change", "norm_ratio")


@dataclass(frozen=True)
class KernelDistance(Probe[Pair]):
    """Distance between the tangent kernels of two moments of a training, or of two models of one shape.

    What it measures, for Θ₀ = J₀ J₀ᵀ of the first subject and Θ of the second, on the same examples, outputs and
    parameters: ``distance`` S = 1 - ⟨Θ, Θ₀⟩ / (‖Θ‖ ‖Θ₀‖), not centred, which sees rotation only; ``centred_distance`` =
    1 - CKA, the same of HΘH with H = I - 11ᵀ/n over examples; ``relative_change`` = ‖Θ - Θ₀‖ / ‖Θ₀‖, rotation and
    growth; ``norm_ratio`` = ‖Θ‖ / ‖Θ₀‖, growth alone (Frobenius norms). For the class-trace kernel
    (1/C) Σ_c J_c J_cᵀ with ``outputs="trace"``.

    How to read it: 0 for a network that trains as its initial kernel prescribes (lazy, ∝ 1/α² in S and ∝ 1/α in
    ``relative_change`` where outputs are scaled by α); feature learning turns the kernel and S grows to tenths. A large
    ``relative_change`` at a small S is growth: look at ``norm_ratio``.

    What it costs: C backward passes and the Gram of each, (nC)² Σ(widths) multiplications (C² fewer for ``trace``),
    both kernels in float64, then a few passes over them.

    When it misleads: S depends on which examples and how many; compare equal ones. The constant part of a kernel hides
    turns in S, so that the centred one is larger; it is nan where centring leaves nothing. Permuted units move it
    nowhere, but weight scales that the function does not see (before a normalisation) do. Take logits: after a softmax
    it is another kernel.

    Errors: standard errors over examples by the jackknife, each left out (and the others centred anew): of these
    numbers for n examples as they are, not for larger n. Kernels themselves are exact to rounding.

    Source: Fort et al. 2020 (arXiv 2010.15110); Chizat, Oyallon and Bach 2019.
    """

    examples: Annotated[
        int, Range(2, 10_000, step=1, log=True, soft=(16, 512)), Doc("Examples, of each class equally many.")
    ] = 128
    outputs: Annotated[Outputs, Choice(OUTPUTS), Doc("Which kernel.")] = "full"

    looks_at: ClassVar[Look] = "pair"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("distance", (), "1 - cosine of the kernels", error="distance_error"),
        Variable("distance_error", (), "its standard error over examples"),
        Variable("centred_distance", (), "1 - cosine of the centred kernels", error="centred_distance_error"),
        Variable("centred_distance_error", (), "its standard error over examples"),
        Variable("relative_change", (), "‖Θ - Θ₀‖ / ‖Θ₀‖", error="relative_change_error"),
        Variable("relative_change_error", (), "its standard error over examples"),
        Variable("norm_ratio", (), "‖Θ‖ / ‖Θ₀‖", error="norm_ratio_error"),
        Variable("norm_ratio_error", (), "its standard error over examples"),
        Variable("used_examples", (), "examples in this reading"),
        Variable("used_outputs", (), "outputs of each example"),
        Variable("parameters", (), "parameters that vary"),
        Variable("train_loss", (), "loss of the second on these examples", error="train_loss_error"),
        Variable("train_loss_error", (), "its standard error over examples"),
        Variable("start_loss", (), "loss of the first on these examples", error="start_loss_error"),
        Variable("start_loss_error", (), "its standard error over examples"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """A glance at a few examples, then one kernel, the other, and their distances.

        Raises:
            ValueError: the two have other examples, outputs, parameters or policies; the message says which.
        """
        subject.check_alike()
        run = _Run(self, *(picked(s, self.examples) for s in (subject.first, subject.second)))
        yield from run.measured()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The distances and the growth, with their errors."""
        found: dict[str, Value] = {}
        for name in _NAMES:
            found |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """The three distances as bars with their errors."""
        names = _NAMES[:3]
        values, errors = ([float(data[f"{n}{end}"]) for n in names] for end in ("", "_error"))
        labels = ("1 - cosine", "centred", "‖Θ - Θ₀‖ / ‖Θ₀‖")
        return Figure((Panel((Bars(range(3), values, errors, names=labels),), Axis(""), Axis("kernel distance")),))

    def estimate(self, subject: Pair) -> Cost:
        """Both kernels in float64 with what is centred of them, and what one kernel keeps of layers."""
        kernel = Kernel(picked(subject.first, self.examples))
        side = kernel.examples * (1 if self.outputs == "trace" else kernel.outputs)
        words = f"two {self.outputs} kernels of {kernel.examples} examples, {side} x {side}"
        return Cost(kernel.expected_bytes(self.outputs) + 8 * 8 * side**2, 2 * kernel.outputs, words)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: KernelDistance, first: Subject, second: Subject) -> None:
        self.probe, self.pair = probe, (first, second)
        self.kernels = Kernel(first), Kernel(second)
        if self.kernels[0].outputs != self.kernels[1].outputs:
            raise ValueError(
                f"the first has {self.kernels[0].outputs} outputs an example and the second {self.kernels[1].outputs}: "
                "their tangent kernels have different sizes. Compare nets of one shape."
            )
        losses = [s.evaluate(None, ("loss",)) for s in self.pair]
        self.values: dict[str, Any] = {"used_outputs": self.kernels[0].outputs, "parameters": first.size}
        for name, loss in zip(("start_loss", "train_loss"), losses, strict=True):
            self.values |= {name: loss["loss"], f"{name}_error": loss["loss_error"]}
        gap = max(kernel.check() for kernel in self.kernels)
        self.notes = (
            *dict.fromkeys((*first.notes, *second.notes)),
            first.on,
            f"products on a few examples differ from the kernel by {gap:.0e}",
        )

    def measured(self) -> Iterator[Reading]:
        """A glance, both kernels, and their distances."""
        few = range(min(GLANCE, max(self.pair[0].examples // 2, 2)))
        if len(few) < self.pair[0].examples:
            glance = [at_once(blocks(Kernel(s.selected(few)), self.probe.outputs)) for s in self.pair]
            yield self.found(0.02, *glance)
        first = yield from self.formed(0)
        second = yield from self.formed(1)
        yield self.found(1.0, first, second)

    def formed(self, which: int) -> Generator[Reading, None, Tensor]:
        """One kernel, with readings on the way."""
        steps = blocks(self.kernels[which], self.probe.outputs)
        return reported(steps, lambda share: self.report(0.03 + 0.47 * (which + share)))

    def found(self, done: float, first: Tensor, second: Tensor) -> Reading:
        """The numbers of two kernels."""
        found = kernel_distances(first, second, rounding(self.kernels[0]))
        for name, estimate in vars(found).items():
            self.values |= {name: estimate.value, f"{name}_error": estimate.error}
        self.values["used_examples"] = len(first)
        return self.report(done)

    def report(self, done: float) -> Reading:
        """The reading of now, which names its kernel."""
        made = self.probe.reading(min(done, 1.0), self.values, converged=done >= 1, notes=self.notes)
        return naming(made, named(self.kernels[0], self.probe.outputs))
