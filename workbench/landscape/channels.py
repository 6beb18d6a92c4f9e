"""Which axes of a model's weights count the same units: followed through one forward pass, operation by operation."""

# pyright: reportPrivateUsage=false
# The schema of an operation has no public name.

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.numerics.factors import Axis, Factors

Axes = list[Axis]
Bound = Mapping[str, Any]
Rule = Callable[["Channels", Bound, list[Tensor]], list[Axes]]


class Channels(TorchDispatchMode):
    """A context that watches tensor operations and notes which axes must be permuted together to change nothing.

    Every axis of the ``named`` tensors starts free. Sums over an axis make it the same on both sides, elementwise
    operations make axes the same, reshaping cuts and merges them, and what tells positions apart (indexing, kernels,
    unequal cuts, anything not in the table of rules) fixes them. All other tensors are fixed from the start.
    ``strange`` names the operations without a rule, and concatenations, that met a free axis. Keeps what the pass
    computes until it is dropped, so give it few examples.
    """

    def __init__(self, named: Iterable[Tensor]) -> None:
        super().__init__()
        self.factors = Factors()
        self.strange: dict[str, None] = {}
        self.used: set[int] = set()
        self._axes: dict[int, Axes] = {}
        self._kept: list[Tensor] = []
        for tensor in named:
            self._put(tensor, [self.factors.new(n) for n in tensor.shape])

    def _put(self, tensor: Tensor, axes: Axes) -> None:
        self._axes[id(tensor)] = axes
        self._kept.append(tensor)  # an id is only good for as long as its tensor lives

    def of(self, tensor: Tensor) -> Axes:
        """The axes of a tensor, one for each dim; fixed for one that is not known."""
        if id(tensor) not in self._axes:
            self._put(tensor, [self.factors.new(n, fixed=True) for n in tensor.shape])
        return self._axes[id(tensor)]

    def same(self, first: Axis, second: Axis) -> Axis:
        """Say that two axes are the same, and return it; an axis of length 1 goes with any."""
        if first and second:
            self.factors.unite(first, second)
        return first or second

    def fix(self, axes: Iterable[Axis]) -> None:
        """The order along these axes matters."""
        for axis in axes:
            self.factors.fix(axis)

    def free(self, axis: Axis) -> bool:
        """Whether any factor of the axis may still be permuted."""
        return any(not self.factors.is_fixed(leaf) for leaf in self.factors.leaves(axis))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call as it stands, then note what it says about axes."""
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.used.update(map(id, given))
        name = str(func._schema.name).removeprefix("aten::").rstrip("_")
        rule = _elementwise if torch.Tag.pointwise in func.tags else _rule(name)
        try:
            found = None if rule is None else rule(self, _bound(func, args, kwargs or {}), made)
        except (ArithmeticError, LookupError, TypeError, ValueError):  # a form of the operation that no rule foresaw
            found = None
        self._note(name, given, made, found)
        return out

    def _note(self, name: str, given: list[Tensor], made: list[Tensor], found: list[Axes] | None) -> None:
        if found is None or [len(axes) for axes in found] != [t.ndim for t in made]:
            if any(self.free(axis) for t in given for axis in self.of(t)):
                self.strange[name] = None
            self.fix(axis for t in given for axis in self.of(t))
            found = [[self.factors.new(n, fixed=True) for n in t.shape] for t in made]
        for tensor, axes in zip(made, found, strict=True):
            self._put(tensor, axes)


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    names = [a.name for a in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _dims(tensor: Tensor, dims: Any) -> list[int]:
    """Dims given as a number, several or none (all), counted from the front."""
    listed = range(tensor.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [d % max(tensor.ndim, 1) for d in listed]


def _fill(c: Channels, out: Tensor, *given: Axes) -> Axes:
    """The axes of the result of broadcasting: those that meet are the same."""
    made: Axes = [()] * out.ndim
    for axes in given:
        for k, axis in enumerate(reversed(axes), 1):
            made[-k] = c.same(made[-k], axis)
    return [axis if c.factors.length(axis) == n else c.factors.new(n) for axis, n in zip(made, out.shape, strict=True)]


def _elementwise(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    given = [c.of(t) for t in tree_leaves(dict(b)) if isinstance(t, Tensor)]
    return [_fill(c, out, *given) for out in made]


def _like(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    return [list(c.of(_first(b))) for _ in made]


def _first(b: Bound) -> Tensor:
    return next(t for t in b.values() if isinstance(t, Tensor))


def _constant(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Equal entries: any order of them is as good as any other."""
    return [[c.factors.new(n) for n in out.shape] for out in made]


