"""The loss on the plane through two or three models, all of them marked."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.figure import AnyMark, Figure, Line, Points, Role
from workbench.landscape.axes import PlaneAxes
from workbench.landscape.directions import Direction, cosine, inner, norm, random_direction
from workbench.landscape.filling import VARIABLES, Filling
from workbench.landscape.picture import field_of, note, panels
from workbench.landscape.preview import Preview, caption, summary_of
from workbench.landscape.settings import ColourScale, Metric, View
from workbench.numerics.sampling import Draw
from workbench.pace import Pace
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.several import Pair, Runs
from workbench.subject import Subject

Array = NDArray[np.float64]
_ROLES: tuple[Role, ...] = ("second", "third", "fourth")
_CLOSE = 1e-6
"""Models lie on one line where the third is nearer to it than this share of its distance from the first."""


@dataclass(frozen=True)
class ModelsPlane(Probe[Runs]):
    """The loss on the plane through three models, or two: ``loss[i, j] = L(θ_1 + u_i d1 + v_j d2)``.

    What it measures: mean loss and error rate on a grid that holds all models and ``margin`` around them, with d1 =
    (θ_2 - θ_1) / ‖θ_2 - θ_1‖ and d2 the part of θ_3 - θ_1 orthogonal to it, of unit length (Garipov et al. 2018,
    arXiv:1802.10026); of two models, d2 is a Gaussian direction scaled to the filters and made orthogonal and unit
    alike. Given to it as ``wb.Runs({"a": one, "b": other, "c": third})``; of a trajectory the last step counts.
    ``model_u``, ``model_v`` and ``model_loss`` are the models' own places and losses. Units: loss per example;
    coordinates in parameter distance.

    How to read it: a ridge between two models is a barrier on the straight way; a valley that bends around it may join
    them (see ModeConnectivity). Distances in the picture are those in parameter space.

    What it costs: one forward pass over the examples for each point; with ``norm="recompute"`` and BatchNorm two.

    When it misleads: permuted units make networks that are alike look far apart. BatchNorm's statistics of the models
    are wrong between them, so they are estimated anew at each point by default. Frozen weights and buffers
    that differ between the models move along.

    Errors: ``loss_error`` is the standard error over examples of the mean; NaN and Inf are kept as they are. With
    ``preview`` the grid's forward passes run in bfloat16: ``loss_preview_error`` is the largest difference from full
    precision at the first model and on a grid of 3 × 3 points; the models' own losses are in full precision.
    """

    looks_at: ClassVar[Literal["runs"]] = "runs"

    points: Annotated[
        int, Range(3, 201, 2, soft=(5, 51)), Doc("Grid points on each axis; cost grows as its square.")
    ] = 15
    margin: Annotated[
        float, Range(0.0, 5.0, soft=(0.0, 1.0)), Doc("Room around the models, in their largest distance along an axis.")
    ] = 0.3
    norm: Annotated[
        Literal["recompute", "batch"],
        Doc("BatchNorm's statistics at each point; without such layers it does not matter."),
        Choice({"recompute": "estimated anew from the examples", "batch": "of each micro-batch"}),
    ] = "recompute"
    preview: Preview = False
    scale: ColourScale = "log"
    view: View = "contour"
    metric: Metric = "loss"

    variables: ClassVar[tuple[Variable, ...]] = (
        *VARIABLES,
        Variable("model_u", ("model",), "first coordinate of each model", "parameter distance"),
        Variable("model_v", ("model",), "second coordinate of each model", "parameter distance"),
        Variable("model_loss", ("model",), "mean loss at each model", "loss per example", "model_loss_error"),
        Variable("model_loss_error", ("model",), "standard error of model_loss over examples", "loss per example"),
        Variable("distance", ("model",), "distance of each model from the first", "parameter distance"),
        Variable("angle_cosine", (), "cosine of the angle at the first model between the two others"),
    )

    def stream(self, subject: Runs, draw: Draw) -> Iterator[Reading]:
        """The models themselves, then the grid from coarse to fine."""
        spanned, pace = _Spanned(members(subject), self, draw), Pace()
        yield spanned.reading()
        for _ in spanned.filling.explore():
            if pace.due() or spanned.filling.share == 1:
                yield spanned.reading()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Each model's loss, the extremes on the plane, distances and the angle."""
        seen = data.loss.values[data.evaluated.values]
        finite = seen[np.isfinite(seen)]
        found: dict[str, Value] = {}
        for k, label in enumerate(data["model"].values):
            found[f"loss ({label})"] = float(data.model_loss[k])
            found[f"loss ({label})_error"] = float(data.model_loss_error[k])
        return found | {
            "loss_min": float(finite.min()) if finite.size else math.nan,
            "loss_max": float(finite.max()) if finite.size else math.nan,
            "not_finite": int(seen.size - finite.size),
            "distance_max": float(data.distance.max()),
            "angle_cosine": float(data.angle_cosine),
            **summary_of(data),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """Contour map of the finest complete grid with the models on it, joined by straight lines."""
        labels = [str(label) for label in data["model"].values]
        across = f"towards {labels[2]}" if len(labels) > 2 else "along a random direction"
        words = (f"from {labels[0]} to {labels[1]} (distance)", f"{across}, orthogonal (distance)")
        field = field_of(data, self.metric, words, self.scale, square=True)
        u, v = data.model_u.values, data.model_v.values
        around = [*range(len(labels)), 0]
        marks: list[AnyMark] = [Line(u[around], v[around], "straight", "reference")]
        for k, (label, role) in enumerate(zip(labels, _ROLES, strict=False)):
            marks.append(Points(u[[k]], v[[k]], label=label, role=role))
        return Figure(panels(field, self.view, tuple(marks)), note=note(data, caption(data)))

    def estimate(self, subject: Runs) -> Cost:
        """The models, two directions, a moved copy, and the forward pass of a chunk."""
        first = members(subject)[next(iter(subject))]
        size = (
            (5 + len(subject) + self.preview) * first.size * first.dtype.itemsize + first.memory() + 64 * self.points**2
        )
        passes = self.points**2 + len(subject)
        return Cost(size, passes, f"{passes} forward passes over {first.examples} examples")


def members(runs: Runs) -> dict[str, Subject]:
    """Two or three subjects by label: those given, or the last recorded steps of trajectories.

    Raises:
        ValueError: fewer or more.
    """
    if len(runs) not in (2, 3):
        raise ValueError(f"a plane goes through two or three models; got {len(runs)}: wb.Runs({{'a': one, 'b': two}}).")
    return {
        label: one if isinstance(one, Subject) else cast("Subject", one.subject(one.steps[-1]))
        for label, one in runs.items()
    }


class _Spanned:
    """The plane through models while its grid is being filled."""

    def __init__(self, models: Mapping[str, Subject], probe: ModelsPlane, draw: Draw) -> None:
        self.probe, self.labels = probe, list(models)
        self.first, *others = models.values()
        for other in others:
            Pair(self.first, other).check_alike()
        self.ground = self.first.under(probe.norm)
        self.start = self.ground.tensors()
        gaps = [_gap(self.start, other) for other in others]
        if len(gaps) < 2:
            fit = dataclasses.replace(draw, size=self.first.size, dtype=self.first.dtype, device=self.first.device)
            gaps.append(random_direction(self.first, fit, 0, "filter"))
        along, across, self.places = _gram_schmidt(self._own(gaps[0]), self._own(gaps[1]), len(models))
        self.rows = _combined(gaps, along, across)
        self.filling = self._filling(gaps[: len(others)], probe)
        self.fixed = self._fixed(others, [self._own(gap) for gap in gaps[: len(others)]])

    def _own(self, gap: Mapping[str, Tensor]) -> Direction:
        return {name: gap[name] for name in self.ground.params}

    def _filling(self, gaps: list[Direction], probe: ModelsPlane) -> Filling:
        u, v = _ticks(self.places, probe.points, probe.margin)
        first, second = (self._own(row) for row in self.rows)
        statistics = set(self.ground.recomputed())
        others = set(itertools.chain(*gaps)) - set(self.ground.params) - statistics
        moving = sorted(name for name in others if any(bool(gap[name].any()) for gap in gaps))
        said = (f"{', '.join(moving[:4])} differ between the models and move along",) if moving else ()
        axes = PlaneAxes(first, second, u, v, {"cosine": cosine(first, second)}, said)
        beyond = self._beyond if moving else None
        return Filling(self.ground, axes, predict=False, there=beyond, preview=probe.preview)

    def _beyond(self, u: float, v: float) -> Subject:
        """The subject at (u, v) where more than the chosen parameters moves."""
        one, two = self.rows
        return self.ground.at({name: self.start[name] + u * d + v * two[name] for name, d in one.items()})

    def _fixed(self, others: list[Subject], gaps: list[Direction]) -> dict[str, Any]:
        """The models' places, losses and distances."""
        found = [self.filling.here, *(self.ground.at(other.tensors()).evaluate() for other in others)]
        return {
            "model_u": [u for u, _ in self.places],
            "model_v": [v for _, v in self.places],
            "model_loss": [one["loss"] for one in found],
            "model_loss_error": [one["loss_error"] for one in found],
            "distance": [0.0, *(norm(gap) for gap in gaps)],
            "angle_cosine": cosine(*gaps) if len(gaps) > 1 else math.nan,
        }

    def reading(self) -> Reading:
        """What is known now."""
        filling = self.filling
        return self.probe.reading(
            (filling.seen + 1) / (filling.total + 1),
            {**filling.values(), **self.fixed},
            coords=filling.coords | {"model": self.labels},
            converged=filling.seen == filling.total,
            notes=filling.notes,
        )


def _gap(start: Mapping[str, Tensor], other: Subject) -> Direction:
    """From the first model's tensors to another's, those of whole numbers left out."""
    there = other.tensors()
    return {name: there[name].to(t) - t for name, t in start.items() if t.is_floating_point()}


def _gram_schmidt(
    one: Direction, two: Direction, models: int
) -> tuple[tuple[float, float], tuple[float, float], list[tuple[float, float]]]:
    """Both unit directions as combinations (of gap 1, of gap 2), and where the models lie.

    Raises:
        ValueError: models that are equal, or lie on one line.
    """
    length = norm(one)
    if not length > 0:
        raise ValueError("the first two models are equal, so there is no plane through them; leave one out.")
    part = inner(two, one) / length
    rest = norm({name: t - part / length * one[name] for name, t in two.items()})
    if rest <= _CLOSE * norm(two):
        what = "the models lie on one line" if models > 2 else "the random direction moves nothing"
        raise ValueError(f"{what}, so they span no plane; use wb.landscape.Path for the line between two models.")
    places = [(0.0, 0.0), (length, 0.0), (part, rest)][:models]
    return (1 / length, 0.0), (-part / length / rest, 1 / rest), places


def _combined(
    gaps: list[Direction], along: tuple[float, float], across: tuple[float, float]
) -> tuple[Direction, Direction]:
    """The unit directions over all tensors that move; a random gap has only the chosen parameters."""
    one, two = gaps
    first = {name: along[0] * t for name, t in one.items()}
    second = {name: across[0] * t + across[1] * two.get(name, torch.zeros_like(t)) for name, t in one.items()}
    return first, second


def _ticks(places: list[tuple[float, float]], points: int, margin: float) -> tuple[Array, Array]:
    """Even ticks over all models with room around them; across two models, half their distance to both sides."""
    u, v = (np.array(c) for c in zip(*places, strict=True))
    if not v.any():
        v = np.array([-u.max(), u.max()]) / 2
    room = margin * max(np.ptp(u), np.ptp(v))
    first, second = (np.linspace(c.min() - room, c.max() + room, points) for c in (u, v))
    return first, second
