"""How many dimensions the features of each layer fill, and the gradients of the loss with respect to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from workbench.activations import choose_layers
from workbench.figure import ROLES, AnyMark, Axis, Bars, Figure, Line, Panel, Points
from workbench.numerics import kernels
from workbench.numerics.row_spectra import GroupedRows, RowSpectrum, kept_bytes
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import jackknife_error
from workbench.pace import Pace
from workbench.pooling import POOLS, Pool, example_rows, widths
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Range
from workbench.subject import Subject

Floats = NDArray[np.float64]
Source = Literal["features", "gradients"]

GLANCE = 256
"""Examples of a first look."""
PER_FEATURE = 4
"""Examples for each feature below which a rank says more about the examples than about the layer."""
FEW = 4
"""Layers whose names have room in a narrow panel."""
PASSES = 0.5
"""Share of the progress that the passes over the examples take."""
RANKS: tuple[tuple[str, str], ...] = (
    ("effective_rank", "exp(entropy(σ/Σσ))"),
    ("stable_rank", "Σσ²/σ_1²"),
    ("participation_ratio", "(Σσ²)²/Σσ⁴"),
    ("threshold_rank", "least k with Σ_(i<=k) σ_i >= share · Σσ"),
    ("variance_rank", "least k with Σ_(i<=k) σ_i² >= share · Σσ²"),
    ("numerical_rank", "number of σ_i > tolerance · σ_1"),
)
"""The ranks by name, with their formulas."""


@dataclass(frozen=True)
class FeatureRank(Probe[Subject]):
    """Ranks and spectra of each layer's features, and of the loss's gradients with respect to them.

    What it measures, layer by layer, from the singular values σ of the matrix H (n, d), one row an example (not
    centred, unless ``centred``):
    ``effective_rank`` = exp(entropy(σ/Σσ)), of singular values, not of their squares; ``stable_rank`` = Σσ²/σ_1²;
    ``participation_ratio`` = (Σσ²)²/Σσ⁴; ``threshold_rank``, the least k with Σ_(i<=k) σ_i >= ``share`` · Σσ, which
    some scripts call stable rank; ``variance_rank``, the same with σ²; ``numerical_rank``, how many σ_i exceed
    ``tolerance`` · σ_1. For ``gradients`` a row is ∂ℓ/∂h of one example's own loss ℓ and the layer's output h, pooled
    as the features are. ``singular_value`` is σ/√n, the root mean square along a direction. None can exceed
    ``possible`` = min(n, d), with n - 1 for n if centred.

    How to read it: an even spread over k directions has effective rank, stable rank and participation ratio k. Falling
    ranks along the layers are a tunnel, towards the end of training collapse (C - 1 or C directions), during it a loss
    of plasticity. Gradients of few directions mean that few combinations of features are still being changed. Compare
    layers of unlike width by rank / ``possible``. Without centring a large mean alone brings all ranks towards 1.

    What it costs: one forward pass for all layers, and for gradients one forward and backward pass. Kept in float64:
    second moments of each group of examples, groups · d² numbers a layer, or the features themselves (n · d) where that
    is less; then groups + 1 eigenvalue problems of min(n, d) for each layer.

    When it misleads: a rank is capped by the number of examples, and grows with it until there are several for each
    feature (a note names layers with fewer than four). Numbers go by formula: never compare effective ranks of σ with
    those of σ² or of kernels. Small singular values count in the effective and threshold rank, hardly in the others;
    rescaling features one by one changes all. Averaging over tokens or places first (``pool``) lowers ranks. A layer
    that runs several times gives its last call. Whatever is below 1e-7 · σ_1 counts as 0.

    Errors: jackknife over ``groups`` groups of examples, every such-and-such one in a group; ranks that count have the
    error 0 where no group changes them. nan for layers whose values are all alike (ranks of nothing), and where the
    examples are fewer than two for each group.

    Source: Roy and Vetterli 2007 (effective rank); Kumar et al. 2021 (threshold rank); Masarczyk et al. 2023 (tunnel).
    """

    of: Annotated[
        Literal["features", "gradients", "both"],
        Choice(
            {
                "features": "the layers' outputs",
                "gradients": "the gradients of each example's loss with respect to them",
                "both": "features, and gradients where each example has its own",
            }
        ),
        Doc("Whose rank."),
    ] = "both"
    layers: Annotated[str, Doc("Names or globs of layers, with commas between; empty chooses them.")] = ""
    pool: Annotated[Pool, Choice(POOLS), Doc("How tokens and places become one row of features an example.")] = "mean"
    centred: Annotated[bool, Doc("Whether the mean over examples is taken away first.")] = False
    share: Annotated[
        float, Range(0.5, 1.0, soft=(0.9, 0.999)), Doc("Share of Σσ, or of Σσ², that the ranks by share reach.")
    ] = 0.99
    tolerance: Annotated[
        float, Range(1e-6, 0.5, log=True), Doc("Part of σ_1 above which a singular value counts as not zero.")
    ] = 1e-3
    groups: Annotated[
        int, Range(0, 50, step=1, soft=(0, 20)), Doc("Groups of examples, each left out once for the errors; 0: none.")
    ] = 10
    shown: Annotated[
        str, Doc("Layers whose spectra are drawn (up to four), with commas between; empty for some."), Display()
    ] = ""

    variables: ClassVar[tuple[Variable, ...]] = (
        *(
            made
            for name, formula in RANKS
            for made in (
                Variable(name, ("source", "layer"), formula, error=f"{name}_error"),
                Variable(f"{name}_error", ("source", "layer"), "its standard error over examples"),
            )
        ),
        Variable("singular_value", ("source", "layer", "rank"), "σ/√n, largest first", error="singular_value_error"),
        Variable("singular_value_error", ("source", "layer", "rank"), "its standard error over examples"),
        Variable("possible", ("layer",), "min(n, d), the highest rank there can be"),
        Variable("width", ("layer",), "features of the layer, d"),
        Variable("examples", (), "examples, n"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Features of all layers in one pass, gradients in another, and then the spectra of layer after layer."""
        run = _Run(self, subject)
        for source in run.sources:
            yield from run.measure(source)
        yield run.report(last=True)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Ranks of the last layer, and the layer that fills the least part of what it could."""
        found: dict[str, Value] = {"last_layer": str(data["layer"].values[-1])}
        for source in data["source"].values:
            one = data.sel(source=source)
            for name in ("effective_rank", "stable_rank"):
                value, error = float(one[name][-1]), float(one[f"{name}_error"][-1])
                found |= {f"{name}_of_{source}": value, f"{name}_of_{source}_error": error}
            part = (one.effective_rank / one.possible).values
            if np.isfinite(part).any():
                at = int(np.nanargmin(part))
                found[f"narrowest_of_{source}"] = f"{data['layer'].values[at]} ({part[at]:.0%})"
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Ranks by layer with their errors, and spectra of some layers on logarithms, a row for each source."""
        panels = [
            panel
            for source in data["source"].values
            for panel in (_ranks(data.sel(source=source)), _spectra(data.sel(source=source), self.shown))
        ]
        return Figure(tuple(panels), columns=2 if data.sizes["layer"] <= FEW else 1)

    def estimate(self, subject: Subject) -> Cost:
        """What is kept of all layers, the matrices of the largest, and one chunk's graph; a small pass tells."""
        n, sizes = subject.examples, widths(subject, choose_layers(subject, self.layers), self.pool)
        kept = sum(kept_bytes(n, d, self.groups, subject.dtype) for d in sizes)
        largest = max(min(n, d) for d in sizes)
        passes = len(self.sources(subject))
        words = (
            f"{passes} passes over the examples, and {self.groups + 1} decompositions for each of {len(sizes)} layers"
        )
        return Cost(kept + 5 * 8 * largest**2 + 2 * subject.memory(), passes, words)

    def sources(self, subject: Subject) -> tuple[Source, ...]:
        """What is measured there: with "both", gradients only where each example has its own.

        Raises:
            ValueError: gradients alone are asked for, and examples touch each other.
        """
        mixed = "" if self.of == "features" else _mixed(subject)
        if mixed and self.of == "gradients":
            raise ValueError(f"no example has a gradient of its own here: {mixed}. Ask for of='features'.")
        if mixed or self.of == "features":
            return ("features",)
        return ("features", "gradients") if self.of == "both" else ("gradients",)

    def ranks(self, spectrum: Floats) -> dict[str, float]:
        """All ranks of singular values (k,); nan where they are not known."""
        if not spectrum.size or not np.isfinite(spectrum).all():
            return {name: np.nan for name, _ in RANKS}
        formulas: Mapping[str, Callable[[Floats], float]] = {
            "effective_rank": kernels.effective_rank,
            "stable_rank": kernels.stable_rank,
            "participation_ratio": lambda s: kernels.participation_ratio(s**2),
            "threshold_rank": lambda s: kernels.threshold_rank(s, 1 - self.share),
            "variance_rank": lambda s: kernels.threshold_rank(s**2, 1 - self.share),
            "numerical_rank": lambda s: kernels.numerical_rank(s, self.tolerance),
        }
        return {name: float(formula(spectrum)) if spectrum[0] else np.nan for name, formula in formulas.items()}


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: FeatureRank
    subject: Subject
    done: float = 1e-6
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    dead: dict[Source, list[str]] = field(default_factory=dict[Source, list[str]])

    def __post_init__(self) -> None:
        subject, probe = self.subject, self.probe
        self.n, self.sources = subject.examples, probe.sources(subject)
        self.mixed = _mixed(subject) if probe.of == "both" and len(self.sources) == 1 else ""
        self.layers = choose_layers(subject, probe.layers)
        self.sizes = widths(subject, self.layers, probe.pool)
        self.pace = Pace()
        self.names = [layer.name or "model" for layer in self.layers]
        possible = [max(min(self.n - probe.centred, d), 1) for d in self.sizes]
        self.values |= {"possible": possible, "width": self.sizes, "examples": self.n}
        self.coords = {"source": list(self.sources), "layer": self.names, "rank": np.arange(1, max(possible) + 1)}
        shape = len(self.sources), len(self.layers), max(possible)
        for variable in probe.variables:
            if "source" in variable.dims:
                self.values[variable.name] = np.full(shape[: len(variable.dims)], np.nan)

    def measure(self, source: Source) -> Iterator[Reading]:
        """One pass, with a glance at the first examples, then layer by layer."""
        probe, subject = self.probe, self.subject
        begun, part = self.sources.index(source) / len(self.sources), 1 / len(self.sources)
        held = [GroupedRows(self.n, d, probe.groups, probe.centred, subject.dtype, subject.device) for d in self.sizes]
        for rows in example_rows(subject, self.layers, probe.pool, of_loss=source == "gradients"):
            before = held[0].seen
            for layer, kept in zip(self.layers, held, strict=True):
                kept.add(rows[layer])
            if before < GLANCE <= held[0].seen < self.n or not before:
                for i, kept in enumerate(held):
                    self.take(source, i, next(kept.spectra()))
            self.done = begun + part * PASSES * held[0].seen / self.n
            yield self.report()
        for i, kept in enumerate(held):
            for step, spectrum in enumerate(kept.spectra(), 1):
                self.take(source, i, spectrum)
                share = (i + min(step / (probe.groups + 1), 1)) / len(held)
                self.done = min(begun + part * (PASSES + (1 - PASSES) * share), 0.999)
                if self.pace.due():
                    yield self.report()

    def take(self, source: Source, i: int, spectrum: RowSpectrum) -> None:
        """Ranks and singular values of one layer, with errors as soon as each group was left out."""
        at, probe = (self.sources.index(source), i), self.probe
        size = min(spectrum.values.size, self.values["possible"][i])
        found = probe.ranks(spectrum.values)
        whole = len(spectrum.replicates) == probe.groups > 1
        again = [probe.ranks(replicate) for replicate in spectrum.replicates] if whole else []
        for name, value in found.items():
            self.values[name][at] = value
            self.values[f"{name}_error"][at] = jackknife_error(np.array([r[name] for r in again]))
        self.values["singular_value"][at][:size] = spectrum.values[:size]
        self.values["singular_value_error"][at][:size] = spectrum.error[:size] if whole else np.nan

    def report(self, last: bool = False) -> Reading:
        """The reading of now."""
        return self.probe.reading(
            1.0 if last else self.done,
            self.values,
            coords=self.coords,
            converged=last and self.known,
            notes=tuple(self.notes(last)),
        )

    @property
    def known(self) -> bool:
        """Whether everything that exists is known, and has an error if errors were asked for."""
        alive = ~np.array([self.nothing(source) for source in self.sources])
        name = "effective_rank_error" if self.probe.groups > 1 else "effective_rank"
        return bool(np.isfinite(self.values[name][alive]).all())

    def nothing(self, source: Source) -> list[bool]:
        """Which layers gave nothing but zeros (after centring)."""
        largest = self.values["singular_value"][self.sources.index(source), :, 0]
        return [bool(value == 0) for value in largest]

    def notes(self, last: bool) -> Iterator[str]:
        """What a reader must know."""
        yield from self.subject.notes
        yield f"on {self.n} of {self.subject.available or 'unknown'} examples"
        yield f"singular values of {'' if self.probe.centred else 'un'}centred rows"
        if self.mixed:
            yield f"no gradients: {self.mixed}"
        few = [name for name, d in zip(self.names, self.sizes, strict=True) if self.n < PER_FEATURE * d]
        if few:
            yield f"fewer than {PER_FEATURE} examples a feature, so that ranks are low by chance: {', '.join(few)}"
        for source in self.sources if last else ():
            dead = [name for name, flag in zip(self.names, self.nothing(source), strict=True) if flag]
            if dead:
                yield f"{source} that are {'constant' if self.probe.centred else 'zero'}: {', '.join(dead)}"
        if self.n < 2 * self.probe.groups:
            yield f"{self.n} examples are too few for errors from {self.probe.groups} groups"


