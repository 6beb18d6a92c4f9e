"""Single coordinates of the gradient beside the second moment that Adam keeps of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from workbench.dynamics.gauges.gauge import Gauge, Meter, Training, Values
from workbench.dynamics.schedules import Schedule

_SQUARE = "exp_avg_sq"


@dataclass(frozen=True)
class CoordinateSpikes(Gauge):
    """Coordinates of the gradient that stand far above what Adam has seen of them: g² > ``ratio`` · v̂.

    v̂ = v / (1 - β₂ᵗ) is the running mean of g² over the steps before this one (with its own step in it, g²/v̂ could
    never pass 1 / (1 - β₂)). ``coordinate_spikes`` is the share of coordinates, ``coordinate_spike_max`` the largest
    g²/v̂. Coordinates whose gradients were all zero so far are left out; nan where none is left, so at the first step.

    Gradients are read as the optimizer gets them, after clipping and unscaling. For Adam and the like, which keep v as
    ``exp_avg_sq``. Source: Huang et al. 2025 (SPAM), who clip such coordinates, and compare with v itself, which early
    steps make small.

    Args:
        every: steps between readings.
        ratio: how many times its mean square a squared coordinate must be; 5000 is in use.
    """

    cost: ClassVar[str] = "three passes over the gradient and the optimizer's state"

    every: Schedule | int = 10
    ratio: float = 5000.0

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ValueError(f"CoordinateSpikes(ratio) must be positive, such as 5000; got {self.ratio!r}.")

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without an optimizer that keeps second moments."""
        optimizer = training.known(self)
        if any("betas" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"CoordinateSpikes reads the second moments of Adam and the like; {type(optimizer).__name__} keeps "
                "none. Use GradientNorm, whose gradient_spike is by tensor."
            )
        return _SpikeMeter(self, optimizer)


class _SpikeMeter(Meter):
    ahead = True

    def __init__(self, gauge: CoordinateSpikes, optimizer: torch.optim.Optimizer) -> None:
        self.gauge, self.optimizer = gauge, optimizer
        self.found: Tensor | None = None

    def before(self) -> None:
        parts = list(self._parts())
        self.found = None
        if parts:
            first = parts[0].device
            self.found = torch.stack([part.to(first) for part in parts])

    def _parts(self) -> Iterator[Tensor]:
        """(spikes, coordinates, largest ratio) of each parameter, on its device."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                held = self.optimizer.state.get(p, {})
                if p.grad is None or p.grad.is_sparse or _SQUARE not in held or "step" not in held:
                    continue
                # Without the correction v is (1 - β₂) g² after the first step, and the second one would look huge.
                steps = torch.as_tensor(held["step"], dtype=torch.float64)
                mean = held[_SQUARE].double() / (1 - group["betas"][1] ** steps)
                ratio = torch.where(mean > 0, p.grad.double().square() / mean, -1.0)
                spikes = (ratio > self.gauge.ratio).sum()
                yield torch.stack([spikes.double(), (mean > 0).sum().double(), ratio.max()])

    def read(self) -> Values:
        found, self.found = self.found, None
        if found is None:
            return {"coordinate_spikes": torch.nan, "coordinate_spike_max": torch.nan}
        spikes, count, largest = found[:, 0].sum(), found[:, 1].sum(), found[:, 2].max()
        largest = torch.where(count > 0, largest, torch.nan)
        return {"coordinate_spikes": spikes / count, "coordinate_spike_max": largest}
