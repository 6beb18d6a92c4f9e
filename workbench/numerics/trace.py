"""Traces of symmetric operators from products: random estimates with intervals, and the exact sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student
from torch import Tensor

from workbench.numerics.basis import Basis, dot
from workbench.numerics.factorisation import Precision
from workbench.numerics.operator import Operator, coordinate_block

FEWEST_SAMPLES = 8
"""Samples below which no interval may end a run."""

LOOK_FACTOR = 1.5
"""Intervals may end a run only when the number of samples has grown by this factor since the last look."""

INFLATION = 1.15
"""Factor on every interval, since a run that ends when its interval is short covers less than one of fixed length."""

FEW = 8.0
"""A further factor 1 + FEW / n² for n samples: of eight samples with two values, a plain interval holds only 92 %."""

FIRST_PROBE = 1_000_000
"""Number of the first random vector drawn for traces: far from those that Lanczos runs draw, so independent."""

LARGEST_EXACT = 20_000
"""Size up to which the exact sum may replace an estimate that would need as many products."""


class Drawing(Protocol):
    """Random vectors by number, such as :class:`workbench.numerics.sampling.Draw`."""

    def __call__(
        self,
        vector: int,
        chunk: int | None = None,
        *,
        size: int | None = None,
        kind: Literal["normal", "rademacher"] = "normal",
    ) -> Tensor: ...


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with the half-width ``error`` of its 95 % interval; nan where it is not known, 0 with ``exact``.

    ``samples`` is the number of independent samples, ``products`` that of products so far; ``look`` marks the moments
    at which a stopping rule may read the error.
    """

    value: float
    error: float
    samples: int
    products: int
    exact: bool = False
    look: bool = False


@dataclass(frozen=True, eq=False)
class Deflation:
    """Orthonormal rows ``vectors`` (k, size) and their Rayleigh quotients ``values`` (k,), as Ritz pairs are.

    Estimates that use it stay unbiased whether the pairs are converged or not; the better they are, the smaller the
    spread.
    """

    vectors: Tensor
    values: ArrayLike

    @property
    def trace(self) -> float:
        """The trace within the span of the rows."""
        return float(np.sum(np.asarray(self.values, dtype=np.float64)))

    def complement(self, vector: Tensor) -> Tensor:
        """The part of a vector that is orthogonal to the rows."""
        kept_alike = self.vectors.dtype == vector.dtype and self.vectors.device == vector.device
        rest = vector.clone()
        # rows kept elsewhere, or in another precision, are fetched a few at a time: all at once may not fit
        for part in (self.vectors,) if kept_alike else self.vectors.split(4):
            rows = part.to(vector)
            rest -= rows.T @ (rows @ vector)
        return rest