def _along(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Order matters along one dim, as in a running sum."""
    x = _first(b)
    c.fix(c.of(x)[d] for d in _dims(x, b.get("dim", b.get("dims"))))
    return _like(c, b, made)


def _reshaped(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    return [c.factors.regroup(c.of(_first(b)), out.shape) for out in made]


def _turned(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    x = b["self"]
    order = list(range(x.ndim))
    if "dims" in b:
        order = _dims(x, b["dims"])
    elif x.ndim > 1:
        i, j = _dims(x, [b.get("dim0", 0), b.get("dim1", 1)])
        order[i], order[j] = j, i
    axes = c.of(x)
    return [[axes[d] for d in order]]


def _expanded(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    return [_fill(c, made[0], c.of(b["self"]))]


def _repeated(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Copies one after the other, all alike: their order is free."""
    axes = [()] * (made[0].ndim - b["self"].ndim) + c.of(b["self"])
    return [[(*c.factors.new(r), *axis) for r, axis in zip(b["repeats"], axes, strict=True)]]


def _reduced(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    x = _first(b)
    over, axes = set(_dims(x, b.get("dim"))), c.of(x)
    kept = b.get("keepdim", False)
    return [[() if d in over else axis for d, axis in enumerate(axes) if kept or d not in over] for _ in made]


def _placed(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """A reduction that also says where: positions are told apart."""
    x = _first(b)
    c.fix(c.of(x)[d] for d in _dims(x, b.get("dim")))
    return _reduced(c, b, made)


_FACTORS = ("mat1", "mat2"), ("batch1", "batch2"), ("mat", "vec"), ("self", "mat2"), ("self", "vec"), ("self", "tensor")


def _multiplied(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Products of matrices and vectors, with an offset where there is one: what is summed over is the same."""
    left, right = next((c.of(b[x]), c.of(b[y])) for x, y in _FACTORS if x in b and y in b)
    c.same(left[-1], right[max(len(right) - 2, 0)])
    batch = [c.same(x, y) for x, y in zip(left[:-2], right[:-2], strict=True)]
    result = [*batch, *left[-2:-1], *right[-1:][: len(right) - 1]]
    added = [c.of(b["self"])] if {"mat1", "batch1", "mat"} & b.keys() else []
    return [_fill(c, made[0], result, *added)]


def _linear(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    x, w = c.of(b["input"]), c.of(b["weight"])
    c.same(x[-1], w[1])
    return [_fill(c, made[0], [*x[:-1], w[0]], *([c.of(b["bias"])] if b.get("bias") is not None else []))]


def _convolved(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Weights are (out, in / groups, ...), transposed ones (in, out / groups, ...); kernels have an order."""
    x, w = c.of(b["input"]), c.of(b["weight"])
    c.fix((*x[2:], *w[2:]))
    groups, within = _grouped(c, x[1], b["groups"])
    outer, rest = _grouped(c, w[0], b["groups"])
    c.same(groups, outer)
    c.same(within, rest if b["transposed"] else w[1])
    leaves = (*groups, *(w[1] if b["transposed"] else rest))
    if b.get("bias") is not None:
        c.same(leaves, c.of(b["bias"])[0])
    return [[x[0], leaves, *(c.factors.new(n, fixed=True) for n in made[0].shape[2:])]]


def _grouped(c: Channels, axis: Axis, groups: int) -> tuple[Axis, Axis]:
    """An axis of channels as groups × channels in each."""
    outer, inner = c.factors.regroup([axis], (groups, c.factors.length(axis) // groups))
    return outer, inner


_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def _per_channel(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """BatchNorm and GroupNorm: everything that has one entry a channel goes with the input's axis 1."""
    axes = c.of(b["input"])
    if b.get("group", 1) > 1:
        _grouped(c, axes[1], b["group"])
    for name in _PER_CHANNEL:
        if b.get(name) is not None:
            c.same(axes[1], c.of(b[name])[0])
    rest = [[axes[1] if n == b["input"].shape[1] else c.factors.new(n, True) for n in t.shape] for t in made[1:]]
    return [list(axes), *rest]


def _over_last(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """LayerNorm and RMSNorm: weight and bias go with the last axes of the input."""
    axes = c.of(b["input"])
    given = [c.of(b[n]) for n in ("weight", "bias") if b.get(n) is not None]
    whole = _fill(c, made[0], axes, *given)
    return [whole, *([a if n > 1 else () for a, n in zip(axes, t.shape, strict=True)] for t in made[1:])]


def _looked_up(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    weight = c.of(b["weight"])
    c.fix(weight[:1])
    return [[*c.of(b["indices"]), weight[1]]]


def _pooled(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Pooling and resampling over the last dims, whose order matters."""
    x = _first(b)
    changed = 2 if x.ndim > 2 else 1
    if made[0].shape[:changed] != x.shape[:changed]:
        raise ValueError("not a batch of images")
    c.fix(c.of(x)[changed:])
    return [[*c.of(x)[:changed], *(c.factors.new(n, True) for n in t.shape[changed:])] for t in made]


def _padded(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    x, out = b["self"], made[0]
    same = [old == new for old, new in zip(x.shape, out.shape, strict=True)]
    c.fix(a for a, kept in zip(c.of(x), same, strict=True) if not kept)
    return [[_sized(c, a, n, not kept) for a, n, kept in zip(c.of(x), out.shape, same, strict=True)]]


def _picked(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """One position, or each by itself: the axis goes, and its order is told apart."""
    axes = list(c.of(b["self"]))
    c.fix([axes.pop(b["dim"] % len(axes))])
    return [list(axes) for _ in made]


def _cut(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Slices and pieces along a dim: where all are of one length that divides the axis, each holds its inner factor."""
    x, dim = b["self"], b["dim"] % b["self"].ndim
    lengths, start = {t.shape[dim] for t in made}, b.get("start") or 0
    if lengths == {x.shape[dim]}:
        return [list(c.of(x))]
    length = lengths.pop()
    even = not lengths and b.get("step", 1) == 1 and start % length == 0
    if not even:
        c.fix([c.of(x)[dim]])
    inner, axes = c.factors.inner(c.of(x)[dim], length), c.of(x)
    return [[*axes[:dim], inner if even else c.factors.new(t.shape[dim], True), *axes[dim + 1 :]] for t in made]


def _sized(c: Channels, axis: Axis, length: int, new: bool) -> Axis:
    return c.factors.new(length, fixed=True) if new else axis


def _halved(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    return _cut(c, {"self": b["self"], "dim": b["dim"]}, made)


def _joined(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """Tensors one after the other along a dim, or stacked on a new one: which is which matters."""
    parts, out = [c.of(t) for t in b["tensors"] if t.numel()], made[0]
    dim, stacked = b["dim"] % out.ndim, b["tensors"][0].ndim < out.ndim
    if not stacked:
        if any(c.free(axes[dim]) for axes in parts):
            c.strange["cat"] = None
        c.fix(axes[dim] for axes in parts)
    parts = [[*axes[:dim], *axes[dim + (not stacked) :]] for axes in parts]
    whole = parts[0]
    for axes in parts[1:]:
        whole = [c.same(a, other) for a, other in zip(whole, axes, strict=True)]
    return [[*whole[:dim], c.factors.new(out.shape[dim], fixed=True), *whole[dim:]]]


def _recurrent(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """A fused recurrent layer: gates × units in its weights, the same units in its states."""
    x, size = c.of(b["input"]), b["hidden_size"]
    into, over = c.of(b["weight0"]), c.of(b["weight1"])
    c.same(x[-1], into[1])
    units = c.factors.inner(into[0], size)
    names = ("weight2", "weight3") if b["has_biases"] else ()
    same = [over[1], *(c.factors.inner(c.of(b[n])[0], size) for n in names), c.factors.inner(over[0], size)]
    for axis in (*same, *(c.of(b[n])[-1] for n in ("hx_", "cx_"))):
        c.same(units, axis)
    rest = [[c.factors.new(n, fixed=True) for n in t.shape] for t in made[1:]]
    for axes, t in zip(rest, made[1:], strict=True):
        axes[-1] = units if t.shape[-1] == size else axes[-1]
    return [[*x[:-1], units], *rest]


def _indexed(c: Channels, b: Bound, made: list[Tensor]) -> list[Axes]:
    """One dim is indexed by a tensor, the others stay."""
    listed = b["indices"] if "indices" in b else [None] * (b["dim"] % b["self"].ndim) + [b["index"]]
    dims = [d for d, index in enumerate(listed) if index is not None]
    if len(dims) != 1 or listed[dims[0]].dtype == torch.bool:
        raise LookupError("several dims are indexed at once")
    axes = c.of(b["self"])
    c.fix([axes[dims[0]]])
    return [[*axes[: dims[0]], *c.of(listed[dims[0]]), *axes[dims[0] + 1 :]]]


_RULES: dict[str, Rule] = {
    name: rule
    for names, rule in (
        ("copy _prelu_kernel hardtanh", _elementwise),
        ("clone detach alias _to_copy contiguous lift_fresh _softmax _log_softmax zero fill", _like),
        ("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full empty empty_like", _constant),
        ("cumsum cumprod flip roll tril triu", _along),
        ("view _unsafe_view reshape _reshape_alias unflatten unsqueeze squeeze", _reshaped),
        ("t transpose permute", _turned),
        ("expand", _expanded),
        ("repeat", _repeated),
        ("sum mean amax amin var std prod logsumexp linalg_vector_norm norm all any var_mean std_mean", _reduced),
        ("max min argmax argmin", _placed),
        ("mm bmm addmm baddbmm mv addmv dot", _multiplied),
        ("linear", _linear),
        ("convolution _convolution", _convolved),
        ("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training", _per_channel),
        ("cudnn_batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_no_update", _per_channel),
        ("native_group_norm", _per_channel),
        ("native_layer_norm _fused_rms_norm", _over_last),
        ("embedding", _looked_up),
        ("constant_pad_nd", _padded),
        ("select unbind", _picked),
        ("slice split unsafe_split split_with_sizes unsafe_split_with_sizes", _cut),
        ("glu", _halved),
        ("cat stack", _joined),
        ("mkldnn_rnn_layer", _recurrent),
        ("index index_select", _indexed),
    )
    for name in names.split()
}


def _rule(name: str) -> Rule | None:
    return _RULES.get(name) or (
        _pooled if re.search(r"pool\dd|upsample|reflection_pad|replication_pad", name) else None
    )
