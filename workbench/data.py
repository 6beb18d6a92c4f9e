"""Examples frozen once: the same list at every pass, whatever the data come as; no random state moves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    default_collate,
    default_convert,
)

from workbench.trees import plain, rows, take, tree_map

READ_AT_ONCE = 256
"""Examples collated together when a dataset is read."""


@dataclass(frozen=True)
class Batch:
    """Some examples on the subject's device: positional and keyword inputs, targets, their number and their weight.

    ``weight`` is the batch's share of the loss's denominator, ``raw`` the batch as the user's objective expects it.
    """

    raw: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any
    size: int
    weight: float = field(default=float("nan"))

    @property
    def inputs(self) -> Any:
        """The single input, or the tuple or the names of several."""
        if self.kwargs:
            return self.kwargs
        return self.args[0] if len(self.args) == 1 else self.args


@dataclass(frozen=True)
class Examples:
    """Frozen examples: one stacked batch where shapes agree, else the batches as they came.

    ``size`` examples are held out of ``available`` (None when a stream did not say); ``batch_size`` is the loader's.
    ``places`` (size,) says where each stood in the data: a dataset's index, else how many examples came before it.
    """

    parts: tuple[Any, ...]
    size: int
    available: int | None
    batch_size: int | None = None
    places: Sequence[int] = ()

    @property
    def ragged(self) -> bool:
        """Whether the batches could not be joined, so that they are always evaluated as they came."""
        return len(self.parts) > 1

    def slices(self, chunk: int | None, join: bool = False) -> Iterator[Any]:
        """Batches of ``chunk`` examples (the last may be shorter); ragged data keep their own.

        ``join`` adds a last batch of one example to the one before: batch statistics need two.
        """
        for part in self.parts:
            n = rows(part)
            step = n if self.ragged or chunk is None else min(chunk, n)
            starts = list(range(0, n, step))
            if join and len(starts) > 1 and n - starts[-1] == 1:
                starts.pop()
            ends = [*starts[1:], n]
            yield from (take(part, slice(at, end), n) for at, end in zip(starts, ends, strict=True))

    def first(self, count: int) -> Any:
        """The first examples, at most ``count`` of them."""
        return next(self.slices(count))

    def some(self, count: int) -> Examples:
        """The first examples, at most ``count`` of them, frozen by themselves."""
        found = self.first(count)
        part = take(found, slice(0, count), rows(found))
        return Examples((part,), rows(part), self.available, self.batch_size, self.places[: rows(part)])

    def picked(self, chosen: Sequence[int]) -> Examples:
        """The examples at these places (0 to ``size`` - 1), in their own order, each at most once."""
        wanted = sorted({int(i) for i in chosen})
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.size:
            raise ValueError(
                f"pick some of the {self.size} examples by places from 0 to {self.size - 1}; got {chosen!r:.80}."
            )
        parts = _pick(list(self.parts), [rows(p) for p in self.parts], wanted)
        return Examples(tuple(parts), len(wanted), self.size, self.batch_size, [self.places[i] for i in wanted])


def freeze(data: Any, max_examples: int | None = 2048, seed: int = 0) -> Examples:
    """Read the data once: all, or ``max_examples`` drawn by ``seed`` without replacement (streams: the first).

    ``data`` is (x, y) tensors or arrays, a batch by names, a Dataset, a DataLoader (its order, augmentation and
    workers do not matter), an IterableDataset, a list of batches or a generator of batches. The global random
    states of torch, NumPy and Python are as before, so two readings are equal.

    Raises:
        ValueError: no examples.
        TypeError: nothing that holds examples.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, or None for all; got {max_examples}.")
    with torch.inference_mode(False), torch.no_grad():
        if _is_arrays(data):
            return _from_batches([data], max_examples, seed, None)
        if isinstance(data, (list, tuple)):
            return _from_batches(list(cast("list[Any]", data)), max_examples, seed, None)
        with quiet_random_state(seed, data):
            return _read(data, max_examples, seed)


