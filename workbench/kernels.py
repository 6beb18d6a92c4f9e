"""Rules for one evaluation, kept to the calling thread: explicit attention, no dropout, random numbers of its own.

PyTorch's switches for these (``sdpa_kernel``, the attention fast path, the default generators) belong to the
whole process; flipping one would change a training loop that runs in another thread. A ``TorchFunctionMode``
belongs to a thread.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Handler = Callable[["Rules", Any, Sequence[Any], dict[str, Any]], Any]
_NONE: Mapping[Any, Handler] = types.MappingProxyType({})


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention softmax(Q Kᵀ·scale + mask) V by plain products, differentiable any number of times.

    Arguments as in ``torch.nn.functional.scaled_dot_product_attention``; ``dropout_p`` is not applied. Rows
    that the mask empties give zeros, as PyTorch's math kernel does. Memory (…, L, S) for the weights, which
    fused kernels avoid.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = (query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores.softmax(-1) @ value
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    else:
        scores = scores + attn_mask
    # a row of -inf alone would make softmax's derivative NaN, also where it is multiplied by zero afterwards
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ value


class Rules(TorchFunctionMode):
    """The rules as a context of the calling thread; ``seen`` names those that were needed.

    ``instead`` holds handlers that come before the rules, for passes that nobody differentiates.

    Cost: about 1 µs for each torch call made inside.
    """

    def __init__(self, seed: int, instead: Mapping[Any, Handler] = _NONE) -> None:
        super().__init__()
        self.seed, self.instead = seed, instead
        self.seen: set[str] = set()
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand the call to its rule, or make it as it stands."""
        rule = self.instead.get(func) or _RULES.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(self, func, args, dict(kwargs or {}))

    def generator(self, device: torch.device) -> torch.Generator:
        """This evaluation's generator on a device: the same numbers at every evaluation."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


def _attention(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    rules.seen.add("attention")
    return attention(*args, **kwargs)


def _inside(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A function of PyTorch's that is written in Python: run its body under the rules too."""
    body = getattr(
        F, f"_{func.__name__}", func
    )  # behind a switch between two functions, the one that reports the switch
    with rules:
        return _body(body)(*args, **kwargs)


@cache
def _body(func: Any) -> Any:
    """The same function, but one that does not hand itself to the mode a second time."""
    names = {n: _never for n in func.__globals__ if n.startswith("has_torch_function")}
    made = types.FunctionType(
        func.__code__, {**func.__globals__, **names}, func.__name__, func.__defaults__, func.__closure__
    )
    made.__kwdefaults__ = func.__kwdefaults__
    return made


def _never(*_: Any) -> bool:
    return False


