"""The local learning coefficient: how fast the volume of low loss shrinks around a point, by Langevin sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import ROLES, AnyMark, Axis, Band, Figure, Heat, Line, Panel, Rule
from workbench.numerics.basis import norm
from workbench.numerics.chains import Diagnosis
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.sgld import ACCEPTANCE, ROUND, Ensemble, Posterior, Tuning, start, tune
from workbench.subject import Subject

Floats = NDArray[np.float64]

READ_EVERY = 10
"""Steps of all chains between two readings."""
LARGEST_RHAT, DRAWS_PER_CHAIN = 1.1, 10
"""Split R-hat and effective draws per chain at which chains count as mixed (Gelman et al. 2013, section 11.5)."""
LEAST_ACCEPTANCE = 0.8
"""Mean acceptance below which the step is too long whatever else is found."""
STEP_FACTORS, PULL_FACTORS = (1 / 3, 1.0, 3.0), (0.1, 1.0, 10.0)
"""What the grid multiplies the step and the localisation by."""
TUNING_SHARE = 0.1
"""The share of the progress that tuning is given."""


@dataclass(frozen=True)
class LearningCoefficient(Probe[Subject]):
    """Local learning coefficient λ̂ (LLC) at the subject's weights w*, by stochastic gradient Langevin dynamics (SGLD).

    What it measures: λ̂ = nβ (E[L(w)] - L(w*)), with L the mean loss over the n examples and the expectation over the
    tempered posterior p(w) ∝ exp(-nβ L(w) - (γ/2) ‖w - w*‖²), nβ = n/ln n with n the number of examples (sequences,
    for language models) that the subject uses, not those of a batch. Half the number of parameters for a regular
    minimum; less the more degenerate it is: 1/(2k) for w^(2k).

    Chains start at w* and follow w ← w - (ε/2)(nβ ∇L(w) + γ (w - w*)) + √ε ξ. The first ``burn_in`` steps are recorded
    but not used. With ``batch`` the loss and its gradient come from random batches, and L(w*) from the same batch as
    L(w), so that what batches differ by cancels. ``learning_coefficient`` is the mean over ``chain_coefficient``;
    ``excess_loss`` holds L(w) - L(w*) of every step (draws up to 0 are the burn-in).

    How to read it: compare it between models of one size, or between moments of a training, on equally many examples
    and with the same nβ, γ and ε, which are part of the number. A plateau over the ``grid`` of ε and γ is what shows
    that these do not decide it. Negative: w* is no local minimum of this loss (training goes on, weight decay, other
    data), or the step is too long. Traces that still climb at the end ask for a longer burn-in.

    What it costs: chains · (burn-in + draws) gradients, 2400 by default, and some 500 to tune the step; with ``batch``
    as many of a batch each, and a forward pass for every one. ``grid`` costs nine times as much. Memory: about three
    vectors of P entries a chain.

    When it misleads: the pull γ bounds directions that the loss leaves free, so λ̂ then measures γ too; a slow direction
    is not explored within the draws, and traces look stationary meanwhile; published values often take nβ from the
    batch. Convergence to λ is logarithmic in n where minima cross (w_1² w_2² at nβ = 10⁴ gives .41, not .5). Dropout is
    off and BatchNorm as the subject says. Weight decay is not part of the loss.

    The step: without ``step``, ε is tuned until the mean acceptance that a Metropolis test would have (nothing is
    rejected) lies within .9 and .95, or smaller, until its bias is within ``tolerance``. ``step_bias`` estimates what
    the finite step and the noise of batches add to λ̂: (ε/8) E[nβ∇L·(nβ∇L + γ(w - w*))], exact for quadratic losses
    (with batches: where γ is small), too large where the loss is flatter than quadratic. ``unbiased_coefficient`` is
    λ̂ without it.

    Errors: ``learning_coefficient_error`` is the standard error, the largest of what chains' means, single draws and
    means of twenty blocks of draws say (the noise of batches would else hide a slow drift). Converged: ``split_rhat``
    at most 1.1, ten effective draws a chain, acceptance at least .8, and the step's bias within ``tolerance`` of λ̂ or
    below the error.

    Source: Lau, Furman, Wang, Murfet, Wei 2023 (arXiv 2308.12108); Welling and Teh 2011 (SGLD); Watanabe 2013 (nβ).
    """

    chains: Annotated[int, Range(1, 100, step=1, soft=(2, 16)), Doc("How many chains, each from w*.")] = 4
    draws: Annotated[
        int, Range(300, 1_000_000, log=True, soft=(300, 5000)), Doc("Draws of each chain after the burn-in.")
    ] = 400
    burn_in: Annotated[
        int, Range(100, 1_000_000, log=True, soft=(100, 5000)), Doc("Steps of each chain that are not used.")
    ] = 200
    localisation: Annotated[
        float, Range(0.0, 1e6, soft=(0.0, 100.0)), Doc("γ, the strength of the pull towards w*.")
    ] = 1.0
    step: Annotated[
        float | None, Range(1e-14, 10.0, log=True, soft=(1e-8, 0.1)), Doc("ε, the step size; empty tunes it.")
    ] = None
    inverse_temperature: Annotated[
        float | None, Range(1e-6, 1e12, log=True, soft=(1.0, 1e6)), Doc("nβ; empty for n/ln n with n examples.")
    ] = None
    batch: Annotated[
        int, Range(0, 1_000_000, soft=(0, 1024)), Doc("Examples of a random batch for each step; 0 for all.")
    ] = 0
    tolerance: Annotated[
        float, Range(1e-3, 0.5, log=True, soft=(0.01, 0.3)), Doc("Share of λ̂ that the step may add to it.")
    ] = 0.1
    grid: Annotated[bool, Doc("Whether to repeat all at a third and three times ε, a tenth and ten times γ.")] = False

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable(
            "learning_coefficient",
            (),
            "local learning coefficient nβ(E[L] - L(w*))",
            error="learning_coefficient_error",
        ),
        Variable("learning_coefficient_error", (), "its standard error"),
        Variable("unbiased_coefficient", (), "the same less the step's bias", error="learning_coefficient_error"),
        Variable("step_bias", (), "what the finite step and batches add, for a quadratic loss"),
        Variable("chain_coefficient", ("chain",), "the same from one chain", error="learning_coefficient_error"),
        Variable("excess_loss", ("chain", "draw"), "L(w) - L(w*) on the same examples"),
        Variable("split_rhat", (), "split R-hat of the excess loss"),
        Variable("effective_draws", (), "effective number of independent draws"),
        Variable("acceptance", (), "mean acceptance that a Metropolis test would have"),
        Variable("distance", (), "root mean square distance from w*"),
        Variable("step_size", (), "step size ε"),
        Variable("inverse_temperature", (), "nβ"),
        Variable("localisation", (), "γ"),
        Variable("grid_coefficient", ("step_factor", "pull_factor"), "λ̂ at multiples of ε and γ", error="grid_error"),
        Variable("grid_error", ("step_factor", "pull_factor"), "its standard error"),
        Variable("examples", (), "examples n"),
        Variable("parameters", (), "number of parameters"),
        Variable("train_loss", (), "loss at w*", error="train_loss_error"),
        Variable("train_loss_error", (), "standard error of the loss over examples"),
        Variable("gradient_norm", (), "length of the gradient at w*"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The step first, then all chains side by side, then the grid."""
        posterior = Posterior(subject, self.heat(subject), self.localisation, self.batch)
        run = _Run(self, subject, posterior)
        if self.step is None:
            for number, run.tuned in enumerate(tune(posterior, draw, self.chains, self.tolerance), 1):
                yield run.report(TUNING_SHARE * number / (number + 10))
        run.main = Ensemble(posterior, run.step, start(posterior, draw, self.chains), self.length)
        for share in _walk(run.main):
            yield run.report((TUNING_SHARE + (1 - TUNING_SHARE) * share / run.cells) if share < 1 else run.part(1))
        if self.grid:
            yield from self._follow_grid(run, draw)
        yield run.report(1.0)

    def _follow_grid(self, run: _Run, draw: Draw) -> Iterator[Reading]:
        """The other cells, with the same random numbers, so that only ε and γ differ between them."""
        cells = [(i, j) for i in range(len(STEP_FACTORS)) for j in range(len(PULL_FACTORS)) if (i, j) != (1, 1)]
        run.keep(1, 1, run.main)
        for number, (i, j) in enumerate(cells, 1):
            target = Posterior(run.subject, run.posterior.heat, self.localisation * PULL_FACTORS[j], self.batch)
            cell = Ensemble(target, run.step * STEP_FACTORS[i], start(target, draw, self.chains), self.length)
            for share in _walk(cell):
                yield run.report(min(run.part(number + share), 0.999))
            run.keep(i, j, cell)

    @property
    def length(self) -> int:
        """Steps of a chain in all."""
        return self.burn_in + self.draws

    def heat(self, subject: Subject) -> float:
        """nβ: as set, or n/ln n.

        Raises:
            ValueError: too few examples for n/ln n to mean anything.
        """
        if self.inverse_temperature is not None:
            return self.inverse_temperature
        if subject.examples < 3:
            raise ValueError(
                f"nβ = n/ln n wants at least 3 examples; got {subject.examples}. Set inverse_temperature instead."
            )
        return subject.examples / math.log(subject.examples)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The coefficient with its error, what the step adds to it, whether chains mixed, and the loss beside it."""
        names = ("learning_coefficient", "learning_coefficient_error", "step_bias", "split_rhat", "effective_draws")
        names += ("acceptance", "step_size", "inverse_temperature", "train_loss", "train_loss_error")
        return {name: float(data[name]) for name in names}

    def figure(self, data: xr.Dataset) -> Figure:
        """The chains' losses, the coefficient as it settles with its band, and the grid."""
        panels = [_traces(data), _running(data)]
        if self.grid:
            panels.append(_grid(data))
        return Figure(tuple(panels))

    def estimate(self, subject: Subject) -> Cost:
        """Vectors of each chain, their traces, and one chunk's graph; gradients in all."""
        vectors = (3 * self.chains + 8) * subject.size * subject.dtype.itemsize
        traces = 10 * 8 * self.chains * (self.length + 2 * ROUND)
        steps = self.length * (9 if self.grid else 1) + (0 if self.step else 6 * ROUND)
        each = self.batch or subject.examples
        words = f"about {steps * self.chains} gradients of {min(each, subject.examples)} examples"
        return Cost(vectors + traces + 2 * subject.memory(), steps * self.chains, words)