def half_width(samples: ArrayLike) -> float:
    """Half of the mean's 95 % t-interval, inflated for optional stopping; nan for fewer than 2 samples."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size < 2:
        return math.nan
    return reach(values.size) * float(values.std(ddof=1)) / math.sqrt(values.size)


def reach(samples: int) -> float:
    """Standard errors that a 95 % interval of a mean of so many samples reaches, inflated for optional stopping."""
    return float(INFLATION * (1 + FEW / samples**2) * student.ppf(0.975, samples - 1))


def hutchinson(
    operator: Operator, draw: Drawing, *, deflation: Deflation | None = None, limit: int | None = None,
    kind: Literal["normal", "rademacher"] = "rademacher", first: int = FIRST_PROBE,
) -> Iterator[TraceEstimate]:  # fmt: skip
    """Mean of vᵀAv over random v outside ``deflation``, plus the trace inside it; yields after each product.

    One-sample variance for ±1 entries: 2 (‖A‖_F² - Σ A_ii²) of the deflated operator; for normal ones 2 ‖A‖_F².
    Memory: two vectors. Ends after ``limit`` products (default: never). Source: Hutchinson 1989; Meyer et al. 2021
    (deflation).
    """
    samples: list[float] = []
    inside = deflation.trace if deflation else 0.0
    next_look = FEWEST_SAMPLES
    while limit is None or len(samples) < limit:
        probe = _probe(operator, draw, first + len(samples), kind)
        probe = deflation.complement(probe) if deflation else probe
        samples.append(_finite(float(dot(probe, operator.matvec(probe)))))
        count = len(samples)
        look = count == next_look
        next_look = math.ceil(count * LOOK_FACTOR) if look else next_look
        yield TraceEstimate(inside + float(np.mean(samples)), half_width(samples), count, count, look=look)


def _probe(operator: Operator, draw: Drawing, number: int, kind: Literal["normal", "rademacher"]) -> Tensor:
    return draw(number, size=operator.size, kind=kind).to(device=operator.device, dtype=operator.dtype)


def _finite(sample: float) -> float:
    if not math.isfinite(sample):
        raise ArithmeticError("A product has entries that are not finite; look at the loss and its gradient first.")
    return sample


def hutch_plus_plus(
    operator: Operator, draw: Drawing, products: int, *, first: int = FIRST_PROBE
) -> Iterator[TraceEstimate]:
    """Trace inside a sketched range plus Hutchinson outside, a third of ``products`` each; yields after each product.

    Exact for operators of rank at most ``products // 3``. Pays above some 50 products on spectra that fall off. While
    the sketch grows, the estimate is plain Hutchinson of the sketch's own samples; while the range is multiplied it
    stays. Memory: ``products / 3`` vectors. Source: Meyer, Musco, Musco and Woodruff 2021.
    """
    third = products // 3
    if third < 1:
        raise ValueError(f"Hutch++ needs at least 3 products; got {products}.")
    span = _Span(operator, third)
    samples: list[float] = []
    estimate = TraceEstimate(math.nan, math.nan, 0, 0)
    for i in range(third):
        probe = _probe(operator, draw, first + i, "rademacher")
        image = operator.matvec(probe)
        samples.append(_finite(float(dot(probe, image))))
        span.add(image)
        estimate = TraceEstimate(float(np.mean(samples)), half_width(samples), i + 1, i + 1)
        yield estimate
    inside = 0.0
    for i in range(span.count):
        row = span.basis.row(i)
        inside += float(dot(row, operator.matvec(row)))
        yield replace(estimate, products=third + i + 1)
    deflation = Deflation(span.basis.rows[: span.count], [inside])
    rest = hutchinson(operator, draw, deflation=deflation, limit=products - third - span.count, first=first + third)
    for estimate in rest:
        yield replace(estimate, products=third + span.count + estimate.products)


class _Span:
    """An orthonormal basis of the vectors added so far; what adds nothing new is left out."""

    def __init__(self, operator: Operator, rows: int) -> None:
        self.basis = Basis(rows, operator.size, operator.dtype, operator.device)
        self.threshold = Precision.of(operator.dtype).floor
        self.count = 0

    def add(self, vector: Tensor) -> tuple[NDArray[np.float64], bool]:
        """Coefficients of a vector in the basis, grown by one where needed: (count,), and whether it grew."""
        rest, taken = self.basis.remove(vector, self.count)
        length = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
        coefficients = taken.cpu().numpy()
        if length <= self.threshold * math.hypot(length, float(np.linalg.norm(coefficients))):
            return coefficients, False
        rest, more = self.basis.remove(rest / length, self.count)
        self.basis.put(self.count, rest / float(torch.linalg.vector_norm(rest, dtype=torch.float64)))
        self.count += 1
        return np.append(coefficients + length * more.cpu().numpy(), length), True


def xtrace(operator: Operator, draw: Drawing, products: int, *, first: int = FIRST_PROBE) -> Iterator[TraceEstimate]:
    """Each of q test vectors estimates what the range sketched by the q - 1 others leaves; yields after each of them.

    Exact for operators of rank at most q - 1, q = ``products // 2``. Test vectors are uniform on the sphere of radius
    √size, and each estimate is rescaled by the dimension that is left. Its estimates share a sketch, so their spread
    is optimistic: the interval is widened by 1.6. Memory: ``products`` vectors (basis and test vectors). Source:
    Epperly, Tropp and Webber 2024; for dependent images, the leave-one-out projector changes only for test vectors
    that alone carry a direction.
    """
    if products < 4:
        raise ValueError(f"XTrace needs at least 4 products; got {products}.")
    run = _XTrace(operator, products // 2)
    for i in range(products // 2):
        probe = _probe(operator, draw, first + i, "normal")
        run.add(probe * (math.sqrt(operator.size) / float(torch.linalg.vector_norm(probe, dtype=torch.float64))))
        estimates = run.estimates()
        count = estimates.size
        width = student.ppf(0.975, count - 1) * estimates.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
        yield TraceEstimate(float(estimates.mean()), float(1.6 * width), count, run.products)


class _XTrace:
    """Small matrices of the method: R = Qᵀ A Ω, W = Qᵀ Ω, H = Qᵀ A Q, d_i = ω_iᵀ A ω_i, with Q spanning A Ω."""

    def __init__(self, operator: Operator, count: int) -> None:
        self.operator, self.span, self.products = operator, _Span(operator, count), 0
        self.images, self.inner = np.zeros((count, count)), np.zeros((count, count))
        self.core = np.zeros((count, count))
        self.tests: list[Tensor] = []
        self.forms: list[float] = []

    def add(self, test: Tensor) -> None:
        """One test vector: its image, and, where that adds a direction, the direction's image too."""
        i, basis = len(self.tests), self.span.basis
        image = self.operator.matvec(test)
        self.tests.append(test)
        self.forms.append(_finite(float(dot(test, image))))
        coefficients, grew = self.span.add(image)
        self.images[: coefficients.size, i] = coefficients
        self.products += 1
        self.inner[: self.span.count, i] = basis.project(test, self.span.count).cpu().numpy()
        if grew:
            last = self.span.count - 1
            row = basis.row(last)
            self.inner[last, :i] = [float(dot(row, earlier)) for earlier in self.tests[:-1]]
            column = basis.project(self.operator.matvec(row), last + 1).cpu().numpy()
            self.core[: last + 1, last] = self.core[last, : last + 1] = column
            self.products += 1

    def estimates(self) -> NDArray[np.float64]:
        """The leave-one-out estimates, one for each test vector."""
        rank, count, size = self.span.count, len(self.tests), self.operator.size
        images, inner, core = self.images[:rank, :count], self.inner[:rank, :count], self.core[:rank, :rank]
        alone = _directions_alone(images)
        kept = inner - alone * (alone * inner).sum(0)
        inside = np.trace(core) - (alone * (core @ alone)).sum(0)
        outside = np.array(self.forms) - 2 * (kept * images).sum(0) + (kept * (core @ kept)).sum(0)
        left = size - (kept**2).sum(0)
        dimension = size - (rank - (alone**2).sum(0).round())
        scale = np.divide(dimension, left, out=np.zeros(count), where=left > 1e-10 * size)
        return inside + scale * outside


