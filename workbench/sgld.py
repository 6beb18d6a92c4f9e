"""Stochastic gradient Langevin dynamics around a subject's weights, on copies of them.

The target is the tempered posterior exp(-nβ L(w) - (γ/2) ‖w - w*‖²) around the subject's own point w*. A step is
w ← w - (ε/2) (nβ ∇L_B(w) + γ (w - w*)) + √ε ξ, with ξ from counter-based random numbers: a chain is the same however
the examples are chunked, and however many chains run beside it. Nothing in the loop waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.basis import dot
from workbench.numerics.sampling import Draw
from workbench.shell import precise
from workbench.subject import Subject
from workbench.trees import take

Floats = NDArray[np.float64]

ACCEPTANCE = (0.9, 0.95)
"""The range of mean Metropolis acceptance that tuning aims for."""
ROUND, ROUNDS, GOOD = 20, 40, 3
"""Steps of each chain between two looks at the step size, the most such rounds, and the good ones in a row wanted."""
CHECK_EVERY = 10
"""With mini-batches, an acceptance costs a gradient of its own and is looked at on every so many steps only."""


@dataclass(frozen=True)
class Slope:
    """A mean loss (0-d, float64) and its gradient (size,) at some weights, on some examples."""

    loss: Tensor
    gradient: Tensor


class Posterior:
    """The tempered posterior around a subject's point: losses and gradients on all examples or on random batches.

    Args:
        subject: the function; it must not change meanwhile.
        inverse_temperature: nβ.
        localisation: γ >= 0, the strength of the pull back to w*.
        batch: examples of a random batch; 0 for all of them.

    Raises:
        ValueError: batches are wanted where the loss is a function of whole batches.
    """

    def __init__(self, subject: Subject, inverse_temperature: float, localisation: float, batch: int = 0) -> None:
        self.subject, self.heat, self.pull = subject, inverse_temperature, localisation
        self.batch = 0 if batch >= subject.examples else batch
        self.centre = subject.flatten(subject.params).clone()
        self.whole: list[Batch] = []
        if self.batch:
            _refuse_coupled(subject)
            self.whole = list(subject.batches(subject.examples))  # as the data lie: no chunk may change a draw
        everything = self.slope(self.centre, None)
        self.loss, self.gradient = everything.loss, everything.gradient

    def part(self, draw: Draw, step: int) -> list[Batch] | None:
        """The random batch of a step, without replacement in itself and independent of all others; None for all."""
        if not self.batch:
            return None
        chosen = np.sort(draw.generator(step).choice(self.subject.examples, self.batch, replace=False))
        made: list[Batch] = []
        first = 0
        for batch in self.whole:
            inside = chosen[(chosen >= first) & (chosen < first + batch.size)] - first
            first += batch.size
            if inside.size:
                made.append(_picked(batch, torch.from_numpy(inside)))
        return made

    def slope(self, weights: Tensor, part: list[Batch] | None) -> Slope:
        """Loss and gradient at ``weights`` (size,); an unbiased estimate of both from a ``part``."""
        point = {n: p.detach().requires_grad_() for n, p in self.subject.unflatten(weights).items()}
        buffers = self.subject.recomputed(point) if self.subject.norm == "recompute" else None
        loss = torch.zeros((), dtype=torch.float64, device=self.subject.device)
        gradient = torch.zeros_like(self.centre)
        with precise(self.subject.device), torch.enable_grad():
            for batch in self.subject.batches() if part is None else part:
                total = self.subject.batch_loss(point, batch, buffers)
                loss = loss + total.detach()
                if total.requires_grad:
                    found = torch.autograd.grad(total, list(point.values()), allow_unused=True, materialize_grads=True)
                    gradient += self.subject.flatten(dict(zip(point, found, strict=True)))
        scale = self._scale(part)
        return Slope(loss * scale, gradient.mul_(scale))

    def loss_at_centre(self, part: list[Batch] | None) -> Tensor:
        """The loss at w* on the same examples."""
        if part is None:
            return self.loss
        point = self.subject.unflatten(self.centre)
        buffers = self.subject.recomputed(point) if self.subject.norm == "recompute" else None
        with precise(self.subject.device), torch.no_grad():
            total = torch.stack([self.subject.batch_loss(point, b, buffers).double() for b in part]).sum()
        return total * self._scale(part)

    def _scale(self, part: list[Batch] | None) -> float:
        share = 1.0 if part is None else sum(b.size for b in part) / self.subject.examples
        return 1 / (share * self.subject.total_weight)

    def force(self, weights: Tensor, slope: Slope) -> Tensor:
        """∇U = nβ ∇L + γ (w - w*)."""
        return self.heat * slope.gradient + self.pull * (weights - self.centre)

    def energy(self, weights: Tensor, slope: Slope) -> Tensor:
        """U = nβ L + (γ/2) ‖w - w*‖², a 0-d float64 tensor."""
        off = weights - self.centre
        return self.heat * slope.loss + 0.5 * self.pull * dot(off, off)


def _refuse_coupled(subject: Subject) -> None:
    if subject.norm == "batch" or any("couples the examples" in note for note in subject.notes):
        raise ValueError(
            "batch must be 0 (all examples): the loss depends on which examples are evaluated together (BatchNorm "
            "with batch statistics, or a loss that couples examples), so random batches would sample another function."
        )


def _picked(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch; its weight is not known, and not needed where losses are sums."""
    raw, args, kwargs, targets = (
        take(t, rows, batch.size) for t in (batch.raw, batch.args, batch.kwargs, batch.targets)
    )
    return Batch(raw, args, kwargs, targets, len(rows))


