"""Weights along two directions, written into tensors that are used again at every point."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Direction = Mapping[str, Tensor]
Move = tuple[Tensor, Tensor | None, Tensor | None]


class Moving:
    """θ + a·u + b·v in buffers of its own; the given tensors are only read.

    Tensors that no direction moves, and those in ``skipped``, have no buffer and are left out of what is returned.
    Memory: one copy of the weights that move.
    """

    def __init__(
        self,
        here: Direction,
        first: Direction,
        second: Direction | None,
        skipped: frozenset[str] = frozenset(),
        channels_last: bool = False,
    ) -> None:
        moves: dict[str, Move] = {}
        for name, weight in here.items():
            u, v = moved(first[name]), None if second is None else moved(second[name])
            if name not in skipped and not (u is None and v is None):
                moves[name] = (weight, u, v)
        self.moves: Mapping[str, Move] = moves
        self._last = channels_last
        self._buffers: dict[str, Tensor] = {}

    def at(self, a: float, b: float) -> dict[str, Tensor]:
        """The weights at (a, b), valid until the next call."""
        if not self._buffers:
            self._buffers = {name: self._room(weight) for name, (weight, *_) in self.moves.items()}
        with torch.no_grad():
            for name, (weight, u, v) in self.moves.items():
                one, step = (u, a) if u is not None else (v, b)
                assert one is not None
                torch.add(weight, one, alpha=step, out=self._buffers[name])
                if u is not None and v is not None:
                    self._buffers[name].add_(v, alpha=b)
        return self._buffers

    def stepped(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The weights at several points, coordinates (k,), as new tensors (k, ...)."""
        return {name: combined_at(move, a, b) for name, move in self.moves.items()}

    def _room(self, weight: Tensor) -> Tensor:
        last = self._last and weight.ndim == 4
        return torch.empty_like(weight, memory_format=torch.channels_last if last else torch.contiguous_format)


def moved(direction: Tensor) -> Tensor | None:
    """The tensor, or None where all of it is zero."""
    return direction if bool(direction.any()) else None


def combined(start: Tensor, u: Tensor | None, v: Tensor | None, a: float, b: float) -> Tensor:
    """start + a·u + b·v, where a missing direction is zero; always a new tensor."""
    found = start.clone() if u is None else torch.add(start, u, alpha=a)
    return found if v is None else found.add_(v, alpha=b)


def combined_at(move: Move, a: Tensor, b: Tensor) -> Tensor:
    """The same at several points, coordinates (k,): a new tensor (k, ...), each entry written as seldom as can be."""
    start, *directions = move
    along = [c.to(start.dtype).view(-1, *(1 for _ in start.shape)) for c in (a, b)]
    steps = [(c, d) for c, d in zip(along, directions, strict=True) if d is not None]
    if not steps:
        return start.expand(len(a), *start.shape)
    found = (steps[0][0] * steps[0][1]).add_(start)
    return found.addcmul_(*steps[1]) if steps[1:] else found
