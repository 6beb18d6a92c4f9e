"""What a forward pass over some fixed examples shows: loss, log-Z, attention logits, dormant units."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.dynamics.gauges.gauge import Gauge, Meter, Training, Values
from workbench.dynamics.schedules import Schedule
from workbench.subject import Subject

aten = torch.ops.aten

_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}
_SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
_NONLINEAR = {
    getattr(aten, name).default
    for name in (
        "relu", "relu_", "gelu", "gelu_", "silu", "silu_", "tanh", "tanh_", "elu", "elu_", "celu", "selu", "softplus",
        "leaky_relu", "leaky_relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "mish", "threshold",
    )
}  # fmt: skip


Hear = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]
"""Told of an operation, its arguments by place and by name, and its result."""


class _Overheard(TorchDispatchMode):
    """Shows every operation of a forward pass, with its result, to a function; changes none."""

    def __init__(self, hear: Hear) -> None:
        super().__init__()
        self.hear = hear

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        self.hear(func, args, given, result)
        return result


def _passes(subject: Subject, hear: Hear | None = None) -> Iterator[Tensor]:
    """One pass over the examples at the weights of now: the outputs of each chunk, overheard where wanted."""
    for batch in subject.batches():
        quiet = torch.autocast(subject.device.type, enabled=False)
        # With gradients asked for, attention layers leave their closed inference kernels, in which nothing is heard.
        point = {name: p.requires_grad_(hear is not None) for name, p in subject.params.items()}
        overheard = contextlib.nullcontext() if hear is None else _Overheard(hear)
        with subject.lock, torch.set_grad_enabled(hear is not None), quiet, overheard:
            outputs = subject.batch_outputs(point, batch).detach()
        yield outputs


@dataclass(frozen=True)
class Evaluation(Gauge):
    """Loss and accuracy on examples of its own, or on the recorder's: ``{name}_loss``, ``{name}_accuracy``.

    In evaluation mode, by the recorder's loss. Accuracy is left out where the loss knows no decisions.

    Args:
        every: steps between readings.
        data: examples, as ``wb.Subject`` takes them; None: the recorder's.
        name: what the curves are called by.
        examples: at most so many; None: all.
    """

    cost: ClassVar[str] = "a forward pass over the examples; a GPU is waited for"

    every: Schedule | int = 100
    data: Any = field(default=None, compare=False)
    name: str = "test"
    examples: int | None = 2048

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without data and loss."""
        if self.data is None:
            return _EvaluationMeter(self.name, training.subject(self, self.examples))
        own = Training(training.model, None, training.start, self.data, training.loss, training.norm)
        return _EvaluationMeter(self.name, own.subject(self, self.examples))


class _EvaluationMeter(Meter):
    def __init__(self, name: str, subject: Subject) -> None:
        self.name, self.subject = name, subject

    def read(self) -> Values:
        try:
            found = self.subject.evaluate()
        except (ArithmeticError, ValueError):
            return {f"{self.name}_loss": math.nan}
        said = {f"{self.name}_loss": found["loss"]}
        return said | {f"{self.name}_accuracy": 1 - rate for rate in (found["error_rate"],) if not math.isnan(rate)}


@dataclass(frozen=True)
class LogZ(Gauge):
    """log Z = logsumexp of the outputs: a drift of all logits together, which cross-entropy does not see.

    ``log_z`` and ``log_z_square`` are its mean and mean square over outputs (the z-loss is 1e-4 times the second),
    ``log_z_max`` the largest |log Z|, ``logit_mean`` the mean logit. Outputs have their classes last for tokens
    (examples, tokens, classes), second for images of labels; every position counts, padded ones too. Of a single logit
    (binary losses) the other class has logit 0.
    Source: Chowdhery et al. 2022; Wortsman et al. 2023.

    Args:
        every: steps between readings.
        examples: at most so many of the recorder's.
    """

    cost: ClassVar[str] = "a forward pass over the examples"

    every: Schedule | int = 100
    examples: int | None = 256

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without data and loss."""
        return _LogZMeter(training.subject(self, self.examples))


class _LogZMeter(Meter):
    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def read(self) -> Values:
        outputs = [_classes(out.float() if out.dtype != torch.float64 else out) for out in _passes(self.subject)]
        axis = 1 if outputs[0].ndim == 4 else -1
        log_z = torch.cat([torch.logsumexp(out, axis).reshape(-1) for out in outputs]).double()
        count = sum(out.numel() for out in outputs)
        mean = torch.stack([out.sum(dtype=torch.float64) for out in outputs]).sum() / count
        said = {"log_z": log_z.mean(), "log_z_square": log_z.square().mean(), "log_z_max": log_z.abs().max()}
        return said | {"logit_mean": mean}


def _classes(outputs: Tensor) -> Tensor:
    """Outputs with an axis of classes: a single logit stands beside the 0 of the other class."""
    rows = outputs[:, None] if outputs.ndim == 1 else outputs
    return torch.cat([torch.zeros_like(rows), rows], -1) if rows.ndim < 4 and rows.shape[-1] == 1 else rows


@dataclass(frozen=True)
class AttentionLogits(Gauge):
    """The largest attention logit q·k / √d over all layers, heads and visible pairs: ``attention_logit_max``.

    Found in whatever way the model computes attention: fused kernels are given their scores again in float32 from
    their own q and k, and other implementations by the argument of their softmax (along the last of at least three
    dimensions, so a softmax over tokens that is no attention would count). Growth far beyond 1e2 precedes divergence in
    low precision. Not seen: kernels outside PyTorch. Source: Dehghani et al. 2023; Wortsman et al. 2023.

    Args:
        every: steps between readings.
        examples: at most so many of the recorder's.
    """

    cost: ClassVar[str] = "a forward pass over the examples, and the scores of one layer in memory"

    every: Schedule | int = 100
    examples: int | None = 32

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without data and loss, or where no attention is found."""
        meter = _AttentionMeter(training.subject(self, self.examples))
        if not meter.largest():
            raise ValueError("AttentionLogits finds no attention in this model; leave the gauge out.")
        return meter


