"""Pitfall 13: data that come in another order, or not at all, the second time they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from pitfalls.exact import N, X, Y, built, dense, double
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from workbench.subject import Subject

PAIRS = TensorDataset(X, Y)


class Named(Dataset[Any]):
    """Examples as dictionaries."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": X[i], "label": Y[i]}

    def __len__(self) -> int:
        return N


class Stream(IterableDataset[Any]):
    """Examples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(N)])


class Noisy(Named):
    """Another picture of each example each time."""

    def __getitem__(self, i: int) -> Any:
        return X[i] + torch.randn(6), Y[i]


class Encoding(dict[str, Any]):
    """Like a batch of Hugging Face's."""


SOURCES: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(PAIRS, batch_size=16, shuffle=True),
    "augmented": lambda: DataLoader(Noisy(), batch_size=16),
    "drops the last": lambda: DataLoader(PAIRS, batch_size=64, drop_last=True),
    "a generator": lambda: (pair for pair in zip(X.split(8), Y.split(8), strict=True)),
    "tiny batches": lambda: DataLoader(PAIRS, batch_size=1, shuffle=True),
    "names": lambda: DataLoader(Named(), batch_size=16, shuffle=True),
    "encodings": lambda: (Encoding(x=x, labels=y) for x, y in zip(X.split(8), Y.split(8), strict=True)),
    "no length": Stream,
    "workers": lambda: DataLoader(PAIRS, batch_size=16, shuffle=True, num_workers=1),
}


def similarity(a: Tensor, b: Tensor) -> float:
    """Linear CKA: ‖Aᵀ B‖² / (‖Aᵀ A‖ ‖Bᵀ B‖), columns centred."""
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


def is_one_list_of_examples(make: Callable[[Any], Callable[[], Tensor]], source: str) -> None:
    """All 70 examples, equal in each pass; a model is like itself; the random state does not move."""
    state = torch.get_rng_state()
    outputs = make(SOURCES[source]())
    first, second = outputs(), outputs()
    assert len(first) == len(second) == N, f"{len(first)} and {len(second)} examples"
    assert similarity(first, second) == pytest.approx(1), "a model is unlike itself"
    assert torch.equal(first, second), "the examples changed"
    assert torch.equal(torch.get_rng_state(), state), "the random state moved"


def ours(source: Any) -> Callable[[], Tensor]:
    return Subject(built(dense), source).outputs


def reading_again(source: Iterable[Any]) -> Callable[[], Tensor]:
    """The fault: the loader is the data."""
    model = built(dense)

    def outputs() -> Tensor:
        found = [model(_inputs(batch)) for batch in source]
        return torch.cat(found).detach() if found else torch.zeros(0, 3)

    return outputs


def _inputs(batch: Any) -> Tensor:
    found = batch["x"] if isinstance(batch, dict) else batch[0]
    return found if found.ndim == 2 else found[None]


@pytest.mark.parametrize("source", SOURCES)
def test_whatever_the_data_come_as_they_are_one_list_of_examples(source: str) -> None:
    is_one_list_of_examples(ours, source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("shuffled", "unlike itself"),
        ("tiny batches", "unlike itself"),
        ("augmented", "unlike itself"),
        ("names", "unlike itself"),
        ("drops the last", "64 and 64 examples"),
        ("a generator", "70 and 0 examples"),
    ],
)
def test_reading_a_loader_twice_is_caught(source: str, words: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(AssertionError, match=words):
        is_one_list_of_examples(reading_again, source)
    torch.set_rng_state(state)


def is_known_by_its_fingerprint(fingerprint: Callable[[Any], Any]) -> None:
    """Equal for the same examples however they are loaded, another for other examples."""
    prints = [fingerprint(SOURCES[name]()) for name in ("shuffled", "drops the last", "tiny batches", "no length")]
    assert len(set(prints)) == 1, "the same examples"
    assert fingerprint((X + 1e-9, Y)) != prints[0], "other examples"


def test_the_list_of_examples_is_fingerprinted() -> None:
    is_known_by_its_fingerprint(lambda source: Subject(built(dense), source).fingerprint())
    with pytest.raises(AssertionError, match="the same examples"):
        is_known_by_its_fingerprint(lambda source: str(next(iter(source))))
    with pytest.raises(AssertionError, match="other examples"):
        is_known_by_its_fingerprint(lambda source: N)


def test_batches_of_three_are_inputs_and_targets() -> None:
    class Shifted(torch.nn.Linear):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return super().forward(x) + shift

    shift, net = double(N, 3, seed=7), built(lambda: Shifted(6, 3))
    wanted = float(torch.nn.functional.cross_entropy(net(X, shift), Y).detach())
    loader = DataLoader(TensorDataset(X, shift, Y), batch_size=16, shuffle=True)
    assert Subject(net, loader).loss() == pytest.approx(wanted, rel=1e-12)
    turned = DataLoader(TensorDataset(shift, X, Y), batch_size=16)
    with pytest.raises(ValueError, match="first batch"):
        Subject(net, turned)
