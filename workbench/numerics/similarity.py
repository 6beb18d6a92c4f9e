"""Centred kernel alignment (CKA) between many layers at once, tile by tile, with errors from examples left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.stats import jackknife_error

Floats = NDArray[np.float64]

TILE_BYTES = 2**26
"""Memory for the tiles of all Gram matrices together."""
MEDIAN_ROWS = 2048
"""Examples, evenly spaced, whose distances give the median for a Gaussian kernel."""
FEWEST = 5
"""Examples that the unbiased estimate and its jackknife need."""
GROUPS = 64
"""Groups that mini-batches are dealt into, of which one at a time is left out."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Similarities (p, q) of layers, and the same with each example (or group) left out, (m, p, q)."""

    value: Floats
    replicates: Floats

    @property
    def error(self) -> Floats:
        """Standard error of each, (p, q)."""
        return jackknife_error(self.replicates)

    def mean(self, pairs: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """The mean over these pairs of layers, those that are known, with its standard error; nan without any."""
        i, j = np.array(pairs, dtype=int).reshape(-1, 2).T
        known = np.isfinite(self.value[i, j])
        if not known.any():
            return math.nan, math.nan
        again = self.replicates[:, i[known], j[known]].mean(1)
        return float(self.value[i[known], j[known]].mean()), float(jackknife_error(again))


@dataclass(frozen=True, eq=False)
class Kernel:
    """Similarities K_ij of n examples by their features, computed in float64 a tile at a time and never held whole.

    Linear: ⟨x_i, x_j⟩ of centred features; Gaussian: exp(-``scale`` ‖x_i - x_j‖²). ``rows`` (n, d) stay as they came.
    """

    rows: Tensor
    mean: Tensor
    scale: float | None = None

    @classmethod
    def of(cls, rows: Tensor, bandwidth: float | None = None, scale: float | None = None) -> Kernel:
        """The kernel of features (n, d): linear, or Gaussian with a bandwidth in units of the median distance.

        The median of the squared distances is over all n² pairs, each example with itself among them, as Kornblith
        et al. 2019 have it. ``scale`` given: that of another batch.
        """
        made = cls(rows, centre(rows))
        if bandwidth is None:
            return made
        return cls(rows, made.mean, made._scale(bandwidth) if scale is None else scale)

    def tile(self, at: slice, diagonal: bool) -> Tensor:
        """Rows ``at`` of K, (t, n); zero on K's diagonal without ``diagonal``."""
        every = centred(self.rows, self.mean)
        found = every[at] @ every.T
        if self.scale is not None:
            squares = (every**2).sum(1)
            found = (-self.scale * (squares[at, None] + squares - 2 * found).clamp_min(0)).exp()
        if not diagonal:
            found.diagonal(at.start).fill_(0.0)
        return found

    def sums(self, diagonal: bool, step: int) -> Tensor:
        """Σ_j K_ij, (n,)."""
        if self.scale is None:
            every = centred(self.rows, self.mean)
            found = every @ every.sum(0)
            return found if diagonal else found - (every**2).sum(1)
        return torch.cat([self.tile(at, diagonal).sum(1) for at in _tiles(len(self.rows), step)])

    def diagonal(self) -> Tensor:
        """K_ii, (n,)."""
        squares = (centred(self.rows, self.mean) ** 2).sum(1)
        return squares if self.scale is None else torch.ones_like(squares)

    def _scale(self, bandwidth: float) -> float:
        every = centred(self.rows[:: -(-len(self.rows) // MEDIAN_ROWS)], self.mean)
        squares = (every**2).sum(1)
        distances = (squares[:, None] + squares - 2 * every @ every.T).fill_diagonal_(0.0).clamp_min(0)
        flat = distances.flatten()  # selecting is ten times as fast as the sorting that a quantile does
        middle = [flat.kthvalue(k).values for k in ((len(flat) + 1) // 2, len(flat) // 2 + 1)]
        median = float((middle[0] + middle[1]) / 2)
        return 1 / (2 * bandwidth**2 * median) if median else math.nan


def centre(rows: Tensor) -> Tensor:
    """The mean of features (n, d) in float64, (d,)."""
    return rows.mean(0, dtype=torch.float64)


def centred(rows: Tensor, mean: Tensor) -> Tensor:
    """Features less their mean in float64, (n, d); exactly 0 where only rounding is left of all of them.

    What is not finite stays nan: its distance from the mean is then nan, which no comparison calls rounding.
    """
    found = rows.double() - mean
    rounding = 16 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows, dtype=torch.float64)
    alike = (torch.linalg.vector_norm(found) <= rounding) & rounding.isfinite()
    return found.masked_fill(alike, 0.0)


def cka(
    first: Sequence[Kernel], second: Sequence[Kernel], *, debiased: bool = True
) -> Iterator[tuple[float, Estimate | None]]:
    """CKA of all pairs of layers of two models on the same n examples: the share done, and at last the estimate.

    HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)). Debiased: the U-statistic HSIC_1 of Song et al. 2012, which can be negative;
    else the biased tr(KHLH) with H = 1 - 11ᵀ/n. nan for constant features, and debiased below :data:`FEWEST` examples.
    Each example is left out once, exactly, at no further product.

    Cost: n² (Σd + pq) multiplications in float64; memory ``TILE_BYTES``, 8 n p q bytes, and one layer in float64.
    """
    n, step = len(first[0].rows), _step(len(first[0].rows), len(first) + len(second))
    one, two = (_Side.of(kernels, not debiased, step) for kernels in (first, second))
    cross, own_one, own_two = (_Sums(n, debiased) for _ in range(3))
    for at in _tiles(n, step):
        k, m = one.tile(at), two.tile(at)
        cross.add(
            torch.einsum("itn,jtn->tij", k, m),
            torch.einsum("itn,jn->tij", k, two.sums),
            torch.einsum("jtn,in->tij", m, one.sums),
            (one.sums[:, at].T[:, :, None], two.sums[:, at].T[:, None]),
            (one.diagonals[:, at].T[:, :, None], two.diagonals[:, at].T[:, None]),
        )
        for own, side, tile in ((own_one, one, k), (own_two, two, m)):
            across = torch.einsum("itn,in->ti", tile, side.sums)
            sums, diagonals = side.sums[:, at].T, side.diagonals[:, at].T
            own.add(torch.einsum("itn,itn->ti", tile, tile), across, across, (sums, sums), (diagonals, diagonals))
        if at.stop < n:
            yield at.stop / n, None
    a, b = one.totals, two.totals
    top, left, right = cross.all(a[:, None], b), own_one.all(a, a), own_two.all(b, b)
    c, d = one.less, two.less
    tops, lefts, rights = cross.less(c[:, :, None], d[:, None]), own_one.less(c, c), own_two.less(d, d)
    yield 1.0, Estimate(_cosine(top, left, right), _cosine(tops, lefts, rights))


@dataclass(frozen=True, eq=False)
class _Side:
    """All layers of one model: row sums and diagonals (layers, n) of their kernels."""

    kernels: Sequence[Kernel]
    with_diagonal: bool
    sums: Tensor
    diagonals: Tensor

    @classmethod
    def of(cls, kernels: Sequence[Kernel], diagonal: bool, step: int) -> _Side:
        sums = torch.stack([k.sums(diagonal, step) for k in kernels])
        return cls(
            kernels,
            diagonal,
            sums,
            torch.stack([k.diagonal() for k in kernels]) if diagonal else torch.zeros_like(sums),
        )

    def tile(self, at: slice) -> Tensor:
        return torch.stack([k.tile(at, self.with_diagonal) for k in self.kernels])

    @property
    def totals(self) -> Tensor:
        """The sum of each kernel, (layers,)."""
        return self.sums.sum(1)

    @property
    def less(self) -> Tensor:
        """The same without each example, (n, layers)."""
        return (self.totals[:, None] - 2 * self.sums + self.diagonals).T


class _Sums:
    """tr(KL) and 1ᵀKL1 with their parts of each example, from which HSIC follows with all examples or all but one.

    Up to a factor that cancels, HSIC = tr(KL) + s 1ᵀKL1 + u (1ᵀK1)(1ᵀL1), with s and u of :func:`_weights`.
    """

    def __init__(self, n: int, debiased: bool) -> None:
        self.full, self.short = _weights(n, debiased), _weights(n - 1, debiased)
        self.trace: Tensor | float = 0.0
        self.inner: Tensor | float = 0.0
        self.parts: list[Tensor] = []

    def add(
        self, rows: Tensor, kl: Tensor, lk: Tensor, sums: tuple[Tensor, Tensor], diagonals: tuple[Tensor, Tensor]
    ) -> None:
        """Some examples i: Σ_j K_ij L_ij, (KL1)_i, (LK1)_i, (K1)_i and (L1)_i, K_ii and L_ii, examples leading."""
        (k, m), (a, b) = sums, diagonals
        self.trace = self.trace + rows.sum(0)
        self.inner = self.inner + (k * m).sum(0)
        corner = a * b
        inner = rows - kl - lk - k * m + a * m + b * k - corner
        self.parts.append(corner - 2 * rows + self.short[0] * inner)

    def all(self, a: Tensor, b: Tensor) -> Tensor:
        """HSIC of all examples, given the kernels' sums."""
        return self.trace + self.full[0] * self.inner + self.full[1] * a * b

    def less(self, a: Tensor, b: Tensor) -> Tensor:
        """HSIC without each example (n, ...), given the kernels' sums without it."""
        found = torch.cat(self.parts)
        self.parts.clear()
        return found.add_(self.trace + self.short[0] * self.inner).add_(self.short[1] * a * b)


def _weights(n: int, debiased: bool) -> tuple[float, float]:
    if not debiased:
        return -2 / n, 1 / n**2
    return (-2 / (n - 2), 1 / ((n - 1) * (n - 2))) if n > 3 else (math.nan, math.nan)


def _cosine(cross: Tensor, left: Tensor, right: Tensor) -> Floats:
    """cross / √(left right), (..., p, q); nan where one of them is not positive."""
    scale = (left.clamp_min(0).sqrt()[..., :, None] * right.clamp_min(0).sqrt()[..., None, :]).cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, cross.cpu().numpy() / scale, np.nan)


def _step(n: int, layers: int) -> int:
    return max(1, min(n, TILE_BYTES // (8 * n * layers)))


def _tiles(n: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, n)) for at in range(0, n, step)]


class MinibatchCKA:
    """Debiased CKA whose three HSIC_1 are averaged over mini-batches *before* the ratio is taken.

    Each is a U-statistic, so that averages over batches tend to those of all examples; a ratio averaged over batches
    would not. Batches count by their size; below :data:`FEWEST` - 1 examples not at all. Memory: that of one batch.
    Errors: jackknife over up to :data:`GROUPS` groups of batches. Source: Nguyen, Raghu and Kornblith 2021.
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        self.bandwidth, self.batches = bandwidth, 0
        self.scales: tuple[list[float | None], ...] = ()
        self.groups: dict[int, tuple[Tensor, ...]] = {}

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Take in a batch: features (b, d) of each layer of both models."""
        b = len(first[0])
        if b < FEWEST - 1:
            return
        k, m = (self._grams(side, rows) for side, rows in enumerate((first, second)))
        cross = _unbiased(k.flatten(1) @ m.flatten(1).T, k.sum(2) @ m.sum(2).T, _totals(k)[:, None] * _totals(m), b)
        own = [_unbiased((g**2).sum((1, 2)), (g.sum(2) ** 2).sum(1), _totals(g) ** 2, b) for g in (k, m)]
        found = tuple(b * h for h in (cross, *own))
        group = self.batches % GROUPS
        before = self.groups.get(group)
        self.groups[group] = found if before is None else tuple(x + y for x, y in zip(before, found, strict=True))
        self.batches += 1

    def estimate(self) -> Estimate:
        """CKA so far, (p, q); errors need two batches."""
        parts = [torch.stack(found) for found in zip(*self.groups.values(), strict=True)]
        whole = [p.sum(0) for p in parts]
        return Estimate(_cosine(*whole), _cosine(*(w - p for w, p in zip(whole, parts, strict=True))))

    def _grams(self, side: int, rows: Sequence[Tensor]) -> Tensor:
        if len(self.scales) <= side:
            self.scales = (*self.scales, [Kernel.of(r, self.bandwidth).scale for r in rows])
        kernels = [Kernel.of(r, self.bandwidth, s) for r, s in zip(rows, self.scales[side], strict=True)]
        return torch.stack([k.tile(slice(0, len(k.rows)), False) for k in kernels])


def _totals(grams: Tensor) -> Tensor:
    return grams.sum((1, 2))


def _unbiased(trace: Tensor, inner: Tensor, sums: Tensor, n: int) -> Tensor:
    """HSIC_1 from tr(KL), 1ᵀKL1 and (1ᵀK1)(1ᵀL1), with zero diagonals."""
    s, u = _weights(n, True)
    return (trace + s * inner + u * sums) / (n * (n - 3))
