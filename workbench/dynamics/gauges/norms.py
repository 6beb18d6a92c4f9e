"""Sizes of gradients, weights and updates: one pass over the tensors each, and no host waits for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from workbench.dynamics.gauges.gauge import Gauge, Meter, Training, Values, chosen, differences, norms

_DECAY = 0.99


def _mean(values: Tensor, sizes: Tensor) -> Tensor:
    """Mean over tensors that are not zero; nan over none."""
    there = sizes != 0
    return torch.where(there, values, 0.0).sum() / there.sum()


@dataclass(frozen=True)
class _PerTensor(Gauge):
    """A gauge of all tensors together, in which some have a curve of their own."""

    tensors: tuple[str, ...] = ()


class _PerTensorMeter(Meter):
    def __init__(self, gauge: _PerTensor, training: Training) -> None:
        self.gauge, self.training = gauge, training

    def each(self, prefix: str, names: Sequence[str], values: Tensor) -> dict[str, Tensor]:
        """The curves of the tensors that the gauge names."""
        return {f"{prefix}/{names[i]}": values[i] for i in chosen(names, self.gauge.tensors)}


@dataclass(frozen=True)
class GradientNorm(_PerTensor):
    """‖g‖ of the gradient that the optimizer gets, and how far one tensor's gradient stands above its own past.

    ``gradient_norm`` is the Euclidean norm over all parameters. ``gradient_spike`` is the largest, over tensors, of
    ‖g_t‖ over the running mean of the earlier readings (decay 0.99, bias removed); nan at the first reading. A tensor
    whose gradients were all zero so far has no past to stand above, and is left out. What is called a spike is the
    reader's choice: 50 is one in use (Huang et al. 2025, SPAM, for single coordinates).

    Gradients are read when the optimizer has stepped: after clipping, where the loop clips (record what
    ``clip_grad_norm_`` returns as a scalar of your own to see the norm before), after unscaling, reduced over
    processes. A step that AMP's scaler skips has no reading.

    Args:
        every: steps between readings.
        tensors: globs of parameter names that get a curve of their own, ``gradient_norm/NAME``.
    """

    cost: ClassVar[str] = "one pass over the gradient"

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without an optimizer."""
        training.known(self)
        return _GradientMeter(self, training)


class _GradientMeter(_PerTensorMeter):
    ahead = True

    def __init__(self, gauge: GradientNorm, training: Training) -> None:
        super().__init__(gauge, training)
        self.mean: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.found: tuple[list[str], Tensor] | None = None

    def stepped(self) -> None:
        held = {name: p.grad for name, p in self.training.parameters().items() if p.grad is not None}
        self.found = list(held), norms(list(held.values()))

    def read(self) -> Values:
        if self.found is None:
            return {}
        names, values = self.found
        self.found = None
        said: dict[str, Tensor] = {"gradient_norm": torch.linalg.vector_norm(values)}
        said["gradient_spike"] = self._spike(names, values)
        return said | self.each("gradient_norm", names, values)

    def _spike(self, names: list[str], values: Tensor) -> Tensor:
        if not names:
            return torch.tensor(torch.nan, dtype=torch.float64)
        key = "\n".join(names)
        mean, count = self.mean.get(key, torch.zeros_like(values)), self.count.get(key, 0)
        weight = 1 - _DECAY**count
        past = mean > 0
        ratio = torch.where(past, values * weight / mean, -torch.inf).max() if count else values.new_tensor(torch.nan)
        ratio = torch.where(past.any(), ratio, torch.nan)
        # What is not finite is left out of the mean, so that one bad step does not blind the gauge for good.
        self.mean[key] = torch.where(torch.isfinite(values), _DECAY * mean + (1 - _DECAY) * values, mean)
        self.count[key] = count + 1
        return ratio


@dataclass(frozen=True)
class WeightNorm(_PerTensor):
    """‖θ‖ over all trained parameters (``weight_norm``), after the step.

    Args:
        every: steps between readings.
        tensors: globs of parameter names that get a curve of their own, ``weight_norm/NAME``.
    """

    cost: ClassVar[str] = "one pass over the weights"

    def start(self, training: Training) -> Meter:
        """The meter."""
        return _WeightMeter(self, training)


class _WeightMeter(_PerTensorMeter):
    def read(self) -> Values:
        named = self.training.parameters()
        values = norms(list(named.values()))
        said = {"weight_norm": torch.linalg.vector_norm(values)}
        return said | self.each("weight_norm", list(named), values)


@dataclass(frozen=True)
class Distance(_PerTensor):
    """‖θ - θ₀‖ from the weights of step 0 (``distance``), over all trained parameters.

    In a record that is continued, θ₀ is read back from its first checkpoint. Source: Hoffer et al. 2017 (log t law).

    Args:
        every: steps between readings.
        tensors: globs of parameter names that get a curve of their own, ``distance/NAME``.
    """

    cost: ClassVar[str] = "one pass over the weights, and a copy of them kept"

    def start(self, training: Training) -> Meter:
        """The meter."""
        return _DistanceMeter(self, training)


class _DistanceMeter(_PerTensorMeter):
    def __init__(self, gauge: Distance, training: Training) -> None:
        super().__init__(gauge, training)
        first = training.start()
        named = training.parameters()
        self.first = {n: first[n].detach().to(p.device, copy=True) for n, p in named.items() if n in first}

    def read(self) -> Values:
        named = {n: p for n, p in self.training.parameters().items() if n in self.first}
        values = norms(differences(list(named.values()), [self.first[n].to(p) for n, p in named.items()]))
        said = {"distance": torch.linalg.vector_norm(values)}
        return said | self.each("distance", list(named), values)


