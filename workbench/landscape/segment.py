"""The straight line between two models while it is being evaluated: losses, and how high they rise, with errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workbench.landscape.barrier import barriers, greatest_rise
from workbench.subject import Subject

Array = NDArray[np.float64]
ENDS = (0.0, 1.0)


@dataclass(eq=False)
class Segment:
    """θ(α) = (1 - α) θ_a + α θ_b with what was found at each α; evaluate both ends first.

    ``ground`` says how losses are taken (examples, loss, BatchNorm's policy); ``first`` and ``second`` are all tensors
    of the two models. Floating-point buffers are interpolated too, integers are the nearer model's. The losses of each
    example are kept at the ends and where the curve is highest, so that a barrier's error pairs them.
    """

    ground: Subject
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    found: dict[float, Mapping[str, float]] = field(default_factory=dict[float, Mapping[str, float]])
    losses: dict[float, Tensor | None] = field(default_factory=dict[float, Tensor | None])

    def at(self, alpha: float) -> Subject:
        """The subject at that point; the models themselves at the ends, to the last bit."""
        return self.ground.at({name: _mixed(t, self.second[name], alpha) for name, t in self.first.items()})

    def evaluate(self, alpha: float) -> None:
        """One pass over the examples, and a second one at the ends and wherever the curve is highest so far."""
        there = self.at(alpha)
        self.found[alpha] = there.evaluate(there.params)  # a loss that is not finite is kept
        if alpha in ENDS:
            self.losses[alpha] = there.losses()
        elif self.complete and alpha in (tops := self._tops("loss")):
            self.losses = {a: each for a, each in self.losses.items() if a in (*ENDS, *tops)}
            self.losses[alpha] = there.losses()

    @property
    def complete(self) -> bool:
        """Whether both ends are known."""
        return all(end in self.found for end in ENDS)

    def values(self, name: str, alphas: Sequence[float] | Array) -> Array:
        """What was found at each α, nan where nothing was."""
        unknown: Mapping[str, float] = {}
        return np.array([self.found.get(float(a), unknown).get(name, math.nan) for a in alphas])

    def inside(self) -> Array:
        """Every α from 0 to 1 that was evaluated, ascending."""
        return np.array(sorted(a for a in self.found if 0 <= a <= 1))

    def _tops(self, name: str) -> tuple[float, float]:
        """Where the curve is highest above the chord, and where it is highest at all."""
        a = self.inside()
        e = self.values(name, a)
        return float(a[barriers(a, e).place]), float(a[int(e.argmax())])

    def heights(self) -> dict[str, float]:
        """The three barriers of loss and of error rate with standard errors over examples, and the greatest rise.

        Those of the loss pair examples: they are of the mean difference, nan where losses do not come apart. Those of
        the error rate do not, and are too large rather than too small. Both ignore that the highest of several points
        was picked. Empty while an end is unknown.
        """
        if not self.complete:
            return {}
        a = self.inside()
        values = self.values("loss", a)
        made = {"barrier_place": self._tops("loss")[0], "greatest_rise": greatest_rise(a, values)}
        for prefix, name, error in (("", "loss", self._paired), ("error_", "error_rate", self._unpaired)):
            e = self.values(name, a)
            found, weights = barriers(a, e), self._references(name)
            for kind, height in (("", found.linear), ("_mean", found.mean), ("_maximum", found.maximum)):
                known = math.isfinite(height)
                made[f"{prefix}barrier{kind}"] = height
                made[f"{prefix}barrier{kind}_error"] = error(*weights[kind]) if known else math.nan
        return made

    def _references(self, name: str) -> dict[str, tuple[float, float]]:
        """For each barrier the α of its top, and the second end's weight in what it is compared with."""
        linear, top = self._tops(name)
        first, second = (self.found[end].get(name, math.nan) for end in ENDS)
        return {"": (linear, linear), "_mean": (top, 0.5), "_maximum": (top, float(second > first))}

    def _paired(self, top: float, share: float) -> float:
        if top in ENDS and top == share:  # an end compared with itself
            return 0.0
        at, first, second = (self.losses.get(a) for a in (top, *ENDS))
        if at is None or first is None or second is None or len(at) < 2:
            return math.nan
        gap = at - (1 - share) * first - share * second
        return float(gap.std()) / math.sqrt(len(gap))

    def _unpaired(self, top: float, share: float) -> float:
        weights = {0.0: -(1 - share), 1.0: -share}
        weights[top] = weights.get(top, 0.0) + 1
        return math.hypot(*(w * self.found[a].get("error_rate_error", math.nan) for a, w in weights.items() if w))

    def finer(self) -> float | None:
        """Where to look next: half-way to the farther neighbour of the highest point above the chord.

        None where the curve is not finite, so that nothing is highest.
        """
        a = self.inside()
        e = self.values("loss", a)
        if not np.isfinite(e).all():
            return None
        chord = e - ((1 - a) * e[0] + a * e[-1])
        k = 1 + int(chord[1:-1].argmax())
        left, right = a[k] - a[k - 1], a[k + 1] - a[k]
        to_left = left > right * (1 + 1e-9) or (left > right * (1 - 1e-9) and chord[k - 1] > chord[k + 1])
        return float((a[k] + a[k - 1 if to_left else k + 1]) / 2)


def _mixed(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if not first.is_floating_point():
        return first if alpha < 0.5 else second.to(first.device)
    if alpha in ENDS:
        return second.to(first) if alpha else first
    return first + alpha * (second.to(first) - first)