def _walk(ensemble: Ensemble) -> Iterator[float]:
    """Move all chains to their end; the share that is done, every so many steps."""
    while ensemble.at < ensemble.length:
        ensemble.advance()
        if ensemble.at % READ_EVERY == 0 or ensemble.at == ensemble.length:
            yield ensemble.at / ensemble.length


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: LearningCoefficient
    subject: Subject
    posterior: Posterior
    tuned: Tuning | None = None
    main: Ensemble | None = None
    grid: Floats = field(default_factory=lambda: np.full((2, len(STEP_FACTORS), len(PULL_FACTORS)), math.nan))

    def __post_init__(self) -> None:
        self.loss = self.subject.evaluate(None, ("loss",))
        self.gradient_norm = float(norm(self.posterior.gradient))

    @property
    def step(self) -> float:
        """The step that was set, or the one tuned last."""
        return self.probe.step if self.tuned is None else self.tuned.step  # type: ignore[return-value]

    @property
    def cells(self) -> int:
        """Runs of all chains in all."""
        return len(STEP_FACTORS) * len(PULL_FACTORS) if self.probe.grid else 1

    def part(self, done: float) -> float:
        """Progress when so many runs of all chains are made."""
        return min(TUNING_SHARE + (1 - TUNING_SHARE) * done / self.cells, 0.999)

    def keep(self, i: int, j: int, ensemble: Ensemble | None) -> None:
        """Take a whole run into the grid."""
        if ensemble is not None:
            found = _Chains.of(ensemble, self.probe.burn_in)
            self.grid[:, i, j] = found.loss.mean, found.loss.error

    def report(self, done: float) -> Reading:
        """The reading of now."""
        found = None if self.main is None else _Chains.of(self.main, self.probe.burn_in)
        draws = np.arange(1, self.probe.length + 1) - self.probe.burn_in
        coords = {"chain": np.arange(self.probe.chains), "draw": draws}
        coords |= {"step_factor": np.array(STEP_FACTORS), "pull_factor": np.array(PULL_FACTORS)}
        converged = done == 1 and found is not None and not self.faults(found)
        return self.probe.reading(
            done, self.values(found), coords=coords, converged=converged, notes=self.notes(found, done == 1)
        )

    def values(self, found: _Chains | None) -> dict[str, Any]:
        """Every variable that is known."""
        known: dict[str, Any] = {
            "inverse_temperature": self.posterior.heat,
            "localisation": self.posterior.pull,
            "examples": self.subject.examples,
            "parameters": self.subject.size,
            "train_loss": self.loss["loss"],
            "train_loss_error": self.loss["loss_error"],
            "gradient_norm": self.gradient_norm,
            "grid_coefficient": self.grid[0],
            "grid_error": self.grid[1],
        }
        if self.tuned is not None or self.probe.step is not None:
            known["step_size"] = self.step
        return known | (found.values() if found else {})

    def faults(self, found: _Chains) -> list[str]:
        """What keeps the run from having converged."""
        said: list[str] = []
        if not math.isfinite(found.loss.mean):
            return ["the chains left for infinity (or the loss is not finite near w*): set a smaller step"]
        if self.tuned is not None and not self.tuned.found:
            said.append("no step size with the wanted acceptance was found: set step")
        if not found.acceptance >= LEAST_ACCEPTANCE:
            said.append(f"a Metropolis test would accept {found.acceptance:.0%} only: set a smaller step")
        if not found.bias <= max(self.probe.tolerance * abs(found.loss.mean), found.loss.error):
            said.append(f"the step (and batches) add about {found.bias:.2g} to the coefficient: set a smaller step")
        wanted = DRAWS_PER_CHAIN * self.probe.chains
        if not (found.loss.rhat <= LARGEST_RHAT and found.loss.effective >= wanted):
            said.append(
                f"chains have not mixed (split R-hat {found.loss.rhat:.2f}, {found.loss.effective:.0f} effective draws "
                f"of {wanted} wanted): take more draws and a longer burn-in"
            )
        return said

    def notes(self, found: _Chains | None, last: bool) -> tuple[str, ...]:
        """How it was measured, and what to beware of."""
        n, many = self.subject.examples, self.subject.available
        said = [*self.subject.notes, f"on {n} of {many or 'unknown'} examples"]
        said.append(f"nβ = {self.posterior.heat:.6g}" + ("" if self.probe.inverse_temperature else f" = {n}/ln {n}"))
        if self.posterior.batch:
            said.append(
                f"random batches of {self.posterior.batch}; L(w*) on the same ones; their noise adds to the bias"
            )
        if self.tuned is not None:
            low, high = ACCEPTANCE
            said.append(f"step tuned to an acceptance of {low} to {high} and a bias within {self.probe.tolerance:.0%}")
        if found and last:
            said += self.faults(found)
            if found.loss.mean < -found.loss.error:
                said.append("negative: the weights are no local minimum of this loss, or the step is too long")
        return tuple(said)


