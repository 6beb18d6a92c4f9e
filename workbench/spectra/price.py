"""What a run will take: seconds from a product timed on a few examples, bytes from a graph measured on a few."""

from __future__ import annotations

import time
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from workbench.numerics.basis import norm
from workbench.operators.curvature import SHARE, TRIED, Curvature
from workbench.operators.gauss_newton import OutputCurvature
from workbench.operators.table import OperatorName, curvature
from workbench.plan import Plan
from workbench.selftest import at_once
from workbench.spectra.opening import restricted
from workbench.spectra.run import Aim
from workbench.subject import Subject

FEW = 8
"""The smaller of two numbers of examples, so that what does not grow with them is told apart."""
WORKING = 1.3
"""What a product takes beside its graphs, over the graph of one chunk, as curvatures themselves expect."""
HOLES, HOLES_WORKING = 1.7, 1.2
"""Factors on a host for kept graphs and for a product's tensors. Building a graph keeps some tensors and frees others
between them, and glibc's allocator neither returns such holes nor, before its release 2.38, puts an aligned tensor of
the same size back into one; measured on dense, convolutional and attention nets (tests/pitfalls/test_14_memory.py)."""
TEMPORARY = 8
"""A product's passing tensors on a host, over the largest one that its chunk's graph keeps: each elementwise function
is differentiated twice in several steps, of which each makes a tensor anew that no hole takes. In a deep net that is
little beside its graph, in one wide layer it is most; measured 5 to 10 on wide layers of tanh, ReLU and GELU."""
TEST_VECTORS, TEST_GRAPHS, TEST_AGAIN = 13, 7, 0.5
"""The self-test: vectors of the parameters' size in float64; what it takes over the graph of its examples in float64
(the graph, a product on it, and the patches into which float64 convolutions unfold their inputs); and the share of it
that a host does not use again for what comes later."""
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
    return working / WORKING * subject.examples / chunk <= SHARE * subject.available_memory()


def peak_bytes(found: Curvature, aim: Aim, vectors: float) -> int:
    """The most memory that a run takes at one time: basis, ``vectors`` of the parameters' size, graphs, self-test.

    Each kept graph holds its chunk's gradient too (for products with outputs, two). On a device the self-test's
    memory is free again when a product needs it. A host's allocator keeps what it was given and uses it again in part:
    there the smaller of the two counts half, graphs take more than their tensors (:data:`HOLES`), and what passes by in
    a product counts by the largest of them (:data:`TEMPORARY`).
    """
    subject, vector = found.subject, found.size * found.dtype.itemsize
    kept, working = found.expected_bytes()
    chunk = min(subject.plan.chunk or subject.examples, subject.examples)
    chunks = -(-subject.examples // chunk) if keeps_graphs(subject, working) else 1
    kept += chunks * vector * (2 if isinstance(found, OutputCurvature) else 1)
    basis, others = basis_bytes(aim, subject), vectors * vector
    share = working / WORKING / chunk * at_once(subject) * 8 / found.dtype.itemsize
    tests = TEST_VECTORS * 8 * found.size + TEST_GRAPHS * share
    if subject.device.type != "cpu":
        return int(kept + basis + max(others + working, 6 * vector + tests))
    run = others + HOLES * kept + HOLES_WORKING * working + TEMPORARY * found.largest_bytes()
    return int(basis + max(run, tests) + TEST_AGAIN * min(run, tests))


def basis_bytes(aim: Aim, subject: Subject) -> int:
    """What the Lanczos basis takes of the memory in which the subject lies; for models on the host, always all."""
    if subject.device.type == "cpu" and aim.storage == "host":
        aim = replace(aim, storage="operator")
    return aim.basis_bytes(subject.size, subject.dtype.itemsize)


def _timed(subject: Subject, operator: OperatorName, retained: bool) -> float:
    """One product after a first one, waiting for the device."""
    with curvature(subject.with_plan(Plan(retained=retained)), operator) as found:
        vector = torch.ones(found.size, dtype=found.dtype, device=found.device)
        float(norm(found.matvec(vector)))
        began = time.perf_counter()
        float(norm(found.matvec(vector)))
        return time.perf_counter() - began
