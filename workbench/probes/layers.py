"""The curvature of each layer for itself: the diagonal blocks of a curvature matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr

from workbench.figure import Figure
from workbench.numerics.sampling import Draw
from workbench.operators.blocks import Block, Group, Level, coverage, groups, named, together, unused
from workbench.operators.table import WORDS, OperatorName, curvature
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.selftest import check_symmetry, self_test, test_bytes
from workbench.spectra import layer_panels as panels
from workbench.spectra.blocks import BlockAim, BlockNumbers, BlockRun
from workbench.spectra.layers import (
    agreement,
    coverage_values,
    coverage_words,
    layer_values,
    shares,
    whole_values,
)
from workbench.spectra.measured import KINKS, SUBSET
from workbench.subject import Subject

GLANCE = 3
"""Products that every layer gets before any gets more."""
OFTEN = 4
"""Products between two readings."""


@dataclass(frozen=True)
class LayerSpectra(Probe[Subject]):
    """Eigenvalues, trace and Frobenius norm of each layer's own curvature: the diagonal blocks H_ll of H = ∇²L.

    What it measures, for each group l of parameters W_l: the largest ``eigenvalue`` λ_1 of H_ll with its ``residual``,
    the most negative ``eigenvalue_min``, the ``trace``, the ``frobenius_norm`` ‖H_ll‖_F, the ``trace_share``
    tr(H_ll) / Σ tr(H_mm) and the ``scaled`` sharpness λ_1 ‖W_l‖². Of all the layers together: λ_1, trace and norm of
    the whole matrix, and ``off_diagonal_mass`` = 1 - Σ ‖H_ll‖_F² / ‖H‖_F², the share of its squared entries that lies
    between layers. A product with H_ll differentiates by W_l alone; nothing is cut out of eigenvectors of H. Layers are
    modules with weight and bias, attention as queries, keys, values and output; blocks what lists of modules repeat.

    How to read it: the layer with the largest λ_1 sets the step that the whole net stands. λ_1 of no layer exceeds that
    of H; where all are far below it, the sharp direction runs through several layers at once, and a large off-diagonal
    mass says the same. Compare layers of different scale by ``scaled``, which does not change when a layer that feeds a
    normalisation is multiplied by a number. Very unequal blocks are where adaptive optimizers help (Zhang et al. 2024).
    ``analysed`` says of every parameter whether it is in these numbers; the notes say why others are not.

    What it costs: 20 to 40 products a layer, each at most as much as one with H and the less the closer the layer lies
    to the output (a tenth is usual); then some 40 with H itself (``whole``), which take most of the time. Every layer
    gets three products first, so that the picture is there at once. Memory: about 25 vectors of P entries (more for
    small models).

    When it misleads: λ_1 without ``scaled`` compares layers by their units, and rescaling two layers against each other
    moves curvature between them while the network stays the same. ``scaled`` is free of that only for layers that a
    normalisation follows. Where traces are negative, shares can be negative or above 1. The blocks say nothing of how
    layers act on each other; of that only the off-diagonal mass does. On a subset of the examples λ_1 is biased
    upwards; kinks (ReLU) are not seen by differentiation. In a ReLU net without biases the blocks of the Hessian are
    those of the Gauss-Newton matrix. A block that is zero but for rounding never converges in float32, and says so.

    Errors: some eigenvalue of the block lies within ``residual``. Errors of traces, norms, shares and of the mass are
    half-widths of 95 % intervals, 0 where the block was solved exactly, and unknown after the first three products.
    Source: Zhang et al. 2024; Singh et al. 2021.
    """

    level: Annotated[
        Level,
        Choice(
            {"layer": "each module, attention in its four parts", "block": "what repeats, such as encoder.layers.0"}
        ),
        Doc("What counts as one."),
    ] = "layer"
    operator: Annotated[OperatorName, Choice(WORDS), Doc("Which curvature matrix.")] = "hessian"
    layers: Annotated[str, Doc("Names or globs of the layers to look at, with commas between; empty for all.")] = ""
    top: Annotated[int, Range(1, 50, step=1, soft=(1, 10)), Doc("How many of each layer's largest eigenvalues.")] = 1
    tolerance: Annotated[
        float,
        Range(1e-6, 0.5, log=True, soft=(1e-3, 0.2)),
        Doc("What counts as converged: residual over eigenvalue, error over trace and over norm."),
    ] = 0.05
    minimum: Annotated[bool, Doc("Whether to find each layer's most negative eigenvalue.")] = True
    whole: Annotated[bool, Doc("Whether to measure all layers together too, for the off-diagonal mass.")] = True

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("eigenvalue", ("layer", "rank"), "largest eigenvalues of the block", error="residual"),
        Variable("residual", ("layer", "rank"), "residual ‖Hv - λv‖"),
        Variable("converged", ("layer", "rank"), "residual within the tolerance", kind="bool"),
        Variable("eigenvalue_min", ("layer",), "most negative eigenvalue", error="eigenvalue_min_residual"),
        Variable("eigenvalue_min_residual", ("layer",), "residual of the most negative eigenvalue"),
        Variable("eigenvalue_min_converged", ("layer",), "minimum's residual within the tolerance", kind="bool"),
        Variable("negative_curvature", ("layer",), "whether the minimum is negative beyond its residual", kind="bool"),
        Variable("trace", ("layer",), "trace of the block", error="trace_error"),
        Variable("trace_error", ("layer",), "half-width of the trace's 95 % interval"),
        Variable("frobenius_norm", ("layer",), "Frobenius norm of the block", error="frobenius_norm_error"),
        Variable("frobenius_norm_error", ("layer",), "half-width of the norm's 95 % interval"),
        Variable("trace_share", ("layer",), "share of the layers' traces", error="trace_share_error"),
        Variable("trace_share_error", ("layer",), "half-width of the share's 95 % interval"),
        Variable("scaled", ("layer",), "λ_1 ‖W‖², free of the layer's scale", error="scaled_error"),
        Variable("scaled_error", ("layer",), "residual times ‖W‖²"),
        Variable("weight_norm", ("layer",), "‖W‖ of the layer's parameters"),
        Variable("parameters", ("layer",), "number of parameters in the layer"),
        Variable("complete", ("layer",), "whether all of the layer's numbers are as good as asked for", kind="bool"),
        Variable(
            "off_diagonal_mass", (), "1 - Σ‖H_ll‖²/‖H‖²: what lies between layers", error="off_diagonal_mass_error"
        ),
        Variable("off_diagonal_mass_error", (), "half-width of its 95 % interval"),
        Variable("whole_eigenvalue", (), "largest eigenvalue of all layers together", error="whole_residual"),
        Variable("whole_residual", (), "its residual"),
        Variable("whole_trace", (), "trace of all layers together", error="whole_trace_error"),
        Variable("whole_trace_error", (), "half-width of its 95 % interval"),
        Variable("whole_norm", (), "Frobenius norm of all layers together", error="whole_norm_error"),
        Variable("whole_norm_error", (), "half-width of its 95 % interval"),
        Variable("analysed", ("parameter",), "whether the tensor is in one of the layers", kind="bool"),
        Variable("frozen", ("parameter",), "not analysed: requires no gradient", kind="bool"),
        Variable("filtered", ("parameter",), "not analysed: left out when the subject was made", kind="bool"),
        Variable("left_out", ("parameter",), "not analysed: left out by the setting layers", kind="bool"),
        Variable("not_floating", ("parameter",), "not analysed: not a floating-point tensor", kind="bool"),
        Variable("unused", ("parameter",), "analysed, and the loss does not depend on it", kind="bool"),
        Variable("entries", ("parameter",), "number of scalars in the tensor"),
        Variable("train_loss", (), "loss at the point", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("products", (), "products with blocks and with the whole"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """A glance at every layer, then each to its end, then the whole."""
        run = _Run(self, subject, draw)
        try:
            yield from run.glance()
            yield from run.finish()
            yield run.report(last=True)
        finally:
            run.close()

    def aim(self) -> BlockAim:
        """What each block is asked for; only a Hessian has negative eigenvalues to look for."""
        return BlockAim(self.top, int(self.minimum and self.operator == "hessian"), self.tolerance)

    def chosen(self, subject: Subject) -> list[Group]:
        """The groups that ``level`` and ``layers`` say.

        Raises:
            ValueError: ``layers`` names none of them.
        """
        found = groups(subject, self.level)
        wanted = [word.strip() for word in self.layers.split(",") if word.strip()]
        kept = [g for g in found if not wanted or any(named(g.name, word) for word in wanted)]
        if not kept:
            raise ValueError(
                f"layers={self.layers!r} names none of the {len(found)} groups at the level {self.level!r}: "
                f"{', '.join(g.name for g in found[:12])}."
            )
        return kept

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The sharpest layer, the layer with the largest share of the trace, and what lies between layers."""
        values = data.eigenvalue.values[:, 0]
        names = data["layer"].values
        found: dict[str, Value] = {"layers": len(names)}
        if np.isfinite(values).any():
            at = int(np.nanargmax(values))
            found |= {"sharpest_layer": str(names[at]), "sharpness": float(values[at])}
            found |= {"sharpness_error": float(data.residual.values[at, 0])}
        if np.isfinite(data.trace_share.values).any():
            at = int(np.nanargmax(data.trace_share.values))
            found |= {"largest_share_layer": str(names[at]), "trace_share": float(data.trace_share[at])}
            found |= {"trace_share_error": float(data.trace_share_error[at])}
        for name in ("off_diagonal_mass", "train_loss"):
            if math.isfinite(float(data[name])):
                found |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        return found | {"products": int(data.products)}

    def figure(self, data: xr.Dataset) -> Figure:
        """λ_1, share of the trace and scale-free sharpness of each layer, grey where not converged."""
        mass, error = float(data.off_diagonal_mass), float(data.off_diagonal_mass_error)
        note = f"off-diagonal mass {mass:.2g} ± {error:.1g}" if math.isfinite(mass) else ""
        return Figure((panels.eigenvalues(data), panels.shares(data), panels.scaled(data)), note=note, columns=1)

    def estimate(self, subject: Subject) -> Cost:
        """All layers' bases, the whole matrix's basis once they are freed, and its kept graphs."""
        aim, item = self.aim(), subject.dtype.itemsize
        chosen = self.chosen(subject)
        sizes = [group.size for group in chosen]
        bases = sum((aim.rows(n, item) + 1) * n for n in sizes) * item
        all_of = sum(sizes)
        if self.whole:
            bases = max(bases, (aim.rows(all_of, item) + 1) * all_of * item)
        kept, working = curvature(subject, self.operator).expected_bytes()
        vector = subject.size * item
        products = sum(map(aim.products, sizes)) + (aim.products(all_of) + 10 if self.whole else 0)
        words = f"Lanczos bases of {len(sizes)} layers with {all_of} parameters, and the gradient's graph"
        return Cost(kept + max(bases + 5 * vector + working, 6 * vector + test_bytes(subject)), products, words)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: LayerSpectra
    subject: Subject
    draw: Draw
    done: float = 0.0
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    tested: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        probe, subject, aim = self.probe, self.subject, self.probe.aim()
        self.chosen = probe.chosen(subject)
        self.full = curvature(subject, probe.operator)
        self.unused = unused(subject)
        self.covered = coverage(subject, self.chosen)
        self.runs = [self.one(aim, group, i + 1) for i, group in enumerate(self.chosen)]
        everything = together(self.chosen)
        self.everything = self.one(aim, everything, 0) if probe.whole and len(self.chosen) > 1 else None
        params = subject.params
        self.norms = np.array([group.norm(params) for group in self.chosen])
        self.values |= coverage_values(self.covered, self.unused)
        self.coords = {
            "layer": np.array([group.name for group in self.chosen]),
            "rank": np.arange(1, probe.top + 1),
            "parameter": np.array([c.name for c in self.covered]),
        }

    def one(self, aim: BlockAim, group: Group, number: int) -> BlockRun:
        """A run for one group; zero where the loss uses none of its tensors."""
        zero = set(group.names) <= self.unused
        return BlockRun(aim, Block(self.subject, group, self.probe.operator), self.draw, number, zero)

    # --- the order of work ------------------------------------------------------------------------------------------

    def glance(self) -> Iterator[Reading]:
        """Three products for every layer, then a reading; the self-test after the first."""
        for i, run in enumerate(self.runs):
            for _, _ in zip(range(GLANCE), self.checked(run), strict=False):
                self.loss(run)
            run.block.close()
            yield self.report(0.1 * (i + 1) / len(self.runs))
            if not self.tested:
                self.test()

    def finish(self) -> Iterator[Reading]:
        """Each layer to its end, then all of them together, which weighs as much as three."""
        runs = [*self.runs, *([self.everything] if self.everything else [])]
        shares = [1.0] * len(self.runs) + [3.0] * (len(runs) - len(self.runs))
        before = 0.0
        for run, share in zip(runs, shares, strict=True):
            for count, _ in enumerate(self.steps(run)):
                if count % OFTEN == OFTEN - 1:
                    inside = share * run.block.products / (run.block.products + 20)
                    yield self.report(0.1 + 0.89 * (before + inside) / sum(shares))
            before += share
            run.release()
            yield self.report(0.1 + 0.89 * before / sum(shares))

    def steps(self, run: BlockRun) -> Iterator[None]:
        """All that is left to do for one run."""
        for _ in self.checked(run):
            if run is self.everything:
                assert run.state is not None
                check_symmetry(run.state.asymmetry)
            yield
        yield from run.sizes()

    def checked(self, run: BlockRun) -> Iterator[None]:
        """The eigenvalues' products; a loss that is not finite is named before what it spoils."""
        try:
            for _ in run.eigenvalues:
                yield
        except ArithmeticError as problem:
            if math.isfinite(run.block.curvature.loss):
                raise
            raise ValueError(
                f"the loss at the model's own point is {run.block.curvature.loss}, so it has no curvature; look at the "
                "weights (did training diverge?), the inputs and the targets."
            ) from problem

    def loss(self, run: BlockRun) -> None:
        """The loss came with the first product."""
        if "train_loss" not in self.values:
            self.values["train_loss"] = run.block.curvature.loss

    def test(self) -> None:
        """What is asked once: is this a second derivative, and how sure is the loss."""
        self.tested = (self_test(self.full).words,)
        found = self.subject.evaluate(metrics=("loss",))
        self.values |= {"train_loss": found["loss"], "train_loss_error": found.get("loss_error", math.nan)}

    def close(self) -> None:
        """Free what is held."""
        for run in (*self.runs, *([self.everything] if self.everything else [])):
            run.block.close()
        self.full.close()

    # --- what is known ----------------------------------------------------------------------------------------------

    def report(self, done: float = 1.0, last: bool = False) -> Reading:
        """The reading of now."""
        known = [run.numbers() for run in self.runs]
        everything = known[0] if len(known) == 1 else self.everything.numbers() if self.everything else None
        self.done = 1.0 if last else max(self.done, min(done, 0.99))
        values = (
            self.values | layer_values(known, self.norms, self.chosen) | shares(known) | whole_values(known, everything)
        )
        values["products"] = sum(run.block.products for run in self.all())
        met = all(k.met for k in known) and (everything is None or everything.met)
        return self.probe.reading(
            self.done, values, coords=self.coords, converged=last and met, notes=self.notes(known, everything)
        )

    def all(self) -> list[BlockRun]:
        """The layers' runs and that of the whole."""
        return [*self.runs, *([self.everything] if self.everything else [])]

    def notes(self, known: Sequence[BlockNumbers], everything: BlockNumbers | None) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        subject = self.subject
        said = [*subject.notes, *self.tested, KINKS, *coverage_words(self.covered, self.unused)]
        if subject.available is None or subject.examples < subject.available:
            said.append(f"{subject.on}: {SUBSET}")
        said += [f"{run.block.group.name}: {run.rounded}" for run in self.all() if run.rounded]
        if self.probe.minimum and not self.probe.aim().bottom:
            said.append("the minimum was not sought: this matrix has no negative eigenvalues where the loss is convex")
        if everything is not None and everything.met and all(k.met for k in known):
            said.append(agreement(known, everything))
        return tuple(said)
