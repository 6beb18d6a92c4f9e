"""Each layer's part of a tangent kernel, from inputs and output gradients or from rows of the Jacobian, tile by tile.

A kernel is (n, C, m, C): examples by outputs on both sides. What a layer contributes is Σ over its parameters of
products of gradients. A weight's gradient is Σ_s g_s x_sᵀ over positions s, so that its part is
Σ_{s,t} (x_s · x_t) (g_s · g_t): no gradient of the weight's size is needed, which pays off unless there are many
positions. Then the gradients are formed a few outputs of the layer at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.operators.tangent_uses import Outer, Role, Use

TILE_BYTES = 2**25
"""What temporary tensors of a contraction may take, each."""
ROWS, COLUMNS = 160, 1280
"""Rows and columns of a symmetric kernel in a tile, about: half of it is computed, in strips that stay in the cache."""
MIRRORED = 40
"""Rows that are turned into columns at once: as many as the cache has room for beside each other."""
ENTRY = 3.0
"""Multiplications in a matrix product that cost as much as one entry read and written."""


@dataclass(frozen=True)
class Extent:
    """How much there is of one side: ``examples`` by ``outputs``, both as they are multiplied."""

    examples: int
    outputs: int


class LayerSide(ABC):
    """What one side keeps of a layer: filled chunk by chunk and output by output."""

    @abstractmethod
    def take(self, at: slice, uses: Sequence[Use]) -> None:
        """Keep what does not depend on the output, for the examples ``at``."""

    @abstractmethod
    def slope(self, at: slice, output: int, uses: Sequence[Use], slopes: Sequence[Tensor | None]) -> None:
        """Keep the gradients of one output."""

    @abstractmethod
    def folded(self) -> LayerSide:
        """With all outputs as one, whose kernel is the sum of theirs."""

    @abstractmethod
    def only(self, output: int) -> LayerSide:
        """Of one output: a view."""


class KernelLayer(ABC):
    """A part of the parameters and how it is contracted; ``uses`` are numbers of calls in the forward pass."""

    uses: tuple[int, ...]

    @abstractmethod
    def numbers(self, outputs: int) -> float:
        """Numbers that are kept for each example."""

    @abstractmethod
    def cost(self, outputs: int) -> float:
        """Multiplications for each pair of examples, about."""

    @abstractmethod
    def open(self, examples: int, outputs: int, like: Tensor) -> LayerSide:
        """Room for one side."""

    @abstractmethod
    def contract(self, kernel: Tensor, left: LayerSide, right: LayerSide) -> None:
        """Add the layer's part to a kernel (n, C, m, C); only its lower triangle of tiles where both sides are one."""


