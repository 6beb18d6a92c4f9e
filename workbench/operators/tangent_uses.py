"""Where a forward pass uses its parameters: every call recorded with its input, so that gradients need no search.

A function mode sees each torch call with a chosen parameter among its arguments, whoever makes it: a module, a module
used twice, a tied weight, attention's own code, a bare parameter in a formula. Calls with a known formula become
:class:`Outer` or :class:`Scale` uses; a parameter in any other call is ``loose`` and differentiated as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

Layout = Literal["first", "second", "major", "minor"]
"""Where the examples are in a call's output: in the first or second dimension, or in the first together with
positions, counted slowly (major) or quickly (minor)."""
LAYOUTS: tuple[Layout, ...] = ("first", "second", "major", "minor")
Role = Literal["weight", "bias"]


@dataclass
class Use(ABC):
    """One call y = f(x; weight, bias): its parameters' names by role, the output's place in the graph and shape."""

    names: dict[Role, str]
    edge: Any
    shape: tuple[int, ...]
    layout: Layout = field(default="first", init=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be the same on other examples."""
        return type(self).__name__, tuple(self.names.items())

    def examples_first(self, tensor: Tensor, examples: int) -> Tensor:
        """A tensor of the output's batch dimensions as (examples, positions or what follows, ...)."""
        return arranged(tensor, self.layout, examples)

    @abstractmethod
    def rows(self, role: Role, slope: Tensor, examples: int) -> Tensor:
        """Each example's gradient (examples, numel) in one parameter, for the output's gradient ``slope``."""


@dataclass
class Outer(Use):
    """A weight whose gradient is a sum over positions of outer products: of output gradients and inputs.

    ``turned``: the weight holds inputs by outputs, as in ``x @ W`` and tables of embeddings.
    """

    given: Tensor
    groups: int = 1
    turned: bool = False
    _patches: Tensor | None = field(default=None, init=False)

    @property
    def key(self) -> tuple[Any, ...]:
        return *super().key, self.groups, self.turned

    @abstractmethod
    def inputs(self, examples: int) -> Tensor:
        """x as (examples, groups, positions, inputs)."""

    @abstractmethod
    def slopes(self, slope: Tensor, examples: int) -> Tensor:
        """The output's gradient as (examples, groups, positions, outputs)."""

    def patches(self, examples: int) -> Tensor:
        """:meth:`inputs`, made once for all outputs."""
        if self._patches is None:
            self._patches = self.inputs(examples)
        return self._patches

    def rows(self, role: Role, slope: Tensor, examples: int) -> Tensor:
        g = self.slopes(slope, examples)
        if role == "bias":
            return g.sum(2).flatten(1)
        x = self.patches(examples)
        return (x.mT @ g if self.turned else g.mT @ x).flatten(1)


@dataclass
class Dense(Outer):
    """x Wᵀ + b, or x @ W."""

    def inputs(self, examples: int) -> Tensor:
        x = self.examples_first(self.given, examples)
        return x.reshape(examples, 1, -1, x.shape[-1])

    def slopes(self, slope: Tensor, examples: int) -> Tensor:
        g = self.examples_first(slope, examples)
        return g.reshape(examples, 1, -1, g.shape[-1])


