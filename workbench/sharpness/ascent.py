"""Worst cases by projected gradient ascent: lower bounds of the largest loss in a ball around the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.numerics.basis import dot
from workbench.sharpness.balls import Ball
from workbench.sharpness.found import Found
from workbench.sharpness.point import Point, value_and_slope
from workbench.subject import Subject

FRESH = 0.75
"""Weight of the new step; the rest goes to the step before."""
FIRST_STEP = 2.0
"""Length of the first step, in radii."""
SETTLED = 0.02
"""Share of the rise that the gradient may still promise within the ball at the end of a converged ascent."""
RANDOM = 10_000
"""Number of the random vectors that ascents start from: away from those that other definitions draw."""


@dataclass(frozen=True, eq=False)
class Climb:
    """How far one ascent came: the step, and as 0-d float64 tensors its loss and what is left to gain to first order.

    The latter, max ⟨∇L, δ' - δ⟩ over the ball, is zero exactly where no small step within the ball raises the loss.
    """

    step: Tensor
    loss: Tensor
    left: Tensor


def ascend(subject: Subject, weights: Tensor, ball: Ball, start: Tensor, steps: int) -> Iterator[Climb]:
    """Projected gradient ascent with momentum from ``start``, yielding after each gradient; never gets worse.

    δ' = P(δ + ¾ (P(δ + η u) - δ) + ¼ (δ - δ_before)), with u the ball's uphill step and η = 2 at first. A step that
    does not raise the loss is taken back, η halved and the momentum forgotten; so the last point is the best of all.
    Nothing is read back from the device. Cost: ``steps`` + 1 gradients; memory: six vectors.
    """
    here = before = start
    loss, slope = value_and_slope(subject, weights + here)
    length = torch.full((), FIRST_STEP, dtype=start.dtype, device=start.device)
    yield Climb(here, loss, dot(slope, ball.steepest(slope) - here))
    for _ in range(steps):
        target = ball.project(here + length * ball.uphill(slope))
        tried = ball.project(here + FRESH * (target - here) + (1 - FRESH) * (here - before))
        found, bent = value_and_slope(subject, weights + tried)
        better = found > loss
        before = here
        here, slope = torch.where(better, tried, here), torch.where(better, bent, slope)
        loss, length = torch.where(better, found, loss), torch.where(better, length, length / 2)
        yield Climb(here, loss, dot(slope, ball.steepest(slope) - here))


Starts = Callable[[Tensor], tuple[Tensor, ...]]


def worst_case(point: Point, ball: Ball, steps: int) -> Iterator[Found]:
    """max over the ball of L(θ + δ) - L(θ), by two ascents: from a random point and from the first-order maximiser.

    The value is the best point met, so a lower bound of the maximum. Error: by how much the two starts differ, which
    says how much depends on the start and nothing of what both missed. Source: Andriushchenko et al. 2023
    (arXiv:2302.07011).
    """
    starts = (ball.steepest(point.gradient), ball.random(point.draw(RANDOM)))
    report = functools.partial(_report, point, ball, steps)
    ended: list[Climb] = []
    for number, start in enumerate(starts):
        for taken, climb in enumerate(ascend(point.subject, point.weights, ball, start, steps)):
            if taken % 4 == 0 and taken < steps:
                yield report([*ended, climb], (number + (taken + 1) / (steps + 1)) / len(starts))
        ended.append(climb)  # pyright: ignore[reportPossiblyUnboundVariable]
    yield report(ended, 1.0)


def _report(point: Point, ball: Ball, steps: int, climbs: list[Climb], done: float) -> Found:
    # The last word has the per-example sums of a forward pass, as all other definitions do.
    rises = [point.rise(c.step) if done == 1 else float(c.loss) - point.loss for c in climbs]
    best = max(range(len(rises)), key=rises.__getitem__)
    settled = float(climbs[best].left) <= max(SETTLED * abs(rises[best]), point.rounding)
    return Found(
        rises[best],
        max(rises[best] - min(rises), point.rounding) if len(rises) > 1 else float("nan"),
        converged=done == 1 and settled,
        done=done,
        protocol=(
            f"largest loss in {ball.words}: projected gradient ascent, momentum 0.75, {steps} steps of at first 2 "
            "radii, halved on stall, from the first-order maximiser and from a random point; best of all iterates, a "
            "lower bound; the error is the gap between the two starts"
        ),
        radius=ball.radius,
        lower_bound=True,
        notes=point.unmoved(climbs[best].step) if done == 1 else (),
    )
