"""Features of several layers as one row an example, whatever their shapes, and the same examples in two subjects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.activations import Layer, gradients, module_named, stream
from workbench.several import Pair
from workbench.subject import Subject
from workbench.trees import leaves

Pool = Literal["mean", "last", "cls", "flatten"]
POOLS: Mapping[str, str] = {
    "mean": "mean over tokens (those that are not masked) or over places of an image",
    "last": "last token (that is not masked); images as in mean",
    "cls": "first token; images as in mean",
    "flatten": "every entry a feature of its own",
}
"""How features with tokens or places become one row an example, in words."""
Rows = dict[Layer, Tensor]

_CHANNELS_FIRST = (
    nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
)  # fmt: skip


def example_rows(
    subject: Subject, layers: tuple[Layer, ...], pool: Pool = "mean", *, of_loss: bool = False
) -> Iterator[Rows]:
    """Stream the features of all ``layers`` in one pass, batch by batch, one row (b, d) an example.

    ``of_loss``: instead, the gradients of each example's loss with respect to them, pooled as they are.

    Precision and device are the subject's. A layer that gives (b, c, s) is read as sequences of s channels' rows where
    it is a one-dimensional convolution, normalisation or pooling, or has no parameters and follows one; else as c
    tokens. Memory: one batch.

    Raises:
        ValueError: features in which the examples are not along dimension 0 (or 1, for sequences).
    """
    first = {layer: channels_first(subject, layer) for layer in layers}
    for caught in (gradients if of_loss else stream)(subject, layers):
        mask = caught.batch.kwargs.get("attention_mask")
        yield {
            layer: pooled(found, caught.batch.size, pool, channels_first=first[layer], mask=mask)
            for layer, found in caught.features.items()
        }


def widths(subject: Subject, layers: tuple[Layer, ...], pool: Pool = "mean") -> list[int]:
    """The number of features of each layer; a forward pass of a few examples tells."""
    few = subject.selected(range(min(8, subject.examples)))
    found = next(example_rows(few, layers, pool))
    return [found[layer].shape[1] for layer in layers]


def pooled(
    features: Tensor, examples: int, pool: Pool = "mean", *, channels_first: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Features of any shape as (examples, d).

    (n, d) stays; (n, s, d) is pooled over its s tokens, those with mask (n, s) 1 only; (n, c, ...) with two and more
    places, and (n, c, s) with ``channels_first``, is averaged over places; (s, n, d) is turned first.

    Raises:
        ValueError: no dimension of ``examples`` where there should be one.
    """
    if features.ndim == 3 and len(features) != examples and features.shape[1] == examples:
        features = features.transpose(0, 1)
    if not features.ndim or len(features) != examples:
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not have the {examples} examples along dimension 0; choose "
            "another layer."
        )
    if pool == "flatten" or features.ndim < 3:
        return features.reshape(examples, -1)
    if features.ndim > 3 or channels_first:
        return features.flatten(2).mean(2)
    return _over_tokens(features, pool, mask if mask is not None and mask.shape == features.shape[:2] else None)


def _over_tokens(features: Tensor, pool: Pool, mask: Tensor | None) -> Tensor:
    if pool == "cls":
        return features[:, 0]
    if mask is None:
        return features[:, -1] if pool == "last" else features.mean(1)
    seen = mask.to(features.device) > 0
    if pool == "last":
        places = torch.arange(features.shape[1], device=features.device)
        return features[torch.arange(len(features), device=features.device), (places * seen).argmax(1)]
    shares = seen.to(features.dtype)
    return (features * shares[:, :, None]).sum(1) / shares.sum(1, keepdim=True).clamp_min(1)


def channels_first(subject: Subject, layer: Layer) -> bool:
    """Whether channels come before places: said by the layer, or by the last before it where it has no parameters."""
    module = module_named(subject, layer.name)
    before: list[nn.Module] = []
    for known in subject.module.modules():
        if not any(known.children()):
            before.append(known)
        if known is module:
            break
    for one in reversed([*before, module] if any(module.children()) else before):
        if isinstance(one, _CHANNELS_FIRST):
            return True
        if any(True for _ in one.parameters()) or isinstance(one, nn.Flatten | nn.Unflatten):
            return False
    return False


