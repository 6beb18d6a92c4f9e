"""One Lanczos run and what is read off it: extreme eigenvalues, density, sums over the spectrum, trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from workbench.numerics import trace as traces
from workbench.numerics.basis import norm
from workbench.numerics.density import between_starts, grid_length, nuclear_norm, spectral_density, spectral_sum
from workbench.numerics.factorisation import Precision
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.operator import Operator
from workbench.numerics.ritz import Judged
from workbench.numerics.sampling import Draw
from workbench.numerics.trace import Deflation, TraceEstimate
from workbench.operators.curvature import Curvature
from workbench.selftest import check_symmetry, self_test

Floats = NDArray[np.float64]
Storage = Literal["operator", "bfloat16", "host"]
"""Where a Lanczos basis lies: beside the model, there in half precision, or in the host's memory."""
DEPTH = 30
"""Products that a density takes at least: its error falls with depth, and fewer leave it shapeless."""
NEAR_ZERO = 0.05
"""The minimum need not be known better than the tolerance times this share of the spectrum's scale."""
CANCELLING = 0.5
"""The trace need not be known better than the tolerance times this share of Σ|λ|, where its parts cancel."""
MOST_ROWS, CHEAP_BYTES = 256, 2**24
"""Basis vectors that a small model gets, as far as they fit into so many bytes: a processor's cache."""
MOST_PRODUCTS = 1000
"""Products that the eigenvalues may take, beside twenty for each one that is wanted."""
FURTHER = 3_000_000
"""Number of the random vector that the density's second start is: far from those of other purposes."""
MOST_SAMPLES = 1000
"""Random vectors that a trace may take where its exact sum is out of reach."""
TRACE_PRODUCTS = 80
"""Products that a trace usually takes."""


