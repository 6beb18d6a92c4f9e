"""Signal propagation: how large activations and gradients are by depth, beside what mean-field theory predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from workbench.activations import Layer, choose_layers, gradients, module_named, stream
from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, fitting
from workbench.numerics.mean_field import Affine, Step, backward, forward
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink,
)  # fmt: skip
_SILENT = (nn.Flatten, nn.Identity, nn.Dropout, nn.AlphaDropout)
_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d)


@dataclass(frozen=True)
class SignalPropagation(Probe[Subject]):
    """Signal propagation by depth: moments of activations and of their gradients, layer by layer, with theory's curve.

    What it measures, of each layer's output x over examples (and places or tokens): ``second_moment`` E[x²] over all
    entries; ``channel_mean_square`` mean over channels of (E x)²; ``channel_variance`` mean over channels of Var x;
    ``correlation`` mean cosine between two examples' features (of those that are not all zero); ``zeros`` share of
    entries that are exactly 0; ``gradient_second_moment`` E[(∂ℓ/∂x)²] of each example's own loss ℓ. For
    ``nn.Sequential`` of dense layers and activations also what mean-field theory says: ``predicted_second_moment``, q =
    σ_w² E φ(√q z)² + σ_b² from the inputs' measured second moment and the mean squares of the weights as they are,
    ``predicted_gradient`` backwards from the last layer's measured one, and ``chi`` = σ_w² E φ'(√q z)², what one more
    layer multiplies gradients by.

    How to read it: a straight line on a logarithm is exponential growth or decay with depth. χ = 1 is the edge between
    vanishing and exploding gradients. ``correlation`` near 1 in deep layers says that examples can no longer be told
    apart, near 0 that alike ones have been torn apart. In residual networks the variance grows with every block (l + 1
    after l blocks for branches of variance one) and falls back at transitions: name the blocks, or the last layers of
    branches before they are added, in ``layers``.

    What it costs: one forward pass, and one backward pass with respect to activations.

    When it misleads: it belongs to the weights as they are; theory holds at initialisation, for wide layers and
    weights that are independent of one another, and is drawn for trained ones too. In evaluation mode BatchNorm at
    initialisation is the identity: use norm="batch" for what it does in training (then there are no gradients of
    examples, and no ``gradient_second_moment``). Examples are the subject's: give Gaussian ones for plots that do not
    depend on data.

    Errors: standard errors over examples; none for channels' moments, for correlations and for theory, whose own error
    falls as one over the width.

    Source: Poole et al. 2016; Schoenholz et al. 2017 (mean field); Brock et al. 2021 (signal-propagation plots).
    """

    layers: Annotated[str, Doc('Names and globs of layers between commas, in running order; "auto" for leaves.')] = (
        "auto"
    )
    examples: Annotated[
        int, Range(2, 1_000_000, log=True, soft=(16, 1024)), Doc("At most so many examples, drawn at random.")
    ] = 256

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("second_moment", ("layer",), "E[x²] of the output", error="second_moment_error"),
        Variable("second_moment_error", ("layer",), "its standard error over examples"),
        Variable("channel_mean_square", ("layer",), "mean over channels of (E x)²"),
        Variable("channel_variance", ("layer",), "mean over channels of Var x"),
        Variable("correlation", ("layer",), "mean cosine between two examples"),
        Variable("zeros", ("layer",), "share of entries that are exactly zero"),
        Variable("gradient_second_moment", ("layer",), "E[(∂ℓ/∂x)²]", error="gradient_second_moment_error"),
        Variable("gradient_second_moment_error", ("layer",), "its standard error over examples"),
        Variable("predicted_second_moment", ("layer",), "E[x²] by mean-field theory"),
        Variable("predicted_gradient", ("layer",), "E[(∂ℓ/∂x)²] by mean-field theory"),
        Variable("chi", ("layer",), "σ_w² E φ'², by which one layer multiplies gradients"),
        Variable("input_second_moment", (), "E[x²] of the first dense layer's input, where theory begins"),
        Variable("measured", (), "examples that were looked at"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Forwards, then backwards; theory with the first reading."""
        used = min(self.examples, subject.examples)
        if used < subject.examples:
            subject = subject.selected(draw.generator(0).permutation(subject.examples)[:used].tolist())
        run = _Run(self, subject, choose_layers(subject, self.layers))
        yield from run.forwards()
        yield from run.backwards()
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """First and last second moments of activations and gradients, and the last χ."""
        found: dict[str, Value] = {}
        for name in ("second_moment", "gradient_second_moment"):
            for place, word in ((0, "first"), (-1, "last")):
                found[f"{name}_{word}"] = float(data[name][place])
                found[f"{name}_{word}_error"] = float(data[f"{name}_error"][place])
        known = data.chi.values[np.isfinite(data.chi.values)]
        return found | {"chi": float(known[-1]) if known.size else math.nan}

    def figure(self, data: xr.Dataset) -> Figure:
        """Activations and gradients by depth, measured and predicted."""
        measured = (("second_moment", "predicted_second_moment"), ("gradient_second_moment", "predicted_gradient"))
        labels = ("E[x²]", "E[(∂ℓ/∂x)²]")
        return Figure(tuple(_depth(data, *names, label) for names, label in zip(measured, labels, strict=True)))

    def estimate(self, subject: Subject) -> Cost:
        """Two passes, with the features of a batch."""
        return Cost(3 * subject.memory() + 2**16, 2, f"two passes over {min(self.examples, subject.examples)} examples")