@dataclass
class Chain:
    """One chain: its weights, its random numbers, and what is known at its weights already (full gradients only)."""

    weights: Tensor
    noise: Draw
    batches: Draw
    here: Slope | None = None


@dataclass(frozen=True)
class Traces:
    """What was recorded, (chains, steps) each, float64, nan where nothing is yet.

    ``excess`` L_B(w) - L_B(w*) on the same examples; ``tilt`` nβ∇L_B(w)·∇U_B(w), whose mean times ε/8 is what a finite
    step adds to λ̂; ``acceptance`` min(1, Metropolis ratio) of the move that follows; ``distance`` ‖w - w*‖².
    """

    excess: Floats
    tilt: Floats
    acceptance: Floats
    distance: Floats


@dataclass
class Ensemble:
    """Chains side by side from w*, recorded at every step before the move.

    ``look_often`` asks for the acceptance of every move; else, with mini-batches, of every tenth.
    """

    posterior: Posterior
    step: float
    chains: list[Chain]
    length: int
    look_often: bool = False
    at: int = 0
    record: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (4, len(self.chains), self.length)
        self.record = torch.full(shape, math.nan, dtype=torch.float64, device=self.posterior.subject.device)

    def advance(self) -> None:
        """Record where every chain is, and move it once."""
        check = self.look_often or not self.posterior.batch or self.at % CHECK_EVERY == 0
        for number, chain in enumerate(self.chains):
            self._move(number, chain, check)
        self.at += 1

    def _move(self, number: int, chain: Chain, check: bool) -> None:
        target, size = self.posterior, self.step
        part = target.part(chain.batches, self.at)
        here = chain.here or target.slope(chain.weights, part)
        force = target.force(chain.weights, here)
        off = chain.weights - target.centre
        noise = chain.noise(self.at)
        moved = chain.weights - (size / 2) * force + math.sqrt(size) * noise
        self.record[0, number, self.at] = here.loss - target.loss_at_centre(part)
        self.record[1, number, self.at] = target.heat * dot(here.gradient, force)
        self.record[3, number, self.at] = dot(off, off)
        if check:
            there = target.slope(moved, part)
            gain = target.energy(chain.weights, here) - target.energy(moved, there)
            back = chain.weights - moved + (size / 2) * target.force(moved, there)
            ratio = gain - dot(back, back) / (2 * size) + 0.5 * dot(noise, noise)
            self.record[2, number, self.at] = ratio.clamp(max=0.0).exp()
            chain.here = None if target.batch else there
        chain.weights = moved

    @property
    def traces(self) -> Traces:
        """What was recorded so far; waits for the device."""
        excess, tilt, acceptance, distance = self.record.cpu().numpy().copy()
        return Traces(excess, tilt, acceptance, distance)


