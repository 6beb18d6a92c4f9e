"""A subject's curvature as symmetric operators on its flat parameter vector: Hessian and generalised Gauss-Newton.

Products are reverse-over-reverse: the gradient's own graph is built once for each chunk of examples and kept while it
fits into memory, else rebuilt for each product. Reverse-over-forward is never used: it is silently wrong through
LayerNorm and through BatchNorm with batch statistics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol, Self, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.operator import Operator
from workbench.operators.graphs import add_parts, held, held_bytes
from workbench.shell import precise
from workbench.subject import Subject

TRIED = 32
"""Examples on which memory is measured before a run."""
SHARE = 0.5
"""The share of free memory that kept graphs may take; the rest is for Krylov bases and for the user's training."""
_measured: WeakKeyDictionary[Subject, dict[type, float]] = WeakKeyDictionary()
_largest: WeakKeyDictionary[Subject, dict[type, float]] = WeakKeyDictionary()
_first: WeakKeyDictionary[Subject, dict[type, int]] = WeakKeyDictionary()


class Graph(Protocol):
    """One chunk's part of a curvature: its ``loss`` and ``slope`` (both sums, detached), and products on its graph."""

    loss: Tensor
    slope: Sequence[Tensor]

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """This chunk's share of a product, parameter by parameter; None where it is zero."""
        ...

    def roots(self) -> Iterable[Tensor]:
        """The tensors whose graphs are held."""
        ...


