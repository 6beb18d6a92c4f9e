"""The gauges that cost next to nothing and that nobody regrets."""

from __future__ import annotations

from workbench.dynamics.gauges.gauge import Gauge
from workbench.dynamics.gauges.norms import Distance, GradientNorm, Updates, WeightNorm
from workbench.dynamics.schedules import Schedule


def defaults(every: Schedule | int = 20) -> tuple[Gauge, ...]:
    """Gradient norm and spikes, weight norm, updates, distance from the start; a few passes over the weights each."""
    return GradientNorm(every), WeightNorm(every), Updates(every), Distance(every)
