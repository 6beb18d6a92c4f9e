"""Frozen examples as batches on a device, in a precision, split into inputs and targets as the model takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.data import Batch, Examples
from workbench.trees import leaves, rows, split, tree_map

CHUNK = 512
"""Examples evaluated at once unless batch_size says otherwise or memory is short."""
KEPT_BYTES = 2**28
"""Converted examples up to this size stay on the device; larger ones are converted batch by batch."""


@dataclass(frozen=True)
class Feed:
    """Batches of frozen examples for one model.

    ``accepted`` are the keyword inputs that the model takes (None: any); ``shifted`` moves targets one place to
    the left, as causal language models of Hugging Face compare them; ``weigh(targets, size)`` is a batch's
    share of the loss.
    """

    data: Examples
    device: torch.device
    dtype: torch.dtype
    accepted: frozenset[str] | None = None
    shifted: bool = False
    weigh: Callable[[Any, int], float] = lambda targets, size: float(size)

    def here(self) -> Feed:
        """The same feed with all examples converted at once, where they are small enough to keep."""
        if sum(t.nbytes for part in self.data.parts for t in leaves(part)) > KEPT_BYTES:
            return self
        return replace(self, data=replace(self.data, parts=tuple(tree_map(self.convert, p) for p in self.data.parts)))

    def micro(self, batch_size: int | None) -> int:
        """Examples in a batch whose statistics are taken together: as asked, as the loader has it, or CHUNK."""
        return batch_size or self.data.batch_size or min(self.data.size, CHUNK)

    def batches(self, chunk: int | None, join: bool = False) -> Iterator[Batch]:
        """Batches of ``chunk`` examples, in order."""
        return (self.load(raw) for raw in self.data.slices(chunk, join))

    def first(self, count: int) -> Batch:
        """The first examples, at most ``count`` of them."""
        return self.load(next(self.data.slices(count)))

    def load(self, raw: Any) -> Batch:
        """A batch of the user's as a :class:`Batch`."""
        raw = tree_map(self.convert, raw)
        args, kwargs, targets = split(raw)
        if self.accepted is not None and kwargs:
            known = {k: v for k, v in kwargs.items() if k in self.accepted}
            tensors = tuple(v for v in kwargs.values() if isinstance(v, Tensor))
            args, kwargs = ((), known) if known or len(tensors) != 1 else (tensors, {})
        if self.shifted:
            targets = torch.nn.functional.pad(targets[:, 1:], (0, 1), value=-100)
        size = rows(raw)
        return Batch(raw, args, kwargs, targets, size, self.weigh(targets, size))

    def targets(self) -> Iterator[tuple[Any, int]]:
        """Targets and number of examples of each part of the data."""
        return ((batch.targets, batch.size) for batch in map(self.load, self.data.parts))

    def convert(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, floating-point ones in the precision."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)


def accepted_names(model: nn.Module) -> frozenset[str] | None:
    """The keyword arguments that a model's forward takes; None where it takes any."""
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return None
    return frozenset(p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def compares_next_token(model: nn.Module, batch: Batch, shape: torch.Size) -> bool:
    """Whether targets are a causal language model's labels, which equal the inputs and are not shifted yet."""
    kind = str(getattr(model, "loss_type", "") or type(model).__name__)
    causal = kind.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(model, "config")
    ids = batch.kwargs.get("input_ids")
    if not (causal and isinstance(batch.targets, Tensor) and isinstance(ids, Tensor)):
        return False
    return batch.targets.shape == ids.shape == shape[:-1]


def describe(batch: Batch) -> str:
    """The shapes and types of a batch's inputs, for messages."""
    named = [*((str(i), v) for i, v in enumerate(batch.args)), *batch.kwargs.items()]
    words = (f"{tuple(v.shape)} {str(v.dtype)[6:]}" if isinstance(v, Tensor) else type(v).__name__ for _, v in named)
    return ", ".join(f"{name}: {word}" if batch.kwargs else word for (name, _), word in zip(named, words, strict=True))
