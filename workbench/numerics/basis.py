"""Long vectors held as rows, with every coefficient between them computed in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Store = Literal["operator", "float32", "bfloat16"]
"""How basis vectors are kept: in the operator's dtype, in float32, or in bfloat16 (half the memory, accuracy 1e-3)."""

_CHUNK = 1 << 13
_SLAB_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 25}


class Basis:
    """Up to ``rows`` vectors of ``size`` entries that are kept orthonormal by their user.

    Plain float32 reductions over millions of entries lose two digits of every eigenvalue. Float32 rows on a CPU are
    therefore multiplied in chunks of 8192 columns whose sums are added in float64, which is as good and needs no
    copies; elsewhere (matrix units may round float32 further without asking) slabs of columns are converted to float64.
    Memory: rows ·
    size entries of the stored dtype, plus one slab of at most 2 MB (CPU) or 256 MB (CUDA). ``host`` keeps the rows in
    the host's memory; slabs then travel to the device.
    """

    def __init__(
        self,
        rows: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        store: Store = "operator",
        host: bool = False,
    ) -> None:
        stored = {"operator": dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[store]
        place = torch.device("cpu") if host else device
        self.rows = torch.empty(rows, size, dtype=stored, device=place)
        self.size, self.dtype, self.device = size, dtype, device
        self.width = max(1, _SLAB_ENTRIES.get(device.type, 1 << 21) // max(rows, 1))

    def _slabs(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, self.size, self.width):
            columns = slice(first, min(first + self.width, self.size))
            yield columns, self.rows[:count, columns].to(device=self.device, dtype=torch.float64)

    def row(self, index: int) -> Tensor:
        """Row ``index`` in the dtype and on the device of the operator."""
        return self.rows[index].to(device=self.device, dtype=self.dtype)

    def put(self, index: int, vector: Tensor) -> None:
        """Store a vector as row ``index``."""
        self.rows[index].copy_(vector)

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows."""
        if first != second:
            self.rows[[first, second]] = self.rows[[second, first]]

    def _pieces(self, count: int, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Slabs and parts of vectors to multiply: float32 as it lies where that is exact enough, else float64."""
        as_they_lie = self.device.type == "cpu" and self.rows.dtype == torch.float32
        width, dtype = (_CHUNK, torch.float32) if as_they_lie else (self.width, torch.float64)
        for slab, *parts in zip(self.rows[:count].split(width, 1), *(v.split(width) for v in vectors), strict=True):
            yield slab.to(device=self.device, dtype=dtype), *parts

    def project(self, vector: Tensor, count: int) -> Tensor:
        """Float64 inner products of the first ``count`` rows with a vector: (count,)."""
        total = torch.zeros(count, dtype=torch.float64, device=self.device)
        for slab, part in self._pieces(count, vector):
            total += slab @ part.to(slab.dtype)
        return total

    def remove(self, vector: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The part of a vector orthogonal to the first ``count`` rows, and the coefficients taken out (two passes).

        Two passes suffice: what the first leaves behind, because the rows are orthonormal only to rounding, is what
        the second removes.
        """
        first = self.project(vector, count)
        second = torch.zeros_like(first)
        if not count:
            return vector.clone(), first
        rest = torch.empty_like(vector)
        for slab, part, out in self._pieces(count, vector, rest):
            moved = torch.addmv(part.to(slab.dtype), slab.T, first.to(slab.dtype), alpha=-1)
            second += slab @ moved
            out.copy_(moved)
        for slab, out in self._pieces(count, rest):
            out.copy_(torch.addmv(out.to(slab.dtype), slab.T, second.to(slab.dtype), alpha=-1))
        return rest, first + second

    def rotate(self, transform: Tensor) -> None:
        """Replace the first m rows by combinations of the first n, ``transform`` (n, m), in place by slabs."""
        for columns, slab in self._slabs(transform.shape[0]):
            self.rows[: transform.shape[1], columns] = (transform.T @ slab).to(self.rows)

    def combine(self, transform: Tensor) -> Tensor:
        """Combinations (m, size) of the first n rows by ``transform`` (n, m), in the operator's dtype."""
        out = torch.empty(transform.shape[1], self.size, dtype=self.dtype, device=self.device)
        for columns, slab in self._slabs(transform.shape[0]):
            out[:, columns] = (transform.T @ slab).to(self.dtype)
        return out


def norm(vector: Tensor) -> Tensor:
    """Euclidean length, summed in float64: a 0-d tensor on the vector's device."""
    slabs = vector.split(1 << 21)
    return torch.stack([torch.linalg.vector_norm(slab, dtype=torch.float64) ** 2 for slab in slabs]).sum().sqrt()


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner product summed in float64: a 0-d tensor on the vectors' device."""
    pairs = zip(first.split(1 << 21), second.split(1 << 21), strict=True)
    return torch.stack([a.double() @ b.double() for a, b in pairs]).sum()
