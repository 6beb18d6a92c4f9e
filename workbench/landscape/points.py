"""The loss at many points of a line or plane through a model: fast, and the same numbers as one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from workbench.landscape.evaluation.choice import Trial, key_of, proof, remembered
from workbench.landscape.evaluation.moving import Direction
from workbench.landscape.evaluation.runner import Point, Runner
from workbench.landscape.evaluation.way import Way
from workbench.subject import Subject

METRICS = ("loss", "error_rate")
EVALUATED = ("loss", "loss_error", "error_rate", "error_rate_error")
"""What an evaluation gives at a point: the metrics with their standard errors."""
PRODUCTS = 2**28
"""Bytes that the first layers' products may take at most."""
GRAPHS = 8
"""The products may take so many times what autograd would keep of one chunk."""
MANY = 25
"""The first layers' products are made where at least so many points will use them."""


class PlanePoints:
    """L at θ + a·u + b·v for many (a, b): :meth:`Subject.evaluate` at each, to rounding, in the fastest way found.

    What may differ from one point after another: ``chunk`` examples at once, channels last in memory, BatchNorm in eval
    mode folded into the layer before it, kernels that are not differentiated (dense layers by oneDNN, fused attention,
    log softmax over few classes side by side), first layers replaced by A + a·B + b·C (their outputs are affine in the
    coordinates), several points at once by ``torch.func.vmap``. Weights are written into buffers; nothing of the model
    is. The way is found on the first evaluation, by timing a few real points within 8 % of the expected time and 4 s
    (of the process, on a CPU), and every way but the plain one is compared with the plain one first (float64: 1e-11 of
    the largest example's loss, else 1e-5). Where a forward pass is short, one way that saves calls is tried, no more.

    The choice is kept in memory by model, shapes, precision, device, threads and plan, so evaluations of one process
    are equal bit for bit. Between processes the choice can differ, and with it the last digits.

    Args:
        subject: the function. Under ``norm="recompute"`` points go one by one.
        first: u, by parameter name.
        second: v; None for a line, whose points have b = 0.
        expected: how many points will be evaluated here: few are not worth a trial, nor products.
        series: how many with all other lines and planes of the same kind, which share the choice.
        preview: forward passes in bfloat16: wrong by some 1e-3 of the loss; ``how`` says so. Not for float64.
        singly: points will be asked for one by one, so none are evaluated together.

    Memory: a copy of the weights, a forward pass, and the products (three times the first layers' outputs for all
    examples), at most the smaller of 256 MiB and eight times :meth:`Subject.memory`. See :func:`expected_bytes`.
    """

    def __init__(
        self,
        subject: Subject,
        first: Direction,
        second: Direction | None = None,
        expected: int = 1,
        series: int | None = None,
        preview: bool = False,
        singly: bool = False,
    ) -> None:
        self.subject, self.first, self.second = subject, first, second
        self.expected, self.series = expected, max(series or 0, expected)
        self.base, self.singly = Way(preview=preview), singly
        self._runner: Runner | None = None

    @property
    def how(self) -> str:
        """One sentence for a reading's notes: in which way points are evaluated."""
        way = self._runner.way if self._runner else self.base
        said = f"points are evaluated {way.words(self.subject.plan.chunk or self.subject.examples)}"
        return f"{said}, in bfloat16" if way.preview else said

    @property
    def together(self) -> int:
        """How many points are evaluated at once; 1 before the first evaluation."""
        return self._runner.way.together if self._runner else 1

    def evaluate(self, coordinates: Any, metrics: Sequence[str] = METRICS) -> list[dict[str, float]]:
        """``{"loss", "loss_error", "error_rate", "error_rate_error"}`` at each row (a, b) of ``coordinates`` (k, 2).

        On a line, (k,) will do. Not finite values are kept as they are. Memory does not depend on k.

        Raises:
            ValueError: coordinates of another shape, or an unknown metric.
        """
        return [found for group in self.in_turn(coordinates, metrics) for found in group]

    def in_turn(self, coordinates: Any, metrics: Sequence[str] = METRICS) -> Iterator[list[dict[str, float]]]:
        """The same in the order of ``coordinates``, as many at a time as are evaluated together."""
        if unknown := set(metrics) - set(METRICS):
            raise ValueError(f"there is no metric {sorted(unknown)[0]!r}; there are 'loss' and 'error_rate'.")
        points = _points(coordinates, self.second is not None)
        if points and self._runner is None:
            self._runner = self._choose(points)
        for start in range(0, len(points), self.together):
            assert self._runner is not None
            yield list(self._runner.evaluate(points[start : start + self.together], metrics))

    def _choose(self, points: list[Point]) -> Runner:
        """The runner of the way that is remembered or found; the plain one where it is not the same here."""
        plain, point = self._make(self.base), self._tried(points)
        if plain.recomputes or self.series < 2:
            return plain
        trial = Trial(self.subject, self._make, point, self.base, self.series, 1 if self.singly else self.series)
        way = remembered((*key_of(self.subject, self.series, self.base), self.singly), trial.best)
        if way == self.base:
            return plain
        if trial.winner is not None and trial.winner.way == way:
            return trial.winner
        found = self._make(way)
        if found.layers is None and found.folded is None:  # the rest was compared when it was chosen
            return found
        limit = min(self.subject.examples, self.subject.plan.chunk or self.subject.examples)
        return found if proof(found, self._make(Way()), point, limit) else self._make(_as_built(way))

    def _make(self, way: Way) -> Runner:
        if way.affine and self.expected < MANY:
            way = replace(way, affine=False)
        room = _product_bytes(self.subject) / self.subject.examples
        return Runner(self.subject, self.first, self.second, way, room)

    @staticmethod
    def _tried(points: list[Point]) -> Point:
        """The nearest given point that is away from the model on both axes, else on one."""
        away = [p for p in points if p[0] and p[1]] or [p for p in points if p[0] or p[1]] or [(1e-2, 1e-2)]
        return min(away, key=lambda p: abs(p[0]) + abs(p[1]))


def _as_built(way: Way) -> Way:
    """The way without what is read off the model's structure."""
    return replace(way, affine=False, folded=False)


def expected_bytes(subject: Subject) -> int:
    """Bytes that :class:`PlanePoints` may take beside the directions: moved weights, a forward pass, products."""
    return subject.size * subject.dtype.itemsize + subject.memory() + _product_bytes(subject)


def _product_bytes(subject: Subject) -> int:
    return min(PRODUCTS, GRAPHS * subject.memory())


def _points(coordinates: Any, plane: bool) -> list[Point]:
    """Rows as pairs of numbers; a line's coordinates get a zero beside them."""
    import numpy as np

    given = np.asarray(coordinates, dtype=np.float64)
    if given.ndim == 1 and not plane:
        given = np.stack([given, np.zeros_like(given)], 1)
    if given.ndim != 2 or given.shape[1] != 2:
        wanted = "(k, 2)" if plane else "(k,) or (k, 2)"
        raise ValueError(f"coordinates have shape {np.shape(coordinates)}; give one (a, b) a row: shape {wanted}.")
    return [(float(a), float(b)) for a, b in given]
