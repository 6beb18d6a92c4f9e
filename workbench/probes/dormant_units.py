"""Units that stopped taking part: dead, dormant, rarely active and saturated ones by layer, and how many are active."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules import activation as torchs

from workbench.activations import Caught, Layer, choose_layers, module_named, stream
from workbench.figure import ROLES, AnyMark, Axis, Bars, Figure, Line, Panel, Points, Rule, fitting
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import jackknife_error
from workbench.pace import Pace
from workbench.pooling import channels_first, pooled
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

Floats = NDArray[np.float64]

FRACTIONS = {
    "dormant_fraction": "share of units whose score is at most tau",
    "dead_fraction": "share of units that are 0 on every example",
    "rarely_active_fraction": "share of units that differ from 0 on less than `rarely` of the examples",
    "saturated_fraction": "share of units at an end of their range on more than `mostly` of the examples",
    "active_fraction": "mean over units of the share of examples on which they are positive",
    "ever_active_fraction": "share of units that are positive on some example",
}
"""What is said of a layer, and of all layers by units."""
_WORDS = re.compile(r"relu|gelu|silu|swish|mish|tanh|sigmoid|softplus|softsign|elu", re.IGNORECASE)
_NO_UNITS = (torchs.MultiheadAttention, torchs.Softmax, torchs.Softmax2d, torchs.LogSoftmax, torchs.Softmin)
_KINDS = 4  # sums of a unit: its size, and how often it is positive, not zero, saturated


def hidden_layers(subject: Subject, wanted: str = "") -> tuple[Layer, ...]:
    """Places after each hidden non-linearity: by names and globs as in ``choose_layers``, else the activation modules.

    These are PyTorch's activations and modules without parts whose class is named after one; the network's own output
    is none of them. A network that calls its activations as functions has none: then all layers that ``choose_layers``
    chooses, without the output. Cost: two forward passes of a few examples.

    Raises:
        ValueError: a name that fits nothing, or a network without hidden layers.
    """
    if wanted.strip() not in ("", "auto"):
        return choose_layers(subject, wanted)
    every = dict(subject.module.named_modules())
    ran = choose_layers(subject, "*") if len(every) > 1 else ()
    found = _before_output(subject, tuple(layer for layer in ran if is_activation(every[layer.name])))
    found = found or _before_output(subject, choose_layers(subject, "auto") if ran else ())
    if not found:
        raise ValueError("the network has no hidden layers, so it has no hidden units; name a layer: layers='...'.")
    return found


def is_activation(module: nn.Module) -> bool:
    """Whether a module is a non-linearity applied unit by unit, as far as its class tells."""
    if isinstance(module, _NO_UNITS) or any(module.children()):
        return False
    return type(module).__module__ == torchs.__name__ or bool(_WORDS.search(type(module).__name__))


def _before_output(subject: Subject, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Those whose features are not what the network puts out."""
    if not layers:
        return ()
    few = subject.selected(range(min(8, subject.examples)))
    caught = next(stream(few, layers))
    end = caught.outputs.reshape(-1)
    return tuple(layer for layer in layers if not torch.equal(caught.features[layer].reshape(-1), end))


