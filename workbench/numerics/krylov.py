"""Extremal eigenpairs of a symmetric operator by Lanczos with full reorthogonalisation, as a stream of states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.basis import Store
from workbench.numerics.factorisation import Factorisation, Floats, Fresh, Step
from workbench.numerics.operator import Operator

FEWEST_STEPS = 8
"""Products below which a small residual is not yet trusted: early Ritz values can settle on an inner eigenvalue."""

_ROOM_FOR_CHECK = 12
_Entry = TypeVar("_Entry", np.float64, np.bool_)


@dataclass(frozen=True)
class Krylov:
    """What a Lanczos run knows after ``products`` products; it never changes afterwards.

    ``values`` are all Ritz values, largest first; some eigenvalue lies within ``residuals[i]`` of ``values[i]``
    (rounding of the operator's dtype included). The largest Ritz value never exceeds the largest eigenvalue, nor does
    the smallest undercut the smallest, beyond rounding. ``top_*`` (length ``top``) and ``bottom_*`` (length
    ``bottom``, most negative first) are the wanted ends, padded with nan. ``alpha`` and ``beta`` (m each;
    ``beta[-1]`` leads out of the basis, and is 0 when the Krylov space of the start is exhausted) are the tridiagonal
    matrix of the start vector alone, from before any restart: the input of quadrature. ``asymmetry`` is the largest
    ``|<u, Av> - <v, Au>|`` met, over the largest ``||Av||``. ``wanted_residual`` is the largest ratio of a wanted
    pair's residual to what is allowed: at most 1 when all are converged, infinite while there are too few products to
    say. ``checked`` counts the products spent on looking for missed pairs and ``confirmed`` says that the last look
    found none. ``complete`` says that the basis spans the whole space, so that all values are exact. ``done`` is the
    last state of a run that reached its aim.
    """

    products: int
    values: Floats
    residuals: Floats
    top_values: Floats
    top_residuals: Floats
    top_converged: NDArray[np.bool_]
    bottom_values: Floats
    bottom_residuals: Floats
    bottom_converged: NDArray[np.bool_]
    wanted_residual: float
    alpha: Floats
    beta: Floats
    asymmetry: float
    checked: int
    confirmed: bool
    complete: bool
    done: bool
    _combine: Callable[[NDArray[np.intp]], Tensor] = field(repr=False, compare=False)

    @property
    def converged(self) -> bool:
        """Whether every wanted pair meets the tolerance."""
        return self.wanted_residual <= 1.0

    def vectors(self, indices: Sequence[int] | NDArray[np.intp]) -> Tensor:
        """Ritz vectors (len, size), orthonormal rows, of ``values[indices]``, while this is the run's latest state.

        Made on request from the basis: 2 n size multiplications each. Raises RuntimeError once the run has gone on.
        """
        return self._combine(np.asarray(indices, dtype=np.intp))


@dataclass(frozen=True)
class _Plan:
    top: int
    bottom: int
    tolerance: float
    confirm: bool

    def check(self, operator: Operator, start: Tensor, basis: int | None) -> None:
        least = self.top + self.bottom + 4
        if tuple(start.shape) != (operator.size,):
            raise ValueError(
                f"start must have shape ({operator.size},), one entry a coordinate; got {tuple(start.shape)}."
            )
        if self.top < 0 or self.bottom < 0 or self.top + self.bottom < 1:
            raise ValueError(f"top and bottom must be >= 0 and not both 0; got {self.top} and {self.bottom}.")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, such as 0.02; got {self.tolerance}.")
        if basis is not None and basis < min(operator.size, least):
            raise ValueError(f"basis must hold at least top + bottom + 4 = {least} vectors; got {basis}.")


def lanczos(
    operator: Operator,
    start: Tensor,
    *,
    top: int = 10,
    bottom: int = 1,
    tolerance: float = 0.02,
    limit: int = 500,
    basis: int | None = None,
    fresh: Fresh | None = None,
    confirm: bool = True,
    store: Store = "operator",
    host: bool = False,
) -> Iterator[Krylov]:
    """The ``top`` algebraically largest and ``bottom`` smallest eigenpairs; yields after each product, until done.

    Done when every wanted pair has residual <= ``tolerance`` · |value| (or below the floor of the dtype times the
    largest |value|) after at least 8 products, and nothing was found that had been missed. At ``limit`` products it
    ends with ``done=False``. The basis holds ``basis`` vectors (default ``max(32, 2 (top + bottom) + 10)``) and one
    more; when it is full the best Ritz vectors of both ends are kept (thick restart), which costs no extra products
    as long as more are kept than wanted. An exhausted (invariant) subspace is left by a random vector ``fresh(i)``, i
    = 0, 1, ..., so operators of at most ``basis`` entries come out exact.

    One start vector shows each eigenvalue once, whatever its multiplicity. ``confirm`` therefore runs, once the
    wanted pairs are converged, a second Lanczos chain from ``fresh`` orthogonally to all that is known: at least 8
    products, until its extreme value plus its residual stays inside the k-th wanted value, or is itself converged, or
    the basis is full. If a wanted value moves, the run goes on and checks again. This is a strong test, not a proof.
    An end of which only one pair is wanted is not checked: its multiplicity does not matter.

    Raises ValueError for unusable settings and ArithmeticError when a product is not finite. Source: Paige 1976; Wu
    and Simon 2000 (thick restart); Ruhe 1979 (several pending vectors).
    """
    plan = _Plan(top, bottom, tolerance, confirm)
    plan.check(operator, start, basis)
    rows = 1 + (basis or max(32, 2 * (top + bottom) + 10))
    run = _Run(plan, Factorisation(operator, rows, fresh, store=store, host=host))
    run.space.adopt(start)
    while True:
        run.advance()
        state = run.look()
        yield state
        if state.done or state.products >= limit:
            return


class _Chain:
    """The tridiagonal matrix of a check: Lanczos from a new vector in the complement of everything known."""

    def __init__(self, lowest_top: float, highest_bottom: float) -> None:
        self.lowest_top, self.highest_bottom = lowest_top, highest_bottom
        self.steps: list[Step] = []

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(value, residual) of the chain's largest and smallest Ritz values."""
        beta = [step.beta for step in self.steps]
        matrix = np.diag([step.alpha for step in self.steps]) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
        values, vectors = np.linalg.eigh(matrix)
        residuals = np.abs(beta[-1] * vectors[-1])
        return (values[-1], residuals[-1]), (values[0], residuals[0])

    def verdict(self, tolerance: float, slack: float, exhausted: bool) -> Literal["displaced", "clear", "open"]:
        """Whether the chain passed a wanted value, cannot pass one, or has to go on."""
        (high, high_residual), (low, low_residual) = self.ends()
        if high > self.lowest_top + max(tolerance * abs(self.lowest_top), slack):
            return "displaced"
        if low < self.highest_bottom - max(tolerance * abs(self.highest_bottom), slack):
            return "displaced"
        if exhausted or self.steps[-1].beta == 0.0:
            return "clear"
        above = high + high_residual <= self.lowest_top or high_residual <= max(tolerance * abs(high), slack)
        below = low - low_residual >= self.highest_bottom or low_residual <= max(tolerance * abs(low), slack)
        return "clear" if above and below and len(self.steps) >= FEWEST_STEPS else "open"


class _Run:
    """One run's decisions: what to multiply next, when to restart, whether it is done."""

    def __init__(self, plan: _Plan, space: Factorisation) -> None:
        self.plan, self.space = plan, space
        self.top, self.bottom = (min(count, space.operator.size) for count in (plan.top, plan.bottom))
        self.unchecked = not plan.confirm
        self.first: list[Step] = []
        self.first_goes_on = True
        self.chain: _Chain | None = None
        self.checked = 0
        self.confirmed = False
        self.best = 0

    def advance(self) -> None:
        """One product, after a restart or a fresh vector where one is due."""
        space = self.space
        beginning = self.chain is not None and not self.chain.steps
        cramped = space.rows - space.used < _ROOM_FOR_CHECK and space.rows < space.operator.size
        if space.full or (beginning and cramped):
            self.restart()
        if beginning or not space.pending:
            self.first_goes_on = False
            space.renew()
        if space.full:
            self.restart()
        self.note(space.multiply(self.choose()))

    def restart(self) -> None:
        """Keep more than is wanted: four of the top, one of the bottom, and up to half the basis if there is room."""
        space = self.space
        room = space.rows - space.pending - 3
        wanted = self.top + self.bottom
        extra = max(0, min(room, max(space.rows // 2, wanted + 5)) - wanted)
        more_top = min(extra, 4) + max(0, extra - 5) // 2
        space.restart(self.top + more_top, self.bottom + extra - more_top)
        self.first_goes_on = False

    def choose(self) -> int:
        """The pending row to multiply: the newest, or of several the one most coupled to unconverged pairs."""
        newest = self.space.used - 1
        if self.space.pending == 1 or self.chain is not None:
            return newest
        return self.best if self.space.n <= self.best else newest

    def note(self, step: Step) -> None:
        """Keep the tridiagonal matrices of the start vector and of a check."""
        if self.first_goes_on:
            self.first.append(step)
        if self.chain is not None:
            self.chain.steps.append(step)
            self.checked += 1

    def look(self) -> Krylov:
        """The state after the latest product; also decides what comes next."""
        space, n = self.space, self.space.n
        values, vectors = space.ritz()
        couplings = space.couplings @ vectors
        residuals = np.maximum(np.linalg.norm(couplings, axis=0), space.precision.unit * space.scale)
        allowed = np.maximum(self.plan.tolerance * np.abs(values), space.precision.floor * space.scale)
        ratios = np.divide(residuals, allowed, out=np.zeros(n), where=allowed > 0)
        if not space.complete and (space.products < FEWEST_STEPS or n < self.top + self.bottom):
            ratios[:] = np.inf
        wanted = np.unique(np.r_[0 : min(self.top, n), max(n - self.bottom, 0) : n])
        worst = float(ratios[wanted].max())
        self.aim(np.abs(couplings[:, wanted[ratios[wanted] > 1]]))
        self.settle(values, worst)
        return self.state(values, residuals, ratios <= 1, worst, vectors)

    def aim(self, couplings: Floats) -> None:
        """Choose the pending row that the unconverged wanted pairs need most."""
        newest = self.space.used - 1
        self.best = self.space.n + int(np.argmax(couplings.max(axis=1))) if couplings.size else newest

    def settle(self, values: Floats, worst: float) -> None:
        """Begin, follow or end the check for missed pairs."""
        space = self.space
        if worst > 1 or space.complete:
            self.chain = None
        elif self.chain is None:
            self.begin(values)
        elif not self.unchecked:
            slack = space.precision.floor * space.scale
            verdict = self.chain.verdict(self.plan.tolerance, slack, space.full)
            self.confirmed = verdict == "clear"
            if verdict == "displaced":
                self.begin(values)

    def begin(self, values: Floats) -> None:
        """Begin a check, where one is asked for, matters and fits into the basis."""
        space = self.space
        self.chain = None
        if self.plan.confirm and space.used == space.operator.size:
            return  # no new direction is left: the few products still pending make every value exact
        matters = self.plan.top > 1 or self.plan.bottom > 1
        fits = space.rows == space.operator.size or self.top + self.bottom + space.pending + 4 <= space.rows
        self.confirmed = self.plan.confirm and not matters
        self.unchecked = not (self.plan.confirm and matters and fits)
        if not self.unchecked:
            lowest_top = float(values[self.top - 1]) if self.top > 1 else np.inf
            highest_bottom = float(values[-self.bottom]) if self.bottom > 1 else -np.inf
            self.chain = _Chain(lowest_top, highest_bottom)

    def state(self, values: Floats, residuals: Floats, met: NDArray[np.bool_], worst: float, vectors: Floats) -> Krylov:
        top, bottom, space = self.plan.top, self.plan.bottom, self.space
        return Krylov(
            products=space.products,
            values=_frozen(values),
            residuals=_frozen(residuals),
            top_values=_padded(values, top),
            top_residuals=_padded(residuals, top),
            top_converged=_padded(met, top),
            bottom_values=_padded(values[::-1], bottom),
            bottom_residuals=_padded(residuals[::-1], bottom),
            bottom_converged=_padded(met[::-1], bottom),
            wanted_residual=worst,
            alpha=_frozen(np.array([step.alpha for step in self.first])),
            beta=_frozen(np.array([step.beta for step in self.first])),
            asymmetry=space.asymmetry,
            checked=self.checked,
            confirmed=self.confirmed or space.complete,
            complete=space.complete,
            done=space.complete or (worst <= 1 and (self.confirmed or self.unchecked)),
            _combine=self.combiner(vectors),
        )

    def combiner(self, vectors: Floats) -> Callable[[NDArray[np.intp]], Tensor]:
        stamp, space = self.space.products, self.space

        def combine(indices: NDArray[np.intp]) -> Tensor:
            if space.products != stamp:
                raise RuntimeError(
                    f"The Ritz vectors of product {stamp} are gone: the run is at product {space.products}. "
                    "Take them before asking the run for its next state."
                )
            return space.combine(vectors[:, indices])

        return combine


def _padded(array: NDArray[_Entry], count: int) -> NDArray[_Entry]:
    """The first ``count`` entries, padded with nan (booleans with False), read-only."""
    out = np.full(count, False if array.dtype == bool else np.nan, dtype=array.dtype)
    out[: min(count, array.size)] = array[:count]
    return _frozen(out)


def _frozen(array: NDArray[_Entry]) -> NDArray[_Entry]:
    array = np.array(array)
    array.setflags(write=False)
    return array
