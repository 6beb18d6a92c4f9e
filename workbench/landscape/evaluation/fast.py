"""Other kernels for passes that nobody differentiates: the same numbers to rounding, in less time on some machines.

- Dense layers in float32 on a CPU by oneDNN. PyTorch calls MKL, which does without AVX-512 on processors of other
  makers (half the speed there).
- Attention by PyTorch's fused kernels, in place of explicit products.
- log softmax over a few classes with the classes in the first dimension, where PyTorch's kernel works on all examples
  side by side instead of class by class (six times as fast for ten classes).
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.kernels import Handler, Rules, attention

_several: Callable[[Tensor], bool] = getattr(torch._C, "_functorch").is_batchedtensor  # noqa: B009
FEW = 32
"""So many classes or fewer are few for log softmax."""


def _dense(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """x Wᵀ + b by oneDNN where it can be, else as it stands."""
    words = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    given = [t for t in words.values() if t is not None]
    if (
        torch.is_autocast_enabled("cpu")
        or not all(map(_suits, given))
        or words["weight"].ndim != 2
        or not words["input"].numel()
    ):
        return func(*args, **kwargs)
    return torch.ops.mkldnn._linear_pointwise(words["input"], words["weight"], words.get("bias"), "none", [], "")


def _suits(tensor: Tensor) -> bool:
    """Whether oneDNN takes a tensor: dense float32 on a CPU, not those of several points that vmap holds together."""
    plain = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.layout == torch.strided
    return plain and not _several(tensor)


def _fused(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """PyTorch's own attention, without dropout; explicit products for several points, which it would take singly."""
    if any(isinstance(t, Tensor) and _several(t) for t in (*args, *kwargs.values())):
        return attention(*args, **kwargs)
    words = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return func(**dict(zip(words, args, strict=False)) | kwargs | {"dropout_p": 0.0})


def _log_softmax(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Over the last dimension of (n, classes): transposed, the same, and transposed back."""
    words = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    scores = words["input"]
    few = scores.ndim == 2 and words.get("dim") in (1, -1) and 1 < scores.shape[1] <= min(FEW, len(scores))
    if not few or set(words) - {"input", "dim", "_stacklevel", "dtype"} or words.get("dtype"):
        return func(*args, **kwargs)
    return F.log_softmax(scores.t().contiguous(), 0).t()


def _cross_entropy(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Of class numbers: log softmax, then PyTorch's negative log-likelihood."""
    scores, labels, *others = args
    words = {key: value for key, value in kwargs.items() if value is not None}
    smooth = words.pop("label_smoothing", 0.0)
    if others or smooth or labels.is_floating_point() or set(words) - {"weight", "ignore_index", "reduction"}:
        return func(*args, **kwargs)
    return F.nll_loss(_log_softmax(rules, F.log_softmax, (scores, 1), {}), labels, **words)


def _table() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {F.scaled_dot_product_attention: _fused, F.cross_entropy: _cross_entropy}
    table |= dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), _log_softmax)
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        table[F.linear] = _dense
    return table


FAST: Mapping[Any, Handler] = _table()
"""Handlers for :meth:`Shell.handling`."""
