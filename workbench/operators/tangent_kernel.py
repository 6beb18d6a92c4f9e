"""The empirical tangent kernel of a subject's outputs, exact and without the Jacobian; its products and a sketch."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor

from workbench.numerics.operator import Operator
from workbench.numerics.sampling import Draw
from workbench.operators.gauss_newton import GaussNewton, OutputGraph
from workbench.operators.graphs import add_parts, pull
from workbench.operators.tangent_layers import TILE_BYTES, KernelLayer, LayerSide, mirrored
from workbench.operators.tangent_layout import TRIED, Course, course
from workbench.operators.tangent_plan import Layers, layers, positions
from workbench.operators.tangent_rows import Jacobian
from workbench.operators.tangent_sketch import Sketch
from workbench.plan import fitting
from workbench.shell import precise
from workbench.subject import Subject
from workbench.words import memory

Form = Literal["full", "trace", "each"]
SHARE = 0.25
"""The share of free memory that what is kept of the layers may take, and no more than BUDGET bytes."""
BUDGET = 2**31
PASS = 8
"""What a pass takes, over what autograd keeps of a forward pass: inputs, their patches, one output's gradients."""
Steps = Generator[float, None, Tensor]


class TangentKernel(Operator):
    """Θ = J Jᵀ with J the Jacobian of a subject's outputs in its parameters: ``examples`` by ``outputs`` on each side.

    Entries are example-major: (i, c) stands at i C + c. ``full`` gives all C x C blocks (n, C, n, C), ``trace`` the
    class-trace kernel (1/C) Σ_c J_c J_cᵀ (n, n), ``each`` the kernels of the single outputs (C, n, n); all of them
    also between two sets of examples. As an operator it multiplies vectors of n C entries by J (Jᵀ v), without the
    kernel. Only the subject's chosen parameters count, in its precision, under its policy for BatchNorm.

    The kernel is summed layer by layer. One backward pass for each output gives the output gradients g of every call
    that uses a parameter, for all examples at once; with the call's inputs x a weight's part is Σ (x · x')(g · g'),
    whatever the weight's size. Where there are many positions (convolutions of large images), the weight's gradients
    are formed for a few channels at a time. Used again, shared or tied weights add up as more positions. Parameters
    in other calls (recurrent nets, parametrisations) take rows of the Jacobian, for blocks of examples.

    Cost: a forward pass and C backward passes without weight gradients for each sweep (layers that fit into ``budget``
    bytes together); then about (n C)² Σ_layers o multiplications in dense nets. Memory: the kernel, the budget, one
    chunk's graph and tiles of 32 MiB, all known before the run. Errors: rounding; 1e-10 and better in float64.
    Source: Jacot et al. 2018; Novak et al. 2022.

    Args:
        subject: with outputs, whose examples do not depend on each other.
        outputs: which of an example's outputs, by place in them laid out flat; None: all.
        structured: False takes rows of the Jacobian for all parameters.
        budget: bytes that may be kept of layers at once; None: a quarter of free memory, at most 2 GiB.

    Raises:
        TypeError: a subject made with ``objective=``.
        ValueError: examples are coupled by batch statistics, or outputs that do not exist.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        outputs: Sequence[int] | None = None,
        structured: bool = True,
        budget: int | None = None,
    ) -> None:
        self.subject, self.examples = subject, subject.examples
        self.dtype, self.device = subject.dtype, subject.device
        self.leaves = {name: p.detach().requires_grad_() for name, p in subject.params.items()}
        self.course: Course = course(subject, self.leaves, structured)
        self.chosen = _chosen(outputs, self.course.outputs)
        self.outputs = len(self.chosen)
        self.size = self.examples * self.outputs
        self.budget = int(min(BUDGET, SHARE * subject.available_memory())) if budget is None else budget
        self.products = 0
        self._curvature: GaussNewton | None = None
        self._plans: dict[tuple[bool, frozenset[str]], Layers] = {}
        self._index = torch.tensor(self.chosen, device=self.device)

    # --- the kernel itself ------------------------------------------------------------------------------------------

    def full(self, other: TangentKernel | None = None) -> Tensor:
        """All blocks, (n, C, m, C), with the examples of ``other`` (None: the same) on the right."""
        return at_once(self.steps("full", other))

    def trace(self, other: TangentKernel | None = None) -> Tensor:
        """(1/C) Σ_c J_c J_cᵀ, (n, m): the class-trace kernel. C times cheaper than the full one, and as exact."""
        return at_once(self.steps("trace", other))

    def each(self, other: TangentKernel | None = None) -> Tensor:
        """J_c J_cᵀ for every output, (C, n, m)."""
        return at_once(self.steps("each", other))

    def steps(self, form: Form = "full", other: TangentKernel | None = None) -> Steps:
        """The kernel as the generator's value; yields the share of work done, often enough to be stopped.

        Raises:
            MemoryError: it will not fit; the message says what to do.
            ValueError: another net or other outputs on the right.
        """
        right = self if other is None else other
        plan, done = self.layers(form, right.course.loose), 0.0
        self._check_alike(right, plan)
        self.check_memory(form, other)
        first, side = (self.outputs, 1) if form == "each" else (1, 1 if form == "trace" else self.outputs)
        shape = first, self.examples, side, right.examples, side
        kernel = torch.zeros(shape, dtype=self.dtype, device=self.device)
        share = 1 / (len(plan.sweeps) + bool(plan.loose))
        for sweep in plan.sweeps:
            for part in self._sweep(sweep, form, kernel, right):
                yield done + share * part
            done += share
        if plan.loose:
            for part in self._loose(plan.loose, form, kernel, right):
                yield done + share * part
        if right is self:
            for block in kernel:
                mirrored(block)
        if form == "full":
            return kernel[0]
        return kernel[0, :, 0, :, 0].div_(self.outputs) if form == "trace" else kernel[:, :, 0, :, 0]

    def layers(self, form: Form = "full", loose: frozenset[str] = frozenset()) -> Layers:
        """How the kernel is cut up; parameters that are ``loose`` elsewhere are so here too."""
        key = form == "trace", loose | self.course.loose
        if key not in self._plans:
            most, found = self.budget / (self.examples * self.dtype.itemsize), replace(self.course, loose=key[1])
            self._plans[key] = layers(found, self.leaves, self.outputs, key[0], most)
        return self._plans[key]

    def _check_alike(self, other: TangentKernel, plan: Layers) -> None:
        if other is self:
            return
        same = [u.key for u in self.course.uses] == [u.key for u in other.course.uses]
        same = same and positions(plan, self.course) == positions(plan, other.course)
        if (
            not same
            or list(self.leaves) != list(other.leaves)
            or self.chosen != other.chosen
            or self.dtype != other.dtype
        ):
            raise ValueError(
                "a kernel between two sets of examples wants the same net, parameters, outputs, precision and shapes "
                "of inputs on both sides; make both of one model."
            )

    # --- layers with a formula --------------------------------------------------------------------------------------

    def _sweep(
        self, sweep: Sequence[KernelLayer], form: Form, kernel: Tensor, right: TangentKernel
    ) -> Generator[float, None, None]:
        mine = yield from self._capture(sweep)
        theirs = mine if right is self else (yield from right._capture(sweep))
        for number, layer in enumerate(sweep):
            one, two = mine[number], theirs[number]
            for block, (a, b) in enumerate(_forms(one, two, form, self.outputs)):
                layer.contract(kernel[block], a, b)
            yield 0.5 + 0.5 * (number + 1) / len(sweep)

    def _capture(self, sweep: Sequence[KernelLayer]) -> Generator[float, None, list[LayerSide]]:
        """Inputs and output gradients of some layers, of all examples: one backward pass a chunk and output."""
        like = next(iter(self.leaves.values())).detach()
        held = [layer.open(self.examples, self.outputs, like) for layer in sweep]
        needed = sorted({number for layer in sweep for number in layer.uses})
        first = 0
        for batch in self.subject.batches(self._pass()[0]):
            at = slice(first, first + batch.size)
            z, uses = self.course.follow(self.subject, self.leaves, batch)
            for one in held:
                one.take(at, uses)
            edges = [uses[number].edge for number in needed]
            seed, slopes = torch.zeros_like(z), cast("list[Tensor | None]", [None] * len(uses))
            for output, place in enumerate(self.chosen):
                seed.zero_()[:, place] = 1.0
                with precise(self.device):
                    found: Any = torch.autograd.grad(z, edges, seed, retain_graph=True, allow_unused=True)
                for number, slope in zip(needed, found, strict=True):
                    slopes[number] = None if slope is None else slope.view(uses[number].shape)
                for one in held:
                    one.slope(at, output, uses, slopes)
            first = at.stop
            yield 0.5 * first / self.examples
        return held

    # --- parameters without one -------------------------------------------------------------------------------------

    def _loose(
        self, names: Sequence[str], form: Form, kernel: Tensor, right: TangentKernel
    ) -> Generator[float, None, None]:
        """Rows of the Jacobian of blocks of examples, all blocks against all."""
        one, two = (Jacobian(k.subject, k.subject.params, names, k._index) for k in (self, right))
        side = self._block(one.width)
        for first in range(0, self.examples, side):
            rows = _rows(one, first, min(first + side, self.examples), self._block(one.width, 4))
            stop = first + side if right is self else right.examples
            for other in range(0, min(stop, right.examples), side):
                same = right is self and other == first
                columns = rows if same else _rows(two, other, min(other + side, right.examples), side)
                here, there = slice(first, first + len(rows)), slice(other, other + len(columns))
                _add(kernel[:, here, :, there], rows, columns, form)
                if right is self and not same:
                    _add(kernel[:, there, :, here], columns, rows, form)
            yield min(1.0, (first + side) / self.examples)

    def _pass(self) -> tuple[int, int]:
        """Examples in one forward pass and backward passes, and the bytes that these take beside what is kept."""
        whole = min(self.subject.plan.chunk or self.examples, self.examples)
        each = PASS * self.subject.memory() / whole
        chunk = fitting(whole, each, self.budget)
        return chunk, int(chunk * each)

    def _block(self, width: int, parts: int = 2) -> int:
        """Examples whose rows of the Jacobian fit into a part of the budget."""
        each = self.outputs * width * self.dtype.itemsize
        return max(1, min(self.examples, self.budget // parts // max(each, 1)))

    # --- memory -----------------------------------------------------------------------------------------------------

    def expected_bytes(self, form: Form = "full", other: TangentKernel | None = None) -> int:
        """What a run takes: the kernel, what is kept of layers, tiles, and one chunk's graph."""
        right, itemsize = other or self, self.dtype.itemsize
        each = {"full": self.outputs**2, "trace": 1, "each": self.outputs}[form]
        kernel = self.examples * right.examples * each * itemsize
        plan = self.layers(form, right.course.loose)
        sides = sum(plan.bytes(k.examples, self.outputs, itemsize) for k in {self, right})
        width = sum(self.leaves[name].numel() for name in plan.loose)
        loose = 3 * self._block(width) * self.outputs * width * itemsize if width else 0
        tiles = min(4 * TILE_BYTES, 4 * max(sides, kernel))
        return int(kernel + max(sides, loose) + tiles + sum(k._pass()[1] for k in {self, right}))

    def check_memory(self, form: Form, other: TangentKernel | None = None) -> None:
        """Refuse what will not fit.

        Raises:
            MemoryError: with what is needed, what there is, and what to ask for.
        """
        needed, free = self.expected_bytes(form, other), self.subject.available_memory()
        if needed > free:
            raise MemoryError(
                f"the {form} tangent kernel of {self.examples} examples and {self.outputs} outputs would need "
                f"{memory(needed)}, but {memory(free)} are free; use fewer examples, fewer outputs (outputs=), "
                "the trace, a smaller budget=, or products with it (an operator, without forming it)."
            )

    # --- products ---------------------------------------------------------------------------------------------------

    def matvec(self, vector: Tensor) -> Tensor:
        """J (Jᵀ v): a vector-Jacobian product, then a Jacobian-vector product."""
        self.products += 1
        return self.forward(self.backward(vector))

    def backward(self, vector: Tensor) -> Tensor:
        """Jᵀ v, (P,), for v (n C)."""
        found = torch.zeros(self.subject.size, dtype=self.dtype, device=self.device)
        whole = vector.new_zeros(self.examples, self.course.outputs)
        whole[:, self._index] = vector.view(self.examples, self.outputs)
        at, curvature = 0, self._products
        views = curvature.split(found)
        with precise(self.device):
            for graph in curvature._graphs():
                assert isinstance(graph, OutputGraph)
                stop = at + len(graph.outputs)
                add_parts(views, pull([graph.outputs], graph.leaves, [whole[at:stop].view_as(graph.outputs)]))
                at = stop
        return found

    def forward(self, direction: Tensor) -> Tensor:
        """J u, (n C,), for u (P,)."""
        moved = self._products.field_derivative(direction).view(self.examples, -1)
        return moved[:, self._index].reshape(-1)

    @property
    def _products(self) -> GaussNewton:
        """The outputs' graphs, kept while they fit."""
        if self._curvature is None:
            self._curvature = GaussNewton(self.subject)
        return self._curvature

    def product_bytes(self) -> int:
        """What products take: kept graphs and one on top, known after a pass over a few examples."""
        return sum(self._products.expected_bytes())

    def check(self) -> float:
        """Compare the kernel of the first three examples with products, which know nothing of layers; the difference.

        Raises:
            ArithmeticError: they differ by more than √ε of their size.
        """
        few = self.subject.selected(range(min(TRIED, self.examples)))
        small = TangentKernel(few.with_plan(self.subject.plan), outputs=self.chosen, budget=self.budget)
        # Unequal weights, since those of a softmax's outputs cancel when they are equal.
        v = torch.linspace(1.0, 2.0, small.size, dtype=self.dtype, device=self.device)
        with small:
            found, wanted = small.full().view(small.size, -1) @ v, small.matvec(v)
        gap = float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(self.dtype).tiny))
        if gap > torch.finfo(self.dtype).eps ** 0.5:
            raise ArithmeticError(
                f"the kernel summed layer by layer differs by {gap:.1e} from products with J and its transpose: a "
                "layer of this net does something that its calls do not show, or its derivative is not repeatable. "
                "TangentKernel(subject, structured=False) differentiates each example by itself."
            )
        return gap

    def sketch(self, draw: Draw, width: int) -> Sketch:
        """J R/√k for ``width`` = k random normal directions R: k products, memory n C k."""
        rows = torch.empty(width, self.size, dtype=self.dtype, device=self.device)
        for i in range(width):
            torch.div(self.forward(draw(i, size=self.subject.size)), width**0.5, out=rows[i])
        return Sketch(rows.T)

    def close(self) -> None:
        """Free the kept graphs. Later products build them anew."""
        if self._curvature is not None:
            self._curvature.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _chosen(outputs: Sequence[int] | None, available: int) -> tuple[int, ...]:
    found = tuple(range(available)) if outputs is None else tuple(int(c) for c in outputs)
    if not found or len(set(found)) < len(found) or min(found) < 0 or max(found) >= available:
        raise ValueError(
            f"outputs must be different places from 0 to {available - 1} of an example's outputs; got {outputs!r:.80}."
        )
    return found