def _is_arrays(data: Any) -> bool:
    """One whole batch: a mapping, or a tuple or list of arrays with equally many rows."""
    if isinstance(data, (Mapping, Tensor, np.ndarray)):
        return True
    if not isinstance(data, (tuple, list)) or not data:
        return False
    items = cast("list[Any]", data)
    if isinstance(items[0], Mapping):
        return len(items) == 2 and _is_array(items[1]) and len(items[1]) == rows(items[0])
    return all(map(_is_array, items)) and len({len(x) for x in items}) == 1


def _is_array(x: Any) -> bool:
    return isinstance(x, (Tensor, np.ndarray)) and x.ndim > 0


def _read(data: Any, limit: int | None, seed: int) -> Examples:
    if isinstance(data, DataLoader):
        return _from_loader(cast("DataLoader[Any]", data), limit, seed)
    if isinstance(data, IterableDataset):
        return _from_stream(_grouped(data, READ_AT_ONCE, default_collate), limit, seed, None)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _from_items(data, range(len(data)), default_collate, limit, seed, None)
    if isinstance(data, Iterable):
        return _from_stream(cast("Iterable[Any]", data), limit, seed, None)
    raise TypeError(
        "data must be (x, y), a Dataset, a DataLoader, a list of batches or a generator of batches; got "
        f"{type(data).__name__}."
    )


def _from_loader(loader: DataLoader[Any], limit: int | None, seed: int) -> Examples:
    data, collate, size = loader.dataset, cast("Any", loader.collate_fn), loader.batch_size
    if isinstance(data, IterableDataset):
        stream = data if size is None else _grouped(data, size, collate)
        return _from_stream(map(default_convert, stream) if size is None else stream, limit, seed, size)
    if loader.batch_sampler is None:  # each item is a batch of its own
        chosen = itertools.islice(loader.sampler, limit)
        return _from_stream((collate(data[i]) for i in chosen), limit, seed, None)
    return _from_items(data, _indices(loader, limit), collate, limit, seed, size)


def _indices(loader: DataLoader[Any], limit: int | None) -> Sequence[int]:
    """Which examples the loader visits, without asking a sampler to shuffle where that can be avoided."""
    sampler: Any = loader.sampler
    custom = type(loader.batch_sampler) is not torch.utils.data.BatchSampler
    if not custom and type(sampler) is SequentialSampler:
        return range(len(sampler.data_source))
    if not custom and type(sampler) is RandomSampler and not sampler.replacement:
        return range(len(sampler.data_source))
    if not custom and type(sampler) is SubsetRandomSampler:
        return list(sampler.indices)
    visited = itertools.chain.from_iterable(cast("Any", loader.batch_sampler)) if custom else sampler
    return list(visited if hasattr(sampler, "__len__") else itertools.islice(visited, limit))


def _from_items(
    data: Any, indices: Sequence[int], collate: Callable[[Any], Any], limit: int | None, seed: int, size: int | None
) -> Examples:
    chosen = [indices[i] for i in choose(len(indices), limit, seed)]
    several = getattr(data, "__getitems__", None)
    step = size or READ_AT_ONCE
    groups = [chosen[at : at + step] for at in range(0, len(chosen), step)]
    batches = [collate(several(g) if several else [data[i] for i in g]) for g in groups]
    made = _from_batches(batches, None, seed, size)
    return Examples(made.parts, made.size, len(indices), size, chosen)


def _grouped(data: Iterable[Any], size: int, collate: Callable[[Any], Any]) -> Iterator[Any]:
    items = iter(data)
    while group := list(itertools.islice(items, size)):
        yield collate(group)


def _from_stream(stream: Iterable[Any], limit: int | None, seed: int, size: int | None) -> Examples:
    batches: list[Any] = []
    count, ended = 0, True
    for batch in stream:
        batches.append(batch)
        count += rows(batch)
        if limit is not None and count >= limit:
            ended = False
            break
    if limit is not None and count > limit:
        last = rows(batches[-1])
        batches[-1] = take(batches[-1], slice(0, last - (count - limit)), last)
    made = _from_batches(batches, None, seed, size)
    return Examples(made.parts, made.size, made.size if ended else None, size, made.places)


