"""Local complexity: how many neurons change sign in a small neighbourhood of the inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from workbench.activations import Layer, catch, choose_layers
from workbench.data import Batch
from workbench.figure import Axis, Band, Figure, Line, Panel, Points, Role
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

PLACES = ("train", "test", "random")
NOISE = 10_000
"""Number of the first random vector that is an input; those below are directions."""
_ROLES: tuple[Role, ...] = ("main", "second", "reference")
_NOT_BENDS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention)
_STRAIGHT = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Hardshrink, nn.Softshrink)


@dataclass(frozen=True)
class LocalComplexity(Probe[Subject]):
    """Local complexity: the share of a layer's neurons whose sign changes within a small polytope around an input.

    What it measures: around each input x the vertices x ± r u_j, for ``directions`` orthonormal random u_j and
    r = ``radius`` times the median ‖x‖; a neuron counts when its pre-activation does not have one sign at all of them.
    ``fraction`` (place, layer) is the mean over inputs of the share of neurons that count, ``changing`` the number,
    on training inputs, on held-out ones, and on normal noise with the training inputs' mean and deviation in each
    entry. For piecewise linear nets it is how many linear regions' borders pass near x.

    How to read it: it falls, rises and falls again around training inputs as a net fits, memorises and generalises.

    What it costs: 2 ``directions`` forward passes over at most ``examples`` inputs of each place.

    When it misleads: the vertices' hull is no ball: a border between two vertices' cones is missed. r changes with the
    scale of the inputs. A smooth activation has no borders: the notes say that these are sign changes only. Inputs that
    are no real numbers (tokens) have no neighbourhood and are refused.

    Errors: standard errors over the inputs.

    Source: Humayun, Balestriero, Baraniuk 2024 (arXiv:2402.15555).
    """

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("fraction", ("place", "layer"), "share of neurons whose sign changes", error="fraction_error"),
        Variable("fraction_error", ("place", "layer"), "standard error of the mean over inputs"),
        Variable("changing", ("place", "layer"), "number of neurons whose sign changes", error="changing_error"),
        Variable("changing_error", ("place", "layer"), "standard error of the mean over inputs"),
        Variable("total", ("place",), "neurons of all layers whose sign changes", error="total_error"),
        Variable("total_error", ("place",), "standard error of the mean over inputs"),
        Variable("input_radius", (), "r, the distance of the vertices from the input"),
    )

    directions: Annotated[int, Range(1, 1000, soft=(2, 50)), Doc("Orthonormal directions, two vertices each.")] = 20
    radius: Annotated[
        float, Range(1e-6, 10.0, log=True, soft=(0.001, 1)), Doc("Distance of a vertex, over the median ‖x‖.")
    ] = 0.05
    examples: Annotated[int, Range(2, 1_000_000, soft=(16, 4096)), Doc("Inputs at most, of each place.")] = 1024
    layers: Annotated[
        str, Doc("Layers whose outputs are pre-activations, names and globs; auto takes what activations read.")
    ] = "auto"

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Batch after batch: training inputs, held-out ones, then noise."""
        layers, notes = _layers(subject, self.layers)
        spread = _Spread(_some(subject, self.examples))
        radius = self.radius * spread.median_norm
        units = directions(draw, spread.entries, self.directions)
        found = {place: list[Tensor]() for place in PLACES}
        sizes: list[int] = []
        held = () if subject.held_out is None else _some(subject.held_out, self.examples)
        todo = 2 * sum(1 for _ in _some(subject, self.examples)) + sum(1 for _ in held)
        for seen, (place, batch) in enumerate(self._todo(subject, draw, spread), 1):
            counts, sizes = _sign_changes(subject, layers, batch, units, radius)
            found[place].append(counts)
            values = _values(found, sizes) | {"input_radius": radius}
            coords = {"place": list(PLACES), "layer": [layer.name or "outputs" for layer in layers]}
            said = (*subject.notes, *notes)
            yield self.reading(seen / todo, values, coords=coords, converged=seen == todo, notes=said)

    def _todo(self, subject: Subject, draw: Draw, spread: _Spread) -> Iterator[tuple[str, Batch]]:
        """Every batch to look around, with its place."""
        yield from (("train", batch) for batch in _some(subject, self.examples))
        if subject.held_out is not None:
            yield from (("test", batch) for batch in _some(subject.held_out, self.examples))
        first = NOISE
        for batch in _some(subject, self.examples):
            x = batch.args[0]
            # Each input's noise has a number of its own, so that chunks of another size see the same.
            rows = [draw(first + k, size=spread.entries) for k in range(len(x))]
            noise, first = torch.stack(rows).reshape(x.shape).to(x), first + len(x)
            yield "random", _moved(batch, spread.mean.to(x) + spread.deviation.to(x) * noise)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Neurons of all layers that change sign, on average around an input of each place."""
        made: dict[str, Value] = {}
        for place in PLACES:
            here = data.sel(place=place)
            made |= {f"total_{place}": float(here.total), f"total_{place}_error": float(here.total_error)}
        return made

    def figure(self, data: xr.Dataset) -> Figure:
        """The share of sign changes by layer, around each kind of input."""
        at = np.arange(1.0, data.sizes["layer"] + 1)
        marks: list[Any] = []
        for place, role in zip(PLACES, _ROLES, strict=True):
            here = data.sel(place=place)
            share, error = here.fraction.values, np.nan_to_num(here.fraction_error.values)
            if np.isfinite(share).any() or place == "train":
                marks += [Band(at, share - error, share + error), Line(at, share, place, role)]
                marks.append(Points(at, share, role=role))
        return Figure((Panel(tuple(marks), Axis("layer"), Axis("share of neurons that change sign")),))

    def estimate(self, subject: Subject) -> Cost:
        """The counts of each input and layer, the directions, and one batch's activations with its inputs."""
        batch = next(iter(subject.batches(1)))
        entries = batch.args[0].numel() if batch.args and isinstance(batch.args[0], Tensor) else 0
        count = min(self.examples, subject.examples)
        held = 8 * (self.directions * entries + 3 * count * (32 + entries))
        passes = 2 * self.directions * (3 if subject.held_out is not None else 2)
        return Cost(held + subject.memory(), passes, f"{passes} forward passes over at most {self.examples} inputs")


