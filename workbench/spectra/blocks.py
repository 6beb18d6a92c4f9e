"""One diagonal block at a time: a Lanczos run that can be paused, then trace and norm outside its basis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.numerics.factorisation import Precision
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.sampling import Draw
from workbench.numerics.sizes import Sizes, sizes
from workbench.numerics.trace import FIRST_PROBE
from workbench.operators.blocks import Block
from workbench.selftest import NotAHessian, check_symmetry
from workbench.spectra.run import CHEAP_BYTES, MOST_ROWS, NEAR_ZERO

Floats = NDArray[np.float64]
APART = 10**8
"""Numbers of random vectors that each block has to itself."""
SMALL = 24
"""Parameters up to which a block is solved whole: estimates would cost as much."""
DEPTH = 14
"""Products that a larger block's eigenvalues take at least: what they find is known exactly in trace and norm, and what
is left then varies little, which saves more samples than it costs and keeps their intervals true."""
MOST_PRODUCTS = 200
"""Products that a block's eigenvalues may take, beside twenty for each one that is wanted."""
UNKNOWN = Sizes(math.nan, math.nan, math.nan, math.nan)
"""Trace and norm before anything is known."""


@dataclass(frozen=True)
class BlockAim:
    """What is to be found of each block: ``top`` largest and ``bottom`` smallest eigenvalues, and how well."""

    top: int = 1
    bottom: int = 1
    tolerance: float = 0.05

    def rows(self, size: int, itemsize: int) -> int:
        """Vectors in a block's Lanczos basis before it restarts: more for small blocks."""
        wanted = self.top + self.bottom
        return min(size, max(24, 2 * wanted + 10, min(MOST_ROWS, CHEAP_BYTES // (size * itemsize))))

    def products(self, size: int) -> int:
        """Products that a block usually takes: its eigenvalues, then trace and norm."""
        return min(size, max(DEPTH, 8 + 4 * (self.top + self.bottom)) + 12)


@dataclass(frozen=True, eq=False)
class BlockNumbers:
    """What is known of a block: nan where nothing is, errors of 0 where a number is exact.

    ``eigenvalue``, ``residual`` and ``converged`` (top,), largest first; ``low`` the smallest; ``met`` says that all
    that was asked for is as good as was asked for.
    """

    eigenvalue: Floats
    residual: Floats
    converged: NDArray[np.bool_]
    low: float = math.nan
    low_residual: float = math.nan
    low_converged: bool = False
    negative: bool = False
    sizes: Sizes = UNKNOWN
    met: bool = False


class BlockRun:
    """One block's numbers as they become known; a block that the loss does not depend on is zero at once.

    ``number`` keeps the random vectors of runs apart. ``eigenvalues`` can be paused between products for as long as
    one likes: it holds the basis, while the graphs can be freed with ``block.close()``.
    """

    def __init__(self, aim: BlockAim, block: Block, draw: Draw, number: int, zero: bool = False) -> None:
        self.aim, self.block, self.draw, self.first = aim, block, draw, number * APART
        self.state: Krylov | None = None
        self.estimate: Sizes | None = None
        self.zero, self.rounded, self.useless = zero, "", False
        self.kept: BlockNumbers | None = _zeros(aim, block.size) if zero else None
        self.eigenvalues = self._eigenvalues()

    def vector(self, i: int) -> Any:
        """A normal start vector of this block's own."""
        return self.draw(self.first + i, size=self.block.size)

    def _eigenvalues(self) -> Iterator[None]:
        """Lanczos: pauses after each product."""
        if self.zero:
            return
        aim, size = self.aim, self.block.size
        states = lanczos(
            self.block, self.vector(0), top=aim.top, bottom=aim.bottom, tolerance=aim.tolerance, near_zero=NEAR_ZERO,
            basis=max(aim.rows(size, self.block.dtype.itemsize), min(size, aim.top + aim.bottom + 4)),
            least=size if size <= SMALL else DEPTH, limit=MOST_PRODUCTS + 20 * (aim.top + aim.bottom),
            fresh=lambda i: self.vector(1 + i),
        )  # fmt: skip
        for state in states:
            self.state = state
            self._look(state.asymmetry)
            yield
            if self.useless:
                return

    def _look(self, asymmetry: float) -> None:
        """A block may be all rounding where the whole matrix is not: that spoils its own numbers only."""
        try:
            self.rounded = check_symmetry(asymmetry)
        except NotAHessian:
            self.useless = True
            self.rounded = f"products are rounding only ({asymmetry:.0e} not symmetric); dtype=torch.float64 is exacter"

    def sizes(self) -> Iterator[None]:
        """Trace and Frobenius norm: pauses after each product."""
        if self.zero or self.useless or self.state is None:
            return
        first = self.first + FIRST_PROBE
        for found in sizes(self.block, self.draw, self.state, tolerance=self.aim.tolerance, first=first):
            self.estimate = found
            yield

    def release(self) -> None:
        """Free basis and graphs; the numbers stay."""
        self.kept = self.numbers()
        self.state, self.eigenvalues = None, iter(())
        self.block.close()

    def numbers(self) -> BlockNumbers:
        """What is known now."""
        state, aim = self.state, self.aim
        if self.kept is not None:
            return self.kept
        if state is None:
            nothing = np.full(aim.top, math.nan)
            return BlockNumbers(nothing, nothing, np.zeros(aim.top, dtype=bool))
        found = self.estimate or _first_sizes(state, self.block.size)
        low, residual = (float(x[0]) if aim.bottom else math.nan for x in (state.bottom_values, state.bottom_residuals))
        floor = Precision.of(self.block.dtype).floor * float(np.abs(state.values).max())
        return BlockNumbers(
            state.top_values,
            state.top_residuals,
            state.top_converged & (not self.useless),
            low,
            residual,
            bool(aim.bottom and state.bottom_converged[0]) and not self.useless,
            low < -max(residual, floor),
            found,
            met=state.done and found.met and not self.useless,
        )


def _first_sizes(state: Krylov, size: int) -> Sizes:
    """From the start vector alone: P v·Av and P ‖Av‖² for a random unit v, of unknown error."""
    if not state.alpha.size:
        return UNKNOWN
    forms, squares = float(state.alpha[0]), float(state.alpha[0] ** 2 + state.beta[0] ** 2)
    return Sizes(size * forms, math.nan, size * squares, math.nan, samples=1)


def _zeros(aim: BlockAim, size: int) -> BlockNumbers:
    """A block of zeros, known exactly."""
    values = np.where(np.arange(aim.top) < size, 0.0, math.nan)
    low = 0.0 if aim.bottom else math.nan
    sure = Sizes(0.0, 0.0, 0.0, 0.0, exact=True, met=True)
    return BlockNumbers(values, values, values == 0, low, low, aim.bottom > 0, sizes=sure, met=True)