@dataclass(frozen=True)
class DormantUnits(Probe[Subject]):
    """Hidden units that do not take part, by layer: dormant, dead, rarely active, saturated; and how many are active.

    What it measures, from the values h_i(x) of each unit behind a hidden non-linearity: the score
    s_i = E|h_i| / mean_k E|h_k| over the units k of the layer; ``dormant_fraction``, units with s_i <= ``tau``;
    ``dead_fraction``, units with h_i = 0 on every example; ``rarely_active_fraction``, units with
    P(h_i != 0) < ``rarely``; ``saturated_fraction``, units of tanh, sigmoid and the like that lie within ``margin`` of
    an end of their range on more than ``mostly`` of the examples (nan for activations without two ends);
    ``active_fraction``, the mean over units of P(h_i > 0); ``ever_active_fraction``, units with h_i > 0 on some
    example. Each also as ``total_...``, over the units of all layers together. A channel of a convolution is one unit:
    |h|, h > 0 and so on are averaged over its places first; so are the tokens of a sequence that are not masked.

    How to read it: the score works for every activation, since it compares a unit with its layer; dead and rarely
    active are about activations that are 0 exactly (ReLU). Fractions that grow from task to task are a sign of lost
    plasticity: dead units get no gradient. Half of the units active is what a ReLU net has at initialisation.

    What it costs: one forward pass for all layers; ``groups`` · 4 · d numbers a layer.

    When it misleads: the four definitions differ by a lot, so never compare numbers of two. A dormant unit need not be
    useless, and a unit that is constant and large is not dormant at all. For GELU, SiLU and tanh "active" is arbitrary:
    look at the score. Normalisation behind the activation revives small units. Units of sparse features look dead on
    few examples: measure on examples of the task at hand. A module that runs several times gives its last call; name
    layers where activations are called as functions.

    Errors: jackknife over ``groups`` groups of examples; 0 where no group changes a count. A unit that no example at
    hand wakes counts as dead, however many examples there would be elsewhere.

    Source: Sokar et al. 2023 (arXiv:2302.12902) for the score; Dohare et al. 2024 for dead units; Ma et al. 2023 for
    the active fraction.
    """

    layers: Annotated[str, Doc("Names or globs of layers, with commas between; empty takes the activations.")] = ""
    tau: Annotated[float, Range(0.0, 1.0, soft=(0.0, 0.1)), Doc("Score at or below which a unit is dormant.")] = 0.025
    rarely: Annotated[
        float, Range(0.0, 1.0, soft=(0.001, 0.1)), Doc("Share of examples below which a unit is rarely active.")
    ] = 0.01
    margin: Annotated[
        float, Range(0.0, 1.0, soft=(0.001, 0.1)), Doc("Distance from an end of the range that counts as saturated.")
    ] = 0.01
    mostly: Annotated[
        float, Range(0.0, 1.0, soft=(0.9, 0.999)), Doc("Share of examples above which a unit is a saturated one.")
    ] = 0.99
    groups: Annotated[
        int, Range(0, 50, step=1, soft=(0, 20)), Doc("Groups of examples, each left out once for the errors; 0: none.")
    ] = 10

    variables: ClassVar[tuple[Variable, ...]] = (
        *(
            made
            for name, words in FRACTIONS.items()
            for made in (
                Variable(name, ("layer",), words, error=f"{name}_error"),
                Variable(f"{name}_error", ("layer",), "its standard error over examples"),
                Variable(f"total_{name}", (), f"{words}, over all layers", error=f"total_{name}_error"),
                Variable(f"total_{name}_error", (), "its standard error over examples"),
            )
        ),
        Variable("score", ("layer", "unit"), "E|h| over its mean over the layer", error="score_error"),
        Variable("score_error", ("layer", "unit"), "its standard error over examples"),
        Variable("active_share", ("layer", "unit"), "P(h > 0)", error="active_share_error"),
        Variable("active_share_error", ("layer", "unit"), "its standard error over examples"),
        Variable("units", ("layer",), "units of the layer"),
        Variable("examples", (), "examples"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """One pass over the examples for all layers."""
        run, pace = _Run(self, subject), Pace()
        for caught in stream(subject, run.layers):
            run.add(caught)
            if run.seen < subject.examples and pace.due():
                yield run.report()
        run.check_outputs()
        yield run.report(last=True)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The totals with their errors, and the layer with most dormant units."""
        found: dict[str, Value] = {}
        for name in FRACTIONS:
            found |= {name: float(data[f"total_{name}"]), f"{name}_error": float(data[f"total_{name}_error"])}
        if np.isfinite(data.dormant_fraction).any():
            at = int(np.nanargmax(data.dormant_fraction))
            found["most_dormant"] = f"{data['layer'].values[at]} ({float(data.dormant_fraction[at]):.0%})"
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Fractions by layer with their errors, and the sorted scores of up to four layers."""
        return Figure((_fractions(data), self._scores(data)))

    def _scores(self, data: xr.Dataset) -> Panel:
        count = data.sizes["layer"]
        marks: list[AnyMark] = [Rule(self.tau, "y", "tau")]
        picked = np.unique(np.linspace(0, count - 1, min(count, len(ROLES))).round().astype(int))
        for i, role in zip(picked, ROLES, strict=False):
            scores = np.sort(data.score.values[i][: int(data.units[i])])
            at = (np.arange(scores.size) + 0.5) / scores.size
            marks.append(Line(at, scores, str(data["layer"].values[i]), role))
        return Panel(tuple(marks), Axis("share of units"), fitting("score", "log", data.score.values))

    def estimate(self, subject: Subject) -> Cost:
        """The sums of each layer, and one chunk's features."""
        layers = hidden_layers(subject, self.layers)
        few = subject.selected(range(min(8, subject.examples)))
        caught = next(stream(few, layers))
        units = sum(_rows(few, caught, layer, caught.features[layer]).shape[1] for layer in layers)
        each = 2 * 8 * sum(found.numel() for found in caught.features.values()) // few.examples  # in float64, twice
        chunk = min(subject.plan.chunk or subject.examples, subject.examples)
        total = 8 * _KINDS * max(self.groups, 1) * units + each * chunk + subject.memory()
        return Cost(total, 1, f"one pass over the examples, {units} units of {len(layers)} layers")

    def fractions(self, means: Floats, bounded: bool) -> dict[str, Floats]:
        """All fractions of a layer from the means (..., 4, d) of |h|, h > 0, h != 0 and saturation; over the last axis.

        nan where |h| is not finite somewhere. A layer that is 0 throughout has scores 0.
        """
        size, positive, nonzero, saturated = (means[..., kind, :] for kind in range(_KINDS))
        unknown = ~np.isfinite(size).all(-1)
        found = {
            "dormant_fraction": (scores(size) <= self.tau).mean(-1),
            "dead_fraction": (nonzero == 0).mean(-1),
            "rarely_active_fraction": (nonzero < self.rarely).mean(-1),
            "saturated_fraction": (saturated > self.mostly).mean(-1) if bounded else np.full(unknown.shape, np.nan),
            "active_fraction": positive.mean(-1),
            "ever_active_fraction": (positive > 0).mean(-1),
        }
        return {name: np.where(unknown, np.nan, value) for name, value in found.items()}


def scores(size: Floats) -> Floats:
    """E|h_i| (..., d) over its mean over the last axis; 0 where all are 0."""
    mean = size.mean(-1, keepdims=True)
    return np.divide(size, mean, out=np.zeros_like(size), where=mean != 0)


def _rows(subject: Subject, caught: Caught, layer: Layer, values: Tensor) -> Tensor:
    """Values of a layer averaged over places or tokens, (n, units)."""
    mask = caught.batch.kwargs.get("attention_mask")
    return pooled(values, caught.batch.size, channels_first=channels_first(subject, layer), mask=mask)


def _ends(module: nn.Module) -> tuple[float, float] | None:
    """The two ends of an activation's range; None where it has not two."""
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return float(module.min_val), float(module.max_val)
    if isinstance(module, nn.Tanh | nn.Softsign):
        return -1.0, 1.0
    return (0.0, 1.0) if isinstance(module, nn.Sigmoid | nn.Hardsigmoid) else None


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: DormantUnits
    subject: Subject
    seen: int = 0
    sums: list[Tensor] = field(default_factory=list[Tensor])

    def __post_init__(self) -> None:
        self.layers = hidden_layers(self.subject, self.probe.layers)
        self.ends = [_ends(module_named(self.subject, layer.name)) for layer in self.layers]
        self.groups = max(self.probe.groups, 1)
        self.counts = np.zeros(self.groups)
        self.broken = torch.zeros((), dtype=torch.bool, device=self.subject.device)

    def add(self, caught: Caught) -> None:
        """Take in a batch; example i belongs to group i mod ``groups``."""
        place = torch.arange(self.seen, self.seen + caught.batch.size, device=self.subject.device) % self.groups
        member = nn.functional.one_hot(place, self.groups).T.double()
        parts = [member @ self._statistics(caught, i) for i in range(len(self.layers))]
        self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)] if self.sums else parts
        self.counts += np.bincount(np.arange(self.seen, self.seen + caught.batch.size) % self.groups, None, self.groups)
        self.broken |= caught.outputs.isnan().any()
        self.seen += caught.batch.size

    def _statistics(self, caught: Caught, i: int) -> Tensor:
        """|h|, h > 0, h != 0 and saturation of each example, side by side: (n, 4 d) in float64."""
        layer, ends = self.layers[i], self.ends[i]
        h = caught.features[layer]
        low, high = ends or (-torch.inf, torch.inf)
        edge = self.probe.margin
        every = (h.abs(), h > 0, h != 0, (h > high - edge) | (h < low + edge))
        return torch.cat([_rows(self.subject, caught, layer, values.double()) for values in every], dim=1)

    def check_outputs(self) -> None:
        """Refuse a network that puts out nan."""
        if bool(self.broken):
            raise ValueError(
                "the network's outputs are nan on some examples, so its units are not those of a working network; "
                "measure at an earlier step, or look for the cause."
            )

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        means = [self._means(total.cpu().numpy()) for total in self.sums]
        again = [self._left_out(total.cpu().numpy()) for total in self.sums]
        sizes = np.array([m.shape[-1] for m in means], dtype=np.float64)
        whole = [self.probe.fractions(m, ends is not None) for m, ends in zip(means, self.ends, strict=True)]
        parts = [self.probe.fractions(m, ends is not None) for m, ends in zip(again, self.ends, strict=True)]
        values: dict[str, Any] = {"units": sizes, "examples": self.seen}
        for name in FRACTIONS:
            value, replicates = (np.stack([one[name] for one in held], -1) for held in (whole, parts))
            values |= {name: value, f"{name}_error": jackknife_error(replicates)}
            counted = sizes * ([e is not None for e in self.ends] if name == "saturated_fraction" else True)
            values[f"total_{name}"] = _total(value, counted)
            values[f"total_{name}_error"] = jackknife_error(_total(replicates, counted))
        values |= _by_unit("score", [scores(m[0]) for m in means], [scores(m[:, 0]) for m in again])
        values |= _by_unit("active_share", [m[1] for m in means], [m[:, 1] for m in again])
        coords = {"layer": [layer.name or "model" for layer in self.layers], "unit": np.arange(int(sizes.max()))}
        done = 1.0 if last else min(self.seen / (self.subject.examples + 1), 0.999)
        settled = last and bool(np.isfinite(values["total_active_fraction"]))
        return self.probe.reading(done, values, coords=coords, converged=settled, notes=tuple(self.notes()))

    def _means(self, sums: Floats) -> Floats:
        return sums.sum(0).reshape(_KINDS, -1) / self.counts.sum()

    def _left_out(self, sums: Floats) -> Floats:
        """Means without each group in turn, (groups, 4, d); none where there is nothing to leave out."""
        if self.probe.groups < 2 or not self.counts.all() or self.seen < 2 * self.groups:
            return np.zeros((0, _KINDS, sums.shape[1] // _KINDS))
        others = [np.delete(sums, g, 0).sum(0) / np.delete(self.counts, g).sum() for g in range(self.groups)]
        return np.stack(others).reshape(self.groups, _KINDS, -1)

    def notes(self) -> Iterator[str]:
        """What a reader must know."""
        yield from self.subject.notes
        yield f"on {self.seen} of {self.subject.available or 'unknown'} examples"
        plain = [la.name for la in self.layers if not is_activation(module_named(self.subject, la.name))]
        if plain:
            yield f"outputs of layers that are no activations: {', '.join(plain)}"
        if self.probe.groups > 1 and self.subject.examples < 2 * self.groups:
            yield f"{self.subject.examples} examples are too few for errors from {self.groups} groups"


def _total(fractions: Floats, units: Floats) -> Floats:
    """The mean over layers (last axis) by units; layers that count no units are left out, nan where none is left."""
    with np.errstate(invalid="ignore"):
        return (np.where(units > 0, fractions, 0.0) * units).sum(-1) / units.sum()


def _by_unit(name: str, values: list[Floats], replicates: list[Floats]) -> dict[str, Floats]:
    """Values of the units of each layer and their errors, padded with nan to the widest."""
    held = {name: np.full((len(values), max(v.size for v in values)), np.nan)}
    held[f"{name}_error"] = held[name].copy()
    for i, (value, again) in enumerate(zip(values, replicates, strict=True)):
        held[name][i, : value.size] = value
        held[f"{name}_error"][i, : value.size] = jackknife_error(again)
    return held


def _fractions(data: xr.Dataset) -> Panel:
    at = np.arange(1.0, data.sizes["layer"] + 1)
    names = tuple(str(name) for name in data["layer"].values)
    marks: list[AnyMark] = [Bars(at, np.full(at.size, np.nan), names=names)]
    marks.append(Line(at, data.active_fraction.values, "active", "reference"))
    for name, role in zip(list(FRACTIONS)[:4], ROLES, strict=True):
        if np.isfinite(data[name]).any():
            label = name.removesuffix("_fraction").replace("_", " ")
            marks.append(Points(at, data[name].values, data[f"{name}_error"].values, label, role))
    return Panel(tuple(marks), Axis("layer"), Axis("share of units", limits=(-0.05, 1.4)))