@dataclass(frozen=True)
class _Chains:
    """What the draws so far amount to; nan before there are any, and where losses are not finite."""

    excess: Floats
    loss: Diagnosis
    acceptance: float
    bias: float
    distance: float

    @classmethod
    def of(cls, ensemble: Ensemble, burn_in: int) -> _Chains:
        """Of the draws after the burn-in."""
        traces, seen = ensemble.traces, slice(burn_in, ensemble.at)
        checked = traces.acceptance[:, seen]
        tried = checked[:, ~np.isnan(checked).all(axis=0)] if ensemble.posterior.batch else checked
        return cls(
            excess=traces.excess,
            loss=Diagnosis.of(ensemble.posterior.heat * traces.excess[:, seen]),
            acceptance=_mean(tried),
            bias=ensemble.step / 8 * _mean(traces.tilt[:, seen]),
            distance=math.sqrt(_mean(traces.distance[:, seen])),
        )

    def values(self) -> dict[str, Any]:
        """As variables."""
        return {
            "learning_coefficient": self.loss.mean,
            "learning_coefficient_error": self.loss.error,
            "unbiased_coefficient": self.loss.mean - self.bias,
            "step_bias": self.bias,
            "chain_coefficient": self.loss.each,
            "excess_loss": self.excess,
            "split_rhat": self.loss.rhat,
            "effective_draws": self.loss.effective,
            "acceptance": self.acceptance,
            "distance": self.distance,
        }


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