def _mixed(subject: Subject) -> str:
    """Why no example has a gradient of its own; empty where each has."""
    if subject.norm == "batch":
        return "BatchNorm mixes the examples of a batch"
    with torch.no_grad():
        losses = subject.batch_losses(subject.params, next(iter(subject.batches(2))))
    return "" if losses is not None else "the loss couples the examples of a batch"


def _ranks(one: xr.Dataset) -> Panel:
    """Ranks by layer, with what is possible."""
    at = np.arange(1.0, one.sizes["layer"] + 1)
    names = tuple(f"{i:.0f} {name}" for i, name in zip(at, one["layer"].values, strict=True))
    marks: list[AnyMark] = [Bars(at, np.full(at.size, np.nan), names=names)]
    marks.append(Line(at, one.possible.values, "possible", "reference"))
    for (name, _), role in zip(RANKS, ROLES, strict=False):
        marks.append(Points(at, one[name].values, one[f"{name}_error"].values, name.replace("_", " "), role))
    drawn = np.stack([one.possible.values, *(one[name].values for name, _ in RANKS[: len(ROLES)])])
    low, high = 0.8 * float(np.nanmin(drawn)), 1.2 * float(np.nanmax(drawn))
    room = high * (high / low) ** 0.8  # for the legend, above what is possible
    return Panel(tuple(marks), Axis("layer"), Axis("rank", "log", limits=(low, room)), title=_title("ranks", one))


def _title(of: str, one: xr.Dataset) -> str:
    return f"{of} of {one['source'].item()}"


def _spectra(one: xr.Dataset, words: str) -> Panel:
    """Singular values over the largest, of up to four layers."""
    names = [str(name) for name in one["layer"].values]
    asked = [names.index(word) for word in map(str.strip, words.split(",")) if word in names]
    spread = np.unique(np.linspace(0, len(names) - 1, min(len(ROLES), len(names))).round().astype(int))
    marks: list[AnyMark] = []
    for i, role in zip(asked or spread, ROLES, strict=False):
        values = one.singular_value.values[i]
        with np.errstate(invalid="ignore", divide="ignore"):
            marks.append(Line(one["rank"].values, np.where(values > 0, values / values[0], np.nan), names[i], role))
    return Panel(tuple(marks), Axis("k", "log"), Axis("σ_k / σ_1", "log"), title=f"spectra of {one['source'].item()}")
