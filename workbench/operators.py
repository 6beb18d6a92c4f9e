"""A subject's curvature as symmetric operators on its flat parameter vector: Hessian and generalised Gauss-Newton.

Products are reverse-over-reverse: the gradient's own graph is built once for each chunk of examples and kept while it
fits into memory, else rebuilt for each product. Reverse-over-forward is never used: it is silently wrong through
LayerNorm and through BatchNorm with batch statistics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.operator import Operator
from workbench.shell import precise
from workbench.subject import Subject

TRIED = 32
"""Examples on which memory is measured before a run."""
SHARE = 0.5
"""The share of free memory that kept graphs may take; the rest is for Krylov bases and for the user's training."""


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
        self._chunks = 0
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
                    _add(view, graph.product(part))
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
        first, seen = not self._chunks, 0
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
        self._chunks = seen

    def _note(self, graph: Graph) -> None:
        """Loss and gradient come with the first pass for nothing."""
        self._loss = self._loss + graph.loss.double()
        _add(self.split(self._slope), graph.slope)

    def _keep(self, graph: Graph, number: int) -> None:
        if number == 1:
            self.graph_bytes = held_bytes(graph.roots(), self.leaves.values())
            if self._room is None:
                self._room = SHARE * self.subject.available_memory() / max(self.graph_bytes, 1)
        if self._room and number <= self._room and number == len(self._kept) + 1:
            self._kept.append(graph)

    def expected_bytes(self) -> tuple[int, int]:
        """What the kept graphs will hold, and what a product takes on top: 1.3 times a chunk's graph.

        Measured on a few examples and scaled; where not all chunks fit into memory, that of one chunk counts.
        """
        batch = next(iter(self.subject.batches(TRIED)))
        with precise(self.device):
            each = held_bytes(self._graph(batch).roots(), self.leaves.values()) / batch.size
        chunk = each * min(self.subject.plan.chunk or self.subject.examples, self.subject.examples)
        whole = each * self.subject.examples
        fits = self._room is None and whole <= SHARE * self.subject.available_memory()
        return int(whole if fits or self._room else chunk), int(1.3 * chunk)

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


def _add(views: Sequence[Tensor], shares: Sequence[Tensor] | None) -> None:
    if shares is not None:
        for view, share in zip(views, shares, strict=True):
            view.add_(share)


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    *,
    differentiable: bool = False,
    keep: bool = True,
) -> Sequence[Tensor] | None:
    """Vector-Jacobian product on a graph that stays (``keep``); what an output or input has no part in counts as zero.

    None when no output depends on anything: a loss linear in the parameters has a gradient without a graph.
    """
    alive = [i for i, o in enumerate(outputs) if o.requires_grad]
    if not alive:
        return None
    return torch.autograd.grad(
        [outputs[i] for i in alive],
        inputs,
        None if weights is None else [weights[i] for i in alive],
        retain_graph=keep,
        create_graph=differentiable,
        allow_unused=True,
        materialize_grads=True,
    )


class _GradientGraph:
    """The gradient of one chunk's loss with its graph: products are derivatives of it."""

    def __init__(self, loss: Tensor, leaves: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self.gradient = _grad([loss], leaves, None, differentiable=True) or _zeros(leaves)
        self.loss = loss.detach()
        self.slope: Sequence[Tensor] = [g.detach() for g in self.gradient]

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor] | None:
        return _grad(self.gradient, self.leaves, parts)

    def roots(self) -> Iterable[Tensor]:
        return self.gradient


class Hessian(Curvature):
    """H = ∇²L of a subject's loss, by reverse-over-reverse differentiation.

    Cost: one product is about 1.5 to 2.6 gradients on a kept graph (2 to 3.5 gradients' memory), 3 to 5 on a fresh
    one. A loss linear in the parameters gives zeros. Kinks (ReLU, max) carry curvature that differentiation does not
    see: the products are those of the smooth piece that the weights lie in. Source: Pearlmutter 1994.
    """

    words = "Hessian"

    def _graph(self, batch: Batch) -> Graph:
        return _GradientGraph(self.subject.batch_loss(self.leaves, batch), list(self.leaves.values()))

    def field(self, params: Mapping[str, Tensor]) -> Tensor:
        """The gradient, (size,)."""
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        with precise(self.device):
            for batch in self.subject.batches():
                loss = self.subject.batch_loss(leaves, batch)
                _add(self.split(total), _grad([loss], list(leaves.values()), None, keep=False))
        return total.div_(self.subject.total_weight)

    def field_derivative(self, direction: Tensor) -> Tensor:
        """H v, (size,)."""
        return self.matvec(direction)


