"""Rows of the Jacobian example by example, for parameters in calls without a formula: recurrent nets, say."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.shell import precise
from workbench.subject import Subject
from workbench.trees import leaves, take, tree_map


class Jacobian:
    """J of some parameters: rows (examples, C, width) for ranges of examples, in blocks of bounded memory.

    By vectorised vector-Jacobian products over examples where the model allows, else by one backward pass for each
    example and output; which of the two is settled on the first examples and said by ``way``.
    """

    def __init__(self, subject: Subject, params: Mapping[str, Tensor], names: Sequence[str], outputs: Tensor) -> None:
        self.subject, self.outputs = subject, outputs
        self.params = {name: params[name] for name in names}
        self.width = sum(p.numel() for p in self.params.values())
        self.way = "vectorised"

    def rows(self, first: int, last: int, chunk: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the examples ``first`` up to ``last``, at most ``chunk`` at a time, with their places."""
        at = first
        here = self.subject if last - first == self.subject.examples else self.subject.selected(range(first, last))
        for batch in here.batches(chunk):
            with precise(self.subject.device):
                yield slice(at, at + batch.size), self._of(batch)
            at += batch.size

    def _of(self, batch: Batch) -> Tensor:
        if self.way == "vectorised":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # a missing rule falls back to a slow loop, and only warns
                    return self._vectorised(batch)
            except (RuntimeError, NotImplementedError, TypeError, ValueError, UserWarning, AssertionError) as problem:
                if isinstance(problem, torch.OutOfMemoryError):
                    raise
                self.way = "one by one"
        return torch.cat([self._singly(batch, i) for i in range(batch.size)])

    def _vectorised(self, batch: Batch) -> Tensor:
        tree = batch.args, dict(batch.kwargs)
        given = list(leaves(tree))
        along = [0 if t.ndim and len(t) == batch.size else None for t in given]

        def outputs(params: dict[str, Tensor], *one: Tensor) -> Tensor:
            found = iter([t if d is None else t.unsqueeze(0) for t, d in zip(one, along, strict=True)])
            return self.subject.batch_outputs(params, _of_one(batch, tree_map(lambda _: next(found), tree))).reshape(-1)

        def rows(*one: Tensor) -> Any:
            vjp: Any = torch.func.vjp(lambda params: outputs(params, *one), self.params)
            z, pull = vjp
            seeds = torch.zeros(len(self.outputs), len(z), dtype=z.dtype, device=z.device)
            return torch.func.vmap(pull)(seeds.scatter(1, self.outputs[:, None], 1.0))[0]

        found = torch.func.vmap(rows, in_dims=tuple(along))(*given)
        return torch.cat([found[name].detach().reshape(batch.size, len(self.outputs), -1) for name in self.params], 2)

    def _singly(self, batch: Batch, place: int) -> Tensor:
        one = _of_one(batch, take((batch.args, dict(batch.kwargs)), slice(place, place + 1), batch.size))
        point = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        with torch.enable_grad():
            z = self.subject.batch_outputs(point, one).reshape(-1)
        seed, rows = torch.zeros_like(z), list[Tensor]()
        for output in self.outputs.unbind():
            at = seed.index_fill(0, output.reshape(1), 1.0)
            slopes = torch.autograd.grad(
                z, list(point.values()), at, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([s.reshape(-1) for s in slopes]))
        return torch.stack(rows).unsqueeze(0)


def _of_one(batch: Batch, tree: Any) -> Batch:
    """One example as a batch, by its positional and keyword inputs."""
    return dataclasses.replace(batch, args=tree[0], kwargs=tree[1], size=1)
