"""Which way of evaluating points is fastest here: timed on real points, verified, remembered as long as we run."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.landscape.evaluation.folding import NORMS
from workbench.landscape.evaluation.runner import Parts, Point, Runner
from workbench.landscape.evaluation.way import Way
from workbench.subject import SHARE, Subject
from workbench.trees import leaves

QUICK = 0.03
"""Where all points together take fewer seconds than this, nothing is tried."""
EFFORT = 0.08
"""The share of the expected time of all points that trying other ways may take."""
PATIENCE = 4.0
"""Seconds that trying other ways may take at most; the process's own on a CPU, where others may be in the way."""
BETTER = 0.97
"""A way replaces another where it takes at most this share of its time."""
SLOW = 0.1
"""A run of so many seconds is timed once."""
CALL = 2e-3
"""On a CPU, where one forward pass takes fewer seconds, calls cost more than what they compute: points go together."""
CACHED = 2**23
"""Bytes that the activations of points evaluated together should take on a CPU: what caches hold."""
REMEMBERED = 256
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5}
"""How far from the plain way a verified one may be, relative to the largest loss of an example."""
PREVIEW = 0.1
"""The same for bfloat16, which must only be roughly right."""

Make = Callable[[Way], Runner]
_chosen: OrderedDict[Hashable, Way] = OrderedDict()
_lock = threading.Lock()


def remembered(key: Hashable, find: Callable[[], Way]) -> Way:
    """The way chosen before under ``key`` in this process; else ``find()``, from then on. At most 256 are kept."""
    with _lock:
        if key in _chosen:
            _chosen.move_to_end(key)
            return _chosen[key]
    found = find()  # outside the lock: a thread that is timed should not stop the others
    with _lock:
        _chosen.setdefault(key, found)
        while len(_chosen) > REMEMBERED:
            _chosen.popitem(last=False)
        return _chosen.get(key, found)


def key_of(subject: Subject, expected: int, base: Way) -> tuple[Hashable, ...]:
    """What the fastest way depends on: model, shapes, precision, device, threads, plan, and how many points come."""
    examples = next(iter(subject._feed.data.parts))
    return (
        repr(subject.module),
        tuple((name, tuple(p.shape)) for name, p in subject.params.items()),
        tuple((tuple(t.shape), str(t.dtype)) for t in leaves(examples)),
        (subject.describe()["loss"], subject.examples, subject.norm, subject.dtype, subject.device),
        (subject.plan.chunk, torch.get_num_threads(), expected.bit_length(), base),
    )


def agree(ours: Parts, plain: Parts, tolerance: float) -> bool:
    """Whether totals are those of the plain way, to ``tolerance`` of the largest of them."""
    scale = plain[0].abs().max()
    return bool((ours[0] - plain[0]).abs().max() <= tolerance * scale) and ours[0].shape == plain[0].shape


def tolerance_of(subject: Subject, way: Way) -> float:
    """How far from the plain way this one may be."""
    return PREVIEW if way.preview else ROUNDING.get(subject.dtype, 1e-5)


