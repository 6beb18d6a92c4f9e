"""A small training loop for notebooks, experiments and tests: nothing hidden, nothing global."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

Examples = tuple[Tensor, Tensor]


class TakesSteps(Protocol):
    """What the loop needs of a recorder: to be told of each step."""

    def step(self, /, **scalars: float) -> None:
        """Hear that one more optimizer step was taken."""
        ...


def train(
    model: nn.Module,
    data: Examples,
    steps: int = 500,
    lr: float = 0.1,
    batch_size: int = 64,
    seed: int = 0,
    recorder: TakesSteps | None = None,
    *,
    test: Examples | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    evaluate_every: int = 10,
) -> Mapping[str, float]:
    """Train a classifier by cross-entropy in mini-batches and return its last scalars.

    Batches are drawn without replacement, epoch by epoch, by a generator of this loop's own, so that the same arguments
    give the same weights bit for bit. Each step's batch loss is recorded; accuracies on all of ``data`` and ``test``
    every ``evaluate_every`` steps, at the first and the last.

    Args:
        model: trained in place, in training mode; its mode is put back at the end.
        data: (inputs, targets) to train on.
        steps: number of optimizer steps.
        lr: learning rate of the SGD with momentum 0.9 that is made when no ``optimizer`` is given.
        batch_size: examples in a batch.
        seed: of the order of the examples.
        recorder: a ``wb.Recorder`` that was entered, or anything with ``step``.
        test: (inputs, targets) held out.
        optimizer: used instead of SGD; the recorder should know the same one.
        evaluate_every: steps between accuracies.
    """
    chosen = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    mode, scalars = model.training, dict[str, float]()
    model.train()
    for step, rows in zip(range(1, steps + 1), _batches(len(data[0]), batch_size, seed), strict=False):
        scalars = {"train_loss": _descend(model, chosen, data[0][rows], data[1][rows])}
        if step in (1, steps) or step % evaluate_every == 0:
            scalars |= _accuracies(model, data, test)
        if recorder is not None:
            recorder.step(**scalars)
    model.train(mode)
    return scalars


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> float:
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def _accuracies(model: nn.Module, data: Examples, test: Examples | None) -> dict[str, float]:
    found = {"train_accuracy": accuracy(model, data)}
    return found if test is None else found | {"test_accuracy": accuracy(model, test)}


def accuracy(model: nn.Module, data: Examples) -> float:
    """Share of examples whose largest output is their class, in evaluation mode, without gradients."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        right = (model(data[0]).argmax(-1) == data[1]).double().mean().item()
    model.train(mode)
    return right