def at_once(steps: Steps) -> Tensor:
    """What a generator of steps returns, without a look on the way."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _forms(
    one: LayerSide, two: LayerSide, form: Form, outputs: int
) -> Generator[tuple[LayerSide, LayerSide], None, None]:
    """Both sides as they are multiplied: whole, with outputs folded, or one output after another."""
    if form == "full":
        yield one, two
    elif form == "trace":
        folded = one.folded()
        yield folded, folded if one is two else two.folded()
    else:
        for output in range(outputs):
            left = one.only(output)
            yield left, left if one is two else two.only(output)


def _rows(jacobian: Jacobian, first: int, last: int, chunk: int) -> Tensor:
    """Rows (examples, C, width) of a block of examples."""
    found: Tensor | None = None
    for at, rows in jacobian.rows(first, last, chunk):
        if found is None:
            found = rows.new_empty(last - first, *rows.shape[1:])
        found[at.start - first : at.stop - first] = rows
    assert found is not None
    return found


def _add(kernel: Tensor, rows: Tensor, columns: Tensor, form: Form) -> None:
    """Add J Jᵀ of two blocks of examples to their part (blocks, n, C, m, C) of the kernel, all of it."""
    if form == "full":
        kernel[0] += torch.einsum("icp,jdp->icjd", rows, columns)
    elif form == "trace":
        kernel[0, :, 0, :, 0] += rows.flatten(1) @ columns.flatten(1).T
    else:
        kernel[:, :, 0, :, 0] += torch.einsum("icp,jcp->cij", rows, columns)
