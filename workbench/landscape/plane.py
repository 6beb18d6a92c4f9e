"""The loss on a plane through the model: two directions, one grid, coarse to fine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr

from workbench.figure import Figure
from workbench.fingerprint import digest
from workbench.landscape.axes import PlaneAxes, Span, plane_axes
from workbench.landscape.directions import mover
from workbench.landscape.filling import PREDICTED, VARIABLES, Filling, half_widths
from workbench.landscape.kinds import WORDS, Kind, adam_direction, axis_words, chosen, kinds
from workbench.landscape.picture import (
    agreement_words,
    field_of,
    here,
    note,
    own_field,
    panels,
    path_marks,
    quadratic_marks,
)
from workbench.landscape.points import expected_bytes
from workbench.landscape.preview import Preview, caption, summary_of
from workbench.landscape.quadratic import differentiable_twice
from workbench.landscape.refining import ROUGH, SURFACE, Refining, filled, refined, refined_note, sample_marks
from workbench.landscape.settings import ColourScale, View
from workbench.numerics.sampling import Draw
from workbench.operators.hessian import Hessian
from workbench.pace import Pace
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Range
from workbench.subject import Subject

NORMALIZATIONS = {
    "filter": "each filter of the direction gets the norm of the model's filter",
    "layer": "each tensor of the direction gets the norm of the model's tensor",
    "weight": "each entry is multiplied with the weight's size",
    "dfilter": "each filter of the direction has length 1",
    "dlayer": "each tensor of the direction has length 1",
    "none": "plain Gaussian",
}


@dataclass(frozen=True)
class Plane(Probe[Subject]):
    """The loss around a model on a plane: ``loss[i, j] = L(θ + u_i d1 + v_j d2)``, with the predicted quadratic.

    What it measures: mean loss, its standard error over the examples, the error rate, and the subject's own metrics
    (``wb.Subject(model, data, metrics={"reward": f})``), at every point of a points × points grid centred on the
    model, which is also evaluated exactly at (0, 0) (``loss_here``). Directions: Gaussian, scaled to the filters (Li
    et al. 2018, arXiv:1712.09913) or otherwise; leading eigenvectors of Hessian or Gauss-Newton matrix; the gradient;
    the optimizer's step; principal components of a recorded path (mean-centred axes, origin at this checkpoint). Both
    axes may differ. ``cosine`` is that of the angle between them, ``cosine_displacement`` of each to the way from the
    first recorded step to here. ``slope`` s and ``curvature`` C from the gradient and two Hessian products predict
    L + sᵀx + ½ xᵀC x at x = (u, v): ``inner_difference`` is its RMS difference from the losses over their RMS change in
    the inner half, ``agreement_radius`` the |x| up to which that ratio is at most a tenth. Units: loss per example;
    coordinates in the lengths of the directions.

    How to read it: with filter-normalised directions a step of 1 moves each filter by its own length: pictures of
    networks that differ only by a rescaling of ReLU units are the same. The centre is where the model stands. The
    ellipse is one level of the quadratic, and beside it the measured line of that level: where both agree, curvature
    at the model tells what is drawn. With ``reach="auto"`` each half-width is ``extent`` times the distance at which
    the quadratic predicts a rise of 1 in the loss per example (on the steeper side; negative curvature counts as
    none; at most the length of the weights that move), so that pictures of different models show rises alike.

    What it costs: one forward pass over the examples for each point and about two gradients more for the quadratic
    (plus about 30 curvature products for eigenvectors). A rough map of 3 × 3, 5 × 5, 9 × 9 points comes first.

    When it misleads: two directions out of millions, so a smooth picture is no proof of a smooth loss. Random
    directions are nearly but not exactly orthogonal (``cosine`` says how nearly). BatchNorm statistics stay frozen
    unless the policy is "recompute". A path's plane shows as large a share as ``explained_variance`` says,
    and a random walk alone gives about 0.76 for two components.

    Errors: ``loss_error`` is the standard error over examples of the mean; NaN and Inf are kept as they are. The
    agreement is that of the grid: a coarse one sees little near the model. With ``sampling="adaptive"`` the losses are
    evaluated where two interpolations disagree (7 × 7 points first), and ``surface`` is interpolated from them:
    ``surface_error`` is that disagreement, scaled by how far the newest losses were from what was expected, and
    ``relative_error`` its RMS. That is an estimate, too small in about one case of eight; a feature between all points
    is missed. With ``preview`` forward passes run in bfloat16, but for ``loss_here`` and derivatives:
    ``loss_preview_error`` is the largest difference from full precision at the model and on a grid of 3 × 3 points
    (elsewhere up to some three times as large), beside the other errors; how far the quadratic holds is then not told.
    """

    points: Annotated[
        int, Range(3, 201, 2), Doc("Grid points on each axis; a whole grid costs as much as its square.")
    ] = 65
    extent: Annotated[
        float,
        Range(1e-6, 100.0, log=True, soft=(0.01, 10.0)),
        Doc("Half-width: in filter lengths or weight distance, or times the path's reach (pca) or the automatic one."),
    ] = 1.0
    directions: Annotated[
        Literal["random", "hessian", "ggn", "gradient", "adam", "pca"],
        Doc("Along what the first axis runs, and the second unless said otherwise."),
        Choice(WORDS),
    ] = "random"
    normalization: Annotated[
        Literal["filter", "layer", "weight", "dfilter", "dlayer", "none"],
        Doc("How random directions are scaled to the weights; the other directions keep unit length."),
        Choice(NORMALIZATIONS),
    ] = "filter"
    second: Annotated[
        Literal["same", "random", "hessian", "ggn", "gradient", "adam", "pca"],
        Doc("Along what the second axis runs."),
        Choice({"same": "the next one of the first axis's kind; random where there is only one", **WORDS}),
    ] = "same"
    one_dim: Annotated[
        Literal["zero", "copy"],
        Doc("Where normalised random directions move tensors with at most one dim: biases and norm parameters."),
        Choice({"zero": "not at all", "copy": "along themselves, by their own length"}),
    ] = "zero"
    reach: Annotated[
        Literal["given", "auto"],
        Doc("Where the picture ends."),
        Choice({"given": "at extent", "auto": "at extent times the distance to a predicted rise of 1"}),
    ] = "given"
    centre_u: Annotated[float, Range(-1e6, 1e6, soft=(-1.0, 1.0)), Doc("Moves the picture along the first axis.")] = 0.0
    centre_v: Annotated[float, Range(-1e6, 1e6, soft=(-1.0, 1.0)), Doc("Moves it along the second axis.")] = 0.0
    norm: Annotated[
        Literal["subject", "eval", "batch", "recompute"],
        Doc("BatchNorm's statistics at each point; without such layers it does not matter."),
        Choice(
            {
                "subject": "as the subject has them",
                "eval": "the model's own running statistics",
                "batch": "of each micro-batch",
                "recompute": "estimated anew from the examples at each point",
            }
        ),
    ] = "subject"
    sampling: Annotated[
        Literal["grid", "adaptive"],
        Doc("Which points of the grid are evaluated."),
        Choice({"grid": "all of them", "adaptive": "where the surface is known least; the others are interpolated"}),
    ] = "adaptive"
    tolerance: Annotated[
        float,
        Range(1e-4, 1.0, log=True, soft=(0.003, 0.1)),
        Doc("Adaptive sampling stops at this stated RMS error of the (log) loss, over its standard deviation."),
    ] = 0.01
    most: Annotated[
        int,
        Range(9, 2000, soft=(25, 300)),
        Doc("Adaptive sampling evaluates at most so many points; a grid with no more is evaluated whole."),
    ] = 81
    preview: Preview = False
    scale: ColourScale = "log"
    view: View = "both"
    metric: Annotated[
        Literal["loss", "error_rate", "own"],
        Doc("Which of the recorded values is drawn."),
        Choice({"loss": "the loss", "error_rate": "share of wrong decisions", "own": "the subject's own metrics"}),
        Display(),
    ] = "loss"
    ellipse: Annotated[bool, Doc("Draw one level of the predicted quadratic, and of the loss."), Display()] = True

    variables: ClassVar[tuple[Variable, ...]] = (
        *VARIABLES,
        *PREDICTED,
        *SURFACE,
        Variable("cosine_displacement", ("direction",), "cosine to the way from the first recorded step to here"),
        Variable("explained_variance", ("direction",), "share of the path's variance along each direction"),
        Variable("path_u", ("path",), "first coordinate of the recorded path, projected"),
        Variable("path_v", ("path",), "second coordinate of the recorded path, projected"),
        Variable("path_distance", ("path",), "distance of the recorded path from the plane", "parameter distance"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Evaluate the origin, then the points from coarse to fine, the quadratic after the first rough map."""
        return self._stream(subject, draw, None)

    def resume(self, subject: Subject, draw: Draw, before: xr.Dataset) -> Iterator[Reading]:
        """As ``stream``, without the points that an earlier run evaluated."""
        return self._stream(subject, draw, before)

    def _stream(self, subject: Subject, draw: Draw, before: xr.Dataset | None) -> Iterator[Reading]:
        filling = self._filling(subject if self.norm == "subject" else subject.under(self.norm), draw)
        if before is not None:
            filling.restore(before)
        if filling.seen > ROUGH:
            filling.foresee()
        pace, rough = Pace(), False
        yield self._reading(filling)
        for _ in filling.explore():
            if filling.seen > ROUGH or filling.share == 1:
                filling.foresee()
            if pace.due() or filling.share == 1 or (filling.seen >= ROUGH and not rough):
                rough = filling.seen >= ROUGH
                yield self._reading(filling)

    def _filling(self, subject: Subject, draw: Draw) -> Filling:
        axes = self._axes(subject, draw)
        if not self._chosen:
            return Filling(subject, axes, preview=self.preview)
        return Refining(subject, axes, tolerance=self.tolerance, most=self.most, preview=self.preview)

    @property
    def _chosen(self) -> bool:
        """Whether points are chosen one after another: where the whole grid would take more."""
        return self.sampling == "adaptive" and self.points**2 > self.most

    def _axes(self, subject: Subject, draw: Draw) -> PlaneAxes:
        span = Span(self.second, self.one_dim, (self.centre_u, self.centre_v), self.reach)
        return plane_axes(subject, draw, self.directions, self.normalization, self.extent, self.points, span)

    def _reading(self, filling: Filling) -> Reading:
        """What is known now."""
        return self.reading(
            filling.share,
            filling.values(),
            coords=filling.coords,
            converged=filling.settled,
            notes=filling.notes,
            sizes={"path": 0, "along": 2},
        )

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Loss at the model, the extremes on the plane, angles, and how far the quadratic holds."""
        seen = data.loss.values[data.evaluated.values]
        finite = seen[np.isfinite(seen)]
        return {
            "loss_here": float(data.loss_here),
            "loss_here_error": float(data.loss_here_error),
            "loss_min": float(finite.min()) if finite.size else math.nan,
            "loss_max": float(finite.max()) if finite.size else math.nan,
            "points": int(seen.size),
            "not_finite": int(seen.size - finite.size),
            "cosine": float(data.cosine),
            "agreement_radius": float(data.agreement_radius),
            **({"interpolated_within": float(data.relative_error)} if refined(data) else {}),
            **summary_of(data),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """Contour map and surface of the finest complete grid, or interpolated; model, path and quadratic marked."""
        words = axis_words(self._kinds, self.normalization, data.explained_variance.values.tolist())
        square, say = self._square(data), refined_note if refined(data) else note
        drawn, beside = filled(data), (*path_marks(data), *sample_marks(data))
        own = [str(name) for name in data["own"].values] if self.metric == "own" else []
        if own:
            fields = [own_field(drawn, k, name, words, square) for k, name in enumerate(own)]
            maps = [panel for field in fields for panel in panels(field, "contour", (*beside, here()))]
            return Figure(tuple(maps), note=say(data, caption(data)))
        metric = "error_rate" if self.metric == "error_rate" else "loss"
        truth = quadratic_marks(drawn) if self.ellipse and metric == "loss" else ()
        field = field_of(drawn, metric, words, self.scale, square)
        agreement = agreement_words(drawn) if truth else ""
        return Figure(panels(field, self.view, (*beside, *truth, here())), note=say(data, caption(data), agreement))

    @property
    def _kinds(self) -> tuple[Kind, Kind]:
        return kinds(self.directions, self.second)

    def _square(self, data: xr.Dataset) -> bool:
        """Whether both axes have one unit and one length."""
        first, second = (kind == "random" for kind in self._kinds)
        width, height = half_widths(data["u"].values, data["v"].values)
        return first == second and "pca" not in self._kinds and bool(np.isclose(width, height))

    def zoomed(self, data: xr.Dataset, u: tuple[float, float], v: tuple[float, float]) -> Plane:
        """The settings that sample the range ``u`` × ``v`` of a reading's data, or the smallest of its shape around."""
        moved: dict[str, Any] = {}
        factor = 0.0
        for name, (low, high) in (("u", u), ("v", v)):
            ticks = data[name].values
            setting, half = f"centre_{name}", (ticks[-1] - ticks[0]) / 2
            factor = max(factor, (high - low) / 2 / half)
            moved[setting] = float(getattr(self, setting) + (low + high) / 2 - (ticks[0] + ticks[-1]) / 2)
        return dataclasses.replace(self, extent=float(self.extent * factor), **moved)

    def subject_at(self, subject: Subject, u: float, v: float, seed: int = 0) -> Subject:
        """The model at the point (``u``, ``v``) of the plane through ``subject``, for other probes to look at.

        The directions are made again from these settings and ``seed``, so that its loss is what a reading with that
        seed has there, to rounding. Only what decides the directions matters, not which part of the plane is drawn.
        It stands under the plane's BatchNorm policy, on weights of its own.

        Args:
            subject: the model in the middle, that the reading was made on.
            u: coordinate along the first direction, in its lengths.
            v: coordinate along the second.
            seed: the reading's, ``reading.provenance["seed"]``.

        Cost: two vectors and a copy of the weights; for eigenvectors about 30 curvature products more.

        Raises:
            ValueError: a coordinate is not finite, or the directions cannot be made of this subject.
        """
        if not (math.isfinite(u) and math.isfinite(v)):
            raise ValueError(f"a point of the plane has two finite coordinates; got u = {u:g}, v = {v:g}.")
        under = subject if self.norm == "subject" else subject.under(self.norm)
        draw = Draw(seed, self.name, under.size, under.dtype, under.device)
        first, second = chosen(under, draw, self._kinds, self.normalization, self.one_dim)
        moved = mover(under, first.direction, second.direction)(u, v)
        return under.at(moved, note=f"at u = {u:.6g}, v = {v:.6g} of a plane through the model (seed {seed})")

    @property
    def bearings(self) -> Plane:
        """The settings that decide where a point (u, v) lies, the others as they are by default."""
        plain, kept = Plane(), ("directions", "normalization", "second", "one_dim", "norm")
        return dataclasses.replace(plain, **{name: getattr(self, name) for name in kept})

    def estimate(self, subject: Subject) -> Cost:
        """Two directions, a moved copy, the graph of a chunk's gradient, and for eigenvectors a Lanczos basis."""
        eigen = {"hessian", "ggn"} & {self.directions, self.second}
        vectors = 6 + (40 if eigen else 0) + self.preview
        weights = subject.size * subject.dtype.itemsize
        surface = 8 * 8 * self.points**2
        passes = (self.most if self._chosen else self.points**2) + 1
        size = vectors * weights + surface + max(expected_bytes(subject), _graph_bytes(subject))
        return Cost(size, passes, f"{passes} forward passes over the examples")

    def context(self, subject: Subject) -> str:
        """A plane of a recorded path depends on the whole path, angles on its start, Adam's direction on the state."""
        path: Any = getattr(subject, "path", None)
        parts: list[Any] = []
        if path is not None:
            parts.append(path.fingerprint() if "pca" in self._kinds else path.weights(path.steps[0]))
        if "adam" in self._kinds:
            parts.append(adam_direction(subject))
        return digest(*parts) if parts else ""


def _graph_bytes(subject: Subject) -> int:
    """What two Hessian products take; 0 where the loss has none."""
    once = subject.with_plan(dataclasses.replace(subject.plan, retained=False))
    try:
        return sum(Hessian(once).expected_bytes())
    except RuntimeError as problem:
        if differentiable_twice(problem):
            raise
        return 0