def _depth(data: xr.Dataset, name: str, predicted: str, label: str) -> Panel:
    at = np.arange(1, data.sizes["layer"] + 1)
    values, theory = data[name].values, data[predicted].values
    marks: list[AnyMark] = [Line(at, values), Points(at, values, data[f"{name}_error"].values, "measured")]
    if np.isfinite(theory).any():
        marks.append(Line(at, theory, "mean field", "reference"))
    return Panel(tuple(marks), Axis("depth (layer)"), fitting(label, "log", values, theory))


@dataclass
class _Sums:
    """What is summed over batches of a layer, on the device."""

    each: list[Tensor] = field(default_factory=list[Tensor])
    channels: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    unit: Tensor | float = 0.0
    pointing: Tensor | float = 0.0
    zeros: Tensor | float = 0.0
    count: int = 0

    def add(self, features: Tensor, channel: int) -> None:
        """One batch (n, ...) with its channels along ``channel``."""
        x = features.double()
        rows = x.flatten(1)
        self.each.append(rows.square().mean(1))
        wide = x.movedim(channel, -1).reshape(-1, x.shape[channel])
        self.channels, self.squares = self.channels + wide.sum(0), self.squares + wide.square().sum(0)
        self.count += len(wide)
        self.zeros = self.zeros + (rows == 0).double().mean(1).sum()
        sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        self.unit = self.unit + (rows / torch.where(sizes == 0, 1.0, sizes)).sum(0)
        self.pointing = self.pointing + (sizes != 0).sum()

    def numbers(self) -> dict[str, float]:
        """Everything, once all batches are in."""
        mean = torch.as_tensor(self.channels) / self.count
        variance = torch.as_tensor(self.squares) / self.count - mean**2
        each, unit = torch.cat(self.each), torch.as_tensor(self.unit)
        n, m = len(each), torch.as_tensor(self.pointing).to(unit)
        pairs = torch.where(m > 1, (unit.square().sum() - m) / (m * (m - 1)), math.nan)
        found = torch.stack([mean.square().mean(), variance.mean(), pairs, torch.as_tensor(self.zeros) / n]).tolist()
        names = ("channel_mean_square", "channel_variance", "correlation", "zeros")
        return dict(zip(names, found, strict=True)) | _mean("second_moment", each)


