"""The gradient noise scale from gradient accumulation: micro-batches against the whole, both seen for nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.dynamics.gauges.gauge import Gauge, Meter, Training, Values
from workbench.dynamics.schedules import Schedule
from workbench.optimizers import Scale, scales, threshold


@dataclass(frozen=True)
class NoiseScale(Gauge):
    """B = tr Σ / |G|² from two batch sizes: a micro-batch of b examples and the k of them that one step accumulates.

    ``gradient_square`` = (k b ‖g_big‖² - b ‖g_small‖²) / (k b - b) and ``gradient_variance`` =
    (‖g_small‖² - ‖g_big‖²) / (1/b - 1/(k b)) are unbiased for |G|² and tr Σ (of one example). ``noise_scale`` is the
    ratio of their running means (decay 0.95), nan where the mean of the first is not positive: the noise is then not
    resolved. Average the two recorded parts over more steps for a firmer number; a mean of ratios would be biased.

    Gradients are caught as they are accumulated, before clipping and before processes are averaged: under DDP the
    batches are those of the process that writes. A step with one micro-batch says nothing and records nothing. Losses
    may be divided by k or not. ``backward`` must be called once for each micro-batch, all of one size.
    Source: McCandlish et al. 2018.

    ``preconditioned``: the same of (ηP⁻¹)^(1/2) g, with P and η of the optimizer as the step before left them, under
    names that begin with ``preconditioned_``, so that both gauges can be read. Nothing before the optimizer's first
    step. GradientNoise says how to read it.

    Args:
        every: steps between readings.
        examples: in a micro-batch; with 1 the scale counts micro-batches.
        scaler: AMP's gradient scaler, so that the two parts (their ratio never needs it) come out unscaled.
        preconditioned: whether to look through the optimizer's preconditioner; costs one more copy of the weights.
    """

    cost: ClassVar[str] = "two passes over the gradient for each micro-batch"

    every: Schedule | int = 10
    examples: int = 1
    scaler: Any = field(default=None, compare=False)
    preconditioned: bool = False

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError(f"NoiseScale(examples) is the size of a micro-batch, at least 1; got {self.examples}.")

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without an optimizer, or where its preconditioner is asked for and not known."""
        optimizer = training.known(self)
        if self.preconditioned:
            threshold(optimizer, training.parameters())
        return _NoiseMeter(self, training)


class _NoiseMeter(Meter):
    ahead = True

    def __init__(self, gauge: NoiseScale, training: Training) -> None:
        self.gauge, self.training = gauge, training
        self.handles: list[Any] = []
        self.small: dict[int, Tensor] = {}
        self.big: dict[int, Tensor] = {}
        self.count: dict[int, int] = {}
        self.roots: Mapping[int, Tensor | float] = {}
        self.scale: float | None = None
        self.square: Tensor | None = None
        self.variance: Tensor | None = None

    def arm(self) -> None:
        self.disarm()
        self.small, self.big, self.count, self.scale = {}, {}, {}, None
        self.roots = self._roots() if self.gauge.preconditioned else {}
        if self.gauge.preconditioned and not self.roots:
            return
        for p in self.training.parameters().values():
            self.handles += [p.register_hook(_Micro(self, id(p))), p.register_post_accumulate_grad_hook(self._whole)]

    def stepped(self) -> None:
        self.disarm()
        self.scale = float(self.gauge.scaler.get_scale()) if self.gauge.scaler is not None else 1.0

    def disarm(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def part(self, key: int, grad: Tensor) -> None:
        """One micro-batch's gradient of a parameter arrived."""
        square = self._square(key, grad)
        self.small[key] = self.small[key] + square if key in self.small else square
        self.count[key] = self.count.get(key, 0) + 1

    def _whole(self, p: Tensor) -> None:
        if p.grad is not None:
            self.big[id(p)] = self._square(id(p), p.grad)

    def _square(self, key: int, grad: Tensor) -> Tensor:
        """‖g‖², through the preconditioner where there is one."""
        return _square(grad, self.roots.get(key, 1.0))

    def _roots(self) -> dict[int, Tensor | float]:
        """√(η/P) of each parameter, 0 for one that is never moved; nothing before the optimizer's first step."""
        optimizer, named = self.training.known(self.gauge), self.training.parameters()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        try:
            found = scales(optimizer, {name: p for name, p in named.items() if id(p) in held})
        except ValueError:  # no step was taken yet; what else could be wrong was found at the start
            return {}
        return {id(p): _root(found[name], p) if name in found else 0.0 for name, p in named.items()}

    def read(self) -> Values:
        k, b, scale = max(self.count.values(), default=0), self.gauge.examples, self.scale
        if k < 2 or scale is None:  # one micro-batch, or a step that AMP's scaler skipped
            return {}
        first = next(iter(self.big.values())).device
        big = torch.stack([x.to(first) for x in self.big.values()]).sum() / scale**2
        # In the units of the accumulated gradient each part stands for k times itself; their squares are averaged.
        small = k * torch.stack([x.to(first) for x in self.small.values()]).sum() / scale**2
        square = (k * big - small) / (k - 1)
        variance = (small - big) / (1 / b - 1 / (k * b))
        found = {"gradient_square": square, "gradient_variance": variance, "noise_scale": self._ratio(square, variance)}
        return {f"preconditioned_{n}": v for n, v in found.items()} if self.gauge.preconditioned else found

    def _ratio(self, square: Tensor, variance: Tensor) -> Tensor:
        """Both means have the same weights, so that the ratio needs no correction of their bias."""
        sound = torch.isfinite(square) & torch.isfinite(variance)
        self.square, self.variance = (
            torch.where(sound, value if old is None else 0.95 * old + 0.05 * value, 0.0 if old is None else old)
            for old, value in ((self.square, square), (self.variance, variance))
        )
        return torch.where(self.square > 0, self.variance / self.square, torch.nan)


@dataclass(frozen=True)
class _Micro:
    """A hook that looks at a gradient and leaves it alone."""

    meter: _NoiseMeter
    key: int

    def __call__(self, grad: Tensor) -> None:
        self.meter.part(self.key, grad)


def _root(scale: Scale, like: Tensor) -> Tensor | float:
    if not scale.moved:
        return 0.0
    if not isinstance(scale.entries, Tensor):
        return math.sqrt(scale.rate)
    return (scale.rate / scale.entries).sqrt_().to(torch.promote_types(like.dtype, torch.float32))


def _square(grad: Tensor, root: Tensor | float) -> Tensor:
    held = grad.coalesce() if grad.is_sparse else grad
    values = (held.values() if grad.is_sparse else held).detach()
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if isinstance(root, Tensor):
        wide = wide * (root[held.indices().unbind()] if grad.is_sparse else root).to(wide)
        return torch.linalg.vector_norm(wide).double() ** 2
    return torch.linalg.vector_norm(wide).double() ** 2 * root**2
