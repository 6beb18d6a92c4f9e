"""Which permutation of one network's units brings its weights closest to another's: ascent by linear assignments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Indices = NDArray[np.int64]
Labels = tuple[int | None, ...]
"""For each dim of an array the permutation that acts on it; None where none does."""
GAIN = 1e-12
"""A step is taken where it adds more than this share of ‖a‖ ‖b‖ to the overlap."""
SWEEPS = 100
"""Rounds over all permutations after which a start that still gains is left as it is."""


@dataclass(frozen=True)
class Matching:
    """The best permutations so far: row i of the aligned second array is row ``permutations[label][i]`` of the given.

    ``distance`` = √Σ‖a - πb‖² over all arrays, ``unaligned`` the same for identities; ``starts`` are the distances
    that each start reached, in order, and ``settled`` whether the best one ended because nothing gained any more.
    """

    permutations: Mapping[int, Indices]
    distance: float
    unaligned: float
    starts: tuple[float, ...]
    settled: bool


def match(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    labels: Mapping[str, Labels],
    rng: np.random.Generator,
    starts: int = 4,
) -> Iterator[Matching]:
    """Maximise Σ⟨a, πb⟩ over the permutations by coordinate ascent, keeping the best of several starts; one each.

    Each step solves a linear assignment for one permutation with the others held (Ainsworth et al. 2023,
    arXiv:2209.04836). The first start compares units by what does not depend on permutations that are still unknown
    (norms over those axes), beginning where most is known: a permuted copy is found in one go unless units look alike.
    The others begin at the identity and take the permutations in random order. The result is a local optimum: the
    problem is hard, and its global one is not known for any real network. Cost of a step: size × n for the axis'
    length n, and n³ for the assignment; float64 throughout.

    Args:
        first: arrays by name.
        second: arrays of the same names and shapes, to be permuted.
        labels: for each name which permutation acts on each dim.
        rng: for the orders.
        starts: how many.

    Raises:
        ValueError: an entry is not finite.
    """
    ascent = _Ascent(first, second, labels)
    best, reached = ascent.identity(), list[float]()
    value, settled = ascent.value(best), True
    unaligned = ascent.distance(value)
    for start in range(starts):
        found = ascent.invariant() if start == 0 else ascent.identity()
        done = ascent.climb(found, rng, shuffled=start > 0)
        reached.append(ascent.distance(ascent.value(found)))
        if ascent.value(found) > value:
            best, value, settled = found, ascent.value(found), done
        yield Matching(dict(best), ascent.distance(value), unaligned, tuple(reached), settled)
        if not best:
            return


def permuted(array: Tensor, labels: Labels, permutations: Mapping[int, Indices]) -> Tensor:
    """The array with the permutation of each labelled dim applied; itself where none is known."""
    for dim, label in enumerate(labels):
        if label is not None and label in permutations:
            array = array.index_select(dim, torch.as_tensor(permutations[label], device=array.device))
    return array


@dataclass(eq=False)
class _Ascent:
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    labels: Mapping[str, Labels]
    lengths: dict[int, int] = field(default_factory=dict[int, int])
    users: dict[int, list[str]] = field(default_factory=dict[int, list[str]])

    def __post_init__(self) -> None:
        squares = {n: (_inner(a, a), _inner(self.second[n], self.second[n])) for n, a in self.first.items()}
        self.square = sum(a + b for a, b in squares.values())
        if not math.isfinite(self.square):
            name = next(n for n, s in squares.items() if not math.isfinite(sum(s)))
            raise ValueError(f"{name} has entries that are not finite, which cannot be matched.")
        self.least = GAIN * math.sqrt(sum(a for a, _ in squares.values()) * sum(b for _, b in squares.values()))
        for name, labels in self.labels.items():
            for dim, label in enumerate(labels):
                if label is not None:
                    self.lengths[label] = self.first[name].shape[dim]
                    self.users.setdefault(label, []).append(name)
        self.users = {label: list(dict.fromkeys(names)) for label, names in self.users.items()}

    def identity(self) -> dict[int, Indices]:
        return {label: np.arange(length) for label, length in self.lengths.items()}

    def value(self, permutations: Mapping[int, Indices], names: list[str] | None = None) -> float:
        """Σ⟨a, πb⟩ over the named arrays (None: all)."""
        return sum(
            _inner(self.first[n], permuted(self.second[n], self.labels[n], permutations))
            for n in (self.first if names is None else names)
        )

    def distance(self, value: float) -> float:
        return math.sqrt(max(self.square - 2 * value, 0.0))

    def climb(self, at: dict[int, Indices], rng: np.random.Generator, shuffled: bool) -> bool:
        """Improve ``at`` in place until no permutation gains; False where the sweeps ran out first."""
        order = list(self.lengths)
        for _ in range(SWEEPS):
            if shuffled:
                order = [order[i] for i in rng.permutation(len(order))]
            if not sum(self._step(at, label) for label in order):
                return True
        return False

    def _step(self, at: dict[int, Indices], label: int) -> bool:
        names = self.users[label]
        before, old = self.value(at, names), at[label]
        at[label] = _assigned(self._overlaps(at, label, invariant=False))
        if self.value(at, names) > before + self.least:
            return True
        at[label] = old
        return False

    def invariant(self) -> dict[int, Indices]:
        """Permutations found one after the other, each from what those found before it and norms tell."""
        found: dict[int, Indices] = {}
        while len(found) < len(self.lengths):
            label = max((k for k in self.lengths if k not in found), key=lambda k: self._told(k, found))
            found[label] = _assigned(self._overlaps(found, label, invariant=True))
        return {label: found[label] for label in self.lengths}

    def _told(self, label: int, found: Mapping[int, Indices]) -> float:
        """The share of the weights around a permutation all of whose other axes are known."""
        sizes = [(self.first[n].numel(), self._is_told(n, label, found)) for n in self.users[label]]
        return sum(size for size, told in sizes if told) / sum(size for size, _ in sizes)

    def _is_told(self, name: str, label: int, found: Mapping[int, Indices]) -> bool:
        labels = self.labels[name]
        return labels.count(label) == 1 and all(k in found for k in labels if k not in (None, label))

    def _overlaps(self, at: Mapping[int, Indices], label: int, invariant: bool) -> Tensor:
        """A[i, j] = what matching unit i of the first with unit j of the second adds to the overlap."""
        made: Tensor | None = None
        for name in self.users[label]:
            for dim, own in enumerate(self.labels[name]):
                if own == label:
                    held = tuple(None if d == dim else k for d, k in enumerate(self.labels[name]))
                    a, b = self.first[name], permuted(self.second[name], held, at)
                    unknown = [d for d, k in enumerate(held) if invariant and k is not None and k not in at]
                    added = _rows(a, dim, unknown) @ _rows(b, dim, unknown).T
                    made = added if made is None else made + added
        assert made is not None
        return made


def _rows(array: Tensor, dim: int, unknown: list[int]) -> Tensor:
    """One row for each index along ``dim``, norms taken over the dims that are not known yet."""
    array = array.double()
    if unknown:
        array = torch.linalg.vector_norm(array, dim=unknown, keepdim=True)
    return array.movedim(dim, 0).reshape(array.shape[dim], -1)


def _assigned(overlaps: Tensor) -> Indices:
    return linear_sum_assignment(overlaps.cpu().numpy(), maximize=True)[1].astype(np.int64)


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