@dataclass
class Convolution(Outer):
    """A convolution in any number of dimensions; x is cut into the patches that it sees."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    def inputs(self, examples: int) -> Tensor:
        flat = [p for pair in reversed(self.padding) for p in pair]
        x, space = F.pad(self.given, flat) if any(flat) else self.given, len(self.kernel)
        for i, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
        n, channels = x.shape[:2]
        x = x.reshape(n, self.groups, channels // self.groups, *x.shape[2:])
        x = x.movedim(tuple(range(3, 3 + space)), tuple(range(2, 2 + space)))  # positions before channels
        x = x.reshape(n, self.groups, -1, channels // self.groups * _product(self.kernel))
        return self._join(x, examples)

    def slopes(self, slope: Tensor, examples: int) -> Tensor:
        n, channels = slope.shape[:2]
        g = slope.reshape(n, self.groups, channels // self.groups, -1).mT
        return self._join(g, examples)

    def _join(self, found: Tensor, examples: int) -> Tensor:
        """Frames of one example beside each other as more positions."""
        if self.layout == "first":
            return found
        frames = self.examples_first(found, examples)
        return frames.transpose(1, 2).flatten(2, 3)


@dataclass
class Lookup(Outer):
    """Rows of a table; x is which row, as an integer, -1 for rows that have no gradient."""

    entries: int = 0
    skipped: int | None = None

    def inputs(self, examples: int) -> Tensor:
        """(examples, 1, positions) integers."""
        x = self.examples_first(self.given, examples).reshape(examples, 1, -1)
        return x if self.skipped is None else x.masked_fill(x == self.skipped, -1)

    def slopes(self, slope: Tensor, examples: int) -> Tensor:
        g = self.examples_first(slope, examples)
        return g.reshape(examples, 1, -1, g.shape[-1])

    def rows(self, role: Role, slope: Tensor, examples: int) -> Tensor:
        g, x = self.slopes(slope, examples)[:, 0], self.inputs(examples)[:, 0]
        table = g.new_zeros(examples, self.entries, g.shape[-1])
        g = g.masked_fill((x < 0).unsqueeze(-1), 0)
        table.scatter_add_(1, x.clamp_min(0).unsqueeze(-1).expand_as(g), g)
        return table.flatten(1)


@dataclass
class Scale(Use):
    """x · weight + bias, entry by entry, both of shape ``like`` broadcast to the output (normalisation, sums)."""

    given: Tensor | None
    like: tuple[int, ...]

    def rows(self, role: Role, slope: Tensor, examples: int) -> Tensor:
        per = self.examples_first(slope * cast("Tensor", self.given) if role == "weight" else slope, examples)
        shared = [i for i, size in enumerate(self.aligned) if size == 1 and i > 0]
        return (per.sum(shared) if shared else per).reshape(examples, -1)

    @property
    def aligned(self) -> tuple[int, ...]:
        """``like`` with the dimensions of an output whose examples come first; 1 where entries are shared."""
        like = (1,) * (len(self.shape) - len(self.like)) + self.like
        if self.layout == "second":
            return like[1], like[0], *like[2:]
        return like if self.layout == "first" else (like[0], *like)


def arranged(tensor: Tensor, layout: Layout, examples: int) -> Tensor:
    """A tensor with its examples in the first dimension: a view."""
    if layout in ("first", "second"):
        return tensor if layout == "first" else tensor.movedim(1, 0)
    if layout == "major":
        return tensor.unflatten(0, (examples, -1))
    return tensor.unflatten(0, (-1, examples)).transpose(0, 1)


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


# ------------------------------------------------------------------------------------------------ the calls


class Recorder(TorchFunctionMode):
    """Uses of the given parameters by the calls made while it is entered, in their order, and ``loose`` ones."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self.uses: list[Use] = []
        self.loose: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call, and note it where it uses a parameter in a way that is differentiated."""
        words = dict(kwargs or {})
        found = func(*args, **words)
        used = {self._names[id(t)] for t in _tensors((*args, *words.values())) if id(t) in self._names}
        if used and any(t.requires_grad for t in _tensors((found,))):
            rule = _RULES.get(func)
            use = rule(self._names, args, words, found) if rule and isinstance(found, Tensor) else None
            if use is not None:
                self.uses.append(use)
            self.loose |= used - set(use.names.values() if use else ())
        return found


def _tensors(tree: Sequence[Any]) -> Iterator[Tensor]:
    for one in tree:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from _tensors(cast("Sequence[Any]", one))


Names = Mapping[int, str]
Rule = Callable[[Names, Sequence[Any], dict[str, Any], Tensor], Use | None]


def _bound(order: str, args: Sequence[Any], words: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; those not given are None."""
    names = order.split()
    return {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **words}


def _roles(names: Names, given: Mapping[str, Any]) -> dict[Role, str]:
    roles: tuple[Role, Role] = ("weight", "bias")
    return {role: names[id(given[role])] for role in roles if id(given.get(role)) in names}


def _place(found: Tensor) -> tuple[Any, tuple[int, ...]]:
    # The edge and not the tensor: an in-place activation would turn the tensor into its own result. In-place writes to
    # a view go past the view's own edge, to that of what it is a view of.
    base = found._base
    whole = base is not None and base.numel() == found.numel() and base.is_contiguous() and found.is_contiguous()
    edge = get_gradient_edge(cast("Tensor", base) if whole else found)
    return edge, tuple(found.shape)


def _linear(names: Names, args: Sequence[Any], words: dict[str, Any], found: Tensor) -> Use | None:
    given = _bound("input weight bias", args, words)
    return Dense(_roles(names, given), *_place(found), given["input"].detach())


def _matmul(names: Names, args: Sequence[Any], words: dict[str, Any], found: Tensor) -> Use | None:
    given = _bound("input weight", args, words)
    x, weight = given["input"], given.get("weight", words.get("other", words.get("mat2")))
    if weight is None or id(weight) not in names or weight.ndim != 2 or id(x) in names or x.ndim < 2:
        return None
    return Dense({"weight": names[id(weight)]}, *_place(found), x.detach(), turned=True)