def _traces(data: xr.Dataset) -> Panel:
    draw = data["draw"].values.astype(float)
    lines = [
        Line(draw, row, f"chain {i + 1}" if i < len(ROLES) else "", ROLES[i] if i < len(ROLES) else "reference")
        for i, row in enumerate(data.excess_loss.values)
    ]
    marks: list[AnyMark] = [*lines, Rule(0.0), Rule(0.0, "x")]
    return Panel(tuple(marks), Axis("draw (burn-in: up to 0)"), Axis("L(w) - L(w*)"), title="chains")


def _running(data: xr.Dataset) -> Panel:
    """The coefficient over the draws up to each one, with the standard error between the chains' own."""
    kept = data["draw"].values > 0
    draw = data["draw"].values[kept].astype(float)
    means = float(data.inverse_temperature) * np.cumsum(data.excess_loss.values[:, kept], axis=1) / draw
    middle = means.mean(axis=0)
    spread = error_of_mean(means)
    half = float(data.parameters) / 2
    marks: list[AnyMark] = [Band(draw, middle - spread, middle + spread, "standard error"), Line(draw, middle, "mean")]
    if half <= 3 * abs(float(np.nanmax(np.abs(middle), initial=0.0))):
        marks.append(Rule(half, label="half the parameters"))
    return Panel(tuple(marks), Axis("draw", "log"), Axis("learning coefficient"), title="estimate")


def _grid(data: xr.Dataset) -> Panel:
    steps = np.log10(data["step_factor"].values * (float(data.step_size) if np.isfinite(data.step_size) else 1.0))
    pull = float(data.localisation)
    pulls = np.log10(data["pull_factor"].values * (pull or 1.0))
    heat = Heat(steps, pulls, data.grid_coefficient.values.T)
    return Panel(
        (heat,),
        Axis("log10 of the step ε"),
        Axis("log10 of γ" if pull else "γ is 0"),
        Axis("learning coefficient"),
        title="grid",
    )