def in_blocks(parts: Iterator[Rows], size: int) -> Iterator[Rows]:
    """The same rows, ``size`` examples at a time (the last block may be shorter), however they came."""
    held: Rows = {}
    for part in parts:
        held = {layer: torch.cat([held[layer], rows]) if layer in held else rows for layer, rows in part.items()}
        while held and len(next(iter(held.values()))) >= size:
            yield {layer: rows[:size] for layer, rows in held.items()}
            held = {layer: rows[size:] for layer, rows in held.items()}
    if held and len(next(iter(held.values()))):
        yield held


@dataclass(eq=False)
class Ranges:
    """The least and the greatest value of each feature of some layers: whether a layer is the same for all examples."""

    low: list[Tensor] = field(default_factory=list[Tensor])
    high: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, rows: list[Tensor]) -> None:
        """Take in features (b, d) of each layer."""
        low, high = [r.amin(0) for r in rows], [r.amax(0) for r in rows]
        self.low = [torch.minimum(a, b) for a, b in zip(self.low or low, low, strict=True)]
        self.high = [torch.maximum(a, b) for a, b in zip(self.high or high, high, strict=True)]

    @property
    def constant(self) -> list[bool]:
        """Which layers gave all examples the same features."""
        return [bool((a == b).all()) for a, b in zip(self.low, self.high, strict=True)]


@dataclass(eq=False)
class Kept:
    """Features (n, d) of each of some layers for all examples, in the subject's precision, filled as they come."""

    layers: tuple[Layer, ...]
    rows: list[Tensor]
    ranges: Ranges = field(default_factory=Ranges)
    seen: int = 0

    @classmethod
    def empty(cls, subject: Subject, layers: tuple[Layer, ...], sizes: list[int]) -> Kept:
        """Room for all examples."""
        n = subject.examples
        return cls(layers, [torch.empty(n, d, dtype=subject.dtype, device=subject.device) for d in sizes])

    def add(self, part: Rows) -> None:
        """Take in a batch."""
        new = [part[layer] for layer in self.layers]
        for rows, found in zip(self.rows, new, strict=True):
            rows[self.seen : self.seen + len(found)] = found
        self.ranges.add(new)
        self.seen += len(new[0])

    @property
    def constant(self) -> list[bool]:
        """Which layers gave all examples the same features."""
        return self.ranges.constant

    def ordered(self, order: Tensor | None) -> list[Tensor]:
        """The features in another order of the examples."""
        if order is not None:
            for i, rows in enumerate(self.rows):
                self.rows[i] = rows[order.to(rows.device)]
        return self.rows


def common_order(pair: Pair) -> Tensor | None:
    """Where each example of the first subject is found in the second, (n,); None where both have one order.

    Examples are told by their inputs, to float32. Cost: none where both subjects froze the same data alike; else one
    pass over the examples of each, without the models.

    Raises:
        ValueError: the inputs are not the same examples.
    """
    if pair.first.data_digest == pair.second.data_digest:
        return None
    one, two = _digests(pair.first), _digests(pair.second)
    if one == two:
        return None
    places: dict[bytes, list[int]] = {}
    for i, digest in reversed(list(enumerate(two))):
        places.setdefault(digest, []).append(i)
    if sorted(one) != sorted(two):
        missing = sum(1 for digest in one if digest not in places)
        raise ValueError(
            f"similarity compares features of the same examples; {missing} of the first subject's {len(one)} examples "
            f"are not among the second's {len(two)}. Make both subjects with the same data, max_examples and seed."
        )
    return torch.tensor([places[digest].pop() for digest in one])


def _digests(subject: Subject) -> list[bytes]:
    """A hash of the inputs of each example, in order."""
    return [digest for batch in subject.batches() for digest in _each(batch.args, batch.kwargs, batch.size)]


def _each(args: Any, kwargs: Any, examples: int) -> Iterator[bytes]:
    tensors = [t for t in leaves((args, dict(kwargs))) if t.ndim and len(t) == examples]
    plain = [(t.float() if t.is_floating_point() else t).cpu().contiguous().numpy() for t in tensors]
    for i in range(examples):
        found = hashlib.blake2b(digest_size=16)
        for array in plain:
            found.update(repr(array.shape[1:]).encode() + array[i].tobytes())
        yield found.digest()
