"""What a product will take, from one that was timed on a few examples."""

from __future__ import annotations

import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from workbench.numerics.basis import norm
from workbench.operators.curvature import SHARE, TRIED
from workbench.operators.table import OperatorName, curvature
from workbench.plan import Plan
from workbench.spectra.opening import restricted
from workbench.subject import Subject

FEW = 8
"""The smaller of two numbers of examples, so that what does not grow with them is told apart."""
_known: WeakKeyDictionary[Subject, dict[tuple[str, str, bool], float]] = WeakKeyDictionary()


def product_seconds(subject: Subject, operator: OperatorName, layers: str, retained: bool) -> float:
    """Seconds that a product on all examples will take, timed once a subject.

    Products on 8 and on 32 examples tell a part for each chunk from a part for each example. ``retained`` says that
    graphs are kept; else each product builds its own. Cost: some ten products on 32 examples.
    """
    found = _known.setdefault(subject, {})
    key = (operator, layers, retained)
    if key not in found:
        part = restricted(subject, layers)
        counts = [min(n, part.examples) for n in (FEW, TRIED)]
        few, more = (_timed(part.selected(range(n)), operator, retained) for n in counts)
        each = max(more - few, 0.0) / (counts[1] - counts[0]) if counts[1] > counts[0] else more / counts[1]
        chunk = min(part.plan.chunk or part.examples, part.examples)
        chunks = -(-part.examples // chunk)
        found[key] = each * part.examples + max(more - each * counts[1], 0.0) * chunks
    return found[key]


def keeps_graphs(subject: Subject, working: int) -> bool:
    """Whether all graphs will be kept, for a curvature whose products take ``working`` bytes beside its graphs."""
    if subject.plan.retained is not None:
        return subject.plan.retained
    chunk = min(subject.plan.chunk or subject.examples, subject.examples)
    return working / 1.3 * subject.examples / chunk <= SHARE * subject.available_memory()


def _timed(subject: Subject, operator: OperatorName, retained: bool) -> float:
    """The shortest of three products after a first one, waiting for the device."""
    plan = Plan(chunk=None, retained=retained)
    with curvature(subject.with_plan(plan), operator) as found:
        vector = torch.ones(found.size, dtype=found.dtype, device=found.device)
        float(norm(found.matvec(vector)))
        return min(_once(lambda: float(norm(found.matvec(vector)))) for _ in range(3))


def _once(call: Callable[[], float]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
