"""m-sharpness: the worst case of each block of m examples by itself, averaged over blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from workbench.sharpness.ascent import RANDOM, SETTLED, Climb, ascend
from workbench.sharpness.balls import Ball
from workbench.sharpness.found import Found
from workbench.sharpness.point import Point
from workbench.subject import Subject

SHUFFLE = 20_000
"""Number of the draw that deals the examples out to blocks."""


def block_sharpness(point: Point, ball: Ball, steps: int, m: int) -> Iterator[Found]:
    """S = Σ_b (W_b / W) [max over the ball of L_b(θ + δ_b) - L_b(θ)] over random blocks of m examples.

    Each block's maximum is searched for as in :func:`worst_case`, from both starts, so that the value is a lower
    bound; the last, shorter block counts by its weight. Merging blocks never raises the exact value, so values of
    different m do not compare. Cost: as one worst case over all examples, and one trial of the model for each block.
    Error: the weighted gap between the two starts. Source: Foret et al. 2021; Andriushchenko and Flammarion 2022.
    """
    places = _blocks(point, m)
    rise = gap = left = seen = 0.0
    for number, chosen in enumerate(places, 1):
        block = point.subject.selected(chosen)
        climbs = _climb(point, block, ball, steps)
        base = block.loss()
        found = [block.loss(block.unflatten(point.weights + c.step)) - base for c in climbs]
        rise += block.total_weight * max(found)
        gap += block.total_weight * (max(found) - min(found))
        left += block.total_weight * float(climbs[found.index(max(found))].left)
        seen += block.total_weight
        yield Found(
            rise / seen,
            max(gap / seen, point.rounding),
            converged=number == len(places) and left <= max(SETTLED * abs(rise), point.rounding * seen),
            done=number / len(places),
            protocol=_words(ball, steps, m, places),
            radius=ball.radius,
            lower_bound=True,
        )


def _blocks(point: Point, m: int) -> list[Sequence[int]]:
    order = point.draw.generator(SHUFFLE).permutation(point.subject.examples).tolist()
    return [order[first : first + m] for first in range(0, len(order), m)]


def _climb(point: Point, block: Subject, ball: Ball, steps: int) -> list[Climb]:
    uphill = block.flatten(block.gradient())
    ends: list[Climb] = []
    for start in (ball.steepest(uphill), ball.random(point.draw(RANDOM))):
        *_, end = ascend(block, point.weights, ball, start, steps)
        ends.append(end)
    return ends


def _words(ball: Ball, steps: int, m: int, places: list[Sequence[int]]) -> str:
    last = f", the last of {len(places[-1])}" if len(places[-1]) != len(places[0]) else ""
    return (
        f"largest loss of each of {len(places)} random blocks of {min(m, len(places[0]))} examples{last} in "
        f"{ball.words}, weighted by their examples: projected gradient ascent as for worst_l2, {steps} steps from two "
        "starts, a lower bound; the error is the mean gap between the starts"
    )
