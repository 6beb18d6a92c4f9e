"""Permutations of a model's units that change nothing it computes, and those that bring it closest to another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from workbench.landscape.channels import Channels
from workbench.numerics.matching import Indices, Labels, Matching, match, permuted
from workbench.several import Pair
from workbench.subject import Subject

Tensors = Mapping[str, Tensor]
FEW = 3
"""Examples with which axes are followed through the model, and permutations first tried."""
ROUNDING = 1e4
"""Outputs agree where they differ by less than so many units of rounding of the largest."""


@dataclass(frozen=True)
class Symmetry:
    """Which axes of a model's tensors may be permuted together without changing what it computes.

    ``shapes`` cuts each tensor's axes into factors (heads × entries of a head, channels × places), ``labels`` names
    the permutation that acts on each factor, None where none does. ``lengths`` are the permutations' own; ``notes``
    say what was left alone and why. Running statistics have labels like weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    labels: Mapping[str, Labels]
    lengths: Mapping[int, int]
    notes: tuple[str, ...] = ()

    def permuted(self, tensors: Tensors, permutations: Mapping[int, Indices]) -> dict[str, Tensor]:
        """The tensors with every permutation applied wherever it acts; those without labels as they are."""
        cut = {n: permuted(t, self.labels[n], permutations) for n, t in self.cut(tensors).items()}
        return {n: cut[n].reshape(t.shape) if n in cut else t for n, t in tensors.items()}

    def cut(self, tensors: Tensors) -> dict[str, Tensor]:
        """Those tensors that have labels, reshaped to their factors."""
        return {n: t.reshape(self.shapes[n]) for n, t in tensors.items() if n in self.labels}

    def coverage(self, tensors: Tensors) -> float:
        """The share of the entries of ``tensors`` that some permutation moves."""
        moved = sum(t.numel() for n, t in tensors.items() if any(k is not None for k in self.labels.get(n, ())))
        return moved / sum(t.numel() for t in tensors.values())

    def without(self, dropped: Iterable[int], why: str) -> Symmetry:
        """The symmetry with some permutations held at the identity."""
        gone = set(dropped)
        if not gone:
            return self
        labels = {n: tuple(None if k in gone else k for k in ks) for n, ks in self.labels.items()}
        return replace(
            self,
            labels=labels,
            lengths={k: n for k, n in self.lengths.items() if k not in gone},
            notes=(*self.notes, f"{len(gone)} of {len(self.lengths)} permutations are left out: {why}"),
        )


def symmetry(subject: Subject) -> Symmetry:
    """Find the permutations by following axes through one forward pass, and try each on a few examples.

    Hidden units, channels with their BatchNorm, channels before a flattening, a residual stream as one, attention
    heads, entries of a head (the same in all heads) and gates of recurrent layers come out as they stand in the
    operations: no layer has to be known by name. What an operation without a rule touches keeps its order, and so
    does whatever fails the trial. Cost: three passes over three examples, and one for each permutation if any fails.
    """
    chosen = subject.selected(range(min(FEW, subject.examples)))
    found = _followed(chosen)
    outputs = _outputs(chosen, {})
    if not torch.isfinite(outputs).all():
        return found.without(found.lengths, "outputs are not finite, so that permutations cannot be tried")
    rng = np.random.default_rng(0)
    orders = {k: rng.permutation(n) for k, n in found.lengths.items()}
    if not _changes(chosen, found, orders, outputs):
        return found
    wrong = [k for k, order in orders.items() if _changes(chosen, found, {k: order}, outputs)]
    kept = found.without(wrong, "the model's outputs change under them")
    still = {k: order for k, order in orders.items() if k in kept.lengths}
    return kept.without(still, "their product changes outputs") if _changes(chosen, kept, still, outputs) else kept


def _followed(subject: Subject) -> Symmetry:
    now = subject.tensors()
    named = {n: now[n].detach().clone() for n in _permutable(subject)}
    batch = next(iter(subject.batches()))
    with Channels(named.values()) as seen, torch.no_grad():
        result = (
            subject.batch_outputs(named, batch, {}) if subject.has_outputs else subject.batch_loss(named, batch, {})
        )
    seen.fix(seen.of(result))
    for tensor in named.values():
        if id(tensor) not in seen.used:
            seen.fix(seen.of(tensor))
    leaves = {n: [k for axis in seen.of(t) for k in seen.factors.leaves(axis)] for n, t in named.items()}
    free = [k for k in dict.fromkeys(itertools.chain.from_iterable(leaves.values())) if not seen.factors.is_fixed(k)]
    numbers = {leaf: number for number, leaf in enumerate(free)}
    strange = f"axes that meet {', '.join(seen.strange)} keep their order" if seen.strange else ""
    return Symmetry(
        shapes={n: tuple(seen.factors.length((k,)) for k in ks) for n, ks in leaves.items()},
        labels={n: tuple(map(numbers.get, ks)) for n, ks in leaves.items()},
        lengths={number: seen.factors.length((leaf,)) for leaf, number in numbers.items()},
        notes=(strange,) if strange else (),
    )


