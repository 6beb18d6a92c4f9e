"""How far weights have moved, and in which direction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from workbench.figure import Axis, Bars, Figure, Panel, Rule
from workbench.numerics.basis import dot
from workbench.numerics.sampling import Draw
from workbench.operators.blocks import Group, Part, groups
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc
from workbench.several import Pair
from workbench.subject import Subject

TOTALS = ("displacement", "relative", "cosine", "angle")
_BY_LAYER = (*TOTALS, "share", "norm_first", "norm_second", "entries")


@dataclass(frozen=True)
class Displacement(Probe[Pair]):
    """Distance in parameter space between two moments of a training, or two networks: per layer and in total.

    What it measures, for the parameters θ_0 of the first subject and θ of the second, of each layer: ``displacement`` =
    ‖θ - θ_0‖, ``relative`` = ‖θ - θ_0‖ / ‖θ_0‖, ``cosine`` = ⟨θ, θ_0⟩ / (‖θ‖ ‖θ_0‖), ``angle`` its arc cosine,
    ``share`` = the layer's part of Σ ‖θ - θ_0‖². The same for all layers together (``total_...``), but without gains
    and offsets of normalisation layers, which start at one and zero whatever the rest does.

    How to read it: a lazy network moves by a small part of its length (for f scaled by α, ``relative`` ∝ 1/α); a rich
    one by as much as it is long. Two independent networks are √2 apart, at a right angle. A turn at constant length is
    ``angle``; a change of length alone leaves it 0.

    What it costs: one pass over the weights; no example is looked at.

    When it misleads: weight decay shrinks θ where nothing is learnt. Rescaling a normalised
    layer's weights and permuting units change distances and not the function. What started at zero has no relative
    distance (nan).

    Errors: exact. Source: Chizat, Oyallon and Bach 2019; Geiger, Spigler, Jacot and Wyart 2020.
    """

    level: Annotated[
        Literal["layer", "block"],
        Choice({"layer": "weights and biases of each module", "block": "modules that repeat, as one"}),
        Doc("What is taken together."),
    ] = "layer"

    looks_at: ClassVar[Look] = "pair"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("displacement", ("layer",), "‖θ - θ₀‖"),
        Variable("relative", ("layer",), "‖θ - θ₀‖ / ‖θ₀‖"),
        Variable("cosine", ("layer",), "cosine between θ and θ₀"),
        Variable("angle", ("layer",), "angle between θ and θ₀", "rad"),
        Variable("share", ("layer",), "part of the sum of squared displacements"),
        Variable("norm_first", ("layer",), "‖θ₀‖"),
        Variable("norm_second", ("layer",), "‖θ‖"),
        Variable("entries", ("layer",), "number of scalars"),
        Variable("normalisation", ("layer",), "gains and offsets of a normalisation, not in the total", kind="bool"),
        Variable("total_displacement", (), "‖θ - θ₀‖ of all layers"),
        Variable("total_relative", (), "‖θ - θ₀‖ / ‖θ₀‖ of all layers"),
        Variable("total_cosine", (), "cosine between θ and θ₀, all layers"),
        Variable("total_angle", (), "angle between θ and θ₀, all layers", "rad"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """Layer by layer; the total at the end."""
        subject.check_parameters()
        chosen = groups(subject.first, self.level)
        normal = normalisations(subject.first)
        still = np.array([set(group.names) <= normal for group in chosen])
        moved = [_Moved() for _ in chosen]
        for i, group in enumerate(chosen):
            moved[i] = _Moved.of(group, subject.first.params, subject.second.params)
            yield self._report(chosen, moved, still, (i + 1) / len(chosen))

    def _report(self, chosen: list[Group], moved: list[_Moved], still: np.ndarray, done: float) -> Reading:
        last = done >= 1
        values: dict[str, Any] = {name: [getattr(m, name) for m in moved] for name in _BY_LAYER if name != "share"}
        squares = np.array([m.squared for m in moved])
        if last:
            total = sum((m for m, left in zip(moved, still, strict=True) if not left), _Moved(0.0, 0.0, 0.0, 0.0, 0))
            values |= {f"total_{name}": getattr(total, name) for name in TOTALS}
            with np.errstate(invalid="ignore", divide="ignore"):
                values["share"] = squares / squares.sum()
        whole = f"without the {int(still.sum())} layers that normalise" if still.any() else "of all layers"
        notes = ("weights only: no example was looked at", f"total {whole}")
        known = last and bool(np.isfinite(squares).all())
        coords = {"layer": np.array([group.name for group in chosen])}
        return self.reading(done, values | {"normalisation": still}, coords=coords, converged=known, notes=notes)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The total, and the layer that moved the most for its size."""
        found: dict[str, Value] = {name: float(data[f"total_{name}"]) for name in TOTALS}
        relative = data.relative.values
        if np.isfinite(relative).any():
            found["most_moved"] = str(data["layer"].values[int(np.nanargmax(relative))])
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Relative distance and angle of each layer, with the total."""
        places, names = np.arange(1, data.sizes["layer"] + 1), tuple(str(n) for n in data["layer"].values)
        panels = [
            Panel((Bars(places, data[name].values * unit, names=names), _total(data, name, unit)), Axis(""), axis)
            for name, unit, axis in (
                ("relative", 1.0, Axis("‖θ - θ₀‖ / ‖θ₀‖")),
                ("angle", 180 / math.pi, Axis("angle to θ₀", unit="degrees")),
            )
        ]
        return Figure(tuple(panels))

    def estimate(self, subject: Pair) -> Cost:
        """One layer of both in float64."""
        largest = max(group.size for group in groups(subject.first, self.level))
        return Cost(4 * 8 * largest, 1, "one pass over the weights")


@dataclass(frozen=True)
class _Moved:
    """Sums over entries, ‖θ - θ₀‖², ‖θ₀‖², ‖θ‖² and ⟨θ, θ₀⟩, and what follows from them; nan before they are known."""

    squared: float = math.nan
    first: float = math.nan
    second: float = math.nan
    inner: float = math.nan
    entries: int = 0

    @classmethod
    def of(cls, group: Group, first: dict[str, Tensor], second: dict[str, Tensor]) -> _Moved:
        return sum((_part(part, first, second) for part in group.parts), cls(0.0, 0.0, 0.0, 0.0, 0))

    def __add__(self, other: _Moved) -> _Moved:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Moved(*(one + two for one, two in pairs))

    @property
    def displacement(self) -> float:
        return math.sqrt(self.squared)

    @property
    def norm_first(self) -> float:
        return math.sqrt(self.first)

    @property
    def norm_second(self) -> float:
        return math.sqrt(self.second)

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared / self.first) if self.first else math.nan

    @property
    def cosine(self) -> float:
        scale = self.norm_first * self.norm_second
        return max(-1.0, min(1.0, self.inner / scale)) if scale > 0 else math.nan

    @property
    def angle(self) -> float:
        """2 arcsin(half the chord of the unit vectors): right for small angles too, where the arc cosine is not."""
        scale = self.norm_first * self.norm_second
        if not scale > 0:
            return math.nan
        chord = (self.squared - (self.norm_first - self.norm_second) ** 2) / scale
        return 2 * math.asin(min(1.0, math.sqrt(max(chord, 0.0)) / 2))


def _part(part: Part, first: dict[str, Tensor], second: dict[str, Tensor]) -> _Moved:
    start = part.of(first[part.name]).detach().double().reshape(-1)
    end = part.of(second[part.name]).detach().double().reshape(-1).to(start.device)
    step = end - start
    sums = torch.stack([dot(step, step), dot(start, start), dot(end, end), dot(end, start)]).tolist()
    return _Moved(*sums, entries=part.size)


def normalisations(subject: Subject) -> set[str]:
    """Parameters of modules that normalise: gains and offsets."""
    found = set[str]()
    for path, module in subject.module.named_modules():
        if _normalises(module):
            found |= {f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
    return found


def _normalises(module: nn.Module) -> bool:
    """PyTorch's layers, and somebody's own that say so in their name and have vectors only."""
    if isinstance(module, nn.LayerNorm):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and all(p.ndim <= 1 for p in own)


def _total(data: xr.Dataset, name: str, unit: float) -> Rule:
    return Rule(float(data[f"total_{name}"]) * unit, label="total")