class _AttentionMeter(Meter):
    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def largest(self) -> list[Tensor]:
        """The largest visible score of each attention that ran."""
        found: list[Tensor] = []

        def hear(func: Any, args: Sequence[Any], given: Mapping[str, Any], _: Any) -> None:
            if func in _ATTENTION:
                found.append(_scores(func, args, given).amax())
            elif func in _SOFTMAX and args[0].ndim > 2 and args[1] in (-1, args[0].ndim - 1):
                found.append(args[0].amax())

        for _ in _passes(self.subject, hear):
            pass
        return found

    def read(self) -> Values:
        return {"attention_logit_max": torch.stack([x.double() for x in self.largest()]).max()}


def _scores(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Tensor:
    """q·k times the scale in float32, -inf where a query may not look."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(given)
    q, k = named["query"], named["key"]
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if k.shape[-3] != q.shape[-3] else k
    scale = named.get("scale") or 1 / math.sqrt(q.shape[-1])
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    bias = named.get("attn_mask", named.get("attn_bias"))
    scores = scores if bias is None else scores + bias
    if not named.get("is_causal"):
        return scores
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~seen, -math.inf)


@dataclass(frozen=True)
class DormantUnits(Gauge):
    """How many hidden units do next to nothing: ``dormant_units`` and ``dead_units``, as shares of all units.

    A unit is dormant when its mean |h| over the examples is at most ``threshold`` times the mean over its layer's
    units, and dead when h is zero on every example. Units are what comes out of non-linearities (as modules or as
    functions): channels of images, averaged over places, else the last dimension. nan where one is not finite. For
    saturating ones (tanh, sigmoid)
    neither says that a unit is stuck. Source: Sokar et al. 2023 (ReDo); Dohare et al. 2024.

    Args:
        every: steps between readings.
        examples: at most so many of the recorder's.
        threshold: τ; 0.025 and 0.1 are in use.
    """

    cost: ClassVar[str] = "a forward pass over the examples, and one more over its activations"

    every: Schedule | int = 100
    examples: int | None = 256
    threshold: float = 0.025

    def start(self, training: Training) -> Meter:
        """The meter; ``ValueError`` without data and loss, or where no non-linearity is found."""
        meter = _DormantMeter(self, training.subject(self, self.examples))
        if not meter.sizes():
            raise ValueError("DormantUnits finds no non-linearity in this model; leave the gauge out.")
        return meter


class _DormantMeter(Meter):
    def __init__(self, gauge: DormantUnits, subject: Subject) -> None:
        self.gauge, self.subject = gauge, subject

    def sizes(self) -> list[Tensor]:
        """Σ|h| of each unit, one tensor for each non-linearity in the order in which they run."""
        chunk: list[Tensor] = []
        chunks: list[list[Tensor]] = []

        def hear(func: Any, _: Sequence[Any], __: Mapping[str, Any], result: Any) -> None:
            if func in _NONLINEAR:
                unit = 1 if result.ndim > 3 else result.ndim - 1
                chunk.append(result.abs().sum([d for d in range(result.ndim) if d != unit], dtype=torch.float64))

        for _ in _passes(self.subject, hear):
            chunks.append(chunk.copy())
            chunk.clear()
        return [torch.stack(layer).sum(0) for layer in zip(*chunks, strict=True)]

    def read(self) -> Values:
        layers = self.sizes()
        count = sum(layer.numel() for layer in layers)
        dormant = sum((layer <= self.gauge.threshold * layer.mean()).sum() for layer in layers)
        dead = sum((layer == 0).sum() for layer in layers)
        # Every comparison with nan is false, so that a unit that is not finite would count as alive.
        known = torch.stack([torch.isfinite(layer).all() for layer in layers]).all()
        shares = {"dormant_units": torch.as_tensor(dormant) / count, "dead_units": torch.as_tensor(dead) / count}
        return {name: torch.where(known, share, torch.nan) for name, share in shares.items()}