@dataclass(frozen=True)
class Updates(_PerTensor):
    """How far a step went: Δ = θ' - θ, over all parameters and along and across each weight tensor.

    ``update_norm`` is ‖Δ‖ and ``update_ratio`` ‖Δ‖ / ‖θ‖ over all parameters. For each tensor w of two or more
    dimensions Δ is split into the part along w, which changes its norm, and the part across, which turns it:
    ``radial_update`` = ⟨Δ, w⟩ / ‖w‖², ``tangential_update`` = ‖Δ⊥‖ / ‖w‖ and ``angular_update`` = the angle in
    radians between w and w', all averaged over these tensors (without those that were zero before the step, which have
    no direction). For weights whose scale does not matter (those before a normalisation) the angle is the effective
    step: with weight decay λ it settles near √(2ηλ) under SGD.

    Weight decay, momentum and whatever the loop does to the weights before ``recorder.step`` are part of Δ.
    Source: van Laarhoven 2017; Kosson et al. 2024.

    Args:
        every: steps between readings.
        tensors: globs of parameter names that get a curve of their own, ``angular_update/NAME``.
    """

    cost: ClassVar[str] = "three passes over the weights, and two copies of them meanwhile"

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without an optimizer."""
        training.known(self)
        return _UpdateMeter(self, training)


class _UpdateMeter(_PerTensorMeter):
    ahead = True

    def __init__(self, gauge: Updates, training: Training) -> None:
        super().__init__(gauge, training)
        self.old: dict[str, Tensor] = {}

    def before(self) -> None:
        self.old = {name: p.detach().clone() for name, p in self.training.parameters().items()}

    def read(self) -> Values:
        old, self.old = self.old, {}
        now = self.training.parameters()
        if not old:
            return {}
        names = [n for n in old if n in now]
        before = [old[n] for n in names]
        moved = differences([now[n] for n in names], before)
        steps, sizes = norms(moved), norms(before)
        total = torch.linalg.vector_norm(steps)
        said = {"update_norm": total, "update_ratio": total / torch.linalg.vector_norm(sizes)}
        flat = [i for i, n in enumerate(names) if old[n].ndim > 1]
        if not flat:
            return said
        along = torch.stack([(moved[i] * before[i]).sum(dtype=torch.float64).to(sizes.device) for i in flat])
        return said | self._split([names[i] for i in flat], steps[flat], sizes[flat], along)

    def _split(self, names: list[str], steps: Tensor, sizes: Tensor, along: Tensor) -> dict[str, Tensor]:
        """Of tensors of these sizes, the part of their steps along them (k,), given as ⟨Δ, w⟩, and that across."""
        along = along / sizes
        across = (steps**2 - along**2).clamp(min=0).sqrt()
        parts = torch.stack([along / sizes, across / sizes, torch.atan2(across, sizes + along)])
        means = [_mean(part, sizes) for part in parts]
        said = dict(zip(("radial_update", "tangential_update", "angular_update"), means, strict=True))
        return said | self.each("angular_update", names, parts[2])


@dataclass(frozen=True)
class EffectiveRate(Gauge):
    """The learning rate, and what it amounts to for weights whose scale does not matter.

    ``learning_rate`` is that of the first group, ``effective_rate`` the mean over weight tensors (two or more
    dimensions) of η / ‖w‖² under SGD and η / ‖w‖ under optimizers whose updates do not scale with the gradient (Adam
    and the like). It means something only for weights before a normalisation; choose those with ``tensors``. Tensors
    that are zero are left out.
    Source: van Laarhoven 2017; Lyle et al. 2024.

    Args:
        every: steps between readings.
        tensors: globs of parameter names that are averaged over.
    """

    cost: ClassVar[str] = "one pass over the weights"

    tensors: tuple[str, ...] = ("*",)

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without an optimizer, or when ``tensors`` chooses no weight that it holds."""
        meter = _RateMeter(self, training)
        if not meter.weights():
            raise ValueError(
                f"EffectiveRate(tensors={self.tensors!r}) chooses no weight tensor that the optimizer holds."
            )
        return meter


class _RateMeter(Meter):
    def __init__(self, gauge: EffectiveRate, training: Training) -> None:
        self.gauge, self.training, self.optimizer = gauge, training, training.known(gauge)
        self.power = 2 if isinstance(self.optimizer, torch.optim.SGD) else 1

    def weights(self) -> dict[str, tuple[Tensor, float]]:
        """Weight tensors with their learning rates."""
        rates = {id(p): float(g["lr"]) for g in self.optimizer.param_groups for p in g["params"]}
        named = self.training.parameters()
        picked = [list(named)[i] for i in chosen(list(named), self.gauge.tensors)]
        held: Mapping[str, Tensor] = {n: named[n] for n in picked if named[n].ndim > 1 and id(named[n]) in rates}
        return {n: (p, rates[id(p)]) for n, p in held.items()}

    def read(self) -> Values:
        held = self.weights()
        sizes = norms([p for p, _ in held.values()])
        rates = torch.tensor([rate for _, rate in held.values()], dtype=torch.float64).to(sizes.device)
        first = float(self.optimizer.param_groups[0]["lr"])
        return {"learning_rate": first, "effective_rate": _mean(rates / sizes**self.power, sizes)}
