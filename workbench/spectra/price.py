"""What a product will take, from one that was timed on a few examples."""

from __future__ import annotations

import time
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

    Products on 8 and on 32 examples tell a part for each chunk from a part for each example; of few examples only an
    eighth is used. ``retained`` says that graphs are kept; else each product builds its own. Cost: two products on
    each, so at most a quarter of one on all.
    """
    found = _known.setdefault(subject, {})
    key = (operator, layers, retained)
    if key not in found:
        part = restricted(subject, layers)
        more = min(max(part.examples // 8, FEW), TRIED, part.examples)
        slow = _timed(part.selected(range(more)), operator, retained)
        quick = _timed(part.selected(range(FEW)), operator, retained) if more > FEW else 0.0
        each = max(slow - quick, 0.0) / (more - FEW if more > FEW else more)
        chunks = -(-part.examples // min(part.plan.chunk or part.examples, part.examples))
        found[key] = each * part.examples + max(slow - each * more, 0.0) * chunks
    return found[key]


def keeps_graphs(subject: Subject, working: int) -> bool:
    """Whether all graphs will be kept, for a curvature whose products take ``working`` bytes beside its graphs."""
    if subject.plan.retained is not None:
        return subject.plan.retained
    chunk = min(subject.plan.chunk or subject.examples, subject.examples)
    return working / 1.3 * subject.examples / chunk <= SHARE * subject.available_memory()


def _timed(subject: Subject, operator: OperatorName, retained: bool) -> float:
    """One product after a first one, waiting for the device."""
    with curvature(subject.with_plan(Plan(retained=retained)), operator) as found:
        vector = torch.ones(found.size, dtype=found.dtype, device=found.device)
        float(norm(found.matvec(vector)))
        began = time.perf_counter()
        float(norm(found.matvec(vector)))
        return time.perf_counter() - began