class Curvature(Operator):
    """What Hessian and GaussNewton share: products Σ_chunks share / W, with W the subject's total weight.

    Vectors have ``subject.size`` entries: the chosen parameters in the subject's order, each tied tensor once. Use it
    as a context manager, or call :meth:`close`, to free the kept graphs at once. Writing the live weights in place
    while graphs are kept makes the next product raise autograd's error about an in-place operation.

    Attributes:
        products: how many products were computed so far.
        graph_bytes: what the graph of the first chunk holds; 0 until it was built.
        start: how many examples come before the chunk whose graph is being built.
    """

    words: ClassVar[str] = "curvature"
    rests_on: ClassVar[str] = "gradients"
    """What :meth:`field` is, in a word."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.size, self.dtype, self.device = subject.size, subject.dtype, subject.device
        self.products = self.graph_bytes = 0
        # detach() shares the version counter with the live weight, so that autograd notices in-place changes.
        self.leaves = {name: p.detach().requires_grad_() for name, p in subject.params.items()}
        self._room = {True: float("inf"), False: 0.0, None: None}[subject.plan.retained]
        self._kept: list[Graph] = []
        self._chunks = self.start = 0
        self._loss, self._slope = 0.0, torch.zeros(self.size, dtype=torch.float64, device=self.device)

    @abstractmethod
    def _graph(self, batch: Batch) -> Graph:
        """The graph of one chunk."""

    @abstractmethod
    def field(self, params: Mapping[str, Tensor]) -> Tensor:
        """The function of the parameters whose derivative the products rest on, as one vector, without a graph."""

    @abstractmethod
    def field_derivative(self, direction: Tensor) -> Tensor:
        """The derivative of :meth:`field` along a direction of the parameters, by differentiation."""

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, other: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """``A @ v`` for a vector (size,), a block of columns (size, k), or tensors by parameter name."""
        if isinstance(other, Tensor):
            return super().__matmul__(other)
        strange = set(other) - set(self.leaves)
        if strange:
            raise KeyError(f"{sorted(strange)[0]!r} is none of the parameters that vary: {', '.join(self.leaves)}.")
        return self.subject.unflatten(self.matvec(self.subject.flatten(other)))

    def matvec(self, vector: Tensor) -> Tensor:
        return self._products([vector])[0]

    def matmat(self, block: Tensor) -> Tensor:
        """Columns one after another on each chunk's graph: one that is not kept is built once for the whole block."""
        return torch.stack(self._products(block.unbind(1)), dim=1) if block.shape[1] else block.clone()

    def _products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        parts = [self.split(v) for v in vectors]
        totals = [torch.zeros(self.size, dtype=self.dtype, device=self.device) for _ in vectors]
        views = [self.split(t) for t in totals]
        with precise(self.device):
            for graph in self._graphs():
                for part, view in zip(parts, views, strict=True):
                    add_parts(view, graph.product(part))
        self.products += len(vectors)
        return [total.div_(self.subject.total_weight) for total in totals]

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as views with the parameters' shapes."""
        pieces = vector.split([p.numel() for p in self.leaves.values()])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.leaves.values(), strict=True)]

    def _graphs(self) -> Iterator[Graph]:
        """Each chunk's graph, in one order: kept, or built now."""
        yield from self._kept
        if self._chunks and len(self._kept) == self._chunks:
            return
        first, seen, self.start = not self._chunks, 0, 0
        if first:  # an earlier pass may have been cut short
            self._kept.clear()
            self._loss, self._slope = 0.0, torch.zeros_like(self._slope)
        for seen, batch in enumerate(self.subject.batches(), 1):
            if seen > len(self._kept):
                graph = self._graph(batch)
                if first:
                    self._note(graph)
                self._keep(graph, seen)
                yield graph
            self.start += batch.size
        self._chunks = seen

    def _note(self, graph: Graph) -> None:
        """Loss and gradient come with the first pass for nothing."""
        self._loss = self._loss + graph.loss.double()
        add_parts(self.split(self._slope), graph.slope)

    def _keep(self, graph: Graph, number: int) -> None:
        if number == 1:
            self.graph_bytes = self._first_bytes(graph)
            if self._room is None:
                self._room = SHARE * self.subject.available_memory() / max(self.graph_bytes, 1)
        if self._room and number <= self._room and number == len(self._kept) + 1:
            self._kept.append(graph)

    def _first_bytes(self, graph: Graph) -> int:
        """Bytes that the first chunk's graph holds: measured once a subject, as the weights do not change it."""
        known = _first.setdefault(self.subject, {})
        if type(self) not in known:
            known[type(self)] = held_bytes(graph.roots(), self.leaves.values())
        return known[type(self)]

    def expected_bytes(self) -> tuple[int, int]:
        """What the kept graphs will hold, and what a product takes on top: 1.3 times a chunk's graph.

        Measured on a few examples, once a subject, and scaled; where not all chunks fit into memory, that of one chunk
        counts.
        """
        known = _measured.setdefault(self.subject, {})
        if type(self) not in known:
            sizes, count = self._tried(TRIED)
            known[type(self)] = sum(sizes) / count
        each = known[type(self)]
        chunk = each * min(self.subject.plan.chunk or self.subject.examples, self.subject.examples)
        whole = each * self.subject.examples
        fits = self._room is None and whole <= SHARE * self.subject.available_memory()
        return int(whole if fits or self._room else chunk), int(1.3 * chunk)

    def largest_bytes(self) -> int:
        """What the largest tensor that a chunk's graph keeps, and that grows with the examples, will take.

        Measured on two numbers of examples, once a subject, and scaled.
        """
        known = _largest.setdefault(self.subject, {})
        if type(self) not in known:
            more, few = (self._tried(count) for count in (TRIED, TRIED // 2))
            growing = Counter(more[0]) - Counter(few[0])
            known[type(self)] = max(growing, default=0) / more[1]
        return int(known[type(self)] * min(self.subject.plan.chunk or self.subject.examples, self.subject.examples))

    def _tried(self, count: int) -> tuple[list[int], int]:
        """Bytes of each tensor that the graph of so many examples holds, and how many there are."""
        batch = next(iter(self.subject.batches(count)))
        with precise(self.device):
            return held(self._graph(batch).roots(), self.leaves.values()), batch.size

    @property
    def kept(self) -> int:
        """How many chunks have their graphs kept; the others are rebuilt for each product."""
        return len(self._kept)

    @property
    def loss(self) -> float:
        """The loss at this point, from the same graphs as the products; one pass if there was no product yet."""
        self._once()
        return float(self._loss) / self.subject.total_weight

    @property
    def gradient(self) -> Tensor:
        """The gradient at this point, (size,), float64; one pass if there was no product yet."""
        self._once()
        return self._slope / self.subject.total_weight

    def _once(self) -> None:
        if not self._chunks:
            self._products([])

    def close(self) -> None:
        """Free the kept graphs. Later products work, and build them anew."""
        self._kept.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
