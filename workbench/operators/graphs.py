"""Vector-Jacobian products on graphs that stay, and how many bytes such graphs hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def add_parts(views: Sequence[Tensor], shares: Sequence[Tensor] | None) -> None:
    """Add the shares to the views in place, tensor by tensor; None adds nothing."""
    if shares is not None:
        for view, share in zip(views, shares, strict=True):
            view.add_(share)


def pull(
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


def zeros_like(like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of the same shapes."""
    return [torch.zeros_like(t) for t in like]


def nodes(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Each node of the graphs above ``roots`` once."""
    stack: list[Any] = [r.grad_fn for r in roots if r.grad_fn is not None]
    known = set(stack)
    while stack:
        node = stack.pop()
        yield node
        fresh = {parent for parent, _ in node.next_functions if parent is not None} - known
        known |= fresh
        stack.extend(fresh)


def held_bytes(roots: Iterable[Tensor], leaves: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct tensors that the graphs above ``roots`` keep alive, without those of ``leaves``."""
    return sum(held(roots, leaves))


def held(roots: Iterable[Tensor], leaves: Iterable[Tensor] = ()) -> list[int]:
    """Bytes of each of those tensors, in no order.

    Walks the graph's nodes and looks at what each has saved; about 10 µs a node, nothing is computed. A root without
    a graph counts itself.
    """
    sizes: dict[int, int] = {}
    roots = list(roots)
    plain = [r for r in roots if r.grad_fn is None]
    for saved in chain(plain, *(_saved(node) for node in nodes(roots))):
        place = saved.untyped_storage().data_ptr()
        sizes[place] = max(sizes.get(place, 0), saved.numel() * saved.element_size())
    for leaf in leaves:
        sizes.pop(leaf.untyped_storage().data_ptr(), None)
    return list(sizes.values())


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
