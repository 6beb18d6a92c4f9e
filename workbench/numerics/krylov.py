"""Extremal eigenpairs of a symmetric operator by Lanczos with full reorthogonalisation, as a stream of states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workbench.numerics.basis import Store
from workbench.numerics.factorisation import Factorisation, Floats, Fresh, Step
from workbench.numerics.operator import Operator
from workbench.numerics.ritz import Judged, estimated_errors, frozen, padded

FEWEST_STEPS, SOONEST, EARLY = 8, 4, 10.0
"""Products below which a small residual is not trusted, as early Ritz values can settle on an inner eigenvalue; but
one this many times below the tolerance is trusted after the fewer ones: hardly a start could fake that."""


@dataclass(frozen=True)
class Krylov:
    """What a Lanczos run knows after ``products`` products; it never changes afterwards.

    ``values`` are all Ritz values, largest first; some eigenvalue lies within ``residuals[i]`` of ``values[i]``
    (rounding of the operator's dtype included). The largest Ritz value never exceeds the largest eigenvalue, nor does
    the smallest undercut the smallest, beyond rounding. ``top_*`` (length ``top``) and ``bottom_*`` (length
    ``bottom``, most negative first) are the wanted ends, padded with nan; ``top_estimates`` are no bounds, but what
    :func:`estimated_errors` makes of values and residuals. ``alpha`` and ``beta`` (m each;
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
    top_estimates: Floats
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
    _rows: Callable[[], Tensor] = field(repr=False, compare=False)

    @property
    def converged(self) -> bool:
        """Whether every wanted pair meets the tolerance."""
        return self.wanted_residual <= 1.0

    def vectors(self, indices: Sequence[int] | NDArray[np.intp]) -> Tensor:
        """Ritz vectors (len, size), orthonormal rows, of ``values[indices]``; RuntimeError once the run has gone on."""
        return self._combine(np.asarray(indices, dtype=np.intp))

    def span(self) -> Tensor:
        """Orthonormal rows (len(values), size) that span all Ritz vectors: the basis itself, not a copy.

        Only while this is the run's latest state; later products overwrite it.
        """
        return self._rows()

    def released(self) -> Krylov:
        """The same numbers without the basis."""
        return replace(self, _combine=_released, _rows=_released)


def _released(*_: NDArray[np.intp]) -> Tensor:
    raise RuntimeError("This state gave up its basis; take its vectors before released().")


@dataclass(frozen=True)
class _Plan:
    top: int
    bottom: int
    tolerance: float
    confirm: bool
    least: int = 0
    near_zero: float = 0.0
    judged: Judged = "residual"

    def check(self, operator: Operator, start: Tensor, basis: int | None) -> None:
        if tuple(start.shape) != (operator.size,):
            raise ValueError(f"start must have shape ({operator.size},), as the operator; got {tuple(start.shape)}.")
        if self.top < 0 or self.bottom < 0 or self.top + self.bottom < 1:
            raise ValueError(f"top and bottom must be >= 0 and not both 0; got {self.top} and {self.bottom}.")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, such as 0.02; got {self.tolerance}.")
        if basis is not None and basis < min(operator.size, least := self.top + self.bottom + 4):
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
    least: int = 0,
    near_zero: float = 0.0,
    judged: Judged = "residual",
    store: Store = "operator",
    host: bool = False,
) -> Iterator[Krylov]:
    """The ``top`` algebraically largest and ``bottom`` smallest eigenpairs; yields after each product, until done.

    Done when every wanted pair has residual <= ``tolerance`` · |value| (or below what the dtype, or the asymmetry of
    the products, leaves to be resolved), a tenth of that before the 8th product, and nothing had been missed. At
    ``limit`` products it ends with ``done=False``. The basis holds ``basis`` vectors (default ``max(32, 2 (top +
    bottom) + 10)``) and one more; when it is full the best Ritz vectors of both ends are kept (thick restart), which
    costs no extra products as long as more are kept than wanted. An exhausted (invariant) subspace is left by a random
    vector ``fresh(i)``, i = 0, 1, ..., so operators of at most ``basis`` entries come out exact.

    One start vector shows each eigenvalue once, whatever its multiplicity. ``confirm`` therefore follows, once the
    wanted pairs are converged, a fresh random vector orthogonal to all that is known: for 8 products, then for up to
    8 more while some Ritz value's interval (value ± residual) still reaches beyond the innermost wanted value. If a
    wanted value moves, the run goes on until converged and checks again. This is a strong test, not a proof. An end
    of which only one pair is wanted is not checked: its multiplicity does not matter.

    ``least`` products are made in any case, since a quadrature wants depth. A bottom pair that is not negative beyond
    its residual is judged as if it were of size ``near_zero`` · max |value|: where nothing is negative, the smallest
    eigenvalue is one of many near zero and would hardly ever be resolved relative to its own size.

    ``judged`` by its estimate, a pair is converged when that, not its residual, is within the tolerance: for one far
    from the others fewer products for the same error, promised by no bound.

    Raises ValueError for unusable settings, ArithmeticError when a product is not finite. Source: Paige 1976; Wu and
    Simon 2000 (thick restart); Ruhe 1979 (several pending vectors).
    """
    plan = _Plan(top, bottom, tolerance, confirm, least, near_zero, judged)
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


@dataclass
class _Chain:
    """Lanczos from a fresh vector, orthogonal to everything known: would it show a wanted pair that was missed?

    ``at`` is the place of its next vector among the pending rows (None when nothing is left of it), ``before`` the
    wanted values when it began (None when it only replaces an exhausted start).
    """

    at: int | None
    before: Floats | None
    steps: int = 0

    @property
    def running(self) -> bool:
        """Whether it still has steps to make."""
        return self.at is not None and self.steps < FEWEST_STEPS

    def follow(self, which: int, step: Step, pending: int) -> None:
        """Keep ``at`` right after pending row ``which`` was multiplied."""
        if self.at == which:
            self.steps += 1
            self.at = pending - 1 if step.beta else None
        elif self.at is not None:
            self.at = which - 1 if self.at == 0 else self.at - 1


@dataclass(frozen=True)
class _Look:
    """Ritz pairs, largest value first, judged: ``unmet`` are wanted and not converged, ``open`` might yet be wanted."""

    values: Floats
    residuals: Floats
    estimates: Floats
    vectors: Floats
    couplings: Floats
    ratios: Floats
    worst: float
    unmet: NDArray[np.intp]
    open: NDArray[np.intp]


class _Run:
    """One run's decisions: what to multiply next, when to restart, whether it is done."""

    def __init__(self, plan: _Plan, space: Factorisation) -> None:
        self.plan, self.space = plan, space
        self.top, self.bottom = (min(count, space.operator.size) for count in (plan.top, plan.bottom))
        self.matters = plan.confirm and (plan.top > 1 or plan.bottom > 1)
        self.first: list[Step] = []
        self.first_goes_on = True
        self.chain: _Chain | None = None
        self.due: Floats | None = None
        self.checked = self.best = self.patience = 0
        self.confirmed = self.unchecked = False

    # -- what to multiply next

    def advance(self) -> None:
        """One product, after a restart or a fresh vector where one is due."""
        space = self.space
        if space.used == space.operator.size:
            self.due = None  # no new direction is left: multiplying what is pending makes all exact
        elif self.due is not None or not space.pending:
            self.renew()
        if space.full:
            self.restart()
        step = space.multiply(self.best)
        if self.first_goes_on:
            self.first.append(step)
        if self.chain is not None:
            self.checked += self.chain.before is not None
            self.chain.follow(self.best, step, space.pending)

    def renew(self) -> None:
        """Add a fresh vector and follow it; for a check, free of what is pending, which may hold a missed vector."""
        space = self.space
        if self.due is not None:
            space.shelve()
        if space.full:
            self.restart()
        self.first_goes_on = False
        space.renew()
        self.best = space.pending - 1
        self.chain = _Chain(self.best, self.due)
        self.due, self.patience = None, FEWEST_STEPS

    def restart(self) -> None:
        """Keep more than is wanted: four of the top, one of the bottom, and up to half the basis if there is room."""
        space = self.space
        wanted = self.top + self.bottom
        room = space.capacity - space.pending - max(3, min(FEWEST_STEPS, space.rows // 4))
        extra = max(0, min(room, max(space.rows // 2, wanted + 5)) - wanted)
        more_top = min(extra, 4) + max(0, extra - 5) // 2
        space.restart(self.top + more_top, self.bottom + extra - more_top)
        self.first_goes_on = False

    def aim(self, look: _Look) -> None:
        """Choose the pending row: a running check's; else what unconverged wanted pairs need most, or open ones."""
        needy = look.unmet if look.unmet.size else look.open
        if self.chain is not None and self.chain.running and self.chain.at is not None:
            self.best = self.chain.at
        elif needy.size and look.couplings.size:
            self.best = int(np.argmax(np.abs(look.couplings[:, needy]).max(axis=1)))
        else:
            self.best = self.space.pending - 1

    # -- whether it is done

    def look(self) -> Krylov:
        """The state after the latest product; also decides what comes next."""
        if self.chain is None or not self.chain.running:
            self.space.reunite()
        look = self.judge()
        self.settle(look)
        self.aim(look)
        return self.state(look)

    def judge(self) -> _Look:
        """Ritz pairs with their residuals, against what is allowed."""
        space, n, tolerance = self.space, self.space.n, self.plan.tolerance
        values, vectors = space.ritz()
        # Products that are not symmetric are rounded, whatever the dtype promises: by up to 4 or 5 times as much.
        rounding = 8 * max(0.0, space.asymmetry - 4 * space.precision.unit)
        noise, floor = (max(p, rounding) * space.scale for p in (space.precision.noise, space.precision.floor))
        residuals = np.maximum(space.residuals(vectors), noise)
        sizes = np.abs(values)
        vague = (np.arange(n) >= n - self.bottom) & (values >= -residuals)
        sizes[vague] = np.maximum(sizes[vague], self.plan.near_zero * sizes.max())
        allowed = np.maximum(tolerance * sizes, floor)
        estimates = np.maximum(estimated_errors(values, residuals), noise)
        judged = residuals if self.plan.judged == "residual" else estimates
        ratios = np.divide(judged, allowed, out=np.zeros(n), where=allowed > 0)
        if not space.complete and (n < self.top + self.bottom or space.products < SOONEST):
            ratios[:] = np.inf
        elif not space.complete and space.products < FEWEST_STEPS:
            ratios *= EARLY
        wanted = np.zeros(n, dtype=bool)
        wanted[: self.top] = wanted[max(n - self.bottom, 0) :] = True
        unmet = np.flatnonzero(wanted & (ratios > 1))
        reach = np.stack([values + residuals, residuals - values])
        reaching = (reach > self.beyond(self.innermost(values))[:, None]).any(axis=0)
        open_ = np.flatnonzero(~wanted & (ratios > 1) & reaching)
        couplings, worst = space.couplings @ vectors, float(ratios[wanted].max())
        return _Look(values, residuals, estimates, vectors, couplings, ratios, worst, unmet, open_)

    def wanted(self, values: Floats) -> Floats:
        """The wanted values of the ends that are checked, the bottom's negated."""
        top = values[: self.top] if self.top > 1 else values[:0]
        bottom = -values[values.size - self.bottom :] if self.bottom > 1 else values[:0]
        return np.concatenate([top, bottom])

    def innermost(self, values: Floats) -> Floats:
        """The k-th wanted value of each end, the bottom's negated; infinite where a further pair would not matter."""
        enough = values.size >= max(self.top, self.bottom)
        top = values[self.top - 1] if enough and self.top > 1 else np.inf
        bottom = -values[-self.bottom] if enough and self.bottom > 1 else np.inf
        return np.array([top, bottom])

    def beyond(self, values: Floats) -> Floats:
        """What a value must exceed to count as a wanted one that was missed."""
        floor = self.space.precision.floor * self.space.scale
        margin = np.maximum(self.plan.tolerance * np.abs(values), floor)
        return values + np.where(np.isfinite(margin), margin, 0.0)

    def settle(self, look: _Look) -> None:
        """Begin, follow or end the check for missed pairs."""
        met, chain = not look.unmet.size and self.space.products >= self.plan.least, self.chain
        if not self.matters:
            self.unchecked, self.confirmed = met, met and self.plan.confirm
        elif not met or (chain is not None and chain.running):
            self.due = None
        elif chain is None:
            self.begin(look.values)
        else:
            self.finish(chain, look)

    def finish(self, chain: _Chain, look: _Look) -> None:
        """The chain has had its steps: wait a little for what is still open, then confirm, or check again."""
        if look.open.size and self.space.pending and self.patience > 0:
            self.patience -= 1
        elif chain.before is None or (self.wanted(look.values) > self.beyond(chain.before)).any():
            self.begin(look.values)
        else:
            self.confirmed = True

    def begin(self, values: Floats) -> None:
        """Let a check begin, where it fits into the basis; without room for it, small operators are solved whole."""
        space = self.space
        self.chain = None
        fits = self.top + self.bottom + space.pending + 4 <= space.rows
        self.unchecked = not fits and space.rows < space.operator.size
        self.due = self.wanted(values) if fits else None

    def state(self, look: _Look) -> Krylov:
        top, bottom, space, met = self.plan.top, self.plan.bottom, self.space, look.ratios <= 1
        return Krylov(
            products=space.products,
            values=frozen(look.values),
            residuals=frozen(look.residuals),
            top_values=padded(look.values, top),
            top_residuals=padded(look.residuals, top),
            top_estimates=padded(look.estimates, top),
            top_converged=padded(met, top),
            bottom_values=padded(look.values[::-1], bottom),
            bottom_residuals=padded(look.residuals[::-1], bottom),
            bottom_converged=padded(met[::-1], bottom),
            wanted_residual=look.worst,
            alpha=frozen(np.array([step.alpha for step in self.first])),
            beta=frozen(np.array([step.beta for step in self.first])),
            asymmetry=space.asymmetry,
            checked=self.checked,
            confirmed=self.confirmed or space.complete,
            complete=space.complete,
            done=space.complete or (look.worst <= 1 and (self.confirmed or self.unchecked)),
            _combine=self.current(lambda indices: self.space.combine(look.vectors[:, indices])),
            _rows=self.current(lambda: self.space.basis.rows[: self.space.n]),
        )

    def current(self, get: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``get``, guarded: an error once the run has gone on and the basis holds something else."""
        stamp, space = self.space.products, self.space

        def guarded(*given: NDArray[np.intp]) -> Tensor:
            if space.products != stamp:
                raise RuntimeError(
                    f"The Ritz vectors of product {stamp} are gone: the run is at product {space.products}. "
                    "Take them before asking the run for its next state."
                )
            return get(*given)

        return guarded
