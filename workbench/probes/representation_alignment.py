"""How far the kernels of hidden features turned between two moments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.activations import Layer, choose_layers
from workbench.figure import Axis, Figure, Panel, Points
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean, jackknife_error
from workbench.pooling import POOLS, Kept, Pool, common_order, example_rows, widths
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.several import Pair
from workbench.subject import Subject

TILE = 512
"""Rows of a kernel that are held at once."""
_KINDS = ("alignment", "centred_alignment", "sign_agreement")


@dataclass(frozen=True)
class RepresentationAlignment(Probe[Pair]):
    """Alignment of feature kernels, layer by layer: of a network with its own beginning, or of two networks.

    What it measures, for features h (n, d) of one layer on the same n examples in both and K = h hᵀ: ``alignment`` =
    ⟨K, K_0⟩ / (‖K‖ ‖K_0‖), ``centred_alignment`` the same of H K H with H = I - 11ᵀ/n (biased linear CKA), and
    ``sign_agreement`` = the share of (example, unit) pairs in which h has the same sign. ``baseline`` and the like:
    the same between the first subject and networks whose weights are its own, shuffled within each tensor
    (``shuffles`` of them): what networks without any relation show.

    How to read it: 1 for features that are equal up to rotation and scale: the layer is lazy. What lies well above the
    baseline speaks of features that were kept, what lies at it of features that are new.

    What it costs: one forward pass of each model and one of each shuffled one; features in memory, n d numbers a layer;
    kernels tile by tile, n² (d + d_0) multiplications in float64.

    When it misleads: positive features share a large mean, so that uncentred alignments of unrelated networks are high;
    that is what the baseline and the centred one are for. Biased CKA of unrelated features is p/(p + n) for wide
    layers. Shuffling keeps each tensor's values and not its structure: of a trained network it is no initialisation.
    Sign agreement means something only where units correspond (one network at two moments) and have two signs.

    Errors: standard errors over examples, by the jackknife (each left out); of the baseline, over shuffles.

    Source: Liu et al. 2023 (arXiv 2310.08513); Kornblith, Norouzi, Lee and Hinton 2019.
    """

    layers: Annotated[str, Doc("Names or globs of layers, with commas between; empty chooses them.")] = ""
    pool: Annotated[Pool, Choice(POOLS), Doc("How tokens and places become one row of features an example.")] = "mean"
    shuffles: Annotated[
        int, Range(0, 50, step=1, soft=(0, 10)), Doc("Networks with shuffled weights, for the baseline.")
    ] = 3

    looks_at: ClassVar[Look] = "pair"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("alignment", ("layer",), "cosine of the two kernels", error="alignment_error"),
        Variable("alignment_error", ("layer",), "its standard error over examples"),
        Variable("centred_alignment", ("layer",), "cosine of the centred kernels", error="centred_alignment_error"),
        Variable("centred_alignment_error", ("layer",), "its standard error over examples"),
        Variable("sign_agreement", ("layer",), "share of equal signs", error="sign_agreement_error"),
        Variable("sign_agreement_error", ("layer",), "its standard error over examples"),
        Variable("baseline", ("layer",), "alignment with shuffled networks", error="baseline_error"),
        Variable("baseline_error", ("layer",), "its standard error over shuffles"),
        Variable("centred_baseline", ("layer",), "centred alignment with those", error="centred_baseline_error"),
        Variable("centred_baseline_error", ("layer",), "its standard error over shuffles"),
        Variable("width", ("layer",), "features of the layer"),
        Variable("examples", (), "examples used"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """Features of both, layer by layer; then the shuffled networks."""
        subject.check_parameters()
        run = _Run(self, subject)
        yield from run.both()
        for number in range(self.shuffles):
            yield run.shuffled(draw, number)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The last layer's alignments with their baselines, and the layer that changed the most."""
        found: dict[str, Value] = {}
        for name in ("alignment", "baseline", "centred_alignment", "centred_baseline"):
            values, errors = data[name].values, data[f"{name}_error"].values
            if np.isfinite(values[-1]) or name == "alignment":
                found |= {name: float(values[-1]), f"{name}_error": float(errors[-1])}
        centred = data.centred_alignment.values
        if np.isfinite(centred).any():
            found["most_changed"] = str(data["layer"].values[int(np.nanargmin(centred))])
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Alignment by layer, with and without centring, each with its baseline."""
        return Figure(tuple(_panel(data, *names) for names in _PANELS))

    def estimate(self, subject: Pair) -> Cost:
        """Features of both models, a tile of both kernels, and one shuffled copy."""
        layers = self.chosen(subject)
        sizes = widths(subject.first, layers, self.pool)
        item, n = subject.dtype.itemsize, subject.first.examples
        kept = 2 * n * sum(sizes) * item + 24 * n * max(sizes) + 4 * 8 * min(TILE, n) * n
        return Cost(kept + subject.first.memory() + 2 * subject.size * item, 2 + self.shuffles, "forward passes")

    def chosen(self, pair: Pair) -> tuple[Layer, ...]:
        """The layers that are compared."""
        return choose_layers(pair.first, self.layers)


_PANELS = (
    ("alignment", "baseline", "⟨K, K₀⟩ / (‖K‖ ‖K₀‖)"),
    ("centred_alignment", "centred_baseline", "the same, centred"),
)


def _panel(data: xr.Dataset, name: str, baseline: str, words: str) -> Panel:
    places = np.arange(1, data.sizes["layer"] + 1)
    seen, chance = (
        (data[name].values, data[f"{name}_error"].values),
        (data[baseline].values, data[f"{baseline}_error"].values),
    )
    marks = (
        Points(places, seen[0], error=seen[1], label="the two"),
        Points(places, chance[0], error=chance[1], label="shuffled", role="reference"),
    )
    return Panel(marks, Axis("layer"), Axis(words, limits=(-0.05, 1.05)))


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: RepresentationAlignment, pair: Pair) -> None:
        self.probe, self.pair, self.layers = probe, pair, probe.chosen(pair)
        self.order = common_order(pair)
        self.sizes, self.n = widths(pair.first, self.layers, probe.pool), pair.first.examples
        count = len(self.layers)
        self.values: dict[str, Any] = {v.name: np.full(count, np.nan) for v in probe.variables if v.dims}
        self.values |= {"width": np.array(self.sizes, dtype=float), "examples": self.n}
        self.baselines: list[NDArray[np.float64]] = []
        self.first: list[Tensor] = []
        self.steps = count + 2 + probe.shuffles
        self.notes = (*pair.notes, f"on {self.n} of {pair.first.available or 'unknown'} examples")

    def features(self, subject: Subject) -> Kept:
        """All layers' features of one model."""
        kept = Kept.empty(subject, self.layers, self.sizes)
        for part in example_rows(subject, self.layers, self.probe.pool):
            kept.add(part)
        return kept

    def both(self) -> Iterator[Reading]:
        """The two subjects."""
        self.first = self.features(self.pair.first).rows
        yield self.report(1)
        second = [r.to(self.pair.first.device) for r in self.features(self.pair.second).ordered(self.order)]
        for i, (one, two) in enumerate(zip(self.first, second, strict=True)):
            for name, (value, error) in zip(_KINDS, (*_aligned(one, two), _signs(one, two)), strict=True):
                self.values[name][i], self.values[f"{name}_error"][i] = value, error
            yield self.report(3 + i)

    def shuffled(self, draw: Draw, number: int) -> Reading:
        """One network with the first's weights in another order."""
        other = self.pair.first.at(
            {
                name: _shuffle(t, draw.generator(number, place))
                for place, (name, t) in enumerate(self.pair.first.params.items())
            }
        )
        rows = self.features(other).rows
        found = [[value for value, _ in _aligned(one, two)] for one, two in zip(self.first, rows, strict=True)]
        self.baselines.append(np.array(found).T)
        every = np.array(self.baselines)
        for name, values in zip(("baseline", "centred_baseline"), np.moveaxis(every, 1, 0), strict=True):
            self.values[name], self.values[f"{name}_error"] = values.mean(0), error_of_mean(values)
        return self.report(3 + len(self.layers) + number)

    def report(self, step: int) -> Reading:
        """The reading of now; ``step`` of all steps are done."""
        done = min(step / self.steps, 1.0)
        known = bool(np.isfinite(self.values["alignment"]).all())
        coords = {"layer": np.array([layer.name or "output" for layer in self.layers])}
        return self.probe.reading(done, self.values, coords=coords, converged=done >= 1 and known, notes=self.notes)


