"""Neural collapse layer by layer: where classes come apart, and from where on layers only tidy up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.activations import Layer, choose_layers
from workbench.collapsing import Passes, Values, of_scatter, present, with_errors, words
from workbench.figure import Axis, Figure, Line, Panel, Points, Rule
from workbench.numerics.collapse import Scatter, of_moments
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import ClassMoments
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

Floats = NDArray[np.float64]

_BY_LAYER = {
    "nc1": "within-class variability, Tr(Σ_W Σ_B⁺)/C",
    "nc1_ratio": "within-class over between-class variance, Tr Σ_W / Tr Σ_B",
    "inside": "within-class variance in the span of the class means over Tr Σ_B",
    "outside": "within-class variance outside that span over Tr Σ_B",
    "cdnv": "class-distance normalised variance, mean over pairs",
    "nc2_equinorm": "spread of the class means' lengths",
    "nc2_equiangle": "mean deviation of cosines from -1/(C-1)",
    "nc4": "disagreement of the network with the nearest class mean",
    "nearest_accuracy": "share of examples nearest to the mean of their own class",
    "distance": "least perturbation to collapsed features, relative",
    "reduction": "nc1_ratio over that of the layer before",
}
_HELD = ("nc1", "nc1_ratio", "nearest_accuracy", "distance")


def _variables() -> Iterator[Variable]:
    held = {f"held_out_{name}": f"{_BY_LAYER[name]}, held out" for name in _HELD}
    for name, long_name in {**_BY_LAYER, **held}.items():
        yield Variable(name, ("layer",), long_name, error=f"{name}_error")
        yield Variable(f"{name}_error", ("layer",), f"standard error of {name} over examples")


@dataclass(frozen=True)
class CollapseByLayer(Probe[Subject]):
    """Neural collapse at every layer in one go: the tunnel, and how far each layer reduces variability.

    What it measures, at each layer, for its features h (n, d) with class means μ_c, M_c = μ_c - mean of μ_c:
    ``nc1`` = Tr(Σ_W Σ_B⁺)/C, ``nc1_ratio`` = Tr Σ_W / Tr Σ_B = ``inside`` + ``outside``, variance within classes in the
    span of the means and outside of it; ``cdnv``, ``nc2_equinorm``, ``nc2_equiangle`` as in NeuralCollapse;
    ``nearest_accuracy``: whose nearest class mean is that of their class (the mean of training, for examples held out);
    ``nc4``: where the network itself chooses another class than the nearest mean; ``distance``: the least perturbation,
    relative to the features' spread, that makes them a collapsed simplex; ``reduction``: nc1_ratio over that of the
    layer before. ``tunnel_start``: the first layer from which the nearest class mean stays as accurate as ``share``
    times the network; ``tunnel_length``: the layers after it.

    How to read it: layers before the tunnel pull classes apart; those in it add no accuracy and make variability
    within classes smaller, by about the same factor each where the network has collapsed (Tirer, Huang, Niles-Weed
    2023 prove that nc1_ratio falls). A reduction above 1 is a layer that spreads classes again, which is common for the
    linear half of a layer before its nonlinearity.

    What it costs: two forward passes over the examples, and two over those held out; O(layers groups C d) memory in
    float64. Places of an image are averaged first.

    When it misleads: the nearest class mean is no substitute for a trained classifier: early layers hold more than
    their means tell, so the tunnel seems to start later than by linear probes, by which it was first defined.
    Averaging over places leaves out where things are. Layers of different widths compare by ratios only.

    Errors: standard errors over examples, by the jackknife: all is computed again without each of ``groups`` groups;
    nan where a class would be empty without one. ``tunnel_start`` is a threshold's crossing and has none.

    Source: Papyan et al. 2020; Galanti et al. 2022; Rangamani et al. 2023; Masarczyk et al. 2023 (the tunnel).
    """

    layers: Annotated[str, Doc("Names or globs of layers, with commas between; empty chooses them.")] = ""
    groups: Annotated[int, Range(0, 100, step=1, soft=(0, 20)), Doc("Groups of examples for errors; 0: none.")] = 10
    held_out: Annotated[
        Literal["test", "unused"],
        Choice({"test": "more examples of the same classes", "unused": "not looked at"}),
        Doc("What the subject's held-out examples are."),
    ] = "test"
    share: Annotated[
        float, Range(0.5, 1.0, soft=(0.9, 1.0)), Doc("Share of the network's accuracy at which a tunnel starts.")
    ] = 0.95

    variables: ClassVar[tuple[Variable, ...]] = (
        *_variables(),
        Variable("width", ("layer",), "features of the layer"),
        Variable("rank", ("layer",), "directions that the class means span"),
        Variable("accuracy", (), "share of examples classified rightly", error="accuracy_error"),
        Variable("accuracy_error", (), "standard error of accuracy over examples"),
        Variable("tunnel_start", (), "first layer of the tunnel, counted from 1"),
        Variable("tunnel_length", (), "layers after it"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Class means of every layer, then scatter around them; then the same of the held-out examples."""
        run = _Run(self, subject, choose_layers(subject, self.layers))
        yield from run.train()
        yield from run.held()
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The ends of the way through the network, and where its tunnel starts."""
        found: dict[str, Value] = {"layers": data.sizes["layer"]}
        for name in ("nc1_ratio", "nearest_accuracy", "distance"):
            for word, at in (("first", 0), ("last", -1)):
                found |= {f"{name}_{word}": float(data[name][at])}
                found |= {f"{name}_{word}_error": float(data[f"{name}_error"][at])}
        found |= {"accuracy": float(data.accuracy), "accuracy_error": float(data.accuracy_error)}
        if np.isfinite(data.tunnel_start):
            at = int(data.tunnel_start)
            found |= {"tunnel_start": str(data["layer"].values[at - 1]), "tunnel_length": int(data.tunnel_length)}
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """By depth: variability, its reduction, accuracy of the nearest class mean with the tunnel, and distance."""
        names = data["layer"].values
        note = f"layer 1: {names[0]}, layer {len(names)}: {names[-1]}"
        return Figure((_variability(data), _reduction(data), _accuracy(data), _distance(data)), note=note, columns=2)

    def estimate(self, subject: Subject) -> Cost:
        """Class means of every layer without each group, a tile, and one chunk's activations."""
        classes = subject.classes or 2
        widths = [p.shape[0] for p in subject.params.values() if p.ndim > 1]
        passes = 4 if subject.held_out is not None and self.held_out != "unused" else 2
        kept = 8 * (3 * max(self.groups, 1) + 4) * classes * sum(widths) * (passes // 2)
        return Cost(kept + 2 * subject.memory(), passes, f"{passes} forward passes over the examples")


def _x(data: xr.Dataset) -> Floats:
    return np.arange(1.0, data.sizes["layer"] + 1)


def _joined(data: xr.Dataset, name: str, label: str, role: Any) -> tuple[Any, ...]:
    x, values = _x(data), data[name].values
    return Line(x, values, "", role), Points(x, values, data[f"{name}_error"].values, label, role)


def _variability(data: xr.Dataset) -> Panel:
    marks = [*_joined(data, "nc1_ratio", "all, training", "main"), *_joined(data, "nc1", "NC1, training", "second")]
    if np.isfinite(data.held_out_nc1_ratio).any():
        marks += _joined(data, "held_out_nc1_ratio", "all, held out", "third")
    return Panel(tuple(marks), Axis("layer"), Axis("within over between", "log"))


def _reduction(data: xr.Dataset) -> Panel:
    marks = (Rule(1.0), *_joined(data, "reduction", "", "main"))
    return Panel(marks, Axis("layer"), Axis("over the layer before", "log"))


def _accuracy(data: xr.Dataset) -> Panel:
    marks = [*_joined(data, "nearest_accuracy", "training", "main")]
    if np.isfinite(data.held_out_nearest_accuracy).any():
        marks += _joined(data, "held_out_nearest_accuracy", "held out", "third")
    if np.isfinite(data.accuracy):
        marks.append(Line(_x(data)[[0, -1]], [float(data.accuracy)] * 2, "the network", "reference"))
    if np.isfinite(data.tunnel_start):
        marks.append(Line([float(data.tunnel_start)] * 2, [0.0, 1.0], "tunnel starts", "fourth"))
    return Panel(tuple(marks), Axis("layer"), Axis("nearest-mean accuracy", limits=(0.0, 1.05)))


def _distance(data: xr.Dataset) -> Panel:
    marks = [*_joined(data, "distance", "training", "main")]
    if np.isfinite(data.held_out_distance).any():
        marks += _joined(data, "held_out_distance", "held out", "third")
    return Panel(tuple(marks), Axis("layer"), Axis("distance to collapse", limits=(0.0, 1.05)))


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: CollapseByLayer
    subject: Subject
    layers: tuple[Layer, ...]
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    said: list[str] = field(default_factory=list[str])
    complete: bool = False

    def __post_init__(self) -> None:
        self.other = None if self.probe.held_out == "unused" else self.subject.held_out
        self.passes = Passes(self.subject, self.layers, self.probe.groups)
        self.share = self.subject.examples / (self.subject.examples + (self.other.examples if self.other else 0))

    def train(self) -> Iterator[Reading]:
        """Both passes over the training examples."""
        for done in self.passes.means():
            wholes = [sums.whole() for sums in self.passes.moments]
            self.values["width"] = [m.means.shape[1] for m in wholes]
            if len(present(wholes[0])) > 1:
                self.values |= _stacked([of_moments(m) for m in wholes], tuple(_BY_LAYER))
            yield self.report(self.share * done / 2)
        for done in self.passes.spread():
            self.take(self.passes.scatters, done == 1)
            yield self.report(self.share * (1 + done) / 2)
        wholes = [s.whole for s in self.passes.scatters]
        self.complete = len(present(wholes[0])) > 1
        for layer, moments in zip(self.layers, wholes, strict=True):
            self.said += words(moments, f" at {layer.name or 'the output'}")
        self.tunnel()

    def held(self) -> Iterator[Reading]:
        """Both passes over the examples held out, whose nearest class mean is one of training."""
        if self.other is None or not self.complete:
            return
        held = Passes(self.other, self.layers, self.probe.groups, [s.whole for s in self.passes.scatters])
        for done in held.means():
            yield self.report(self.share + (1 - self.share) * done / 2)
        for done in held.spread():
            if len(present(held.scatters[0].whole)) > 1:
                found = _with_folds(held.scatters, done == 1)
                kept = {f"{n}{end}" for n in _HELD for end in ("", "_error")}
                self.values |= {f"held_out_{name}": value for name, value in found.items() if name in kept}
            yield self.report(min(self.share + (1 - self.share) * (1 + done) / 2, 0.999))

    def take(self, scatters: list[Scatter], errors: bool) -> None:
        """What both passes say, with errors at their end."""
        if len(present(scatters[0].whole)) > 1:
            found = _with_folds(scatters, errors)
            known = {v.name for v in self.probe.variables}
            self.values |= {name: value for name, value in found.items() if name in known}
            self.values["rank"] = [s.rank for s in scatters]

    def tunnel(self) -> None:
        """Where accuracy has come near the network's, for good."""
        if not self.complete:
            return
        enough = self.values["nearest_accuracy"] >= self.probe.share * self.values["accuracy"]
        short = np.flatnonzero(~enough)
        start = int(short[-1]) + 2 if len(short) else 1
        if start <= len(enough):
            self.values |= {"tunnel_start": start, "tunnel_length": len(enough) - start}
        else:
            self.said.append("no layer's nearest class mean comes near the network's accuracy: there is no tunnel")

    def report(self, done: float) -> Reading:
        """A reading of what is known."""
        return self.probe.reading(
            min(done, 1.0),
            self.values,
            coords={"layer": [layer.name or "output" for layer in self.layers]},
            converged=done >= 1 and self.complete,
            notes=(*self.subject.notes, *self.said),
        )


def _with_folds(scatters: list[Scatter], errors: bool) -> dict[str, Any]:
    """Values by layer, (layers,), with errors from the folds that all layers share."""
    folds, kept = scatters[0].folds, present(scatters[0].whole)
    comparable = errors and all(present(fold) == kept for fold in folds)
    return with_errors([_of_fold(scatters, k) for k in range(len(folds) if comparable else 1)])


def _of_fold(scatters: list[Scatter], k: int) -> Values:
    rows = [_of_layer(s, s.folds[k], k) for s in scatters]
    found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    with np.errstate(divide="ignore", invalid="ignore"):
        found["reduction"] = np.append(np.nan, found["nc1_ratio"][1:] / found["nc1_ratio"][:-1])
    return {**found, "accuracy": float(found["right"][0])}


def _of_layer(scatter: Scatter, fold: ClassMoments, k: int) -> dict[str, float]:
    found = of_scatter(scatter, k)
    base = of_moments(fold)
    inside = scatter.spread_inside()[k]
    extra = {"inside": inside, "outside": base["nc1_ratio"] - inside, "nearest_accuracy": 1 - found["astray"]}
    return {**base, **extra, "nc1": found["nc1"], "nc4": found["differ"], "right": found["right"]}


def _stacked(rows: list[dict[str, float]], names: tuple[str, ...]) -> dict[str, Floats]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0] if name in names}