def _weight_norm(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """g v / ‖v‖ written out: the second derivative of PyTorch's own kernel is wrong, without a word (torch 2.13)."""
    given: tuple[Any, ...] = (*args, *kwargs.values(), 0)
    v, g, dim = given[:3]
    kept = tuple(d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim)
    return v * (g / v.pow(2).sum(kept, keepdim=True).sqrt())


def _hardsigmoid(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """min(max(x + 3, 0), 6) / 6 written out: PyTorch's own kernel has no second derivative."""
    return F.relu6((args[0] if args else kwargs["input"]) + 3) / 6


def _cdist(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """All distances written out, since PyTorch's own kernel has no second derivative; memory (…, P, R, M)."""
    given: tuple[Any, ...] = (*args, *kwargs.values(), 2.0)
    x1, x2, p = given[:3]
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _embedding_bag(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    words = given.arguments
    if words["max_norm"] is not None:
        return func(*args, **kwargs)
    kept = ("input", "weight", "offsets", "mode", "per_sample_weights", "include_last_offset", "padding_idx")
    return embedding_bag(*(words[name] for name in kept))


def embedding_bag(
    index: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or maxima of bags of embeddings by gathers and additions, differentiable any number of times.

    Arguments as in ``torch.nn.functional.embedding_bag``, whose kernels have no second derivative. Empty bags
    give zeros.
    """
    if index.ndim == 2:
        offsets, include_last_offset = torch.arange(len(index), device=index.device) * index.shape[1], False
    starts = cast("Tensor", offsets)[: -1 if include_last_offset else None]
    flat = index.reshape(-1)
    bag = torch.searchsorted(starts, torch.arange(len(flat), device=flat.device), right=True) - 1
    kept = flat != padding_idx if padding_idx is not None else torch.ones_like(flat, dtype=torch.bool)
    flat, bag = flat[kept], bag[kept]
    rows = weight[flat]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[kept, None]
    empty = weight.new_zeros(len(starts), weight.shape[1])
    if mode == "max":
        return empty.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)
    total = empty.index_add(0, bag, rows)
    return total if mode == "sum" else total / torch.bincount(bag, minlength=len(starts)).clamp_min(1)[:, None]


def _identity(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["input"]


def _rrelu(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(*args[:3], **{**kwargs, "training": False})


def _random(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("generator") is None:
        rules.seen.add("random")
        tensors = (a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = kwargs.get("device") or next(tensors, None) or torch.get_default_device()
        kwargs["generator"] = rules.generator(torch.device(device))
    return func(*args, **kwargs)


def _random_like(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``rand_like`` and its kin by what they are like, since not every release lets them take a generator."""
    like = args[0] if args else kwargs.pop("input")
    made = {"rand_like": torch.rand, "randn_like": torch.randn, "randint_like": torch.randint}[func.__name__]
    words = {"dtype": like.dtype, "device": like.device, **kwargs}
    words.pop("memory_format", None)
    return _random(rules, made, (*args[1:], tuple(like.shape)), words)


def _recurrent(rules: Rules, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if not (isinstance(args[0], Tensor) and args[0].is_cuda):
        return func(*args, **kwargs)
    rules.seen.add("recurrent")
    # cuDNN's recurrent kernels have no second derivative and no thread-local switch: off for this one call only
    with torch.backends.cudnn.flags(enabled=False):
        return func(*args, **kwargs)


def _table() -> dict[Any, Handler]:
    table: dict[Any, Handler] = {F.scaled_dot_product_attention: _attention}
    table |= {F.hardsigmoid: _hardsigmoid, torch.cdist: _cdist, F.embedding_bag: _embedding_bag}
    table[vars(torch)["_weight_norm"]] = _weight_norm
    groups: list[tuple[Handler, list[tuple[Any, str]]]] = [
        (_inside, [(F, n) for n in ("multi_head_attention_forward", "gumbel_softmax")]),
        (_inside, [(F, f"fractional_max_pool{d}d{w}") for d in (2, 3) for w in ("", "_with_indices")]),
        (_inside, [(F, f"_fractional_max_pool{d}d") for d in (2, 3)]),
        (_identity, [(F, f"{n}dropout{d}") for n in ("", "alpha_", "feature_alpha_") for d in ("", "1d", "2d", "3d")]),
        (
            _identity,
            [(torch, f"{n}dropout{u}") for n in ("", "alpha_", "feature_", "feature_alpha_") for u in ("", "_")],
        ),
        (_rrelu, [(F, "rrelu")]),
        (_random, [(torch, n) for n in "rand randn randint randperm normal bernoulli multinomial poisson".split()]),
        (_random_like, [(torch, n) for n in ("rand_like", "randn_like", "randint_like")]),
        (_random, [(Tensor, n) for n in "normal_ uniform_ bernoulli_ exponential_ random_ cauchy_".split()]),
        (_random, [(Tensor, n) for n in ("log_normal_", "geometric_", "bernoulli", "multinomial")]),
        (_recurrent, [(torch, n) for n in ("lstm", "gru", "rnn_tanh", "rnn_relu")]),
    ]
    for rule, places in groups:
        table.update({getattr(owner, name): rule for owner, name in places if hasattr(owner, name)})
    return table


_RULES = _table()
