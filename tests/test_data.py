"""Whatever the data come as, the same examples are read, once, and no random state moves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from workbench.data import Examples, freeze
from workbench.trees import leaves, plain, rows, split

N = 23
X = torch.arange(2.0 * N, dtype=torch.float64).reshape(N, 2)
Y = torch.arange(N) % 3
PAIRS = TensorDataset(X, Y)


class Stream(IterableDataset[Any]):
    """Examples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(N)])


class Named(Dataset[Any]):
    """Examples by name, with a text that no model takes."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i], "label": Y[i], "file": f"{i}.png"}

    def __len__(self) -> int:
        return N


class Augmented(Dataset[Any]):
    """Examples that use every global generator when read."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + torch.randn(2) + float(np.random.normal()) + random.random(), Y[i]  # noqa: NPY002

    def __len__(self) -> int:
        return N


class Encoding(dict[str, Any]):
    """Like a Hugging Face encoding: a mapping with attributes."""


def batches(size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "list of tensors": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "names": lambda: {"x": X, "labels": Y},
    "encoding": lambda: Encoding(x=X, labels=Y.numpy()),
    "inputs by name": lambda: ({"x": X}, Y),
    "dataset": lambda: PAIRS,
    "named dataset": Named,
    "loader": lambda: DataLoader(PAIRS, batch_size=5),
    "shuffled, dropping the last": lambda: DataLoader(PAIRS, batch_size=5, shuffle=True, drop_last=True),
    "drops everything": lambda: DataLoader(PAIRS, batch_size=50, drop_last=True),
    "workers": lambda: DataLoader(PAIRS, batch_size=5, shuffle=True, num_workers=2, persistent_workers=True),
    "own generator": lambda: DataLoader(PAIRS, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "own batch sampler": lambda: DataLoader(PAIRS, batch_sampler=_Own(SequentialSampler(PAIRS), 4, False)),
    "named loader": lambda: DataLoader(Named(), batch_size=4, shuffle=True),
    "batched items": lambda: DataLoader(
        PAIRS, batch_size=None, sampler=BatchSampler(SequentialSampler(PAIRS), 4, False)
    ),
    "stream": Stream,
    "loaded stream": lambda: DataLoader(Stream(), batch_size=4, num_workers=2),
    "list of batches": batches,
    "generator": lambda: (b for b in batches()),
    "batches by name": lambda: [{"x": x, "target": y} for x, y in batches()],
    "batches as lists": lambda: [[x, y] for x, y in batches()],
    "encodings": lambda: (Encoding(x=x, y=y) for x, y in batches()),
}


class _Own(BatchSampler):
    """A batch sampler of the user's own class."""


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def inputs_of(frozen: Examples) -> tuple[Tensor, Tensor]:
    parts = [split(part) for part in frozen.slices(None)]
    inputs = torch.cat([args[0] if args else kwargs["x"] for args, kwargs, _ in parts])
    return inputs, torch.cat([targets for _, _, targets in parts])


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_examples_and_leaves_all_random_states(name: str) -> None:
    before = states()
    frozen = freeze(SOURCES[name]())
    assert states() == before
    x, y = inputs_of(frozen)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert (frozen.size, frozen.available) == (N, N)


@pytest.mark.parametrize("name", SOURCES)
def test_fewer_examples_are_chosen_by_the_seed_or_the_first_of_a_stream(name: str) -> None:
    first, again, other = (freeze(SOURCES[name](), 7, seed) for seed in (0, 0, 1))
    x, y = inputs_of(first)
    assert first.size == len(x) == len(x.unique(dim=0)) == 7
    assert torch.equal(x, inputs_of(again)[0])
    assert torch.equal(Y[(x[:, 0] / 2).long()], y)
    if first.available is None:
        assert torch.equal(x, X[:7])
    else:
        assert first.available == N
        assert not torch.equal(x, inputs_of(other)[0])


def test_augmentation_is_read_once_and_depends_on_the_seed_alone() -> None:
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True)
    before = states()
    first = inputs_of(freeze(loader))[0]
    torch.randn(5), np.random.rand(3), random.random()  # noqa: NPY002
    assert torch.equal(inputs_of(freeze(loader))[0], first)
    assert not torch.equal(inputs_of(freeze(loader, seed=1))[0], first)
    assert states() != before  # by the line above, so that the comparison can fail at all