def _permutable(subject: Subject) -> list[str]:
    """Names of all parameters, and of the running statistics, which go with their channels."""
    names = [name for name, _ in subject.module.named_parameters()]
    for place, module in subject.module.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            names += [f"{place}.{n}" if place else n for n in ("running_mean", "running_var")]
    return names


def _outputs(subject: Subject, tensors: Tensors) -> Tensor:
    """What must not change: outputs, or losses where there are none."""
    if subject.has_outputs:
        return subject.outputs(dict(tensors))
    found = subject.losses(dict(tensors))
    return torch.tensor([subject.evaluate(dict(tensors))["loss"]]) if found is None else found


def _changes(subject: Subject, found: Symmetry, orders: Mapping[int, Indices], outputs: Tensor) -> bool:
    moved = found.permuted(subject.tensors(), orders)
    return not _apart(_outputs(subject, moved), outputs) <= _allowed(subject)


def _apart(one: Tensor, two: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((one - two).abs().max() / two.abs().max().clamp_min(torch.finfo(two.dtype).tiny))


def _allowed(subject: Subject) -> float:
    return ROUNDING * torch.finfo(subject.dtype).eps


@dataclass(frozen=True)
class Alignment:
    """The second model of a pair with its units in the order of the first's.

    ``output_change`` is the largest change of its outputs by the permutation over the examples, as a share of the
    largest output: rounding. ``permuted_share`` is the share of units that moved, of those that may; ``coverage`` the
    share of the weights that some permutation reaches.
    """

    second: Subject
    symmetry: Symmetry
    matching: Matching | None
    output_change: float
    permuted_share: float
    coverage: float
    notes: tuple[str, ...]


def align(pair: Pair, rng: np.random.Generator, starts: int = 4) -> Iterator[Alignment]:
    """Bring the second model's units into the order of the first's by matching weights; the best of several starts.

    All parameters count alike in the distance; running statistics follow. Yields after each start. The permuted model
    is checked on all examples, BatchNorm in eval mode: where its outputs are not the same to rounding it stays as it
    was, and notes say so.
    Cost: see :func:`workbench.numerics.matching.match`, and two passes over the examples for each start.
    """
    found = symmetry(pair.second)
    first, second = (_weights(found, s) for s in (pair.first, pair.second))
    try:
        for matching in match(first, second, {n: found.labels[n] for n in first}, rng, starts):
            yield _aligned(pair, found, matching)
    except ValueError as problem:
        yield Alignment(pair.second, found, None, 0.0, 0.0, 0.0, (*found.notes, f"not aligned: {problem}"))


def _weights(found: Symmetry, subject: Subject) -> dict[str, Tensor]:
    """Every parameter in its factors, without running statistics."""
    names = {name for name, _ in subject.module.named_parameters()}
    return found.cut({n: t for n, t in subject.tensors().items() if n in names})


def _aligned(pair: Pair, found: Symmetry, matching: Matching) -> Alignment:
    tensors = found.permuted(pair.second.tensors(), matching.permutations)
    error = _change(pair.second.under("eval"), tensors) if found.lengths else 0.0
    moved = sum(int((p != np.arange(len(p))).sum()) for p in matching.permutations.values())
    units = sum(found.lengths.values())
    coverage = found.coverage(pair.second.params)
    if not error <= _allowed(pair.second):
        said = f"the permuted model's outputs differ by {error:.1g}, so that it was left as it was"
        return Alignment(pair.second, found, None, error, 0.0, coverage, (*found.notes, said))
    share = moved / units if units else math.nan
    return Alignment(pair.second.at(tensors), found, matching, error, share, coverage, found.notes)


def _change(subject: Subject, tensors: Tensors) -> float:
    """The largest change of an output over all examples at other tensors, as a share of the largest output."""
    call = subject.batch_outputs if subject.has_outputs else subject.batch_loss
    change, largest = torch.zeros((), device=subject.device), torch.zeros((), device=subject.device)
    with torch.no_grad():
        for batch in subject.batches():
            before, after = call({}, batch, {}), call(tensors, batch, {})
            change = torch.maximum(change, (after - before).abs().max())  # NaN stays NaN, and fails the test
            largest = torch.maximum(largest, before.abs().max())
    return float(change) / max(float(largest), torch.finfo(subject.dtype).tiny)