def _mean(name: str, each: Tensor) -> dict[str, float]:
    n = len(each)
    error = float(each.std()) / math.sqrt(n) if n > 1 else math.nan
    return {name: float(each.mean()), f"{name}_error": error}


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: SignalPropagation, subject: Subject, layers: tuple[Layer, ...]) -> None:
        self.probe, self.subject, self.layers = probe, subject, layers
        lengths = {v.name: np.full(len(layers), np.nan) for v in probe.variables if v.dims}
        self.values: dict[str, Any] = {**lengths, "measured": subject.examples}
        self.chain = _chain(subject)
        self.words: tuple[str, ...] = ()

    def forwards(self) -> Iterator[Reading]:
        """Activations."""
        first = (Layer(self.chain[0][0], "input"),) if self.chain else ()
        sums = {layer: _Sums() for layer in (*self.layers, *first)}
        channels, seen = {layer: _channels_first(self.subject, layer) for layer in sums}, 0
        for caught in stream(self.subject, tuple(sums)):
            for layer, features in caught.features.items():
                turned = features.ndim == 3 and len(features) != caught.batch.size
                x = features.transpose(0, 1) if turned else features
                sums[layer].add(x, -1 if x.ndim == 3 and not channels[layer] else 1)
            seen += caught.batch.size
            self.put({layer: sums[layer].numbers() for layer in self.layers})
            yield self.report(0.5 * min(1.0, seen / self.subject.examples))
        if first:
            self.values["input_second_moment"] = sums[first[0]].numbers()["second_moment"]
            self.theory()

    def backwards(self) -> Iterator[Reading]:
        """Gradients, where each example has its own."""
        subject = self.subject
        if subject.norm == "batch" or subject.losses() is None:
            self.words = ("no gradients: examples have none of their own where the loss couples them",)
            return
        each: dict[Layer, list[Tensor]] = {layer: [] for layer in self.layers}
        seen = 0
        for caught in gradients(subject, self.layers):
            for layer, found in caught.features.items():
                rows = found if len(found) == caught.batch.size else found.transpose(0, 1)
                each[layer].append(rows.double().flatten(1).square().mean(1))
            seen += caught.batch.size
            self.put({layer: _mean("gradient_second_moment", torch.cat(parts)) for layer, parts in each.items()})
            yield self.report(0.5 + 0.49 * min(1.0, seen / subject.examples))
        self.theory()

    def put(self, found: dict[Layer, dict[str, float]]) -> None:
        """Numbers of each layer into their rows."""
        for row, layer in enumerate(self.layers):
            for name, value in found[layer].items():
                self.values[name][row] = value

    def theory(self) -> None:
        """The curve of mean-field theory, as far as the chain reaches; backwards only where it reaches the end."""
        if not self.chain:
            return
        names, steps = [name for name, _ in self.chain], [step for _, step in self.chain]
        places = {layer.name: row for row, layer in enumerate(self.layers)}
        rows = [places.get(name) for name in names]
        seconds, slopes = forward(steps, float(self.values["input_second_moment"]))
        found = {"predicted_second_moment": seconds, "chi": _chi(steps, slopes)}
        if rows[-1] is not None and names[-1] == _last(self.subject):
            last = float(self.values["gradient_second_moment"][rows[-1]])
            found["predicted_gradient"] = backward(steps, slopes, last)
        for name, curve in found.items():
            for row, value in zip(rows, curve, strict=True):
                if row is not None:
                    self.values[name][row] = value

    def report(self, done: float) -> Reading:
        """The reading of now."""
        subject = self.subject
        theory = () if self.chain else ("no theory: the net is no sequence of dense layers and activations",)
        on = subject.on
        coords = {"layer": np.array([layer.name or "model" for layer in self.layers])}
        notes = (*subject.notes, on, *theory, *self.words)
        return self.probe.reading(done, self.values, coords=coords, converged=done == 1, notes=notes)


def _channels_first(subject: Subject, layer: Layer) -> bool:
    """Whether three axes are (examples, channels, places) rather than (examples, tokens, channels)."""
    return isinstance(module_named(subject, layer.name), _CHANNELS_FIRST)


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of nested sequences, in the order in which they run; anything else as a whole."""
    if isinstance(module, nn.Sequential):
        for key, child in module.named_children():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, module


def _last(subject: Subject) -> str:
    return [name for name, _ in _leaves(subject.module)][-1]


def _chain(subject: Subject) -> list[tuple[str, Step]]:
    """The dense layers and activations from the net's first layer on, up to what theory does not cover."""
    found: list[tuple[str, Step]] = []
    if not isinstance(subject.module, nn.Sequential):
        return found
    tensors = subject.tensors()
    for name, module in _leaves(subject.module):
        if isinstance(module, nn.Linear):
            weight, bias = tensors[f"{name}.weight"].detach().double(), tensors.get(f"{name}.bias")
            square = 0.0 if bias is None else float(bias.detach().double().square().mean())
            step = Affine(float(weight.square().mean()), square, module.in_features, module.out_features)
            found.append((name, step))
        elif isinstance(module, _POINTWISE) and found:
            found.append((name, module))
        elif not isinstance(module, _SILENT):
            break
    return found


def _chi(steps: list[Step], slopes: np.ndarray) -> np.ndarray:
    """σ_w² E φ'² at dense layers that follow an activation."""
    found = np.full(len(steps), np.nan)
    for i in range(1, len(steps)):
        step = steps[i]
        if isinstance(step, Affine) and math.isfinite(slopes[i - 1]):
            found[i] = step.ins * step.weight * slopes[i - 1]
    return found