def test_random_states_come_back_when_reading_fails() -> None:
    class Broken(Augmented):
        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            if i == 5:
                raise OSError("disk")
            return super().__getitem__(i)

    before = states()
    with pytest.raises(OSError, match="disk"):
        freeze(Broken())
    assert states() == before


def test_a_sampler_that_leaves_examples_out_is_respected() -> None:
    kept = freeze(DataLoader(PAIRS, batch_size=4, sampler=SubsetRandomSampler([3, 8, 11])))
    assert inputs_of(kept)[0][:, 0].tolist() == [6.0, 16.0, 22.0]
    assert kept.available == 3
    generator = torch.Generator().manual_seed(3)
    sampler = WeightedRandomSampler([1.0] * 10 + [0.0] * 13, 40, generator=generator)
    loader = DataLoader(PAIRS, batch_size=4, sampler=sampler)
    before = generator.get_state()
    drawn = inputs_of(freeze(loader))[0]
    assert torch.equal(before, generator.get_state())
    assert len(drawn) == 40
    assert drawn.max() < 20
    assert freeze(DataLoader(PAIRS, sampler=RandomSampler(PAIRS, replacement=True, num_samples=9))).size == 9


def test_frozen_examples_do_not_follow_the_users() -> None:
    x = X.clone()
    frozen = freeze((x, Y))
    arrays = freeze((array := X.numpy().copy(), Y.numpy()))
    x.zero_()
    array[:] = 0
    assert torch.equal(inputs_of(frozen)[0], X)
    assert torch.equal(inputs_of(arrays)[0], X)


def test_ragged_batches_stay_as_they_are_and_can_be_subsampled() -> None:
    ragged = [(torch.ones(4, 3), torch.zeros(4, 3)), (torch.ones(2, 5), torch.zeros(2, 5))]
    assert [rows(b) for b in freeze(ragged).slices(1)] == [4, 2]
    assert freeze(ragged).ragged
    assert freeze(ragged, 3).size == 3
    shared = [(torch.ones(4, 3), torch.eye(7), torch.zeros(4)), (torch.ones(2, 3), torch.eye(7), torch.zeros(2))]
    assert [tuple(t.shape for t in leaves(b)) for b in freeze(shared).slices(None)][1] == ((2, 3), (7, 7), (2,))


@given(st.integers(1, 30), st.integers(1, 30))
def test_slices_partition_the_examples(count: int, chunk: int) -> None:
    frozen = freeze((torch.arange(count), torch.arange(count)))
    for join in (False, True):
        pieces = [part[0] for part in frozen.slices(chunk, join)]
        assert torch.equal(torch.cat(pieces), torch.arange(count))
        assert all(len(p) <= chunk + join for p in pieces)
    assert count == 1 or chunk == 1 or len(pieces[-1]) > 1


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], ValueError, "no examples"),
        (DataLoader([]), ValueError, "no examples"),
        ((b for b in ()), ValueError, "read before"),
        ((X[:0], Y[:0]), ValueError, "no examples"),
        (3, TypeError, "got int"),
        ([("a", "b")], TypeError, "tensors"),
    ],
    ids=["list", "loader", "generator", "tensors", "number", "text"],
)
def test_nothing_to_read_is_an_error_that_says_so(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        freeze(data)


def test_wrong_numbers_of_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="max_examples"):
        freeze((X, Y), 0)


def test_an_encoding_answers_to_attributes() -> None:
    made = plain(Encoding(input_ids=np.arange(3), more=[1, 2, 3]))
    assert made.input_ids.tolist() == [0, 1, 2]
    with pytest.raises(AttributeError, match="input_ids, more"):
        _ = made.labels


def test_each_example_knows_where_it_stood_in_the_data() -> None:
    x, y = torch.arange(20.0)[:, None], torch.arange(20)
    data = TensorDataset(x, y)
    sampler = torch.utils.data.SubsetRandomSampler([3, 8, 11, 19])
    for source, limit in (
        ((x, y), 7),
        ([(x[:9], y[:9]), (x[9:], y[9:])], 7),
        (data, None),
        (DataLoader(data, batch_size=3, shuffle=True), 7),
        (DataLoader(data, batch_size=3, sampler=sampler), 3),
        (((x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)), 6),
    ):
        found = freeze(source, limit, seed=1)
        assert list(found.places) == found.parts[0][1].tolist()
        assert len(found.places) == found.size
        assert list(found.picked([0, 2]).places) == [found.places[0], found.places[2]]
        assert list(found.some(2).places) == list(found.places[:2])