class _OutputGraph:
    """One chunk's outputs z with the graphs of z and of w ↦ Jᵀw, which is linear: its derivative along v is Jv."""

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor], loss: Tensor, inner: Tensor) -> None:
        self.leaves, self.outputs, self.inner = leaves, outputs, inner
        self.weights = torch.zeros_like(outputs, requires_grad=True)
        self.pulled = _grad([outputs], leaves, [self.weights], differentiable=True) or _zeros(leaves)
        self.force = _grad([loss], [inner], None, differentiable=True) or _zeros([inner])
        self.loss = loss.detach()
        self.slope = _grad([outputs], leaves, [self.force[0].detach()]) or _zeros(leaves)

    def push(self, parts: Sequence[Tensor]) -> Tensor:
        """J v: how the outputs move along a direction of the parameters."""
        moved = _grad(self.pulled, [self.weights], parts)
        return moved[0] if moved else torch.zeros_like(self.inner)

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor] | None:
        bent = _grad(self.force, [self.inner], [self.push(parts)])
        return _grad([self.outputs], self.leaves, bent) if bent else None

    def roots(self) -> Iterable[Tensor]:
        return (*self.pulled, self.outputs, *self.force)


class GaussNewton(Curvature):
    """G = (1/W) Σ Jᵀ (∂²ℓ/∂z²) J, the generalised Gauss-Newton matrix, with J the Jacobian of the outputs z.

    Positive semi-definite when ℓ is convex in z (cross-entropy on logits, squared error). J v by differentiating Jᵀw
    along v (twice reverse, so it works wherever the Hessian does). Cost: 1.2 to 2.3 gradients a product on kept graphs.
    The split lies at what the model returns: return logits, not probabilities. Source: Schraudolph 2002; Martens 2020.

    Raises:
        TypeError: the subject was made with ``objective=``, which does not tell outputs from loss.
    """

    words = "Gauss-Newton matrix"
    rests_on = "outputs"

    def __init__(self, subject: Subject) -> None:
        if not subject.has_outputs:
            raise TypeError(
                "GaussNewton needs outputs and a loss of them; this subject was made with objective=, which gives only "
                'their composition. Make it with loss= (a name or f(outputs, targets)), or use operator="hessian".'
            )
        super().__init__(subject)

    def _graph(self, batch: Batch) -> Graph:
        outputs = self.subject.batch_outputs(self.leaves, batch)
        inner = outputs.detach().requires_grad_()
        return _OutputGraph(outputs, list(self.leaves.values()), self.subject.output_loss(inner, batch), inner)

    def field(self, params: Mapping[str, Tensor]) -> Tensor:
        """The outputs of all examples, flat."""
        with torch.no_grad(), precise(self.device):
            return torch.cat([self.subject.batch_outputs(params, b).reshape(-1) for b in self.subject.batches()])

    def field_derivative(self, direction: Tensor) -> Tensor:
        """J v of all examples, flat."""
        parts = self.split(direction)
        with precise(self.device):
            return torch.cat([cast("_OutputGraph", graph).push(parts).reshape(-1) for graph in self._graphs()])


def _zeros(like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) for t in like]


def held_bytes(roots: Iterable[Tensor], leaves: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct tensors that the graphs above ``roots`` keep alive, without those of ``leaves``.

    Walks the graph's nodes and looks at what each has saved; about 10 µs a node, nothing is computed.
    """
    sizes: dict[int, int] = {}
    stack: list[Any] = [r.grad_fn for r in roots if r.grad_fn is not None]
    known = set(stack)
    while stack:
        node = stack.pop()
        for saved in _saved(node):
            place = saved.untyped_storage().data_ptr()
            sizes[place] = max(sizes.get(place, 0), saved.numel() * saved.element_size())
        fresh = {parent for parent, _ in node.next_functions if parent is not None} - known
        known |= fresh
        stack.extend(fresh)
    for leaf in leaves:
        sizes.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def _saved(node: Any) -> Iterator[Tensor]:
    for name in _saved_names(type(node)):
        try:
            value = getattr(node, name)
        except RuntimeError:  # already freed
            continue
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, Tensor) and one.layout == torch.strided:
                yield one


@cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(n for n in dir(kind) if n.startswith("_saved_") or n == "saved_tensors")


OPERATORS: Mapping[str, type[Curvature]] = {"hessian": Hessian, "ggn": GaussNewton}
"""The operators that probes offer, by the value of their setting ``operator``."""
