"""Axes of arrays as products of factors: which axes are one and the same, and what reshaping makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

Axis = tuple[int, ...]
"""Numbers of the factors whose product, outermost first, is the axis; empty for an axis of length 1."""


class Factors:
    """Factors that are joined where two axes must be the same, and cut where an axis is reshaped into several.

    A union-find forest whose sets may also fall into parts: an axis of 12 that is once viewed as 3 × 4 is (3, 4) from
    then on, wherever it occurs. A factor is ``fixed`` where its order means something from outside. What cannot be
    brought into agreement becomes fixed, so that too little is said to be free and never too much.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._fixed: list[bool] = []
        self._parts: dict[int, Axis] = {}

    def new(self, size: int, fixed: bool = False) -> Axis:
        """A new axis of that length, of one factor."""
        if size == 1:
            return ()
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._fixed.append(fixed)
        return (len(self._parent) - 1,)

    def leaves(self, axis: Axis) -> Axis:
        """The axis in its finest factors, each by the number that stands for all that were joined with it."""
        found: list[int] = []
        for factor in axis:
            root = self._root(factor)
            found += self.leaves(self._parts[root]) if root in self._parts else (root,)
        return tuple(found)

    def _root(self, factor: int) -> int:
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def length(self, axis: Axis) -> int:
        """Entries along the axis."""
        return math.prod(self._size[factor] for factor in axis)

    def is_fixed(self, leaf: int) -> bool:
        """Whether the order of a factor (one of :meth:`leaves`) means something from outside."""
        return self._fixed[leaf]

    def fix(self, axis: Axis) -> None:
        """From now on the order along the axis is fixed."""
        for leaf in self.leaves(axis):
            self._fixed[leaf] = True

    def unite(self, first: Axis, second: Axis) -> None:
        """Say that two axes are the same; both become fixed where they fall apart into lengths that do not agree."""
        left, right = self.leaves(first), self.leaves(second)
        while left and right:
            (a, *more), (b, *others) = left, right
            if self._size[a] == self._size[b]:
                self._join(a, b)
                left, right = tuple(more), tuple(others)
            elif not self._cut(a, self._size[b]) and not self._cut(b, self._size[a]):
                break
            left, right = self.leaves(left), self.leaves(right)
        self.fix((*left, *right))

    def _join(self, a: int, b: int) -> None:
        self._fixed[a] = self._fixed[a] or self._fixed[b]
        self._parent[b] = a

    def _cut(self, leaf: int, outer: int) -> bool:
        """Cut a factor into outer × rest, where that is possible."""
        if self._size[leaf] <= outer or self._size[leaf] % outer:
            return False
        fixed = self._fixed[leaf]
        self._parts[leaf] = (*self.new(outer, fixed), *self.new(self._size[leaf] // outer, fixed))
        return True

    def regroup(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """The axes of an array after reshaping it to ``shape``; all fixed where factors straddle the new axes."""
        rest, made = [leaf for axis in axes for leaf in self.leaves(axis)], list[Axis]()
        for length in shape:
            taken, wanted = list[int](), length
            while wanted > 1 and rest:
                rest = list(self.leaves(tuple(rest)))
                leaf = rest.pop(0)
                if wanted % self._size[leaf] == 0:
                    taken.append(leaf)
                    wanted //= self._size[leaf]
                elif self._cut(leaf, wanted):
                    rest = [*self._parts[leaf], *rest]
                else:
                    return self._give_up(axes, shape)
            made.append(tuple(taken))
        return made

    def _give_up(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        for axis in axes:
            self.fix(axis)
        return [self.new(length, fixed=True) for length in shape]

    def inner(self, axis: Axis, length: int) -> Axis:
        """The axis of one of several equal pieces of that length into which an axis is cut; their order is fixed."""
        whole = self.length(axis)
        if length == whole:
            return axis
        outer, piece = self.regroup([axis], (whole // length, length)) if whole % length == 0 else (axis, ())
        self.fix(outer)
        return piece or self.new(length, fixed=True)
