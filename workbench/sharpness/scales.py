"""The yardsticks of adaptive measures: how far each weight, filter or module may move in proportion to its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from workbench.parameters import filter_axes
from workbench.subject import Subject

ETA = 0.01
"""What ASAM's own code adds to the size of every weight."""
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norm_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the scales and shifts of normalisation layers."""
    homes = [(name, m) for name, m in module.named_modules() if isinstance(m, _NORMS)]
    return frozenset(f"{home}.{own}" if home else own for home, m in homes for own, _ in m.named_parameters())


def weight_names(subject: Subject) -> tuple[str, ...]:
    """Names of the chosen weights proper: at least two dims, and not of a normalisation layer."""
    norms = norm_parameters(subject.module)
    return tuple(name for name, p in subject.params.items() if p.ndim > 1 and name not in norms)


def modules_of_weights(subject: Subject) -> Mapping[str, tuple[str, ...]]:
    """The weights proper by the module that holds them."""
    found: dict[str, tuple[str, ...]] = {}
    for name in weight_names(subject):
        home = name.rpartition(".")[0] or name
        found[home] = (*found.get(home, ()), name)
    return found


def elementwise(subject: Subject, asam_compat: bool) -> Tensor:
    """T, (size,): |θ| for weights with at least two dims, 0 (they stay) for all others.

    Under exact rescalings of weights T follows them, so measures in units of T do not change. ``asam_compat`` gives
    what ASAM's own code uses instead: |θ| + 0.01 where the name contains "weight", 1 for the rest; it is not invariant.
    """

    def size(name: str, p: Tensor) -> Tensor:
        if asam_compat:
            return p.abs() + ETA if "weight" in name else torch.ones_like(p)
        return p.abs() if p.ndim > 1 else torch.zeros_like(p)

    return _each(subject, size)


def moved(subject: Subject) -> Tensor:
    """1 for every parameter but those of normalisation layers, which are 0: (size,)."""
    norms = norm_parameters(subject.module)
    return _each(subject, lambda name, p: torch.full_like(p, float(name not in norms)))


def filterwise(subject: Subject) -> Callable[[Tensor], Tensor]:
    """A map from a Gaussian vector ξ to one whose filters are ‖θ_f‖ ξ_f / ‖ξ_f‖; biases and norm parameters are 0.

    A filter is what makes one output: a row of a dense weight or embedding, an output channel of a convolution.
    """
    params, axes, kept = subject.params, filter_axes(subject.module), set(weight_names(subject))

    def shape(noise: Tensor) -> Tensor:
        raw = subject.unflatten(noise)
        return subject.flatten(
            {n: _scaled(raw[n], p, axes.get(n, 0)) if n in kept else torch.zeros_like(p) for n, p in params.items()}
        )

    return shape


def _scaled(noise: Tensor, weight: Tensor, axis: int) -> Tensor:
    over = tuple(d for d in range(weight.ndim) if d != axis)
    lengths = torch.linalg.vector_norm(noise, dim=over, keepdim=True)
    wanted = torch.linalg.vector_norm(weight, dim=over, keepdim=True)
    return noise * (wanted / lengths.clamp_min(torch.finfo(weight.dtype).tiny))


def _each(subject: Subject, function: Callable[[str, Tensor], Tensor]) -> Tensor:
    return subject.flatten({name: function(name, p) for name, p in subject.params.items()})
