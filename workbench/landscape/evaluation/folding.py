"""BatchNorm in eval mode folded into the convolution or dense layer before it: one layer with other weights.

With running statistics μ, σ² the two are affine in the layer's input: BN(W x + b) = s W x + s (b - μ) + β, where
s = γ / sqrt(σ² + ε). Where only weights move, folding costs a pass over the weights at each point and saves one over
the activations for each example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.data import Batch
from workbench.landscape.evaluation.affine import LINEAR, PROBED, Score, replaced
from workbench.subject import Subject

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Normalisations that running statistics make affine, channel by channel; subclasses may be anything else."""
Forward = Callable[..., Any]


@dataclass(eq=False)
class _Call:
    """What one module was called with during a pass, and what it gave."""

    module: nn.Module
    calls: int = 0
    given: Tensor | None = None
    output: Tensor | None = None
    kept: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.given = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        found: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        self.output, self.kept = found, found.clone()  # before an activation writes over it
        return found

    def again(self, *_: Any, **__: Any) -> Tensor:
        assert self.kept is not None
        return self.kept.clone()

    def spoilt(self, *_: Any, **__: Any) -> Tensor:
        assert self.kept is not None
        return torch.full_like(self.kept, torch.nan)


@dataclass(frozen=True, eq=False)
class Folded:
    """Layers, each with the normalisation that is alone in taking what it gives, under their names in the model."""

    subject: Subject
    pairs: tuple[tuple[str, nn.Module, str, nn.Module], ...]

    def at(self, params: Mapping[str, Tensor]) -> dict[nn.Module, Forward]:
        """Forward functions at these weights (others: the model's own); those of the normalisations give their input.

        Cost: a pass over the layers' weights, and as much memory.
        """
        now, found = {**self.subject.tensors(), **params}, dict[nn.Module, Forward]()
        for layer_name, layer, norm_name, norm in self.pairs:
            found[layer] = _layer(layer, *_folded(_own(now, layer_name), _own(now, norm_name), norm))
            found[norm] = _same
        return found


def foldable(subject: Subject, score: Score, apart_from: frozenset[nn.Module] = frozenset()) -> Folded | None:
    """The pairs of a subject that can be folded, without the layers ``apart_from``; None where there are none.

    A pair counts where both are called once, the normalisation with the very tensor that the layer gave, and where
    nobody else uses that tensor: with nan in its place, and the normalisation's own output given, every loss is the
    same. Under batch statistics nothing is folded. Cost: two passes over a few examples.
    """
    if subject.norm != "eval":
        return None
    batch = next(iter(subject.batches(PROBED)))
    known = subject.tensors()
    names = {m: name for name, m in subject.module.named_modules() if all(k in known for k in _held(m, name))}
    layers = [_Call(m) for m in names if type(m) in LINEAR and _untouched(m) and m not in apart_from]
    norms = [_Call(m) for m in names if type(m) in NORMS and _untouched(m) and _fixed(m)]
    if not layers or not norms:
        return None
    with torch.no_grad(), replaced(subject, {c.module: c.forward for c in (*layers, *norms)}):
        plain = score({}, batch)
    pairs = [(one, two) for two in norms for one in layers if _follows(one, two)]
    if not pairs or not _alone(subject, score, batch, pairs, plain):
        return None
    return Folded(subject, tuple((names[a.module], a.module, names[b.module], b.module) for a, b in pairs))


def _held(module: nn.Module, name: str) -> Iterator[str]:
    """The full names of a module's own tensors; a tied one is known by the name of its first place alone."""
    own = (module.named_parameters(name, recurse=False), module.named_buffers(name, recurse=False))
    return (full for tensors in own for full, _ in tensors)


def _untouched(module: nn.Module) -> bool:
    """Whether the module has no forward function of its own, nor a weight that something else computes."""
    return "forward" not in module.__dict__ and "weight" not in module.__dict__


def _fixed(norm: Any) -> bool:
    return not norm.training and norm.running_mean is not None


def _follows(layer: _Call, norm: _Call) -> bool:
    """Whether the normalisation took the layer's output, channels in the second dimension, and nothing else."""
    once = layer.calls == norm.calls == 1 and layer.output is not None and layer.given is not None
    dense = isinstance(layer.module, nn.Linear) and once and layer.kept is not None and layer.kept.ndim != 2
    return once and norm.given is layer.output and not dense


def _alone(subject: Subject, score: Score, batch: Batch, pairs: list[tuple[_Call, _Call]], plain: Tensor) -> bool:
    forwards = {**{a.module: a.spoilt for a, _ in pairs}, **{b.module: b.again for _, b in pairs}}
    with torch.no_grad(), replaced(subject, forwards):
        return bool(plain.isfinite().all()) and torch.equal(score({}, batch), plain)


def _own(tensors: Mapping[str, Tensor], name: str) -> Callable[[str], Tensor | None]:
    return lambda key: tensors.get(f"{name}.{key}" if name else key)


def _folded(
    layer: Callable[[str], Tensor | None], norm: Callable[[str], Tensor | None], module: Any
) -> tuple[Tensor, Tensor]:
    """s W and s (b - μ) + β."""
    weight, mean, variance = layer("weight"), norm("running_mean"), norm("running_var")
    assert weight is not None
    assert mean is not None
    assert variance is not None
    scale, shift, bias = (variance + module.eps).rsqrt(), norm("bias"), layer("bias")
    gain = norm("weight")
    scale = scale if gain is None else scale * gain
    moved = scale * (-mean if bias is None else bias - mean)
    return weight * scale.view(-1, *(1 for _ in weight.shape[1:])), moved if shift is None else moved + shift


def _layer(module: Any, weight: Tensor, bias: Tensor) -> Forward:
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: module._conv_forward(x, weight, bias)


def _same(x: Tensor) -> Tensor:
    return x
