"""What a linear map can read from each layer of a network: probe accuracy by depth, never on what it was fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.activations import Layer, choose_layers
from workbench.features import predicted
from workbench.figure import Axis, Band, Figure, Line, Panel, Points, Rule
from workbench.numerics.ridge import Ridge, RidgeSums, Scores
from workbench.numerics.sampling import Draw
from workbench.pooling import POOLS, Pool, example_rows, widths
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

_OUTPUT = Layer("")
_NAMES = ("score", "score_error", "score_low", "score_high")


@dataclass(frozen=True)
class Probing(Probe[Subject]):
    """Linear probes: how well ridge regression on the features of each layer tells the class, or the value.

    What it measures, for features h (pooled to one row an example) and targets y (one-hot for classes): w, b minimise
    Σ (y - w·h - b)² + λ‖w‖², solved exactly. λ is the one of ``strengths`` values, 10^-6 to 10^3 times the mean
    eigenvalue of the features' products, with the least squared error when each training example is left out in turn,
    (y - ŷ)/(1 - leverage), exactly. ``score`` is the share of examples whose class has the largest prediction, or
    R² = 1 - Σ‖y - ŷ‖²/Σ‖y - ȳ‖² (ȳ of the training examples) for values: on held-out examples where the subject has
    them, else leaving each example out; never on examples that were fitted. ``control`` is the same after shuffling the
    labels, ``selectivity`` = score - control. ``network`` is the score of the network's own outputs on the examples
    that are tested, ``chance`` that of the most frequent class (0 for values).

    How to read it: the layer from which the score stays near the network's is where the work is done (what follows is
    the tunnel). A score far above the network's in the middle says that later layers throw information away.

    What it costs: two forward passes over the examples, all layers at once, and one over those held out; a
    decomposition of min(width, n) a layer. Memory: width · min(width, n) float64 numbers a layer, for all layers.

    When it misleads: linear probes see what is linear; a low score is no absence. Wide layers read more for their
    width alone: see the control. Averaging over places hides where things are. Without held-out examples ``network``
    and the features are those of training examples, which the network has seen: the probe is tested on left-out
    examples, the network is not; and λ was chosen by the same errors. Left-out shuffled labels score somewhat below
    chance, since leaving one out shifts the mean away from it.

    Errors: ``score_error`` is Wilson's half-width at one standard deviation, ``score_low`` to ``score_high`` his 95 %
    interval (to first order for R²), over the examples tested, for this training set. nan for features that are not
    finite. Source: Alain and Bengio 2017; Hewitt and Liang 2019 for selectivity; Masarczyk et al. 2023.
    """

    layers: Annotated[str, Doc("Names or globs of layers, with commas between; empty chooses them.")] = ""
    pool: Annotated[Pool, Choice(POOLS), Doc("How tokens and places become one row of features an example.")] = "mean"
    strengths: Annotated[int, Range(1, 50, step=1, soft=(5, 20)), Doc("Ridge strengths to choose from.")] = 10

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("score", ("layer",), "accuracy (R² for values) of the linear probe", error="score_error"),
        Variable("score_error", ("layer",), "its standard error over the tested examples"),
        Variable("score_low", ("layer",), "lower end of its 95 % interval"),
        Variable("score_high", ("layer",), "upper end of its 95 % interval"),
        Variable("control", ("layer",), "the same with shuffled labels", error="control_error"),
        Variable("control_error", ("layer",), "its standard error"),
        Variable("selectivity", ("layer",), "score less control", error="selectivity_error"),
        Variable("selectivity_error", ("layer",), "its standard error, of the two as if independent"),
        Variable("strength", ("layer",), "ridge strength λ that was chosen"),
        Variable("width", ("layer",), "features of the layer"),
        Variable("network", (), "score of the network's own outputs", error="network_error"),
        Variable("network_error", (), "its standard error"),
        Variable("chance", (), "score of the most frequent class (0 for values)"),
        Variable("examples", (), "examples fitted"),
        Variable("tested", (), "examples tested"),
        Variable("held_out", (), "whether those tested were held out", kind="bool"),
        Variable("classes", (), "whether the targets are classes", kind="bool"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Sums over the examples, then each left out, then the held-out ones."""
        run = _Run(self, subject, draw)
        yield from run.fit()
        yield from run.leave_out()
        if subject.held_out is not None:
            yield from run.hold_out(subject.held_out)
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The best layer and its score, the last layer's, the network's, and chance."""
        score = data.score.values
        kind = "accuracy" if bool(data.classes) else "R2"
        found: dict[str, Value] = {"score": kind, "tested": "held out" if bool(data.held_out) else "left out"}
        if np.isfinite(score).any():
            best = int(np.nanargmax(score))
            found |= {"best_layer": str(data["layer"].values[best]), "best": float(score[best])}
            found |= {"best_error": float(data.score_error[best]), "last": float(score[-1])}
            found["last_error"] = float(data.score_error[-1])
        return found | {"network": float(data.network), "chance": float(data.chance)}

    def figure(self, data: xr.Dataset) -> Figure:
        """The score by depth with its interval and the control; rules at the network's own score and at chance."""
        at = np.arange(1.0, data.sizes["layer"] + 1)
        rules = [Rule(float(data[n]), "y", n) for n in ("network", "chance") if np.isfinite(float(data[n]))]
        word = "accuracy" if bool(data.classes) else "R²"
        marks = (
            Band(at, data.score_low.values, data.score_high.values),
            Line(at, data.score.values),
            Points(at, data.score.values, None, "linear probe", "main"),
            Points(at, data.control.values, data.control_error.values, "shuffled labels", "second"),
            *rules,
        )
        tested = "held-out examples" if bool(data.held_out) else "each example left out"
        limits = (0.0, 1.02) if bool(data.classes) else None
        return Figure((Panel(marks, Axis("layer"), Axis(f"{word}, {tested}", limits=limits)),))

    def estimate(self, subject: Subject) -> Cost:
        """Sums and decompositions of all layers, and one chunk's activations."""
        sizes = widths(subject, choose_layers(subject, self.layers), self.pool)
        least = [min(d, subject.examples) for d in sizes]
        targets = 2 * (subject.classes or 1)
        kept = sum(8 * d * (3 * m + 2 * targets) for d, m in zip(sizes, least, strict=True))
        passes = 2 + (subject.held_out is not None)
        return Cost(kept + subject.memory(), passes, f"{passes} forward passes, and a decomposition for each layer")


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: Probing, subject: Subject, draw: Draw) -> None:
        self.probe, self.subject = probe, subject
        self.targets, self.are_classes = _targets(subject, None)
        self.order = torch.from_numpy(draw.generator(0).permutation(len(self.targets)))
        if len(self.targets) < 3:
            raise ValueError(f"a probe needs 3 examples or more to leave one out; got {len(self.targets)}.")
        self.layers = choose_layers(subject, probe.layers)
        sizes, n = widths(subject, self.layers, probe.pool), len(self.targets)
        self.sums = [RidgeSums(d, n) for d in sizes]
        self.ridges: list[Ridge | None] = []
        self.own = Scores.empty(1, subject.device)
        self.known = False
        self.parts = 2 if subject.held_out is None else 3
        self.values: dict[str, Any] = {"width": sizes, "examples": n, "classes": self.are_classes}

    def rows(
        self, subject: Subject, targets: Tensor, order: Tensor
    ) -> Iterator[tuple[float, Mapping[Layer, Tensor], Tensor]]:
        """(share done, features of all layers, targets beside shuffled ones) batch by batch."""
        both, seen = torch.cat([targets, targets[order]], 1), 0
        every = self.layers if _OUTPUT in self.layers else (*self.layers, _OUTPUT)
        for found in example_rows(subject, every, self.probe.pool):
            count = len(found[_OUTPUT])
            yield (seen + count) / subject.examples, found, both[seen : seen + count].to(subject.device)
            seen += count

    def fit(self) -> Iterator[Reading]:
        """The sums of all layers in one pass, and their regressions."""
        for share, found, targets in self.rows(self.subject, self.targets, self.order):
            for layer, sums in zip(self.layers, self.sums, strict=True):
                sums.add(found[layer], targets)
            yield self.report(share / self.parts)
        ratios = torch.logspace(-6, 3, self.probe.strengths, dtype=torch.float64)
        self.ridges = [sums.solve(ratios) for sums in self.sums]

    def leave_out(self) -> Iterator[Reading]:
        """Each example left out: all strengths, of which one is chosen for each layer, and one for its control."""
        self.left, self.own = self._empty(self.probe.strengths), Scores.empty(1, self.subject.device)
        for share, found, targets in self.rows(self.subject, self.targets, self.order):
            self._own(found[_OUTPUT], targets)
            for layer, ridge, scores in zip(self.layers, self.ridges, self.left, strict=True):
                if ridge is not None:
                    _left_out(ridge, ridge.coordinates(found[layer]), targets, scores)
            yield self.report((1 + share) / self.parts)
        self.chosen = [tuple(s.best() for s in pair) for pair in self.left]
        if self.subject.held_out is None:
            self._take(self.left, self.chosen, self.targets)

    def hold_out(self, subject: Subject) -> Iterator[Reading]:
        """The chosen regressions on the held-out examples."""
        targets, _ = _targets(subject, self.targets.shape[1] if self.are_classes else None)
        if targets.shape[1] != self.targets.shape[1]:
            raise ValueError(f"held-out targets have {targets.shape[1]} values, training ones {self.targets.shape[1]}.")
        order = torch.arange(len(targets)).roll(1) if len(targets) < 2 else _turned(len(targets))
        scores, self.own = self._empty(1), Scores.empty(1, subject.device)
        for share, found, wanted in self.rows(subject, targets, order):
            self._own(found[_OUTPUT], wanted)
            for layer, ridge, chosen, pair in zip(self.layers, self.ridges, self.chosen, scores, strict=True):
                if ridge is not None:
                    _tested(ridge, ridge.coordinates(found[layer]), wanted, chosen, pair)
            yield self.report((2 + share) / self.parts)
        self._take(scores, [(0, 0)] * len(scores), targets)

    def _empty(self, strengths: int) -> list[tuple[Scores, Scores]]:
        device = self.subject.device
        return [(Scores.empty(strengths, device), Scores.empty(strengths, device)) for _ in self.layers]

    def _own(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in the network's own outputs, where they are of the targets' kind."""
        width = self.targets.shape[1]
        if self.are_classes and outputs.shape[1] == 1 and width == 2:
            outputs = torch.nn.functional.one_hot(predicted(outputs), 2)
        if outputs.shape[1] == width:
            mean = self.targets.mean(0).to(targets)
            self.own.add(0, outputs.double(), targets[:, :width], mean)

    def _take(self, scores: list[tuple[Scores, Scores]], places: list[Any], targets: Tensor) -> None:
        """Scores of the chosen strengths, of the network, and of chance."""
        rows = [
            [*self._score(true, i, ridge), *self._score(false, j, ridge)[:2]]
            for (true, false), (i, j), ridge in zip(scores, places, self.ridges, strict=True)
        ]
        table = np.array(rows, dtype=float).reshape(-1, 6)
        self.values |= dict(zip((*_NAMES, "control", "control_error"), table.T, strict=True))
        self.values["selectivity"] = table[:, 0] - table[:, 4]
        self.values["selectivity_error"] = np.hypot(table[:, 1], table[:, 5])
        found = [
            np.nan if r is None else float(r.strengths[c[0]]) for r, c in zip(self.ridges, self.chosen, strict=True)
        ]
        often = int(self.targets.sum(0).argmax())
        network = self._score(self.own, 0, True) if self.own.count else (np.nan, np.nan)
        self.values |= {"strength": found, "network": network[0], "network_error": network[1], "tested": len(targets)}
        self.values["chance"] = float(targets[:, often].mean()) if self.are_classes else 0.0
        self.values["held_out"] = self.subject.held_out is not None
        self.known = bool(np.isfinite(table[:, 0]).all())

    def _score(self, scores: Scores, strength: int, known: object) -> tuple[float, ...]:
        if known is None:
            return (np.nan,) * 4
        return scores.accuracy(strength) if self.are_classes else scores.determination(strength)

    def report(self, done: float) -> Reading:
        """The reading of now."""
        dead = [layer.name for layer, ridge in zip(self.layers, self.ridges, strict=False) if ridge is None]
        held = self.subject.held_out
        words = "each example left out in turn" if held is None else f"{held.examples} held-out examples"
        said = (f"fitted on {len(self.targets)} examples, tested on {words}",)
        return self.probe.reading(
            1.0 if done >= 1 and self.known else min(done, 1.0 if "score" in self.values else 0.999),
            self.values,
            coords={"layer": np.array([layer.name or "model" for layer in self.layers])},
            converged=done >= 1 and self.known,
            notes=(*self.subject.notes, *said, *((f"features not finite: {', '.join(dead)}",) if dead else ())),
        )


def _left_out(ridge: Ridge, z: Tensor, targets: Tensor, scores: tuple[Scores, Scores]) -> None:
    half = targets.shape[1] // 2
    for i in range(len(ridge.strengths)):
        found = ridge.left_out(z, targets, i)
        scores[0].add(i, found[:, :half], targets[:, :half], ridge.target_mean[:half])
        scores[1].add(i, found[:, half:], targets[:, half:], ridge.target_mean[half:])


def _tested(ridge: Ridge, z: Tensor, targets: Tensor, chosen: Any, scores: tuple[Scores, Scores]) -> None:
    half = targets.shape[1] // 2
    true, false = (ridge.predicted(z, i) for i in chosen)
    scores[0].add(0, true[:, :half], targets[:, :half], ridge.target_mean[:half])
    scores[1].add(0, false[:, half:], targets[:, half:], ridge.target_mean[half:])


def _turned(count: int) -> Tensor:
    """A fixed shuffling of the held-out labels."""
    return torch.from_numpy(np.random.default_rng(count).permutation(count))


def _targets(subject: Subject, classes: int | None) -> tuple[Tensor, bool]:
    """(one row of targets an example in float64 on the host, whether they are classes, as one-hot rows).

    Raises:
        ValueError: there is not one class or one row of values for each example.
    """
    parts = [batch.targets for batch in subject.batches()]
    if not all(isinstance(p, Tensor) and p.ndim in (1, 2) for p in parts):
        raise _unreadable("they are no tensors with one row an example")
    found = torch.cat([p.detach().cpu() for p in parts])
    if len(found) != subject.examples:
        raise _unreadable(f"there are {len(found)} for {subject.examples} examples")
    labels = _labels(found, subject.classes)
    if labels is None:
        return found.double().reshape(len(found), -1), False
    count = classes or max(subject.classes or 2, int(labels.max()) + 1)
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise _unreadable(f"class numbers run from {int(labels.min())} to {int(labels.max())}, of {count} classes")
    return torch.nn.functional.one_hot(labels, count).double(), True


def _labels(found: Tensor, classes: int | None) -> Tensor | None:
    """Class numbers (n,) where the targets are classes; None for values."""
    if not found.is_floating_point():
        if found.ndim > 1 and found.shape[1] != 1:
            raise _unreadable(f"of shape {tuple(found.shape)} they are several classes an example")
        return found.reshape(-1).long()
    binary = bool(((found == 0) | (found == 1)).all())
    if found.ndim == 1 or found.shape[1] == 1:
        return found.reshape(-1).long() if binary else None
    one_hot = binary and bool((found.sum(1) == 1).all())
    return found.argmax(1) if one_hot or classes is not None else None


def _unreadable(why: str) -> ValueError:
    return ValueError(
        f"linear probes need one class or one row of values for each example as targets; {why}. Give such targets, or "
        "leave the examples without one out."
    )
