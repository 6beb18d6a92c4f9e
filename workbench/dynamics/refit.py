"""How well a network still learns: short trainings on fresh random targets, on copies of its weights."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.sampling import Draw
from workbench.shell import precise
from workbench.subject import Subject
from workbench.trees import leaves

TargetKind = Literal["noise", "waves"]
PAUSE = 25
"""Steps between two moments at which a training can be stopped."""
_HIDDEN = 64
_FREQUENCY = 10.0


@dataclass(frozen=True)
class Refit:
    """Training of a copy on a fresh target by Adam with fresh moments: the budget, and what the target is.

    The loss is Σ (f(x) - y)² / Σ (y - mean y)²: 1 is what a constant reaches, 0 a perfect fit. ``noise`` draws each y
    from N(0, 1); ``waves`` is sin(10 g(x)) of a random network g of the inputs, smooth at close range. Batches are
    visited in a random order, epoch by epoch; BatchNorm and dropout are as the subject has them.
    """

    steps: int = 1000
    lr: float = 1e-3
    batch: int = 256
    kind: TargetKind = "noise"

    def target(self, subject: Subject, seed: int, number: int) -> Tensor:
        """Target ``number`` for every example, in the shape of the outputs; the same whatever the weights are.

        Raises:
            ValueError: ``waves`` of inputs that are no real numbers.
        """
        outputs = torch.cat([_outputs(subject, batch) for batch in subject.batches()])
        draw = Draw(seed, f"refit {self.kind}", 0, outputs.dtype, subject.device)
        if self.kind == "noise":
            return draw(number, size=outputs.numel()).reshape(outputs.shape)
        rows = torch.cat([_real_inputs(batch) for batch in subject.batches()]).to(outputs.dtype)
        rows = (rows - rows.mean(0)) / rows.std().clamp_min(1e-12)
        width, count = rows.shape[1], outputs[0].numel()
        first = draw(2 * number, size=width * _HIDDEN).reshape(width, _HIDDEN) / width**0.5
        second = draw(2 * number + 1, size=_HIDDEN * count).reshape(_HIDDEN, count) / _HIDDEN**0.5
        return torch.sin(_FREQUENCY * torch.tanh(rows @ first) @ second).reshape(outputs.shape)

    def run(self, subject: Subject, target: Tensor, seed: int) -> Generator[float, None, float]:
        """Train a copy; yields the share of the steps that is done, now and then, and returns the loss on all examples.

        Memory: three copies of the weights, the examples, and one batch's graph.
        """
        params = {name: p.clone().requires_grad_() for name, p in subject.params.items()}
        optimizer = torch.optim.Adam(params.values(), lr=self.lr)
        parts = list(_with_targets(subject, target, self.batch))
        spread = (target - target.mean(0)).square().mean()
        for step, place in zip(range(self.steps), _visits(len(parts), seed), strict=False):
            batch, wanted = parts[place]
            with torch.enable_grad(), precise(subject.device):
                loss = (subject.batch_outputs(params, batch) - wanted).square().mean() / spread
                found = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
            for p, gradient in zip(params.values(), found, strict=True):
                p.grad = gradient
            optimizer.step()
            if step % PAUSE == 0:
                yield step / self.steps
        held = {name: p.detach() for name, p in params.items()}
        with torch.no_grad(), precise(subject.device):
            errors = [(subject.batch_outputs(held, batch) - wanted).double().square().sum() for batch, wanted in parts]
        return float(torch.stack(errors).sum() / (spread.double() * target.numel()))


def _outputs(subject: Subject, batch: Batch) -> Tensor:
    with torch.no_grad(), precise(subject.device):
        return subject.batch_outputs(subject.params, batch)


def _with_targets(subject: Subject, target: Tensor, size: int) -> Iterator[tuple[Batch, Tensor]]:
    seen = 0
    for batch in subject.batches(size):
        yield batch, target[seen : seen + batch.size]
        seen += batch.size


def _visits(count: int, seed: int) -> Iterator[int]:
    """Places of batches in a random order, epoch after epoch, by a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _real_inputs(batch: Batch) -> Tensor:
    """The first real input of each example as a row."""
    found = [t for t in leaves((batch.args, dict(batch.kwargs))) if t.is_floating_point() and len(t) == batch.size]
    if not found:
        raise ValueError("targets of the kind 'waves' are functions of real inputs; these are not. Use 'noise'.")
    return found[0].flatten(1)