@dataclass(frozen=True)
class Aim:
    """What a run is to find: ``top`` largest and ``bottom`` smallest eigenvalues, trace and density, how well."""

    top: int = 10
    bottom: int = 1
    tolerance: float = 0.02
    trace: bool = True
    density: bool = True
    storage: Storage = "operator"
    depth: int = DEPTH
    starts: int = 1
    judged: Judged = "residual"

    def rows(self, size: int, itemsize: int) -> int:
        """Vectors in the Lanczos basis before it restarts: more for small models, since restarts cost products."""
        cheap = min(MOST_ROWS, CHEAP_BYTES // (size * itemsize))
        return max(32, 2 * (self.top + self.bottom) + 10, cheap, self.depth + 2 if self.density else 0)

    def basis_bytes(self, size: int, itemsize: int) -> int:
        """What the basis takes beside the model: nothing where it lies in the host's memory."""
        each = {"operator": itemsize, "bfloat16": 2, "host": 0}[self.storage]
        return min(self.rows(size, itemsize) + 1, size) * size * each

    def products(self, size: int) -> int:
        """Products that the whole run usually takes."""
        return self.steps(size) + (TRACE_PRODUCTS if self.trace else 0) + self.further * min(self.depth, size)

    @property
    def further(self) -> int:
        """Random starts of the density beside the first."""
        return self.starts - 1 if self.density else 0

    def steps(self, size: int) -> int:
        """Products that eigenvalues and density usually take, with the look for repeated ones."""
        least = max(8 + 2 * (self.top + self.bottom), self.depth if self.density else 0)
        return min(least + 10 * (self.top > 1), size)


class SpectralRun:
    """One run on an operator that belongs to a curvature; ``values`` and ``coords`` are those of a reading.

    Variables: eigenvalue, residual, estimated_error, converged (rank); eigenvalue_min with its residual and whether it
    converged, negative_curvature; node, weight (node_index), density, cumulative (value), density_error,
    smoothing_width; frobenius, effective_dimension, participation with errors; trace, trace_error; parameters,
    train_loss, train_loss_error, gradient_norm, products. The operator is the curvature, or a function of it.
    """

    def __init__(self, aim: Aim, operator: Operator, curvature: Curvature, draw: Draw) -> None:
        self.aim, self.operator, self.curvature, self.draw = aim, operator, curvature, draw
        self.rows = aim.rows(operator.size, operator.dtype.itemsize)
        self.state: Krylov | None = None
        self.estimate: TraceEstimate | None = None
        self.others: list[tuple[Floats, Floats]] = []
        self.tested: tuple[str, ...] = ()
        self.rounded, self._scale = "", math.nan
        self.values: dict[str, Any] = {}
        atoms = aim.top + aim.bottom
        self.coords: dict[str, Any] = {
            "rank": np.arange(1, aim.top + 1),
            "node_index": np.arange(self.rows + 1 + atoms + aim.further * aim.depth),
            "value": np.full(grid_length(atoms), np.nan),
        }

    # --- eigenvalues and density ------------------------------------------------------------------------------------

    def eigenvalues(self) -> Iterator[None]:
        """The Lanczos run: pauses after each product; self-test and standard error come after the first."""
        aim, draw = self.aim, self.draw  # `fresh` must not hold this run: in a cycle its basis would outlive it
        states = lanczos(
            self.operator,
            draw(0),
            top=aim.top,
            bottom=aim.bottom,
            tolerance=aim.tolerance,
            least=aim.depth if aim.density else 0,
            near_zero=NEAR_ZERO,
            judged=aim.judged,
            basis=self.rows,
            limit=MOST_PRODUCTS + 20 * (aim.top + aim.bottom),
            fresh=lambda i: draw(1 + i),
            store="bfloat16" if aim.storage == "bfloat16" else "operator",
            host=aim.storage == "host",
        )
        for state in finite(states, self.curvature):
            self.state = state
            self.values |= self.extremes(state) | (self.spread(state) if aim.density else {})
            yield
            self.rounded = check_symmetry(state.asymmetry)
            if not self.tested:
                self.test()
        if aim.density:
            self.values |= self.sums()

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
            "estimated_error": state.top_estimates,
            "converged": state.top_converged,
            "products": self.curvature.products,
        }
        if "train_loss" not in self.values:
            gradient = float(norm(self.curvature.gradient))
            found |= {"train_loss": self.curvature.loss, "gradient_norm": gradient, "parameters": self.operator.size}
        return found | (self.lowest(state) if self.aim.bottom else {})

    def lowest(self, state: Krylov) -> dict[str, Any]:
        """The most negative eigenvalue, and whether it is negative beyond residual and rounding."""
        low, residual = float(state.bottom_values[0]), float(state.bottom_residuals[0])
        floor = Precision.of(self.operator.dtype).floor * float(np.abs(state.values).max())
        return {
            "eigenvalue_min": low,
            "eigenvalue_min_residual": residual,
            "eigenvalue_min_converged": bool(state.bottom_converged[0]),
            "negative_curvature": low < -max(residual, floor),
        }

    def spread(self, state: Krylov) -> dict[str, Any]:
        """The density as variables, once the run has two steps."""
        if state.alpha.size < 2 and not state.complete:
            return {}
        size, slack = self.operator.size, self.aim.tolerance
        found = spectral_density(state, size, slack, self.others)
        length = self.coords["node_index"].size
        self.coords["value"] = found.grid
        return {
            "node": padded(found.measure.nodes, length),
            "weight": padded(found.measure.weights, length),
            "density": found.density,
            "density_spread": between_starts(state, size, slack, self.others, found),
            "density_error": found.error,
            "smoothing_width": found.width,
        }

    def sums(self) -> dict[str, Any]:
        """Frobenius norm and effective dimension: means over the density times the number of eigenvalues."""
        state, size = self.state, self.operator.size
        assert state is not None
        ridge, slack = SOFTNESS * max(float(state.top_values[0]), 0.0), self.aim.tolerance
        squares, squares_error = spectral_sum(state, size, slack, np.square, self.others)
        length = math.sqrt(max(squares, 0.0))
        found = {"frobenius": length, "frobenius_error": squares_error / (2 * length) if length else 0.0}
        if ridge > 0:
            soft = spectral_sum(state, size, slack, lambda x: x.clip(0) / (x.clip(0) + ridge), self.others)
            found |= {"effective_dimension": soft[0], "effective_dimension_error": soft[1]}
        return found

    def further(self) -> Iterator[bool]:
        """The density from further random starts, one run of the same depth each, for which the basis is given up.

        Says after each product whether the reading is worth making anew.
        """
        if self.state is None or self.state.complete or not self.aim.further:
            return
        self.state, start = self.state.released(), self.draw
        for k in range(self.aim.further):
            found: Krylov | None = None
            for state in lanczos(self.operator, start(FURTHER + k), top=1, bottom=0, **self.same_depth()):
                found, self.values["products"] = state, self.curvature.products
                yield False
            assert found is not None
            self.others.append((found.alpha, found.beta))
            self.values |= self.spread(self.state) | self.sums()
            if self.estimate is not None:
                self.values |= self.traced(self.estimate)
            yield True

    def same_depth(self) -> dict[str, Any]:
        """How a further start is run: as deep as the first, without a restart, for its quadrature alone."""
        depth = min(self.aim.depth, self.operator.size)
        half = self.aim.storage == "bfloat16"
        return {
            "limit": depth,
            "least": depth,
            "basis": max(depth, 5),
            "confirm": False,
            "store": "bfloat16" if half else "operator",
            "host": self.aim.storage == "host",
        }

    # --- trace ------------------------------------------------------------------------------------------------------

    def sum(self) -> Iterator[bool]:
        """Exactly inside the basis, by random vectors (or, when cheaper, by the whole diagonal) outside it.

        Says after each product whether the reading is worth making anew: late samples change little.
        """
        state = self.state
        assert state is not None
        if state.complete:
            self.estimate = TraceEstimate(math.fsum(state.values), 0.0, 0, 0, exact=True)
            self.values |= self.traced(self.estimate)
            return
        estimates = traces.trace(
            self.operator,
            self.draw,
            tolerance=self.aim.tolerance,
            scale=self.scale(state),
            deflation=Deflation(state.span(), state.values),
            limit=None if self.operator.size <= traces.LARGEST_EXACT else MOST_SAMPLES,
            near_zero=CANCELLING,
        )
        for estimate in estimates:
            self.estimate = estimate
            self.values |= self.traced(estimate)
            yield estimate.samples <= 16 or estimate.samples % 4 == 0

    def traced(self, estimate: TraceEstimate) -> dict[str, Any]:
        """The trace, and with the Frobenius norm the participation dimension tr² / ‖·‖_F², free of the trace's noise.

        The square of an estimate is too large by its variance, which is therefore taken off.
        """
        value, error = estimate.value, estimate.error
        found = {"trace": value, "trace_error": error, "products": self.curvature.products}
        length, off = self.values.get("frobenius", math.nan), self.values.get("frobenius_error", math.nan)
        if length > 0 and math.isfinite(error):
            deviation = error / (1.96 * traces.INFLATION)
            share = max(value**2 - deviation**2, 0.0) / length**2
            spread = math.hypot(2 * abs(value) * error / length**2, 2 * share * off / length)
            found |= {"participation": share, "participation_error": spread}
        return found

    def scale(self, state: Krylov) -> float:
        """Σ|λ|, the size of what may cancel in a trace: over the known eigenvalues, or by quadrature over all."""
        if math.isnan(self._scale):
            known = float(np.abs(state.values).sum())
            self._scale = max(known, nuclear_norm(state, self.operator.size, self.aim.tolerance))
        return self._scale

    def allowed(self) -> float:
        """The error at which the trace counts as converged."""
        assert self.state is not None
        value = self.estimate.value if self.estimate else math.nan
        return traces.allowed_error(value, self.aim.tolerance, self.scale(self.state), CANCELLING)

    # --- how far it is ----------------------------------------------------------------------------------------------

    @property
    def converged(self) -> bool:
        """Whether every rule that was asked for is met."""
        summed = not self.aim.trace or (
            self.estimate is not None and (self.estimate.exact or self.estimate.error <= self.allowed())
        )
        return self.state is not None and self.state.done and summed

    @property
    def left(self) -> float:
        """How many products are probably still to come."""
        size, aim, state, estimate = self.operator.size, self.aim, self.state, self.estimate
        assert state is not None
        more = (aim.further - len(self.others)) * min(aim.depth, size) * (not state.complete)
        if estimate is None:
            ahead = 0.0 if state.done else max(aim.steps(size) - state.products, 1 + 0.2 * state.products)
            return ahead + (0 if state.complete or not aim.trace else min(size, TRACE_PRODUCTS)) + more
        samples = traces.samples_needed(estimate, self.allowed()) if estimate.samples > 1 else TRACE_PRODUCTS
        return max(min(samples, size + estimate.samples) - estimate.products, 1.0) + more

    def notes(self) -> tuple[str, ...]:
        """What the run itself has to say of its numbers."""
        said = [*self.tested, *((self.rounded,) if self.rounded else ()), *self.cancelling()]
        if self.aim.judged == "estimate":
            said.append(ESTIMATED)
        if self.aim.top > self.operator.size:
            said.append(f"there are only {self.operator.size} eigenvalues, fewer than the {self.aim.top} asked for")
        return tuple(said)

    def cancelling(self) -> tuple[str, ...]:
        """Whether the trace met only what is asked of one whose parts cancel."""
        found, tolerance = self.estimate, self.aim.tolerance
        if not self.converged or found is None or found.exact or found.error <= tolerance * abs(found.value):
            return ()
        assert self.state is not None
        whole = f"Σ|λ|, about {self.scale(self.state):.2g}"
        return (f"eigenvalues of both signs cancel in the trace: its error is small beside {whole}, not beside itself",)


ESTIMATED = "eigenvalues count as converged by their estimated error, residual²/gap, which is no bound"
"""What a note says of pairs that were not judged by their residual."""
SOFTNESS = 1e-3
"""z in the effective dimension Σ λ / (λ + z), over the largest eigenvalue."""


def finite(states: Iterator[Krylov], curvature: Curvature) -> Iterator[Krylov]:
    """The same states; a loss that is not finite is named before the products that it spoils."""
    try:
        yield from states
    except ArithmeticError as problem:
        if math.isfinite(curvature.loss):
            raise
        raise ValueError(
            f"the loss at the model's own point is {curvature.loss}, so it has no curvature; look at the "
            "weights (did training diverge?), the inputs and the targets."
        ) from problem


def padded(array: Floats, length: int) -> Floats:
    """The array with nan behind it, (length,)."""
    return np.append(array, np.full(length - array.size, np.nan))