def _addmm(names: Names, args: Sequence[Any], words: dict[str, Any], found: Tensor) -> Use | None:
    given = _bound("bias input weight", args, words)
    bias = given["bias"]
    fits = not set(words) & {"beta", "alpha"} and isinstance(bias, Tensor) and tuple(bias.shape) == found.shape[-1:]
    if not fits or id(given["input"]) in names:
        return None
    return Dense(_roles(names, given), *_place(found), given["input"].detach(), turned=True)


def _convolution(names: Names, args: Sequence[Any], words: dict[str, Any], found: Tensor) -> Use | None:
    given = _bound("input weight bias stride padding dilation groups", args, words)
    x, kernel = given["input"], tuple(given["weight"].shape[2:])
    if x.ndim != len(kernel) + 2 or id(x) in names:
        return None
    stride, dilation = (_each(given[name] or 1, len(kernel)) for name in ("stride", "dilation"))
    padding = _padding(given["padding"] or 0, kernel, dilation)
    shape = kernel, stride, padding, dilation
    return Convolution(_roles(names, given), *_place(found), x.detach(), given["groups"] or 1, False, *shape)


def _each(size: int | Sequence[int], count: int) -> tuple[int, ...]:
    if isinstance(size, int):
        return (size,) * count
    return tuple(size) * (count if len(size) == 1 else 1)


def _padding(given: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if given == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _each(0 if given == "valid" else given, len(kernel)))


def _embedding(names: Names, args: Sequence[Any], words: dict[str, Any], found: Tensor) -> Use | None:
    given = _bound("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, words)
    if given["max_norm"] is not None or given["scale_grad_by_freq"] or given["sparse"]:
        return None
    skipped, entries = given["padding_idx"], given["weight"].shape[0]
    skipped = skipped + entries if skipped is not None and skipped < 0 else skipped
    made = given["input"], 1, True, entries, skipped
    return Lookup(_roles(names, given), *_place(found), *made)


def _normalisation(order: str, plain: Callable[..., Tensor], channels: bool) -> Rule:
    """A rule for a normalisation, whose input to the affine map is found by the same call without it."""

    def rule(names: Names, args: Sequence[Any], words: dict[str, Any], found: Tensor) -> Use | None:
        given = _bound(order, args, words)
        roles, weight = _roles(names, given), given["weight"]
        if given.get("training") or id(given["input"]) in names:
            return None
        bare = {k: v for k, v in given.items() if v is not None and k not in ("weight", "bias")}
        with torch.no_grad():
            x = plain(**bare) if "weight" in roles else None
        like = tuple((weight if weight is not None else given["bias"]).shape)
        like = (*like, *(1,) * (found.ndim - 2)) if channels else like
        return Scale(roles, *_place(found), x, like)

    return rule


def _binary(role: Role) -> Rule:
    """x · w or x + b with a parameter on either side."""

    def rule(names: Names, args: Sequence[Any], words: dict[str, Any], found: Tensor) -> Use | None:
        pair = [t for t in (*args, words.get("other")) if isinstance(t, Tensor)]
        own = [t for t in pair if id(t) in names]
        other = [t for t in pair if id(t) not in names]
        if "alpha" in words or "out" in words or len(own) != 1 or len(other) != 1 or found.is_complex():
            return None
        fits = own[0].ndim <= found.ndim and own[0].dtype == found.dtype
        x = other[0].detach().expand(found.shape) if role == "weight" else None
        return Scale({role: names[id(own[0])]}, *_place(found), x, tuple(own[0].shape)) if fits else None

    return rule


def _table() -> dict[Any, Rule]:
    table: dict[Any, Rule] = {F.linear: _linear, F.embedding: _embedding, torch.addmm: _addmm}
    table |= dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d), _convolution)
    table |= dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), _matmul)
    table |= dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _binary("weight"))
    sums = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
    table |= dict.fromkeys(sums, _binary("bias"))
    norms = (
        (F.layer_norm, "input normalized_shape weight bias eps", False),
        (F.rms_norm, "input normalized_shape weight eps", False),
        (F.group_norm, "input num_groups weight bias eps", True),
        (F.batch_norm, "input running_mean running_var weight bias training momentum eps", True),
        (F.instance_norm, "input running_mean running_var weight bias use_input_stats momentum eps", True),
    )
    return table | {f: _normalisation(order, f, channels) for f, order, channels in norms}


_RULES = _table()