def _from_batches(batches: list[Any], limit: int | None, seed: int, size: int | None) -> Examples:
    batches = [plain(b) for b in batches]
    counts = [rows(b) for b in batches]
    total = sum(counts)
    if not total:
        raise ValueError(
            "the data hold no examples: the loader, list or dataset is empty, or a generator was read before (a "
            "generator can be "
            "read only once; pass a list of batches or a DataLoader)."
        )
    chosen = choose(total, limit, seed)
    if len(chosen) < total:
        batches = _pick(batches, counts, chosen)
    return Examples(_joined(batches), len(chosen), total, size, chosen)


def _pick(batches: list[Any], counts: list[int], chosen: Sequence[int]) -> list[Any]:
    """The chosen rows of each batch; batches without any are left out."""
    wanted, start, made = np.asarray(chosen), 0, []
    for batch, count in zip(batches, counts, strict=True):
        inside = wanted[(wanted >= start) & (wanted < start + count)] - start
        start += count
        if len(inside):
            made.append(take(batch, torch.from_numpy(inside), count))
    return made


def choose(total: int, limit: int | None, seed: int) -> Sequence[int]:
    """Which of ``total`` examples, in their own order: all, or ``limit`` drawn by ``seed`` without replacement."""
    if limit is None or total <= limit:
        return range(total)
    rng = np.random.Generator(np.random.Philox(key=seed))
    return sorted(rng.choice(total, limit, replace=False).tolist())


def _joined(batches: list[Any]) -> tuple[Any, ...]:
    """One batch where all have the same form and trailing shapes, else the batches as they are; always copies."""
    forms = {_form(b, rows(b)) for b in batches}
    if len(forms) == 1 and None not in forms:
        return (_concatenate(batches),)
    return tuple(_copy(b) for b in batches)


def _form(tree: Any, n: int) -> Any:
    """A hashable description of what must agree before batches are joined; None where they cannot be."""
    if isinstance(tree, Tensor):
        return ("t", str(tree.dtype), tuple(tree.shape[1:])) if tree.ndim and len(tree) == n else None
    if isinstance(tree, dict):
        parts = [(k, _form(v, n)) for k, v in cast("dict[str, Any]", tree).items()]
        return None if any(p is None for _, p in parts) else ("d", *parts)
    if isinstance(tree, tuple):
        items = [_form(v, n) for v in cast("tuple[Any, ...]", tree)]
        return None if None in items else ("s", *items)
    if isinstance(tree, list):
        return ("l",) if len(cast("list[Any]", tree)) == n else None
    return ("c", repr(tree))


def _concatenate(trees: list[Any]) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(trees) if len(trees) > 1 else first.clone()
    if isinstance(first, dict):
        return type(first)({k: _concatenate([t[k] for t in trees]) for k in cast("dict[str, Any]", first)})
    if isinstance(first, tuple):
        return tuple(_concatenate(list(group)) for group in zip(*trees, strict=True))
    return list(itertools.chain.from_iterable(trees)) if isinstance(first, list) else first


def _copy(tree: Any) -> Any:
    return tree_map(lambda t: t.clone(), tree)


@contextmanager
def quiet_random_state(seed: int, data: Any = None) -> Generator[None]:
    """Seed torch's, NumPy's and Python's global generators for the reading of data, and put them back in any case.

    The generators of a loader and of its sampler are put back as well. Other threads see the seeds meanwhile.
    """
    owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    own = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)}
    cuda = list(torch.cuda.default_generators) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    generators = [torch.default_generator, *cuda, *own.values()]
    states = [g.get_state() for g in generators]
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 the user's own generator
    try:
        for g in generators:
            g.manual_seed(seed)
        np.random.set_state(np.random.RandomState(seed).get_state())  # noqa: NPY002
        random.setstate(random.Random(seed).getstate())
        yield
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
