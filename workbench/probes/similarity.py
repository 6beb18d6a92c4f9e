"""How alike the features of two models are, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.activations import Layer, choose_layers
from workbench.figure import Axis, Bars, Figure, Heat, Panel
from workbench.numerics.canonical import Reduced, compare
from workbench.numerics.sampling import Draw
from workbench.numerics.similarity import TILE_BYTES, Estimate, Kernel, MinibatchCKA, cka
from workbench.pooling import POOLS, Kept, Pool, Ranges, common_order, example_rows, in_blocks, widths
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.several import Pair
from workbench.subject import Subject
from workbench.words import memory

Floats = NDArray[np.float64]

KEPT_BYTES = 2**31
"""Features of all layers of both models together are kept while they take no more."""
GRAM_EXAMPLES = 16384
"""Examples up to which whole Gram matrices are gone through: their cost grows with the square."""
GLANCE = 256
"""Examples of a first look, before all of them are used."""
PER_DIRECTION = 10
"""Examples for each direction that canonical correlations need to mean anything."""
FORWARD = 0.3
"""Share of the progress that the forward passes take."""


@dataclass(frozen=True)
class Similarity(Probe[Pair]):
    """Similarity of features: every layer of one model with every layer of another, on the same examples.

    What it measures, for features X (n, p) and Y (n, q) of n examples, centred, with Gram matrices K and L:
    ``cka`` = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)), with K = XXᵀ (linear) or exp(-‖x_i - x_j‖²/(2σ²)) (rbf, σ² the
    median squared distance times ``bandwidth``²); debiased by HSIC_1 = [tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1/((n-1)(n-2)) -
    2/(n-2) 1ᵀK̃L̃1]/(n(n-3)), K̃ without its diagonal; biased by tr(KHLH); or with HSIC_1 averaged over mini-batches
    before the ratio. ``svcca``: mean canonical correlation of the leading directions that carry ``variance`` of Σσ²;
    ``pwcca``: weighted by Σ_j |⟨h_i, x_j⟩|, not symmetric. ``procrustes``: ‖XᵀY‖_* for unit Frobenius norms.
    ``similarity`` is 1 for a layer with itself; ``distance`` = 1 - similarity, and for procrustes the squared distance
    2 - 2 ‖XᵀY‖_* in [0, 2] after the best rotation. wb.Pair(subject, subject) compares the layers of one model.

    How to read it: debiased CKA is 0 for unrelated features and 1 for equal ones up to rotation and scale; canonical
    correlations forgive any invertible linear map, Procrustes only rotations and scale. Blocks off the diagonal are
    layers that do alike. Two trainings of one architecture are the yardstick: a layer should resemble its namesake
    most (``matched``).

    What it costs: one forward pass of each model. Features stay in memory, n d numbers a layer in the models'
    precision, up to 2 GiB; CKA then goes through Gram matrices tile by tile (n² (Σd + layers²) multiplications in
    float64). Beyond 2 GiB or 16384 examples debiased CKA goes over to mini-batches, keeps nothing, and says so; the
    other measures refuse. Canonical correlations and Procrustes: 11 decompositions for each pair of layers.

    When it misleads: the biased estimate of unrelated features is near p/(p + n): high for wide layers. Canonical
    correlations need 10 examples for each direction; with fewer examples than features all are 1. A few examples of
    large norm, or one dominant direction, can carry CKA alone. Averaging tokens or places first is another question
    than comparing them one by one. Mini-batches are taken in stored order, with a Gaussian as wide as the first asks:
    sorted data make them unlike the whole. CKA can be high where behaviour differs, and low after changes that keep it
    (Davari et al. 2023).

    Errors: standard errors over examples, by the jackknife: each example (or mini-batch) left out for CKA, each tenth
    of the examples for the others, which says up to a third too much where correlations are near 0. nan for layers
    with constant features, and for a single mini-batch or fewer than 20 examples.

    Source: Kornblith et al. 2019; Nguyen et al. 2021; Song 2012; Raghu et al. 2017; Morcos et al. 2018; Ding 2021.
    """

    measure: Annotated[
        Literal["cka", "svcca", "pwcca", "procrustes"],
        Choice(
            {
                "cka": "centred kernel alignment: up to rotation and scale",
                "svcca": "mean canonical correlation: up to invertible linear maps",
                "pwcca": "canonical correlations weighted by what the first model uses",
                "procrustes": "after the best rotation, of features of unit norm",
            }
        ),
        Doc("Which similarity."),
    ] = "cka"
    estimator: Annotated[
        Literal["debiased", "biased", "minibatch"],
        Choice(
            {
                "debiased": "HSIC_1: 0 for unrelated features, may be slightly negative",
                "biased": "as first published; high for wide layers and few examples",
                "minibatch": "HSIC_1 averaged over mini-batches: any number of examples",
            }
        ),
        Doc("Which estimate of CKA."),
    ] = "debiased"
    kernel: Annotated[
        Literal["linear", "rbf"],
        Choice({"linear": "inner products", "rbf": "Gaussian, its width from the median distance"}),
        Doc("CKA's kernel."),
    ] = "linear"
    bandwidth: Annotated[
        float, Range(0.01, 100.0, log=True, soft=(0.1, 10)), Doc("Width of the Gaussian over the median distance.")
    ] = 0.5
    variance: Annotated[
        float, Range(0.5, 1.0, soft=(0.9, 1.0)), Doc("Share of Σσ² that the directions for svcca and pwcca carry.")
    ] = 0.99
    layers: Annotated[str, Doc("Names or globs of layers, with commas between; empty chooses them.")] = ""
    other_layers: Annotated[str | None, Doc("The same for the second model; nothing: as for the first.")] = None
    pool: Annotated[Pool, Choice(POOLS), Doc("How tokens and places become one row of features an example.")] = "mean"
    minibatch: Annotated[
        int, Range(8, 4096, step=1, soft=(64, 1024)), Doc("Examples in a mini-batch, where those are used.")
    ] = 256

    looks_at: ClassVar[Look] = "pair"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("similarity", ("layer", "other"), "similarity of layers", error="similarity_error"),
        Variable("similarity_error", ("layer", "other"), "its standard error over examples"),
        Variable("distance", ("layer", "other"), "1 - similarity (procrustes: twice that)", error="distance_error"),
        Variable("distance_error", ("layer", "other"), "its standard error over examples"),
        Variable("mean", (), "mean similarity over all pairs of layers", error="mean_error"),
        Variable("mean_error", (), "its standard error over examples"),
        Variable("diagonal_mean", (), "mean similarity of layers of one name", error="diagonal_mean_error"),
        Variable("diagonal_mean_error", (), "its standard error over examples"),
        Variable("width", ("layer",), "features of the layer"),
        Variable("other_width", ("other",), "features of the second model's layer"),
        Variable("examples", (), "examples compared"),
        Variable("at_once", (), "examples in one Gram matrix or decomposition"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """Features of both models, then their similarity: of the first examples, then of all."""
        run = _Run(self, subject)
        yield from run.minibatches() if run.by_minibatch else run.whole()
        yield run.report(last=True)

    @property
    def gaussian(self) -> float | None:
        """The bandwidth of a Gaussian kernel; None: linear."""
        return self.bandwidth if self.kernel == "rbf" else None

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """What was measured, the means over namesakes and over all pairs, and how many layers find their namesake."""
        found: dict[str, Value] = {"measure": self.words(float(data.at_once) < float(data.examples))}
        for name in ("diagonal_mean", "mean"):
            found |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        return found | {"matched": _matched(data)}

    def words(self, in_parts: bool = False) -> str:
        """The measure in words."""
        if self.measure != "cka":
            return {"svcca": "SVCCA", "pwcca": "PWCCA", "procrustes": "Procrustes"}[self.measure]
        estimator = "minibatch" if in_parts else self.estimator
        return f"{estimator} {'RBF' if self.kernel == 'rbf' else 'linear'} CKA"

    def figure(self, data: xr.Dataset) -> Figure:
        """All layers against all, and each layer with its namesake."""
        values, words = data.similarity.values, self.words(float(data.at_once) < float(data.examples))
        places = [np.arange(1, n + 1) for n in values.shape]
        diverging = bool((values < -0.05).any())
        limits = (-1.0, 1.0) if diverging else (0.0, 1.0)
        cells = Panel(
            (Heat(places[1], places[0], values, diverging=diverging),),
            Axis("layer of the second"),
            Axis("layer of the first"),
            Axis(words, limits=limits),
            square=True,
        )
        rows = _namesakes(data)
        value, error = (_along(data[name].values, rows) for name in ("similarity", "similarity_error"))
        names = tuple(f"{i} {name}" for i, name in zip(places[0], data["layer"].values, strict=True))
        bars = Panel((Bars(places[0], value, error, names=names),), Axis(""), Axis(words), title="same layer")
        return Figure((cells, bars))

    def estimate(self, subject: Pair) -> Cost:
        """Features kept, tiles, what is left out for errors, and one chunk's activations; two small passes tell."""
        layers = self.chosen(subject)
        sizes = [widths(s, chosen, self.pool) for s, chosen in zip(_sides(subject), layers, strict=True)]
        forward = max(s.memory() for s in _sides(subject))
        if self.in_minibatches(subject, sizes):
            kept = 3 * 8 * self.minibatch * (sum(map(sum, sizes)) + self.minibatch * sum(map(len, sizes)))
        else:
            n, pairs = subject.first.examples, math.prod(map(len, sizes))
            factor = 1 if self.measure == "cka" else 5
            kept = factor * _bytes(subject, sizes) + 3 * TILE_BYTES + 24 * n * pairs + 24 * n * max(map(max, sizes))
        return Cost(kept + forward, 2, "one forward pass of each model, and comparing all pairs of layers")

    def chosen(self, pair: Pair) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        """The layers of both models."""
        other = self.layers if self.other_layers is None else self.other_layers
        return choose_layers(pair.first, self.layers), choose_layers(pair.second, other)

    def in_minibatches(self, pair: Pair, sizes: list[list[int]]) -> bool:
        """Whether mini-batches are asked for, or all that fits.

        Raises:
            ValueError: a measure that needs all features together, where they do not fit.
        """
        needed, n, is_cka = _bytes(pair, sizes), pair.first.examples, self.measure == "cka"
        if is_cka and self.estimator == "minibatch":
            return True
        fits = needed <= KEPT_BYTES and (n <= GRAM_EXAMPLES or not is_cka)
        if fits or (is_cka and self.estimator == "debiased"):
            return not fits
        raise ValueError(
            f"{self.words()} needs all features at once: {n} examples with {memory(needed)} are more than "
            f"{GRAM_EXAMPLES} or {memory(KEPT_BYTES)}. Take fewer examples (max_examples) or layers, or measure='cka' "
            "with estimator='minibatch'."
        )


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: Similarity
    pair: Pair
    done: float = 1e-6
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: list[str] = field(default_factory=list[str])
    constant: list[list[bool]] = field(default_factory=list[list[bool]])
    directions: int = 0

    def __post_init__(self) -> None:
        self.order = common_order(self.pair)
        self.layers = self.probe.chosen(self.pair)
        sides = zip(_sides(self.pair), self.layers, strict=True)
        self.sizes = [widths(subject, chosen, self.probe.pool) for subject, chosen in sides]
        self.by_minibatch = self.probe.in_minibatches(self.pair, self.sizes)
        self.n = self.pair.first.examples
        self.values |= {"width": self.sizes[0], "other_width": self.sizes[1], "examples": self.n}
        self.values["at_once"] = min(self.probe.minibatch, self.n) if self.by_minibatch else self.n
        self.shared = [
            (i, self.layers[1].index(layer)) for i, layer in enumerate(self.layers[0]) if layer in self.layers[1]
        ]
        self.say_how()

    def say_how(self) -> None:
        """What a reader must know of the way that was taken."""
        pair, probe = self.pair, self.probe
        self.notes += [*pair.notes, f"on {self.n} of {pair.first.available or 'unknown'} examples"]
        if self.by_minibatch and probe.estimator != "minibatch":
            self.notes.append(
                f"{self.n} examples, {memory(_bytes(pair, self.sizes))} of features, are too many to compare at once: "
                f"HSIC_1 is averaged over mini-batches of {probe.minibatch}"
            )
        if self.order is not None:
            self.notes.append("the second subject's examples were put into the first's order")
        if not self.shared:
            self.notes.append("the models share no layer name: there is no diagonal")

    # --- all examples at once ---------------------------------------------------------------------------------------

    def whole(self) -> Iterator[Reading]:
        """Features of both, then a look at a few examples, then all."""
        kept = [Kept.empty(s, c, d) for s, c, d in zip(_sides(self.pair), self.layers, self.sizes, strict=True)]
        for side, (subject, layers) in enumerate(zip(_sides(self.pair), self.layers, strict=True)):
            for part in example_rows(subject, layers, self.probe.pool):
                kept[side].add(part)
                self.done = FORWARD * (side + kept[side].seen / self.n) / 2
                yield self.report()
        self.constant = [k.constant for k in kept]
        sides = [kept[0].rows, [r.to(self.pair.first.device) for r in kept[1].ordered(self.order)]]
        del kept
        if self.n > 2 * GLANCE:
            for _, found in self.compared([[rows[:GLANCE] for rows in side] for side in sides]):
                self.take(found)
            yield self.report()
        for share, found in self.compared(sides):
            self.take(found)
            self.done = min(FORWARD + (1 - FORWARD) * share, 0.999)
            yield self.report()

    def compared(self, sides: list[list[Tensor]]) -> Iterator[tuple[float, Estimate | None]]:
        """The chosen similarity of these features: the share done, and what is known."""
        if self.probe.measure == "cka":
            one, two = ([Kernel.of(rows, self.probe.gaussian) for rows in side] for side in sides)
            yield from cka(one, two, debiased=self.probe.estimator == "debiased")
            return
        variance = 1.0 if self.probe.measure == "procrustes" else self.probe.variance
        found: list[list[Reduced]] = [[], []]
        for side in range(2):
            for rows in sides[side]:
                found[side].append(Reduced.of(rows, variance))
                yield 0.1 * (side + len(found[side]) / len(sides[side])), None
        self.directions = max(layer.rows.shape[1] for side in found for layer in side)
        for share, known in compare(found[0], found[1], self.probe.measure):
            yield 0.2 + 0.8 * share, known

    # --- mini-batches -----------------------------------------------------------------------------------------------

    def minibatches(self) -> Iterator[Reading]:
        """Both models together, one mini-batch after the other; nothing is kept.

        Raises:
            ValueError: the subjects hold the same examples in different orders.
        """
        if self.order is not None:
            raise ValueError(
                "mini-batches need both subjects' examples in one order, and they are in two: make both subjects from "
                "the same data in one order, or take fewer examples and estimator='debiased'."
            )
        sums, size = MinibatchCKA(self.probe.gaussian), self.probe.minibatch
        ranges, seen = [Ranges(), Ranges()], 0
        streams = [
            in_blocks(example_rows(subject, layers, self.probe.pool), size)
            for subject, layers in zip(_sides(self.pair), self.layers, strict=True)
        ]
        for parts in zip(*streams, strict=True):
            rows = [[part[layer] for layer in layers] for part, layers in zip(parts, self.layers, strict=True)]
            sums.add(rows[0], rows[1])
            for known, new in zip(ranges, rows, strict=True):
                known.add(new)
            self.constant = [r.constant for r in ranges]
            seen += len(rows[0][0])
            self.done = min(seen / self.n, 0.999)
            self.take(sums.estimate() if sums.batches else None)
            yield self.report()

    # --- what is known ----------------------------------------------------------------------------------------------

    def take(self, found: Estimate | None) -> None:
        """Values and errors, of pairs and of means over them."""
        if found is None:
            return
        factor = 2.0 if self.probe.measure == "procrustes" else 1.0
        self.values |= {
            "similarity": found.value,
            "similarity_error": found.error,
            "distance": factor * (1 - found.value),
            "distance_error": factor * found.error,
        }
        every = list(np.ndindex(*found.value.shape))
        for name, pairs in (("mean", every), ("diagonal_mean", self.shared)):
            self.values[name], self.values[f"{name}_error"] = found.mean(pairs)

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        names = [[layer.name or "model" for layer in side] for side in self.layers]
        return self.probe.reading(
            1.0 if last else self.done,
            self.values,
            coords={"layer": np.array(names[0]), "other": np.array(names[1])},
            converged=last and not self.few and self.known,
            notes=(*self.notes, *self.remarks(names)),
        )

    @property
    def few(self) -> bool:
        """Whether canonical correlations are high by chance."""
        return self.probe.measure in ("svcca", "pwcca") and self.n < PER_DIRECTION * self.directions

    @property
    def known(self) -> bool:
        """Whether every pair of layers that are not constant has an error."""
        error, live = self.values.get("similarity_error"), [~np.array(c) for c in self.constant]
        return error is not None and bool(np.isfinite(error[np.ix_(*live)]).all())

    def remarks(self, names: list[list[str]]) -> Iterator[str]:
        """What turned out on the way."""
        for which, side, flags in zip(("first", "second"), names, self.constant, strict=False):
            dead = [name for name, flag in zip(side, flags, strict=True) if flag]
            if dead:
                yield f"constant features in the {which}: {', '.join(dead)}"
        if self.few:
            yield (
                f"{self.n} examples for up to {self.directions} directions: canonical correlations are high by chance "
                f"below {PER_DIRECTION} examples a direction"
            )


def _sides(pair: Pair) -> tuple[Subject, Subject]:
    return pair.first, pair.second


def _bytes(pair: Pair, sizes: list[list[int]]) -> int:
    sides = zip(_sides(pair), sizes, strict=True)
    return sum(subject.examples * sum(size) * subject.dtype.itemsize for subject, size in sides)


def _namesakes(data: xr.Dataset) -> list[int | None]:
    """The place of each of the first's layers among the second's."""
    others = list(data["other"].values)
    return [others.index(name) if name in others else None for name in data["layer"].values]


def _along(values: Floats, places: list[int | None]) -> Floats:
    return np.array([np.nan if j is None else values[i, j] for i, j in enumerate(places)])


def _matched(data: xr.Dataset) -> str:
    values, places = data.similarity.values, _namesakes(data)
    asked = [i for i, j in enumerate(places) if j is not None and np.isfinite(values[i, j])]
    right = sum(values[i, places[i]] >= np.nanmax(values[i]) - 1e-9 for i in asked)
    return f"{right} of {len(asked)} layers"
