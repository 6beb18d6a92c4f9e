"""Batches as trees of tensors, in tuples and dictionaries: rows taken, tensors converted, targets told from inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

TARGET_NAMES = ("labels", "label", "targets", "target", "y")


class Fields(dict[str, Any]):
    """A batch by names that also answers to attributes, as Hugging Face's encodings do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the batch has no field {name!r}; it has {', '.join(self)}.") from None


def plain(tree: Any) -> Any:
    """A batch of tensors in tuples and dictionaries: arrays become tensors, encodings become :class:`Fields`."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(tree)) if tree.dtype.kind in "biufc" else tree.tolist()
    if isinstance(tree, Mapping):
        return Fields({str(k): plain(v) for k, v in cast("Mapping[Any, Any]", tree).items()})
    if isinstance(tree, tuple):
        return tuple(plain(v) for v in cast("tuple[Any, ...]", tree))
    if isinstance(tree, list):
        items = cast("list[Any]", tree)
        return (
            tuple(map(plain, items))
            if any(isinstance(v, (Tensor, np.ndarray, Mapping)) for v in items)
            else list(items)
        )
    return tree


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A batch with ``function`` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return type(tree)({k: tree_map(function, v) for k, v in cast("dict[str, Any]", tree).items()})
    if isinstance(tree, tuple):
        return tuple(tree_map(function, v) for v in cast("tuple[Any, ...]", tree))
    return tree


def leaves(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a batch."""
    if isinstance(tree, (Tensor, np.ndarray)):
        yield cast("Tensor", tree)
    elif isinstance(tree, Mapping):
        for value in cast("Mapping[Any, Any]", tree).values():
            yield from leaves(value)
    elif isinstance(tree, (tuple, list)):
        for value in cast("list[Any]", tree):
            yield from leaves(value)


def rows(batch: Any) -> int:
    """The number of examples in a batch: the length of its first tensor."""
    for leaf in leaves(batch):
        if leaf.ndim:
            return len(leaf)
    raise TypeError(
        f"a batch must hold tensors with examples along dimension 0; got {type(batch).__name__} without any."
    )


def take(tree: Any, index: Any, n: int) -> Any:
    """Some rows of a batch (a slice or a tensor of indices); what does not have one row an example stays whole."""
    if isinstance(tree, (Tensor, np.ndarray)):
        return tree[index] if tree.ndim and len(tree) == n else tree
    if isinstance(tree, Mapping):
        items = {str(k): take(v, index, n) for k, v in cast("Mapping[Any, Any]", tree).items()}
        return Fields(items)
    if isinstance(tree, tuple) or (isinstance(tree, list) and next(leaves(tree), None) is not None):
        return tuple(take(v, index, n) for v in cast("tuple[Any, ...]", tree))
    if isinstance(tree, list) and len(cast("list[Any]", tree)) == n:
        items = cast("list[Any]", tree)
        return items[index] if isinstance(index, slice) else [items[int(i)] for i in index]
    return tree


def split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, keyword inputs and targets of a batch; targets are None where it has none."""
    if isinstance(batch, Mapping):
        named = dict(cast("Mapping[str, Any]", batch))
        key = next((k for k in TARGET_NAMES if k in named), None)
        targets = named.pop(key) if key else None
        return (), named, targets
    if isinstance(batch, tuple):
        fields = cast("tuple[Any, ...]", batch)
        inputs, targets = (fields[:-1], fields[-1]) if len(fields) > 1 else (fields, None)
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return (), dict(cast("Mapping[str, Any]", inputs[0])), targets
        return inputs, {}, targets
    return (batch,), {}, None
