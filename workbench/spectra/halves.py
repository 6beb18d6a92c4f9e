"""How far the largest eigenvalue of a subset may be from that of all data: the bracket [cross-fit, plug-in]."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from workbench.numerics.basis import dot, norm
from workbench.numerics.krylov import lanczos
from workbench.numerics.operator import Operator
from workbench.numerics.sampling import Draw
from workbench.spectra.opening import Opened
from workbench.spectra.run import finite
from workbench.subject import Subject

FIRST_VECTOR = 2_000_000
"""Number of the first random vector that is drawn for halves: far from those of spectra and of traces."""
ROWS = 12
"""Basis vectors of a half's run: enough for one eigenvalue without losing products to restarts."""
LIMIT = 200
"""Products that a half's run may take."""
FEWEST = 8
"""Examples below which halves say nothing."""
WIDE = 1.25
"""The ratio of a bracket's ends from which more data are asked for."""


@dataclass(frozen=True)
class Bracket:
    """``low`` <= ``high`` around the λ_1 of all data, widened on both sides by ``spread``; not a confidence interval.

    ``products`` were made, each on half of the examples.
    """

    low: float
    high: float
    spread: float
    products: int

    @property
    def wide(self) -> bool:
        """Whether the ends differ by a factor of 1.25 or more, or the lower one is not even positive."""
        return not (self.low > 0 and self.high < WIDE * self.low)


class Halves:
    """λ_1 of two halves A and B of a subject's examples, and each one's eigenvector in the other's matrix.

    The largest eigenvalue is convex, so that of a subset is too large in the mean; v_Aᵀ H_B v_A, with v_A the top
    eigenvector of A, is too small, since v_A was chosen without looking at B. ``bracket(plug_in)`` joins the mean of
    both ways with the subset's own λ_1. It holds in expectation, not with a stated probability; therefore it is
    widened by half the difference between the halves (of quotients or of eigenvalues, whichever is larger). Cost: two
    runs for one eigenvalue on half of the examples, 17 vectors of memory. Source: measured for this bench.
    """

    def __init__(self, subject: Subject, draw: Draw, tolerance: float, opened: Opened) -> None:
        self.subject, self.draw, self.tolerance, self.opened = subject, draw, tolerance, opened
        self.values: list[float] = []
        self.quotients: list[float] = []
        self.products = 0

    @staticmethod
    def wanted(subject: Subject) -> bool:
        """Whether there are other data than these, and enough of these."""
        return (subject.available is None or subject.examples < subject.available) and subject.examples >= FEWEST

    def run(self) -> Iterator[None]:
        """Pauses after each product."""
        first, second = (self.subject.selected(part) for part in halved(self.subject, self.draw))
        of_first = yield from self.largest(first, 0)
        of_second = yield from self.largest(second, 1, of_first)
        yield from self.quotient(first, of_second)

    def largest(self, half: Subject, which: int, other: Tensor | None = None) -> Generator[None, None, Tensor]:
        """The top eigenvector of a half, (size,), of length 1; and before it the other's quotient."""
        with self.opened(half) as opening:
            if other is not None:
                self.quotients.append(quotient(opening.operator, other))
                yield self.count()
            states = lanczos(
                opening.operator,
                self.draw(FIRST_VECTOR + which),
                top=1,
                bottom=0,
                tolerance=self.tolerance,
                limit=LIMIT,
                basis=ROWS,
                fresh=lambda i: self.draw(FIRST_VECTOR + 2 * (1 + i) + which),
            )
            vector, value = self.draw(FIRST_VECTOR + which), math.nan
            for state in finite(states, opening.curvature):
                value = float(state.top_values[0])
                if state.converged or state.products >= LIMIT:
                    vector = state.vectors([0])[0]
                yield self.count()
            self.values.append(value)
            return vector / norm(vector).to(vector.dtype)

    def quotient(self, half: Subject, vector: Tensor) -> Iterator[None]:
        """The quotient of a vector in a half's matrix."""
        with self.opened(half) as opening:
            self.quotients.append(quotient(opening.operator, vector))
            yield self.count()

    def count(self) -> None:
        """One product more."""
        self.products += 1

    def bracket(self, plug_in: float) -> Bracket:
        """The bracket, with the λ_1 of all the subject's examples as its upper end."""
        spread = max(abs(a - b) / 2 for a, b in (self.quotients, self.values))
        return Bracket(float(np.mean(self.quotients)) - spread, plug_in + spread, spread, self.products)


def quotient(operator: Operator, vector: Tensor) -> float:
    """vᵀ A v of a vector of length 1."""
    return float(dot(vector, operator.matvec(vector)))


def halved(subject: Subject, draw: Draw) -> tuple[list[int], list[int]]:
    """The places of the examples of two halves: neighbours in loss are dealt one to each, by the draw's seed.

    A few examples of high loss can carry the largest eigenvalue, so both halves get their share of them. Where the
    loss does not come apart into examples, at random. The second half has the odd example.
    """
    random, losses = draw.generator(FIRST_VECTOR), subject.losses()
    order = random.permutation(subject.examples)
    if losses is not None and len(losses) == subject.examples:
        order = order[np.argsort(losses.cpu().numpy()[order], kind="stable")]
    pairs = order[: subject.examples // 2 * 2].reshape(-1, 2)
    swapped = np.where(random.integers(0, 2, (len(pairs), 1)) == 1, pairs[:, ::-1], pairs)
    return sorted(swapped[:, 0].tolist()), sorted([*swapped[:, 1].tolist(), *order[2 * len(pairs) :].tolist()])
