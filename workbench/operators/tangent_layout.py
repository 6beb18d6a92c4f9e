"""What a forward pass does with its parameters, found on three examples before anything large is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.operators.tangent_uses import LAYOUTS, Layout, Recorder, Scale, Use, arranged
from workbench.shell import precise
from workbench.subject import Subject

TRIED = 3
"""Examples on which the structure is found: few, and a number that other dimensions seldom have."""


@dataclass(frozen=True)
class Course:
    """The uses of parameters in a forward pass, where their examples lie, and the parameters that have no formula.

    ``uses`` are those of ``examples`` examples; ``outputs`` numbers each example has.
    """

    uses: tuple[Use, ...]
    layouts: tuple[Layout, ...]
    loose: frozenset[str]
    examples: int
    outputs: int

    def follow(self, subject: Subject, leaves: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, list[Use]]:
        """Outputs (n, outputs) of a batch with their graph, and its uses, laid out as on the first examples.

        Raises:
            ValueError: the forward pass takes another course on these examples.
        """
        z, recorder = record(subject, leaves, batch)
        if [u.key for u in recorder.uses] != [u.key for u in self.uses] or recorder.loose - self.loose:
            raise ValueError(
                "the model's forward pass makes other calls on other examples, so that layers cannot be told apart; "
                "use TangentKernel(subject, structured=False), which differentiates each example by itself."
            )
        for use, layout in zip(recorder.uses, self.layouts, strict=True):
            use.layout = layout
        return z, recorder.uses


def record(subject: Subject, leaves: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Recorder]:
    """Outputs (n, outputs) of a batch with their graph, and what the pass did."""
    with precise(subject.device), torch.enable_grad(), Recorder(leaves) as recorder:
        z = subject.batch_outputs(leaves, batch)
    return z.reshape(batch.size, -1), recorder


def course(subject: Subject, leaves: Mapping[str, Tensor], structured: bool = True) -> Course:
    """Find the structure; without ``structured`` every parameter is loose.

    A layout is taken where the outputs of the first and of the last example have no gradient in the others' parts.

    Raises:
        TypeError: the subject has no outputs of its own.
        ValueError: examples are coupled, so that a kernel of examples does not exist.
    """
    if not subject.has_outputs:
        raise TypeError(
            "a tangent kernel needs outputs; this subject was made with objective=, which gives only a loss. "
            "Make it with loss= (a name or f(outputs, targets))."
        )
    batch = next(iter(subject.batches(TRIED)))
    z, recorder = record(subject, leaves, batch)
    _refuse_coupled(subject, z.detach())
    if not structured:
        return Course((), (), frozenset(leaves), batch.size, z.shape[1])
    found = _layouts(recorder.uses, z, batch.size)
    loose = set(recorder.loose)
    for use, layout in zip(recorder.uses, found, strict=True):
        use.layout = layout or "first"
        if layout is None or (isinstance(use, Scale) and use.aligned[0] != 1):
            loose |= set(use.names.values())
    placed: tuple[Layout, ...] = tuple(layout or "first" for layout in found)
    return Course(tuple(recorder.uses), placed, frozenset(loose), batch.size, z.shape[1])


def _refuse_coupled(subject: Subject, together: Tensor) -> None:
    apart = subject.norm != "batch"
    if apart and len(together) > 1:
        with torch.no_grad(), precise(subject.device):
            alone = subject.batch_outputs({}, next(iter(subject.batches(1)))).reshape(-1)
        scale = together.abs().max()
        apart = not bool((alone - together[0]).abs().max() > torch.finfo(together.dtype).eps ** 0.5 * scale)
    if not apart:
        raise ValueError(
            "an example's outputs depend on the other examples in its batch (BatchNorm with batch statistics?), so "
            "there is no kernel of examples; use norm='eval'."
        )


def _layouts(uses: Sequence[Use], z: Tensor, examples: int) -> list[Layout | None]:
    """Where each use's examples lie; None where they cannot be found."""
    if not uses:
        return []
    first, last = (_slopes(uses, z, place) for place in (0, examples - 1))
    return [
        None if a is None or b is None else _layout(a.view(use.shape), b.view(use.shape), examples)
        for use, a, b in zip(uses, first, last, strict=True)
    ]


def _slopes(uses: Sequence[Use], z: Tensor, place: int) -> Sequence[Tensor | None]:
    """Gradients of one example's outputs, with unequal weights so that those of a softmax do not cancel."""
    weights = torch.zeros_like(z)
    weights[place] = torch.linspace(1.0, 2.0, z.shape[1], dtype=z.dtype, device=z.device)
    edges: list[Any] = [use.edge for use in uses]
    return torch.autograd.grad(z, edges, weights, retain_graph=True, allow_unused=True)


def _layout(first: Tensor, last: Tensor, examples: int) -> Layout | None:
    """The one layout in which each example's gradient lies in its own place."""
    fits = list[Layout]()
    for layout in LAYOUTS:
        if _possible(first, layout, examples):
            begins, ends = (arranged(t, layout, examples) for t in (first, last))
            if not bool((begins[1:].abs() > 0).any() | (ends[:-1].abs() > 0).any()):
                fits.append(layout)
    # With a gradient of zero several may fit: none is taken then, unless one example is all there is.
    return fits[0] if len(fits) == 1 or (fits and examples == 1) else None


def _possible(slope: Tensor, layout: Layout, examples: int) -> bool:
    shape = slope.shape
    if layout in ("first", "second"):
        place = LAYOUTS.index(layout)
        return len(shape) > place and shape[place] == examples
    return len(shape) > 0 and shape[0] > examples and shape[0] % examples == 0