@dataclass(eq=False)
class Trial:
    """Ways raced against each other on the first chunk of examples at one point.

    The stages are: other kernels, BatchNorm folded, chunk and memory format, the affine first layer, and on a GPU
    several points at once, each on top of the best so far. Where a pass is so short that calls cost more than what
    they compute, all that saves calls is tried at once, so that small jobs do not wait for a race. A way that raises,
    or whose losses are not those of the plain way, has lost.
    """

    subject: Subject
    make: Make
    point: Point
    base: Way
    expected: int
    most: int
    seconds: dict[Way, float] = field(default_factory=dict[Way, float])
    winner: Runner | None = None
    """The runner of the best way, compared with the plain one."""
    last: Runner | None = None
    """The runner that was timed last."""

    def __post_init__(self) -> None:
        self.limit = min(self.subject.examples, self.subject.plan.chunk or self.subject.examples)
        self.budget = math.inf
        # On a CPU the process's own seconds count: other programs that run would decide otherwise.
        self.clock = time.perf_counter if self.subject.device.type == "cuda" else time.process_time

    def best(self) -> Way:
        """The fastest way found within the time there is; the same numbers whichever it is, to rounding."""
        began, base = self.clock(), self.base
        self.plain = self._plain()
        if self.plain is None:
            return base
        whole = self._time(base) * self.subject.examples / max(self.limit, 1) * self.expected
        if not whole > QUICK:
            return base
        self.budget, best = min(EFFORT * whole, PATIENCE), base
        for stage in (self._calls,) if self._small(base) else self._stages():
            start = best
            for way in stage(start):
                if self.clock() - began > self.budget and way.affine == best.affine:
                    break
                if self._time(way) < BETTER * self.seconds[best]:
                    best, self.winner = way, self.last
        return best

    def _stages(self) -> tuple[Callable[[Way], Iterator[Way]], ...]:
        return self._kernels, self._folds, self._layouts, self._affine, self._several

    def _calls(self, start: Way) -> Iterator[Way]:
        """Several points at once, as many as caches hold, on top of all else; then less of it."""
        held = 2 ** (min(max(CACHED // max(self.subject.memory(), 1), 8), 256, self.most).bit_length() - 1)
        if held > 1 and self._together(held):
            yield from self._affine(replace(start, fast=True, together=held))
        if not self.winner or self._pass(start) > CALL / 4:
            yield from self._affine(replace(start, fast=True))
        yield from self._folds(self.winner.way if self.winner else start)

    def _kernels(self, start: Way) -> Iterator[Way]:
        yield replace(start, fast=True)

    def _folds(self, start: Way) -> Iterator[Way]:
        if any(type(m) in NORMS for m in self.subject.module.modules()):
            yield replace(start, folded=True)

    def _layouts(self, start: Way) -> Iterator[Way]:
        """Chunks and memory formats, the most promising first."""
        planned = self.subject.plan.chunk or self.limit
        fixed = self.subject.norm == "batch" or self.subject._criterion.coupled
        cut = not (fixed or self.subject.device.type == "cuda")
        chunks = [c for c in (64, 128, 32, 256) if c < planned] if cut else []
        images = any(isinstance(m, nn.Conv2d) for m in self.subject.module.modules())
        for last in (True, False) if images else (False,):
            for chunk in (*chunks, None):
                if last or chunk:
                    yield replace(start, chunk=chunk, channels_last=last)

    def _affine(self, start: Way) -> Iterator[Way]:
        """With the first layers' products; in a stage that has no winner yet, without them too."""
        yield replace(start, affine=True)
        if start not in self.seconds and (self.winner is None or self.winner.way.together != start.together):
            yield start

    def _several(self, start: Way) -> Iterator[Way]:
        if self.subject.device.type == "cuda":
            yield from (replace(start, together=k) for k in (16, 64, 256) if self._together(k))

    def _together(self, points: int) -> bool:
        return points <= self.most and points <= most_together(self.subject)

    def _small(self, way: Way) -> bool:
        """Whether a forward pass of the way is so short that calls cost more than what they compute."""
        return self.subject.device.type != "cuda" and self._pass(way) < CALL

    def _pass(self, way: Way) -> float:
        """Seconds that a forward pass of the way takes."""
        return self.seconds[way] / math.ceil(self.limit / (way.chunk or self.limit))

    def _time(self, way: Way) -> float:
        """Seconds a point on the first chunk of examples; infinite for a way that is no good."""
        self.seconds[way] = math.inf
        try:
            self.last = runner = self.make(way)
            idle = (way.affine and runner.layers is None) or (way.folded and runner.folded is None)
            if not idle:
                self.seconds[way] = self._measured(runner)
        except Exception:  # whatever a way cannot do, the plain one can
            if way == self.base:
                raise
        return self.seconds[way]

    def _measured(self, runner: Runner) -> float:
        """The best of up to three runs, fewer where they are slow or dear; infinite for other losses."""
        way, times = runner.way, list[float]()
        points = [self.point] * way.together
        for _ in range(3):
            start = self.clock()
            parts = runner.parts(points, True, self.limit)
            total = float(parts[0].sum())  # waits for the device
            times.append((self.clock() - start) / way.together)
            if not times[1:] and not (math.isfinite(total) and self._agrees(parts, way)):
                return math.inf
            spent = sum(times) * way.together
            if spent > self.budget / 8 or (spent > SLOW and (times[1:] or not way.affine)):
                break  # long enough to be measured well; an affine runner's first run makes its products
        return min(times)

    def _agrees(self, parts: Parts, way: Way) -> bool:
        assert self.plain is not None
        return agree(tuple(p[:1] for p in parts), self.plain, tolerance_of(self.subject, way))

    def _plain(self) -> Parts | None:
        """The plain way's losses at the point; None where they are not finite, so that nothing can be compared."""
        found = self.make(Way()).parts([self.point], True, self.limit)
        return found if bool(found[0].isfinite().all()) else None


def most_together(subject: Subject) -> int:
    """How many points a quarter of the free memory holds: weights and activations of a chunk for each."""
    each = subject.size * subject.dtype.itemsize + subject.memory()
    return int(SHARE * subject.available_memory() // max(each, 1))


def proof(runner: Runner, plain: Runner, point: Point, limit: int) -> bool:
    """Whether a runner gives the plain way's losses at a point, to rounding."""
    found: list[Any] = [r.parts([point], False, limit) for r in (runner, plain)]
    finite: Tensor = found[1][0].isfinite().all()
    return bool(finite) and agree(found[0], found[1], tolerance_of(runner.subject, runner.way))
