"""The loss at points of a plane, evaluated in one given way."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.data import Batch
from workbench.feed import KEPT_BYTES
from workbench.landscape.evaluation.affine import FirstLayers, first_layers, replaced
from workbench.landscape.evaluation.fast import FAST
from workbench.landscape.evaluation.folding import Folded, foldable
from workbench.landscape.evaluation.moving import Direction, Moving
from workbench.landscape.evaluation.way import Way
from workbench.shell import precise
from workbench.subject import Subject
from workbench.trees import leaves, tree_map

Point = tuple[float, float]
Parts = tuple[Tensor, ...]
"""Totals and weights of a batch's examples, and its wrong decisions and decisions where they are known."""


class Runner:
    """A subject's loss at θ + a·u + b·v, evaluated in one way; ``room`` bounds the bytes of kept products an example.

    Under ``norm="recompute"`` statistics depend on the point, so points go one at a time through
    :meth:`Subject.evaluate` whatever the way.
    """

    def __init__(
        self, subject: Subject, first: Direction, second: Direction | None, way: Way, room: float = math.inf
    ) -> None:
        self.subject, self.way = subject, way
        self.recomputes = bool(subject.norm == "recompute" and subject._shell.norms)
        self._alone = in_bfloat16(subject) if self.recomputes and way.preview else subject
        self.apart = True
        self._kept: list[Batch] | None = None
        self.layers: FirstLayers | None = None
        if way.affine and not self.recomputes:
            self.layers = first_layers(subject, first, second, self._total, room)
        self.folded: Folded | None = None
        if way.folded and not self.recomputes:
            self.folded = foldable(subject, self._total, frozenset(self.layers.layers if self.layers else ()))
        skipped = self.layers.names if self.layers else frozenset[str]()
        self.moving = Moving(subject.params, first, second, skipped, way.channels_last)

    def evaluate(self, points: Sequence[Point], metrics: Sequence[str], limit: int | None = None) -> Sequence[Any]:
        """Loss and error rate with their errors at each point, on the first ``limit`` examples."""
        if self.recomputes:
            return [self._alone.evaluate(self.moving.at(a, b), metrics) for a, b in points]
        return results(self.parts(points, "error_rate" in metrics, limit), self.apart, metrics)

    @torch.no_grad()
    def parts(self, points: Sequence[Point], decide: bool, limit: int | None = None) -> Parts:
        """Totals, weights, wrong decisions and decisions of each point's examples (points, examples), in float64."""
        with precise(self.subject.device), self._kernels():
            if self.way.together > 1:
                return self._together(points, decide, limit)
            rows = [self._one(point, decide, limit) for point in points]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _one(self, point: Point, decide: bool, limit: int | None) -> Parts:
        params = self.moving.at(*point)
        folded, found = self.folded.at(params) if self.folded else {}, list[Parts]()
        for place, batch in self._batches(limit):
            first = self.layers.at(place, *point) if self.layers else {}
            found.append(self._score(params, {**first, **folded}, batch, decide))
        return _joined(found)

    def _together(self, points: Sequence[Point], decide: bool, limit: int | None) -> Parts:
        """Several points at once, the weights of all of them in one batched tensor for each name."""
        a, b = torch.tensor(points, dtype=self.subject.dtype, device=self.subject.device).unbind(1)
        params, found = self.moving.stepped(a, b), list[Parts]()
        for place, batch in self._batches(limit):

            def one(params: Mapping[str, Tensor], given: Mapping[nn.Module, Tensor], batch: Batch = batch) -> Any:
                first: dict[nn.Module, Callable[..., Any]] = {m: _giving(t) for m, t in given.items()}
                return self._score(params, {**first, **(self.folded.at(params) if self.folded else {})}, batch, decide)

            found.append(torch.func.vmap(one)(params, self.layers.together(place, a, b) if self.layers else {}))
        return _joined(found)

    def _score(
        self, params: Mapping[str, Tensor], forwards: Mapping[nn.Module, Callable[..., Any]], batch: Batch, decide: bool
    ) -> Parts:
        """One batch at one point, with other forward functions for some layers; under vmap it stands for several."""
        criterion = self.subject._criterion
        with self._forwards(forwards):
            totals, weights, outputs = criterion.score(self.subject._shell, params, batch, {})
        self.apart &= totals.ndim == 1
        found = [totals.double().reshape(-1), _double(weights, totals)]
        if decide and criterion.loss is not None and outputs is not None:
            found += [counts.double() for counts in criterion.loss.wrong(outputs, batch.targets) or ()]
        return tuple(found)

    def _total(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """A batch's contribution at given weights, differentiable where gradients are on."""
        return self.subject._criterion.score(self.subject._shell, params, batch, {})[0]

    def _kernels(self) -> AbstractContextManager[None]:
        return self.subject._shell.handling(FAST) if self.way.fast else ExitStack()  # type: ignore[return-value]

    def _forwards(self, forwards: Mapping[nn.Module, Callable[..., Any]]) -> AbstractContextManager[None]:
        if self.way.preview:
            forwards = {self.subject.module: _in_bfloat16(self.subject), **forwards}
        return replaced(self.subject, forwards) if forwards else ExitStack()  # type: ignore[return-value]

    def _batches(self, limit: int | None) -> Iterator[tuple[int, Batch]]:
        """Batches with their numbers, laid out as the way says, up to ``limit`` examples."""
        seen = 0
        for place, batch in enumerate(self._laid_out(limit)):
            if limit is not None and seen >= limit:
                return
            seen += batch.size
            if self.layers:
                self.layers.ready(place, batch, self._total)
            yield place, batch

    def _laid_out(self, limit: int | None) -> Iterable[Batch]:
        """The batches, kept from point to point where they are small."""
        made = map(self._lay_out, self.subject.batches(self.way.chunk))
        if self._kept is None and limit is None and _nbytes(self.subject) <= KEPT_BYTES:
            self._kept = list(made)
        return made if self._kept is None else self._kept

    def _lay_out(self, batch: Batch) -> Batch:
        if not self.way.channels_last:
            return batch
        args, kwargs, raw = (tree_map(_channels_last, part) for part in (batch.args, batch.kwargs, batch.raw))
        return replace(batch, args=args, kwargs=kwargs, raw=raw)


def results(parts: Parts, apart: bool, metrics: Sequence[str]) -> list[dict[str, float]]:
    """Each point's loss and error rate with their standard errors, as :meth:`Subject.evaluate` gives them.

    Without ``apart`` totals are those of batches and not of examples, so that the loss's error is not known.
    """
    totals, weights, *counts = parts
    loss, loss_error = ratio(totals, weights)
    unknown = torch.full_like(loss, math.nan)
    columns = {"loss": loss, "loss_error": loss_error if apart else unknown}
    columns["error_rate"], columns["error_rate_error"] = ratio(counts[0], counts[1]) if counts else (unknown, unknown)
    wanted = {name: column for name, column in columns.items() if name.startswith(tuple(metrics))}
    return [dict(zip(wanted, row, strict=True)) for row in torch.stack(list(wanted.values()), 1).tolist()]


def ratio(t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Σ t / Σ w over the last dimension and its standard error as a ratio of means; nan where there are too few."""
    n, total = t.shape[-1], w.sum(-1)
    found = t.sum(-1) / total
    spread = ((t - found[..., None] * w) ** 2).sum(-1)
    return found, (n / (n - 1) * spread).sqrt() / total if n > 1 else torch.full_like(found, math.nan)


def _giving(tensor: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: tensor


def _joined(batches: list[Parts]) -> Parts:
    """The parts of all batches, one after another; decisions only where every batch has them or none."""
    columns = min(len(parts) for parts in batches)
    return tuple(torch.cat([parts[i] for parts in batches], -1) for i in range(columns))


def _double(weights: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(weights, dtype=torch.float64, device=like.device).reshape(-1)


def _nbytes(subject: Subject) -> int:
    return sum(t.nbytes for part in subject._feed.data.parts for t in leaves(part))


def _channels_last(tensor: Tensor) -> Tensor:
    laid_out = tensor.ndim == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if laid_out else tensor


def in_bfloat16(subject: Subject) -> Subject:
    """The same function, on copies of the weights, whose forward passes run in bfloat16 (autocast): a preview.

    Outputs are in the subject's precision again. Cost: a copy of the model.
    """
    rough = subject.at({})
    rough.module.__dict__["forward"] = _in_bfloat16(rough)
    rough._shell.remember()  # else it would be gone after the first batch
    return rough


def _in_bfloat16(subject: Subject) -> Callable[..., Any]:
    """The model's forward pass under autocast, its outputs in the subject's precision again."""
    plain = subject.module.forward

    def back(tensor: Tensor) -> Tensor:
        return tensor.to(subject.dtype) if tensor.is_floating_point() else tensor

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(subject.device.type, dtype=torch.bfloat16):
            return tree_map(back, plain(*args, **kwargs))

    return forward
