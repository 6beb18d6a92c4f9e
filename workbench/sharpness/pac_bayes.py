"""PAC-Bayes flatness: the largest noise on the weights at which the classifier stays nearly as accurate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from workbench.numerics.basis import norm
from workbench.numerics.stats import error_of_mean
from workbench.sharpness.found import Found, NotDefined
from workbench.sharpness.point import Point
from workbench.sharpness.scales import moved

LOWEST, HIGHEST = 1e-5, 1.0
"""The bracket of σ."""
HALVINGS, CLOSE, SUSPICIOUS = 20, 0.005, 3
"""Steps of the bisection at most, the distance from the allowed drop that ends it, and the steps to one side after
which the end of the range is tried itself."""
FLOOR = 1e-3
"""Noise that every weight gets in the magnitude-aware form, however small it is."""
FIRST = 5_000
"""Number of the first noise vector: the same ones for each σ and each checkpoint."""
EACH = 4


@dataclass
class _Bisection:
    """What is known of the drop of accuracy: σ, drop and its standard error at the bracket's ends and the last try."""

    drop: float
    ends: tuple[float, float] = (LOWEST, HIGHEST)
    tries: list[tuple[float, float, float]] = field(default_factory=list[tuple[float, float, float]])

    @property
    def middle(self) -> float:
        """Where to look next: half-way on a logarithmic scale; once, the end that was never left."""
        if len(self.tries) == SUSPICIOUS:
            never = [end for end, first in zip(self.ends, (LOWEST, HIGHEST), strict=True) if end == first]
            return never[0] if never else math.sqrt(self.ends[0] * self.ends[1])
        return math.sqrt(self.ends[0] * self.ends[1])

    def learn(self, sigma: float, drops: list[float]) -> None:
        """Take in the drops of all draws at one σ; an accuracy that grows is no drop."""
        found = float(np.mean(drops))
        self.tries.append((sigma, found, float(error_of_mean(drops))))
        self.ends = (sigma, self.ends[1]) if found <= self.drop else (self.ends[0], sigma)

    @property
    def met(self) -> bool:
        """Whether the last drop is close enough to what is allowed."""
        return bool(self.tries) and abs(self.tries[-1][1] - self.drop) <= CLOSE

    @property
    def outside(self) -> bool:
        """Whether an end of the range itself was tried, and σ lies beyond it."""
        return self.ends[0] == self.ends[1]

    @property
    def sigma(self) -> float:
        """The best answer so far: the last try where it is close, else the bracket's lower end."""
        return self.tries[-1][0] if self.met else self.ends[0]

    @property
    def error(self) -> float:
        """Of σ: the drop's standard error and remaining distance over its slope in ln σ, or the bracket's width."""
        sigma, drop, spread = self.tries[-1]
        near = sorted(self.tries, key=lambda t: abs(math.log(t[0] / sigma)))[:3]
        slopes = [(t[1] - drop) / math.log(t[0] / sigma) for t in near if t[0] != sigma]
        slope = max(slopes, default=0.0)
        width = 0.0 if self.met else math.log(self.ends[1] / self.ends[0])
        if not slope > 0:
            return math.nan
        return self.sigma * math.hypot(spread / slope, (drop - self.drop) / slope if self.met else width)


def pac_bayes(point: Point, draws: int, drop: float, aware: bool) -> Iterator[Found]:
    """1/σ*², with σ* the largest σ at which E[accuracy(θ) - accuracy(θ + noise)] <= ``drop``.

    Noise: σ ξ, or, magnitude-``aware``, ξ √(σ² θ² + 1e-6); ξ ~ N(0, I), σ a standard deviation, the same ``draws``
    vectors at each σ; norm parameters do not move. Bisection of ln σ on [1e-5, 1], at most 20 steps, ended within 0.005
    of ``drop``. Cost: ``draws`` forward passes a step, usually 5 to 12 steps. Error: from the standard error over draws
    and the slope of the drop. Source: Jiang et al. 2020 (arXiv:1912.02178); Dziugaite et al. 2020.
    """
    rate = _error_rate(point, None)
    if math.isnan(rate):
        raise NotDefined("it needs decisions between classes, which this loss does not make")
    run, noise, step = _Bisection(drop), _noise(point, aware), 0
    while step < HALVINGS and not run.met:
        sigma, drops = run.middle, list[float]()
        for i in range(draws):
            drops.append(_error_rate(point, noise(sigma, point.draw(FIRST + i))) - rate)
            if i % EACH == EACH - 1 and run.tries:
                yield _report(point, run, draws, aware, min(0.05 * step + 0.02, 0.95))
        if not math.isfinite(sum(drops)):
            raise NotDefined("the accuracy at perturbed weights is not a number")
        run.learn(sigma, drops)
        if run.outside:
            raise NotDefined(_outside(run))
        step += 1
    yield _report(point, run, draws, aware, 1.0)


def _error_rate(point: Point, step: Tensor | None) -> float:
    params = None if step is None else point.subject.unflatten(point.weights + step)
    return point.subject.evaluate(params, ("error_rate",))["error_rate"]


def _noise(point: Point, aware: bool) -> Callable[[float, Tensor], Tensor]:
    mask = moved(point.subject)

    def noise(sigma: float, draw: Tensor) -> Tensor:
        spread = (sigma**2 * point.weights**2 + FLOOR**2).sqrt() if aware else sigma
        return draw * mask * spread

    return noise


def _report(point: Point, run: _Bisection, draws: int, aware: bool, done: float) -> Found:
    sigma, error = run.sigma, run.error
    kind = f"√(σ² θ² + {FLOOR:g}²)" if aware else "σ"
    extra = {} if aware else {"pac_bayes_sigma": sigma, "pac_bayes_sigma_error": error, **_bounds(point, sigma)}
    return Found(
        1 / sigma**2,
        2 * error / sigma**3,
        converged=done == 1,
        done=done,
        protocol=(
            f"1/σ² at the largest σ with a mean drop of accuracy of at most {run.drop:g}; noise of standard deviation "
            f"{kind} on all parameters but those of norm layers, {draws} fixed draws, {len(run.tries)} bisections"
        ),
        radius=sigma,
        extra=extra,
    )


def _outside(run: _Bisection) -> str:
    sigma, drop, _ = run.tries[-1]
    return f"noise of σ = {sigma:g}, an end of the range, costs {drop:.3g} of accuracy where {run.drop:g} was sought"


def _bounds(point: Point, sigma: float) -> dict[str, float]:
    """‖θ‖² / (4σ²) + ln(n/σ) + 10, and the same for the distance from the start of a recorded path."""
    subject = point.subject
    rest = math.log(subject.examples / sigma) + 10
    mask = moved(subject)
    found = {"pac_bayes_bound": float(norm(point.weights * mask)) ** 2 / (4 * sigma**2) + rest}
    if subject.path is not None and len(subject.path.steps):
        first = subject.path.weights(subject.path.steps[0])
        start = subject.flatten({n: first[n].to(p) for n, p in subject.params.items()})
        found["pac_bayes_bound_from_start"] = float(norm((point.weights - start) * mask)) ** 2 / (4 * sigma**2) + rest
    return found
