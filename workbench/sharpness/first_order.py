"""The rise of the loss at the point of a ball that the gradient points to: SAM's sharpness and its adaptive form."""

from __future__ import annotations

from collections.abc import Iterator

from workbench.numerics.basis import dot
from workbench.sharpness.balls import Ball
from workbench.sharpness.found import FRACTIONS, Found
from workbench.sharpness.point import Point

VANISHING = 0.1
"""Share of the rise that the gradient itself must explain, else its direction says little."""


def first_order(point: Point, ball: Ball) -> Iterator[Found]:
    """S = L(θ + δ) - L(θ) with δ the ball's point of largest ⟨∇L, δ⟩, and the same at fractions of δ.

    For the Euclidean ball δ = ρ g / ‖g‖ with ‖g‖ over all parameters jointly; for the ellipsoid ‖δ ⊘ T‖ <= ρ,
    δ = ρ T² g / ‖T g‖. It is not the maximum over the ball. Cost: a gradient and three forward passes. Error: rounding.
    Source: Foret et al. 2021 (arXiv:2010.01412); Kwon et al. 2021 (arXiv:2102.11600).
    """
    step = ball.steepest(point.gradient)
    rise = tuple(point.rise(share * step) for share in FRACTIONS)
    slope = float(dot(point.gradient, step))
    notes = point.unmoved(step)
    if slope < VANISHING * abs(rise[-1]):
        said = f"the gradient (norm {point.gradient_norm:.2g}) explains {slope:.1e} of this rise; "
        notes = (f"{said}the direction of a gradient that nearly vanishes is mostly noise", *notes)
    yield Found(
        rise[-1],
        point.rounding,
        converged=True,
        protocol=f"the loss at the first-order maximiser of {ball.words}, one step from the gradient of all examples",
        radius=ball.radius,
        rise=rise,
        rise_error=(point.rounding,) * len(rise),
        notes=notes,
    )