def _directions_alone(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns s_i (rank, count): the unit direction that only image i reaches; 0 where the others span it too."""
    if not images.size:
        return np.zeros(images.shape)
    lengths = np.linalg.norm(images, axis=0)
    scaled = images / np.where(lengths > 0, lengths, 1.0)
    left, values, right = np.linalg.svd(scaled, full_matrices=False)
    solid = values > images.shape[1] * np.finfo(float).eps * values[0]
    leverage = (right[solid] ** 2).sum(0)
    directions = left[:, solid] @ (right[solid] / values[solid, None])
    directions /= np.where(leverage > 0, np.linalg.norm(directions, axis=0), 1.0)
    return np.where(leverage > 1 - 1e-8, directions, 0.0)


def exact_trace(
    operator: Operator, *, block: int = 16, meanwhile: TraceEstimate | None = None
) -> Iterator[TraceEstimate]:
    """The sum of the diagonal, from ``size`` products in blocks of coordinate vectors; yields after each block.

    Until the last block the estimate is ``meanwhile`` (or nan): the part of a diagonal says nothing of the rest.
    """
    before = meanwhile or TraceEstimate(math.nan, math.nan, 0, 0)
    parts: list[float] = []
    for first in range(0, operator.size, block):
        unit = coordinate_block(operator, first, block)
        diagonal = operator.matmat(unit)[first : first + block].diagonal()
        parts += diagonal.detach().double().tolist()
        products = before.products + len(parts)
        if len(parts) < operator.size:
            yield replace(before, products=products, look=False)
    total = _finite(math.fsum(parts))
    yield TraceEstimate(total, 0.0, before.samples, before.products + len(parts), exact=True, look=True)


def trace(
    operator: Operator, draw: Drawing, *, tolerance: float, scale: float, deflation: Deflation | None = None,
    limit: int | None = None, near_zero: float = 0.05, first: int = FIRST_PROBE,
) -> Iterator[TraceEstimate]:  # fmt: skip
    """Deflated Hutchinson until the error is at most ``tolerance`` · max(|trace|, ``near_zero`` · ``scale``).

    ``scale`` is the size of what may cancel, the sum of |eigenvalues| known so far, so that traces near zero end too.
    From the spread so far it predicts the samples that are still needed; when these outnumber the operator's size (at
    most 20000), or the size is at most 8, the exact sum takes over. Ends without reaching the tolerance after
    ``limit`` products. The last estimate's ``error`` tells: compare it with :func:`allowed_error`.
    """
    estimate = None
    if operator.size > FEWEST_SAMPLES:
        for estimate in hutchinson(operator, draw, deflation=deflation, limit=limit, first=first):
            yield estimate
            if not estimate.look:
                continue
            allowed = allowed_error(estimate.value, tolerance, scale, near_zero)
            if estimate.error <= allowed:
                return
            if exact_is_cheaper(estimate, allowed, operator.size, limit):
                break
        else:
            return
    yield from exact_trace(operator, meanwhile=estimate)


def allowed_error(value: float, tolerance: float, scale: float, near_zero: float = 0.05) -> float:
    """``tolerance`` · max(|value|, ``near_zero`` · ``scale``)."""
    return tolerance * max(abs(value), near_zero * scale)


def samples_needed(estimate: TraceEstimate, allowed: float) -> float:
    """Samples in all that should bring the error down to ``allowed``, from the spread so far; infinite for 0."""
    spread = estimate.error / (1 + FEW / max(estimate.samples, 1) ** 2)  # more samples need less caution
    return estimate.samples * (spread / allowed) ** 2 if allowed > 0 else math.inf


def exact_is_cheaper(estimate: TraceEstimate, allowed: float, size: int, limit: int | None = None) -> bool:
    """Whether the exact sum costs fewer further products than sampling on, and is within size and product limits."""
    fits = size <= LARGEST_EXACT and (limit is None or estimate.products + size <= limit)
    return fits and samples_needed(estimate, allowed) - estimate.samples > size