def directions(draw: Draw, entries: int, count: int) -> Tensor:
    """Orthonormal random directions (min(count, entries), entries) in float64, on the draw's device."""
    rows = torch.stack([draw(k, size=entries).double() for k in range(min(count, entries))])
    return torch.linalg.qr(rows.T).Q.T


def _some(subject: Subject, limit: int) -> Iterator[Batch]:
    """The first ``limit`` inputs.

    Raises:
        ValueError: the input is not one tensor of real numbers.
    """
    left = limit
    for batch in subject.batches():
        x = batch.args[0] if len(batch.args) == 1 and not batch.kwargs else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(
                "LocalComplexity looks around inputs that are one tensor of real numbers; got tokens, or several "
                "inputs. Put the embedding outside the model, and give embedded inputs."
            )
        kept = min(left, batch.size)
        yield batch if kept == batch.size else dataclasses.replace(_moved(batch, x[:kept]), size=kept)
        left -= kept
        if left <= 0:
            return


def _moved(batch: Batch, inputs: Tensor) -> Batch:
    return dataclasses.replace(batch, args=(inputs,))


class _Spread:
    """Mean and standard deviation (1, ...) of each entry of the inputs, and the median of their norms; one pass."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        rows = torch.cat([batch.args[0].detach().double() for batch in batches])
        self.entries = rows[0].numel()
        self.median_norm = float(rows.flatten(1).norm(dim=1).median())
        self.mean, self.deviation = rows.mean(0, keepdim=True), rows.std(0, keepdim=True, correction=0)


def _layers(subject: Subject, wanted: str) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Where pre-activations are read, and what has to be said of them."""
    if wanted.strip() not in ("", "auto"):
        return choose_layers(subject, wanted), ()
    modules = dict(subject.module.named_modules())
    bends = {n: m for n, m in modules.items() if type(m).__module__ == nn.ReLU.__module__}
    bends = {n: m for n, m in bends.items() if not isinstance(m, _NOT_BENDS)}
    if bends:
        smooth = sorted({type(m).__name__ for m in bends.values() if not isinstance(m, _STRAIGHT)})
        said = (f"{', '.join(smooth)} has no borders of linear regions: these are sign changes",) if smooth else ()
        return tuple(Layer(name, "input") for name in bends), said
    affine = [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not affine:
        return choose_layers(subject), ("no activation module found: signs of every layer's outputs",)
    return tuple(map(Layer, affine[:-1] or affine)), (
        "no activation module found: outputs of linear maps but the last",
    )


def _sign_changes(
    subject: Subject, layers: tuple[Layer, ...], batch: Batch, units: Tensor, radius: float
) -> tuple[Tensor, list[int]]:
    """Neurons that change sign around each input, (n, layers) in float64, and how many neurons each layer has.

    nan for an input at which a pre-activation is nan.
    """
    x = batch.args[0]
    above, below = list[Tensor](), list[Tensor]()
    lost = torch.zeros(len(x), len(layers), dtype=torch.bool, device=x.device)
    for unit in units:
        step = (radius * unit).reshape(x.shape[1:]).to(x)
        for vertex in (x + step, x - step):
            features = catch(subject, layers, _moved(batch, vertex)).features
            signs = [features[layer].flatten(1) for layer in layers]
            over, under = [z > 0 for z in signs], [z <= 0 for z in signs]
            lost |= torch.stack([z.isnan().any(1) for z in signs], 1)  # nan has no sign
            above = [a | b for a, b in zip(above, over, strict=True)] if above else over
            below = [a | b for a, b in zip(below, under, strict=True)] if below else under
    counts = torch.stack([(a & b).sum(1) for a, b in zip(above, below, strict=True)], 1).double()
    return counts.masked_fill(lost, float("nan")), [a.shape[1] for a in above]


def _values(found: dict[str, list[Tensor]], sizes: list[int]) -> dict[str, NDArray[np.float64]]:
    """Means and their standard errors over inputs, of each place."""
    made = {n: np.full((len(PLACES), len(sizes)), np.nan) for n in ("changing", "changing_error")}
    made |= {n: np.full(len(PLACES), np.nan) for n in ("total", "total_error")}
    for row, place in enumerate(PLACES):
        if found[place]:
            counts = torch.cat(found[place]).cpu().numpy()
            for name, values in (("changing", counts), ("total", counts.sum(1))):
                made[name][row], made[f"{name}_error"][row] = values.mean(0), error_of_mean(values)
    return made | {"fraction": made["changing"] / sizes, "fraction_error": made["changing_error"] / sizes}
