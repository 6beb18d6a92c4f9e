"""The whole measurement of a spectrum on one subject: the run, the halves of a subset, stability and outliers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from workbench.numerics.factorisation import Precision
from workbench.numerics.sampling import Draw
from workbench.operators.preconditioned import Preconditioner
from workbench.operators.table import OperatorName
from workbench.optimizers import Optimizer, state_of, threshold
from workbench.pace import Pace
from workbench.spectra.halves import WIDE, Bracket, Halves
from workbench.spectra.opening import Opening, itself, opener
from workbench.spectra.run import Aim, SpectralRun
from workbench.spectra.spikes import spikes
from workbench.subject import Subject

HALF_PRODUCTS = 24
"""Products with halves that a bracket usually takes."""


class Measured:
    """``values``, ``coords``, ``notes`` and ``converged`` of a reading, ever better while :meth:`steps` goes on.

    Args:
        aim: what the run is to find.
        subject: what is measured, restricted already.
        draw: random vectors of the subject's size.
        operator: the name of the curvature matrix.
        scaling: the optimizer's preconditioner, to look through; None: without.
        bracketed: whether halves of a subset are to bracket the sharpness of all data.
    """

    def __init__(
        self,
        aim: Aim,
        subject: Subject,
        draw: Draw,
        operator: OperatorName = "hessian",
        scaling: Preconditioner | None = None,
        bracketed: bool = True,
    ) -> None:
        self.aim, self.subject, self.draw, self.scaling = aim, subject, draw, scaling
        self.opened = opener(operator, scaling.of if scaling else itself)
        self.halves = (
            Halves(subject, draw, aim.tolerance, self.opened) if bracketed and Halves.wanted(subject) else None
        )
        self.limit, self.rule = stability(subject.optimizer, scaling)
        self.found: dict[str, Any] = {}
        self.said: tuple[str, ...] = ()
        self.bracket: Bracket | None = None
        self.done, self.pace = 0.0, Pace()
        self.run: SpectralRun | None = None

    def steps(self) -> Iterator[bool]:
        """Pauses after each product, and says whether the values have changed enough to make a new reading."""
        with self.opened(self.subject) as opening:
            self.run = run = SpectralRun(self.aim, opening.operator, opening.curvature, self.draw)
            self.found = self.fixed()
            for _ in run.eigenvalues():
                yield self.pace.due()
            self.count_outliers(run)
            yield from self.halve(opening)
            if self.aim.trace:
                yield from run.sum()
            yield from run.further()

    def fixed(self) -> dict[str, Any]:
        """What is known before the first product."""
        classes = self.subject.classes
        return {
            "classes": math.nan if classes is None else classes,
            "half_examples": self.subject.examples // 2 if self.halves else math.nan,
            "stability_threshold": self.limit,
        }

    def count_outliers(self, run: SpectralRun) -> None:
        """Spikes and bulk, once the eigenvalues are there."""
        if run.state is not None and self.aim.top > 1:
            size, classes = run.operator.size, self.subject.classes
            floor = Precision.of(run.operator.dtype, "bfloat16" if self.aim.storage == "bfloat16" else "operator").floor
            found, self.said = spikes(run.state, size, classes, self.aim.density, floor)
            self.found |= found

    def halve(self, opening: Opening) -> Iterator[bool]:
        """The bracket; the graphs of the whole are given up for those of the halves, and come back when needed."""
        if self.halves is None or self.run is None or self.run.state is None:
            return
        opening.curvature.close()
        for _ in self.halves.run():
            yield False
        self.bracket = self.halves.bracket(float(self.run.state.top_values[0]))
        self.found |= {
            "sharpness_low": self.bracket.low,
            "sharpness_high": self.bracket.high,
            "halves_spread": self.bracket.spread,
            "half_products": self.bracket.products,
        }

    @property
    def values(self) -> dict[str, Any]:
        """All variables known so far."""
        assert self.run is not None
        found = self.found | self.run.values
        if math.isfinite(self.limit):
            first, residual = float(found["eigenvalue"][0]), float(found["residual"][0])
            found |= {"stability_ratio": first / self.limit, "stability_ratio_error": residual / self.limit}
        return found

    @property
    def coords(self) -> dict[str, Any]:
        """Coordinates of the variables."""
        assert self.run is not None
        return self.run.coords

    @property
    def converged(self) -> bool:
        """Whether every rule that was asked for is met."""
        return self.run is not None and self.run.converged

    def progress(self, last: bool) -> float:
        """Products so far over those expected in all, those with halves counted half; below 1 until the end."""
        assert self.run is not None
        used, left = float(self.run.curvature.products), self.run.left
        if self.halves:
            used += self.halves.products / 2
            left += 0.0 if self.bracket else max(HALF_PRODUCTS - self.halves.products, 2) / 2
        self.done = 1.0 if last else max(self.done, min(used / (used + left), 0.99))
        return self.done

    def notes(self, last: bool) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        assert self.run is not None
        subject, state = self.subject, self.run.state
        said = [*subject.notes, *self.run.notes(), KINKS, *self.seen_through()]
        if subject.available is None or subject.examples < subject.available:
            said.append(f"{subject.on}: {SUBSET}")
        if self.bracket and self.bracket.wide:
            said.append(
                f"on so few examples the sharpness of all data is only known to lie about {self.bracket.low:.3g} to "
                f"{self.bracket.high:.3g}, a factor of {WIDE:g} or more: use more (max_examples=) before comparing"
            )
        if last and self.aim.bottom and not self.run.values["negative_curvature"]:
            said.append("no negative curvature resolved")
        if last and state and state.checked:
            said.append(f"{state.checked} products looked for repeated eigenvalues that one Lanczos run cannot show")
        return (*said, *self.said)

    def seen_through(self) -> tuple[str, ...]:
        """What preconditioning does to the numbers, and by which rule the optimizer is stable."""
        through = ()
        if self.scaling:
            through = (
                "eigenvalues are those of η P⁻¹H, with the optimizer's preconditioner P and learning rate η",
                *self.scaling.notes,
            )
        rule = f"{self.rule} is stable on a quadratic while eigenvalues stay below {self.limit:.4g}"
        return (*through, rule) if math.isfinite(self.limit) else through


KINKS = "differentiation ignores kinks (ReLU, max): these are numbers of the smooth piece that the weights lie in"
SUBSET = "the largest eigenvalue of a subset is biased upwards"
"""What notes say of the matrix, and of its largest eigenvalue where not all examples were taken."""


def stability(optimizer: Optimizer | None, scaling: Preconditioner | None) -> tuple[float, str]:
    """(largest stable eigenvalue, the optimizer in words): of the preconditioned matrix, or of SGD; nan for none.

    Without the preconditioner of an adaptive optimizer, the eigenvalues of H say nothing of its stability.
    """
    if scaling is not None:
        return scaling.threshold, scaling.words
    if optimizer is None or state_of(optimizer, {}).kind != "SGD":
        return math.nan, ""
    if any(group.get("maximize") for group in state_of(optimizer, {}).param_groups):
        return math.nan, ""
    found = threshold(optimizer)
    return (found.sharpness, found.words) if math.isfinite(found.sharpness) else (math.nan, "")
