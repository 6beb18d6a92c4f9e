"""Singular values of features that come in batches, with those of all but one group of examples, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.stats import jackknife_error

Floats = NDArray[np.float64]

TILE = 2048
"""Rows, or columns, that are turned to float64 together."""


@dataclass(frozen=True, eq=False)
class RowSpectrum:
    """Root mean squares σ/√n (k,) along the n rows' singular vectors, largest first, k = min(n, d).

    ``replicates`` (groups, k) are the same without each group of rows; those that are not known yet are left out.
    """

    values: Floats
    replicates: Floats

    @property
    def error(self) -> Floats:
        """Standard error of each value by the jackknife over groups; nan without."""
        return jackknife_error(self.replicates)


class GroupedRows:
    """What rows (n, d) leave behind from which the spectrum of all, and of all but one group, follows in float64.

    Every ``groups``-th row is in one group (1: none is left out). With few columns the second moments of each group are
    kept, groups · d² numbers; else the rows in their own precision, n · d, whichever is less. Squares in float64 tell
    singular values apart down to about 1e-7 of the largest; smaller ones are 0. ``centred`` takes the mean of the rows
    that are used away first; what is left of equal rows is then 0 and not rounding.
    """

    def __init__(
        self, n: int, d: int, groups: int, centred: bool, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.n, self.d, self.groups, self.centred, self.dtype = n, d, max(groups, 1), centred, dtype
        self.seen, self.norm = 0, torch.zeros((), dtype=torch.float64, device=device)
        self.kept = None if summed(n, d, groups, dtype) else torch.empty(n, d, dtype=dtype, device=device)
        self.moments = _Moments(d, self.groups, centred, device) if self.kept is None else None

    def add(self, rows: Tensor) -> None:
        """Take in rows (b, d), any number at a time."""
        self.norm += (torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
        if self.kept is not None:
            self.kept[self.seen : self.seen + len(rows)] = rows
        elif self.moments is not None:
            self.moments.add(rows, self.seen)
        self.seen += len(rows)

    def spectra(self, errors: bool = True) -> Iterator[RowSpectrum]:
        """The spectrum of the rows so far, then with one more replicate each: one decomposition of k x k at a time."""
        source = self._source()
        size, replicates = min(self.seen, self.d), list[Floats]()
        values = self._values(source.matrix(None), self.seen, size)
        yield RowSpectrum(values, np.empty((0, size)))
        for group in range(self.groups if errors and self.groups > 1 and self.seen >= 2 * self.groups else 0):
            left = self.seen - len(range(group, self.seen, self.groups))
            replicates.append(self._values(source.matrix(group), left, size))
            yield RowSpectrum(values, np.array(replicates))

    def _source(self) -> _Moments | _Gram:
        """What gives the matrices: second moments (d, d), or the rows' inner products (n, n) where those are fewer."""
        if self.moments is not None:
            return self.moments
        assert self.kept is not None
        rows = self.kept[: self.seen]
        if self.seen < self.d:
            return _Gram.of(rows, self.groups, self.centred)
        found = _Moments(self.d, 1, self.centred, rows.device, rows=rows, held=self.groups)
        for at in range(0, self.seen, TILE):
            found.add(rows[at : at + TILE], at)
        return found

    def _values(self, matrix: Tensor, count: int, size: int) -> Floats:
        """σ/√count, padded with zeros to ``size``; nan where the matrix is not finite."""
        if not bool(matrix.isfinite().all()):
            return np.full(size, np.nan)
        rounding = (16 * torch.finfo(self.dtype).eps) ** 2 * float(self.norm)
        squares = torch.linalg.eigvalsh(matrix).flip(0).cpu().numpy()
        floor = len(squares) * np.finfo(np.float64).eps * squares[0]
        known = np.where((squares > floor) & (squares.clip(0).sum() > rounding), squares, 0.0)
        return np.pad(np.sqrt(known[:size] / count), (0, max(size - len(known), 0)))


def summed(n: int, d: int, groups: int, dtype: torch.dtype) -> bool:
    """Whether second moments of each group take less memory than the rows themselves."""
    return (max(groups, 1) + 2) * 8 * d < n * dtype.itemsize and d <= n


def kept_bytes(n: int, d: int, groups: int, dtype: torch.dtype) -> int:
    """Memory that :class:`GroupedRows` keeps of rows (n, d)."""
    return (max(groups, 1) + 2) * 8 * d * d if summed(n, d, groups, dtype) else n * d * dtype.itemsize


@dataclass(eq=False)
class _Moments:
    """Second moments (groups, d, d) about a shift, near the mean where they are centred, so that nothing cancels.

    With ``rows`` those of a group are summed when they are asked for, ``held`` groups there, instead of kept.
    """

    d: int
    groups: int
    centred: bool
    device: torch.device | str
    rows: Tensor | None = None
    held: int = 0
    shift: Tensor | None = None
    counts: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self.squares = torch.zeros(self.groups, self.d, self.d, dtype=torch.float64, device=self.device)
        self.sums = torch.zeros(self.groups, self.d, dtype=torch.float64, device=self.device)
        self.counts = [0] * self.groups

    def add(self, rows: Tensor, first: int) -> None:
        """Take in rows, the first of which is number ``first`` of all."""
        every = rows.double()
        if self.centred:
            self.shift = every.mean(0) if self.shift is None else self.shift
            every = every - self.shift
        for group in range(self.groups):
            part = every[(group - first) % self.groups :: self.groups]
            self.squares[group].addmm_(part.T, part)
            self.sums[group] += part.sum(0)
            self.counts[group] += len(part)

    def matrix(self, without: int | None) -> Tensor:
        """Σ x xᵀ (d, d) over the rows that are kept, less their mean where centred."""
        squares, sums, count = self.squares.sum(0), self.sums.sum(0), sum(self.counts)
        if without is not None:
            part = self._part(without)
            squares, sums, count = squares - part[0], sums - part[1], count - part[2]
        return squares - torch.outer(sums, sums) / count if self.centred else squares

    def _part(self, group: int) -> tuple[Tensor, Tensor, int]:
        if self.rows is None:
            return self.squares[group], self.sums[group], self.counts[group]
        rows = self.rows[group :: self.held]
        found = _Moments(self.d, 1, self.centred, self.device, shift=self.shift)
        for at in range(0, len(rows), TILE):
            found.add(rows[at : at + TILE], 0)
        return found.squares[0], found.sums[0], len(rows)


@dataclass(frozen=True, eq=False)
class _Gram:
    """Inner products (n, n) of fewer rows than columns, taken about their mean where they are centred."""

    products: Tensor
    groups: int
    centred: bool

    @classmethod
    def of(cls, rows: Tensor, groups: int, centred: bool) -> _Gram:
        found = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for at in range(0, rows.shape[1], TILE):
            part = rows[:, at : at + TILE].double()
            part = part - part.mean(0) if centred else part
            found.addmm_(part, part.T)
        return cls(found, groups, centred)

    def matrix(self, without: int | None) -> Tensor:
        """The inner products of the rows that are kept, less their mean where centred."""
        n = len(self.products)
        kept = torch.arange(n, device=self.products.device)
        kept = kept if without is None else kept[kept % self.groups != without]
        found = self.products if without is None else self.products[kept][:, kept]
        if not self.centred:
            return found
        means = found.mean(0)
        return found - means - means[:, None] + means.mean()