def tiles(kernel: Tensor, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Ranges of examples on both sides; of a symmetric kernel strips of rows up to their own examples."""
    n, outputs, m, _ = kernel.shape
    step = _strip(kernel) if symmetric else n
    most = COLUMNS if symmetric else TILE_BYTES // max(1, n * outputs * kernel.element_size())
    wide = max(1, most // outputs)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        end = rows.stop if symmetric else m
        yield from ((rows, slice(j, min(j + wide, end))) for j in range(0, end, wide))


def _strip(kernel: Tensor) -> int:
    """Examples in a strip of a symmetric kernel; small ones are one strip."""
    n, outputs = kernel.shape[:2]
    return max(1, -(-ROWS // outputs)) if n * outputs >= 2 * ROWS else n


def mirrored(kernel: Tensor) -> Tensor:
    """A symmetric kernel of which :func:`tiles` were computed, completed in place."""
    n, outputs, step = *kernel.shape[:2], _strip(kernel)
    flat, strip = kernel.view(n * outputs, n * outputs), step * outputs
    for first in range(0, len(flat) if step < n else 0, strip):  # within a strip nothing is missing
        for at in range(first, last := min(first + strip, len(flat)), MIRRORED):
            rows = slice(at, min(at + MIRRORED, last))
            flat[:at, rows] = flat[rows, :at].T
    return kernel


# ------------------------------------------------------------------------------------------------ rows of the Jacobian


@dataclass
class RowsSide(LayerSide):
    """Rows of the Jacobian (n, C, width)."""

    layer: Rows
    rows: Tensor

    def take(self, at: slice, uses: Sequence[Use]) -> None:
        """Nothing: rows are made of output gradients."""

    def slope(self, at: slice, output: int, uses: Sequence[Use], slopes: Sequence[Tensor | None]) -> None:
        first = 0
        for part in self.layer.parts:
            place = self.rows[at, output, first : first + part.size]
            for number, role in part.uses:
                slope = slopes[number]
                if slope is not None:
                    place += uses[number].rows(role, slope, at.stop - at.start)
            first += part.size

    def folded(self) -> LayerSide:
        return RowsSide(self.layer, self.rows.flatten(1).unsqueeze(1))

    def only(self, output: int) -> LayerSide:
        return RowsSide(self.layer, self.rows[:, output : output + 1])


@dataclass(frozen=True)
class Part:
    """A parameter by name, its number of scalars, and where it is used; ``mixed``: not in the way of :class:`Pairs`."""

    name: str
    size: int
    uses: tuple[tuple[int, Role], ...]
    mixed: bool = True


@dataclass(frozen=True)
class Rows(KernelLayer):
    """Parameters whose gradients are small beside the output's (norms, biases), kept as they are."""

    parts: tuple[Part, ...]

    @property
    def uses(self) -> tuple[int, ...]:  # type: ignore[override]
        """Calls that its parameters occur in."""
        return tuple(dict.fromkeys(number for part in self.parts for number, _ in part.uses))

    @property
    def width(self) -> int:
        """Scalars in all."""
        return sum(part.size for part in self.parts)

    def numbers(self, outputs: int) -> float:
        return float(outputs * self.width)

    def cost(self, outputs: int) -> float:
        return float(outputs**2 * self.width)

    def open(self, examples: int, outputs: int, like: Tensor) -> RowsSide:
        return RowsSide(self, like.new_zeros(examples, outputs, self.width))

    def contract(self, kernel: Tensor, left: LayerSide, right: LayerSide) -> None:
        assert isinstance(left, RowsSide)
        assert isinstance(right, RowsSide)
        add_rows(kernel, left.rows, right.rows)


def add_rows(kernel: Tensor, left: Tensor, right: Tensor) -> None:
    """kernel += J Jᵀ for rows (n, C, width) of both sides."""
    outputs, flat = kernel.shape[1], kernel.view(kernel.shape[0] * kernel.shape[1], -1)
    first, second = left.flatten(0, 1), right.flatten(0, 1)
    for i, j in tiles(kernel, left is right):
        rows, columns = (slice(s.start * outputs, s.stop * outputs) for s in (i, j))
        flat[rows, columns].addmm_(first[rows], second[columns].T)


# ------------------------------------------------------------------------------------------------ pairs


@dataclass
class PairsSide(LayerSide):
    """Inputs x (n, groups, positions, i), or rows of a table, and output gradients g (n, C, groups, positions, o)."""

    layer: Pairs
    x: Tensor
    g: Tensor

    def take(self, at: slice, uses: Sequence[Use]) -> None:
        first = 0
        for number, positions in zip(self.layer.uses, self.layer.positions, strict=True):
            use = uses[number]
            assert isinstance(use, Outer)
            self.x[at, :, first : first + positions] = use.inputs(at.stop - at.start)
            first += positions

    def slope(self, at: slice, output: int, uses: Sequence[Use], slopes: Sequence[Tensor | None]) -> None:
        first, place = 0, self.g[at, output]
        for number, positions in zip(self.layer.uses, self.layer.positions, strict=True):
            use, slope = uses[number], slopes[number]
            assert isinstance(use, Outer)
            if slope is not None:
                found = use.slopes(slope, at.stop - at.start)
                (place if found.shape == place.shape else place[:, :, first : first + positions]).copy_(found)
            first += positions

    def folded(self) -> LayerSide:
        n, outputs, groups, positions, width = self.g.shape
        together = self.g.permute(0, 2, 3, 1, 4).reshape(n, 1, groups, positions, outputs * width)
        return PairsSide(self.layer, self.x, together)

    def only(self, output: int) -> LayerSide:
        return PairsSide(self.layer, self.x, self.g[:, output : output + 1])


@dataclass(frozen=True)
class Pairs(KernelLayer):
    """A weight (and its ``bias``) by inputs and output gradients; several uses count as more positions.

    ``table``: the inputs are integers, rows of a table.
    """

    name: str
    uses: tuple[int, ...]
    positions: tuple[int, ...]
    groups: int
    i: int
    o: int
    bias: str = ""
    table: bool = False

    def numbers(self, outputs: int) -> float:
        inputs = 2 if self.table else self.i
        return float(self.groups * sum(self.positions) * (outputs * self.o + inputs))

    def by_pairs(self, outputs: int, width: int) -> float:
        """Multiplications for a pair of examples by inner products of inputs and of output gradients."""
        s = sum(self.positions)
        inputs = 1 if self.table else self.i
        if s == 1:
            return self.groups * (inputs + outputs**2 * (width + ENTRY))
        moved = ENTRY * (s * outputs * width + s * s)
        return self.groups * (s * s * (inputs + outputs * width) + outputs**2 * s * width + moved)

    def by_gradients(self, outputs: int, width: int) -> float:
        """The same by the weight's gradients."""
        return math.inf if self.table else float(self.groups * outputs**2 * self.i * width)

    def cost(self, outputs: int) -> float:
        return min(self.by_pairs(outputs, self.o), self.by_gradients(outputs, self.o))

    def open(self, examples: int, outputs: int, like: Tensor) -> PairsSide:
        s = sum(self.positions)
        shape = (examples, self.groups, s) if self.table else (examples, self.groups, s, self.i)
        x = torch.zeros(shape, dtype=torch.int64, device=like.device) if self.table else like.new_zeros(shape)
        return PairsSide(self, x, like.new_zeros(examples, outputs, self.groups, s, self.o))

    def contract(self, kernel: Tensor, left: LayerSide, right: LayerSide) -> None:
        assert isinstance(left, PairsSide)
        assert isinstance(right, PairsSide)
        _, outputs, _, positions, width = left.g.shape
        if self.by_gradients(outputs, width) < self.by_pairs(outputs, width):
            self._gradients(kernel, left, right)
            return
        add = self._single if positions == 1 else self._several
        for group in range(self.groups):
            one, two = ((held.x[:, group], held.g[:, :, group]) for held in (left, right))
            add(kernel, one, two, left is right)

    def _alike(self, first: Tensor, second: Tensor) -> Tensor:
        """Inner products of inputs (n, s, m, t), one added for the bias."""
        if self.table:
            return (first[:, :, None, None] == second) & (first >= 0)[:, :, None, None]
        found = (first.flatten(0, 1) @ second.flatten(0, 1).T).view(*first.shape[:2], *second.shape[:2])
        return found.add_(1.0) if self.bias else found

    def _single(
        self, kernel: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], symmetric: bool
    ) -> None:
        """One position: (x · x') (g · g'), with x · x' repeated for the outputs so that all runs along whole rows."""
        (x, g), (y, h) = left, right
        n, outputs, m, across = kernel.shape
        flat, first, second = kernel.view(n, outputs, m * across), g[:, :, 0].flatten(0, 1), h[:, :, 0].flatten(0, 1)
        small = flat[:, 0].numel() <= ROWS * COLUMNS
        every = self._repeated(x, y, across, kernel.dtype) if small else None
        for i, j in tiles(kernel, symmetric):
            columns = slice(j.start * across, j.stop * across)
            alike = self._repeated(x[i], y[j], across, kernel.dtype) if every is None else every[i, columns]
            slopes = first[i.start * outputs : i.stop * outputs] @ second[columns].T
            place = flat[i, :, columns]
            place.addcmul_(slopes.view(place.shape), alike[:, None])

    def _repeated(self, first: Tensor, second: Tensor, across: int, dtype: torch.dtype) -> Tensor:
        """Inner products of inputs at one position (n, m · across), each for every output on the right."""
        return self._alike(first, second)[:, 0].to(dtype).expand(-1, -1, across).flatten(1)

    def _several(
        self, kernel: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], symmetric: bool
    ) -> None:
        """Several positions: Σ_s g_s · (Σ_t (x_s · x_t') g_t')."""
        (x, g), (y, h) = left, right
        _, outputs, s, width = g.shape
        each = s * (s + 2 * outputs * width) * kernel.element_size()
        side = max(1, math.isqrt(TILE_BYTES // each))
        for i, j in _smaller(tiles(kernel, symmetric), side):
            turned = h[j].transpose(1, 2).flatten(2)  # (m, t, C o)
            alike = self._alike(x[i], y[j]).to(kernel.dtype).permute(2, 0, 1, 3).flatten(1, 2)  # (m, n s, t)
            n, m = i.stop - i.start, j.stop - j.start
            moved = (alike @ turned).view(m, n, s, outputs, width)
            moved = moved.permute(1, 2, 4, 0, 3).reshape(n, s * width, m * outputs)
            kernel[i, :, j] += (g[i].flatten(2) @ moved).view(n, outputs, m, outputs)

    def _gradients(self, kernel: Tensor, left: PairsSide, right: PairsSide) -> None:
        """J Jᵀ for a few outputs of the layer at a time."""
        n, outputs, groups, _, width = left.g.shape
        most = max(n, len(right.g)) * outputs * groups * self.i * kernel.element_size()
        step = max(1, TILE_BYTES // most)
        for first in range(0, width, step):
            part = slice(first, min(first + step, width))
            rows = _formed(left, part)
            add_rows(kernel, rows, rows if left is right else _formed(right, part))
        if self.bias:
            rows = left.g.sum(3).flatten(2)
            add_rows(kernel, rows, rows if left is right else right.g.sum(3).flatten(2))


def _smaller(given: Iterator[tuple[slice, slice]], side: int) -> Iterator[tuple[slice, slice]]:
    """Tiles cut into such of at most ``side`` by ``side`` examples."""
    for rows, columns in given:
        for i in range(rows.start, rows.stop, side):
            for j in range(columns.start, columns.stop, side):
                yield slice(i, min(i + side, rows.stop)), slice(j, min(j + side, columns.stop))


def _formed(held: PairsSide, part: slice) -> Tensor:
    """Gradients (n, C, ...) of a weight in some of its outputs."""
    n, outputs, groups, positions, _ = held.g.shape
    g = held.g[..., part].permute(0, 2, 1, 4, 3).reshape(n, groups, -1, positions)
    found = g @ held.x  # (n, groups, C o, i)
    found = found.view(n, groups, outputs, -1, found.shape[-1])
    return found.transpose(1, 2).reshape(n, outputs, -1)