def _shuffle(tensor: Tensor, generator: np.random.Generator) -> Tensor:
    order = torch.from_numpy(generator.permutation(tensor.numel()))
    return tensor.detach().reshape(-1)[order.to(tensor.device)].view(tensor.shape)


def _aligned(one: Tensor, two: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """(value, standard error) of the alignment, plain and centred."""
    rows = [r.double() for r in (one, two)]
    return _cosine(*rows), _cosine(*(r - r.mean(0) for r in rows))


def _cosine(one: Tensor, two: Tensor) -> tuple[float, float]:
    """⟨K, L⟩/(‖K‖‖L‖) of Gram matrices, and its error with each example's row and column left out.

    Centred features are not centred anew where an example is missing: that is of the order 1/n of the error.
    """
    n, sums = len(one), []
    for at in (slice(i, i + TILE) for i in range(0, n, TILE)):
        k, h = one[at] @ one.T, two[at] @ two.T
        sums.append(torch.stack([(k * h).sum(1), (k * k).sum(1), (h * h).sum(1)]))
    rows = torch.cat(sums, 1)
    a, b = one.square().sum(1), two.square().sum(1)
    whole = rows.sum(1)
    less = whole[:, None] - 2 * rows + torch.stack([a * b, a * a, b * b])
    value, every = (_ratio(s).cpu().numpy() for s in (whole, less))
    return float(value), float(jackknife_error(every))


def _ratio(sums: Tensor) -> Tensor:
    scale = (sums[1].clamp_min(0) * sums[2].clamp_min(0)).sqrt()
    return torch.where(scale > 0, sums[0] / scale, torch.nan)


def _signs(one: Tensor, two: Tensor) -> tuple[float, float]:
    """Share of equal signs, with its standard error over examples; nan where features are not known."""
    same = torch.where((one + two).isnan(), torch.nan, (one.sign() == two.sign()).double()).mean(1)
    return float(same.mean()), float(same.std() / math.sqrt(len(same))) if len(same) > 1 else math.nan