def start(posterior: Posterior, draw: Draw, chains: int, purpose: str = "chain") -> list[Chain]:
    """Chains at w*, each with random numbers of its own that depend on its number and purpose only."""
    keys = [f"{draw.key}/{purpose} {number}" for number in range(chains)]
    draws = [replace(draw, key=key, size=posterior.subject.size) for key in keys]
    return [Chain(posterior.centre.clone(), d, replace(d, key=f"{d.key}/batches")) for d in draws]


@dataclass(frozen=True)
class Tuning:
    """A step size under trial: the mean ``acceptance`` and the ``bias`` it showed, and whether it is ``found``.

    ``bias`` is what the step adds to λ̂, over λ̂; ``good`` says that both are as wanted, ``found`` that they were so in
    several rounds one after another.
    """

    step: float
    acceptance: float
    bias: float
    good: bool
    found: bool = False


def tune(posterior: Posterior, draw: Draw, chains: int, tolerance: float) -> Iterator[Tuning]:
    """Look for a step size with acceptance in ACCEPTANCE, or smaller where its bias would exceed ``tolerance``.

    In rounds of 20 steps a chain that follow each other, so that the last ones see the posterior's bulk; a round that
    diverges sends all chains back to w*. Yields after each round; ends with ``found`` when three rounds in a row were
    good, or without after 40. A refused fraction grows like ε^(3/2) and a bias like ε: so the next trial is chosen.
    """
    good = 0
    step = 0.1 / (posterior.heat + posterior.pull)
    walkers = start(posterior, draw, chains, "tuning")
    for number in range(ROUNDS):
        fresh = [replace(c, noise=_later(c.noise, number), batches=_later(c.batches, number)) for c in walkers]
        ensemble = Ensemble(posterior, step, fresh, ROUND, look_often=True)
        for _ in range(ROUND):
            ensemble.advance()
        tried = _judge(ensemble, tolerance)
        good = good + 1 if tried.good else 0
        yield replace(tried, found=good == GOOD)
        if good == GOOD:
            return
        lost = not tried.acceptance > 0.3
        walkers = start(posterior, draw, chains, "tuning") if lost else ensemble.chains
        step *= 0.25 if lost else 1.0 if good else _factor(tried, tolerance)


def _later(draw: Draw, number: int) -> Draw:
    return replace(draw, key=f"{draw.key}/round {number}")


def _judge(ensemble: Ensemble, tolerance: float) -> Tuning:
    traces, low = ensemble.traces, ACCEPTANCE[0]
    heat, size = ensemble.posterior.heat, ensemble.step
    half = traces.excess.shape[1] // 2  # the first half still forgets the step before
    acceptance, tilt, excess = (float(t[:, half:].mean()) for t in (traces.acceptance, traces.tilt, traces.excess))
    bias = size / 8 * tilt / abs(heat * excess) if excess else math.inf
    snug = acceptance <= ACCEPTANCE[1] or bias >= 0.5 * tolerance
    return Tuning(size, acceptance, bias, acceptance >= low and bias <= tolerance and snug)


def _factor(tried: Tuning, tolerance: float) -> float:
    wanted = 1 - sum(ACCEPTANCE) / 2
    by_acceptance = (wanted / max(1 - tried.acceptance, 1e-9)) ** (2 / 3)
    by_bias = 0.75 * tolerance / max(tried.bias, 1e-9)
    return min(max(min(by_acceptance, by_bias), 0.25), 4.0)
