"""Where the loss curves downwards: the Hessian's extreme eigenvalues over a plane through the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Figure, Heat, Panel, Points
from workbench.landscape.axes import PlaneAxes, plane_axes
from workbench.landscape.directions import mover
from workbench.landscape.grid import coarse_to_fine
from workbench.landscape.settings import PlaneDirections, PlaneExtent, PlaneNormalization
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.sampling import Draw
from workbench.operators.hessian import Hessian
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

Array = NDArray[np.float64]
PRODUCTS = 40
"""Products that the two extreme eigenvalues at a point usually take."""
_NAMES = ("loss", "eigenvalue_max", "eigenvalue_max_residual", "eigenvalue_min", "eigenvalue_min_residual")


@dataclass(frozen=True)
class ConvexityMap(Probe[Subject]):
    """Negative against positive curvature over a plane through the model: ``ratio`` = max(0, -λ_min) / λ_max.

    What it measures: at each point θ + u_i d1 + v_j d2 the largest and the smallest eigenvalue of the Hessian of the
    loss in all parameters (not of the slice's own 2 x 2 Hessian), each by its own residual (Li et al. 2018,
    arXiv:1712.09913, who divide the one of larger magnitude). The loss at each point comes along.

    How to read it: 0 is convex as far as the residuals tell, 1 as much curvature down as up. A picture of a
    landscape that looks convex is one only where this is near 0.

    What it costs: about 40 Hessian products for each point, so choose few points; the corners and the middle come
    first. Memory: one more copy of the weights, the gradient's graph and 40 vectors.

    When it misleads: differentiation ignores kinks, so that a ReLU net's own curvature is only part of the story. The
    smallest eigenvalue of thousands is nearly always a little negative; look at its size beside the residual.
    BatchNorm statistics stay frozen unless the subject's policy is "recompute".

    Errors: ``ratio_error`` from both residuals; a point whose pairs did not converge is drawn as unknown.
    """

    points: Annotated[int, Range(3, 101, 2, soft=(3, 25)), Doc("Grid points on each axis; 40 products each.")] = 11
    extent: PlaneExtent = 1.0
    directions: PlaneDirections = "random"
    normalization: PlaneNormalization = "filter"
    tolerance: Annotated[
        float, Range(1e-4, 0.5, log=True, soft=(0.01, 0.2)), Doc("Residual over eigenvalue that counts as converged.")
    ] = 0.05

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("ratio", ("u", "v"), "negative over positive curvature", error="ratio_error"),
        Variable("ratio_error", ("u", "v"), "error of the ratio from the residuals"),
        Variable("loss", ("u", "v"), "mean loss", "loss per example"),
        Variable("eigenvalue_max", ("u", "v"), "largest eigenvalue", error="eigenvalue_max_residual"),
        Variable("eigenvalue_max_residual", ("u", "v"), "residual of the largest eigenvalue"),
        Variable("eigenvalue_min", ("u", "v"), "smallest eigenvalue", error="eigenvalue_min_residual"),
        Variable("eigenvalue_min_residual", ("u", "v"), "residual of the smallest eigenvalue"),
        Variable("converged", ("u", "v"), "both residuals within the tolerance", kind="bool"),
        Variable("evaluated", ("u", "v"), "whether the point was measured", kind="bool"),
        Variable("convex_share", (), "share of the points without negative curvature beyond its residual"),
        Variable("products", (), "Hessian products so far"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Point by point, from coarse to fine."""
        axes = plane_axes(subject, draw, self.directions, self.normalization, self.extent, self.points)
        at, shape = mover(subject, axes.first, axes.second), (self.points, self.points)
        values: dict[str, Any] = {name: np.full(shape, np.nan) for name in _NAMES}
        values |= {name: np.zeros(shape, dtype=bool) for name in ("converged", "evaluated")} | {"products": 0}
        for seen, (i, j) in enumerate(coarse_to_fine(self.points), 1):
            there = subject.at(at(float(axes.u[i]), float(axes.v[j])))
            for name, value in self._measured(there, draw).items():
                if name == "products":
                    values["products"] += value
                else:
                    values[name][i, j] = value
            yield self._reading(subject, axes, values, seen / self.points**2)

    def _measured(self, there: Subject, draw: Draw) -> dict[str, Any]:
        """The two ends of the spectrum at one point; nan where the loss is not finite."""
        with Hessian(there) as hessian:
            try:
                last = self._ends(hessian, draw)
            except ArithmeticError:  # a loss that is not finite has no curvature; its own value says so
                return {"loss": hessian.loss, "evaluated": True, "products": hessian.products}
            return {
                "loss": hessian.loss,
                "eigenvalue_max": last.top_values[0],
                "eigenvalue_max_residual": last.top_residuals[0],
                "eigenvalue_min": last.bottom_values[0],
                "eigenvalue_min_residual": last.bottom_residuals[0],
                "converged": last.done,
                "evaluated": True,
                "products": hessian.products,
            }

    def _ends(self, hessian: Hessian, draw: Draw) -> Krylov:
        states = lanczos(
            hessian,
            draw(1000),
            top=1,
            bottom=1,
            tolerance=self.tolerance,
            near_zero=self.tolerance,
            fresh=lambda i: draw(1001 + i),
        )
        *_, last = states
        return last

    def _reading(self, subject: Subject, axes: PlaneAxes, values: dict[str, Any], done: float) -> Reading:
        high, low = values["eigenvalue_max"], values["eigenvalue_min"]
        doubt = (values["eigenvalue_max_residual"], values["eigenvalue_min_residual"])
        ratio, error = negative_share(high, low, *doubt)
        known = values["converged"]
        convex = float((low[known] >= -doubt[1][known]).mean()) if known.any() else math.nan
        return self.reading(
            done,
            values | {"ratio": ratio, "ratio_error": error, "convex_share": convex},
            coords={"u": axes.u, "v": axes.v},
            converged=done == 1 and bool(known.all()),
            notes=(*subject.notes, *axes.notes),
        )

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The ratio at the model and its extremes, and how much of the plane is convex."""
        middle = self.points // 2
        ratio = data.ratio.values[data.converged.values]
        here = (float(data.ratio[middle, middle]), float(data.ratio_error[middle, middle]))
        odd = self.points % 2 == 1
        return {
            "ratio_here": here[0] if odd else math.nan,
            "ratio_here_error": here[1] if odd else math.nan,
            "ratio_max": float(ratio.max()) if ratio.size else math.nan,
            "convex_share": float(data.convex_share),
            "points": int(data.evaluated.sum()),
            "products": int(data.products),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """The ratio as a map, unknown where a point was not measured or did not converge; the model marked."""
        u, v = data["u"].values, data["v"].values
        z = np.where(data.converged.values, data.ratio.values, np.nan).T
        top = np.nanmax(z, initial=0.0) if np.isfinite(z).any() else 0.0
        colour = Axis("negative / positive curvature", limits=(0.0, float(top) or 1.0))
        marks: tuple[AnyMark, ...] = (Heat(u, v, z), Points([0.0], [0.0], label="model", role="reference"))
        square = self.directions != "pca"
        return Figure((Panel(marks, Axis("direction 1"), Axis("direction 2"), colour, square=square),))

    def estimate(self, subject: Subject) -> Cost:
        """A second copy of the weights, a Lanczos basis, and the gradient's graph."""
        kept, working = Hessian(subject).expected_bytes()
        products = PRODUCTS * self.points**2
        size = 48 * subject.size * subject.dtype.itemsize + kept + working
        return Cost(size, products, f"about {products} Hessian products on {subject.examples} examples")


def negative_share(high: Array, low: Array, high_error: Array, low_error: Array) -> tuple[Array, Array]:
    """max(0, -low) / high and its error, high_error and low_error propagated; nan where nothing curves upwards."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(high > 0, np.maximum(-low, 0.0) / high, np.nan)
        return ratio, np.where(high > 0, (low_error + ratio * high_error) / high, np.nan)
