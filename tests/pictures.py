"""Figures with every mark, scale and kind of gap, and a small probe that draws them, for the tests of drawing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from workbench.figure import (
    Axis,
    Band,
    Bars,
    Contour,
    Figure,
    Heat,
    Line,
    Panel,
    Points,
    Rule,
    Stems,
    Surface,
    Text,
)
from workbench.probe import Probe, Reading, Variable
from workbench.schema import Doc


def valley(points: int = 13) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid with unequal sides and curvatures, all values positive: z[j, i] belongs to (x[i], y[j])."""
    x, y = np.linspace(-1, 1, points), np.linspace(-2, 2, points + 4)
    return x, y, 0.02 + x[None, :] ** 2 + 5 * y[:, None] ** 2


def holes(z: np.ndarray) -> np.ndarray:
    """The same values with a NaN, an Inf and a value below zero planted."""
    out = z.copy()
    out[2, 3], out[7, 8], out[11, 1] = np.nan, np.inf, -1.0
    return out


def field(kind: Any = Contour, scale: Any = "log", planted: bool = True, points: int = 13, **more: Any) -> Figure:
    """One panel with a field; ``planted`` puts three values into it that a logarithm cannot show."""
    x, y, z = valley(points)
    mark = kind(x, y, holes(z) if planted else z, **more)
    return Figure((Panel((mark,), Axis("direction 1"), Axis("direction 2"), Axis("loss", scale, "nats")),))


def spectrum() -> Figure:
    """A density with atoms on a symlog axis, an interval, and a point that has not converged."""
    x = np.concatenate([-np.logspace(1, -4, 40), np.logspace(-4, 3, 60)])
    density = 30 * np.exp(-(np.log10(np.abs(x)) ** 2))
    marks = (
        Band(x, density - 1, density + 1, "95 % interval"),
        Line(x, density, "bulk"),
        Stems([900.0, 300.0, 80.0], [0.5, 0.2, 0.3], "atoms", "second"),
        Points([-9.0], [0.1], label="not converged", role="unconverged"),
        Rule(0.0, "x", "zero"),
    )
    panel = Panel(marks, Axis("eigenvalue λ", "symlog", threshold=1e-3), Axis("density", "log"), title="Spectrum")
    return Figure((panel,), title="Hessian <spectrum>", note="on 512 of 1797 examples")


def curves() -> Figure:
    """Two panels: curves with a gap and error bars on logarithms, and named bars."""
    step = np.unique(np.logspace(0, 4, 30).astype(int)).astype(float)
    loss = 2 * step**-0.3
    loss[5] = np.nan
    left = (
        Line(step, loss, "train"),
        Points(step[::5], loss[::5], 2 * loss[::5], "measured", "third"),
        Rule(0.1, "y", "target"),
        Text(10.0, 0.2, r"a $remark_1 & 50 % of {x}^2 # \ <y>"),
    )
    right = (Bars(np.arange(3.0), [0.1, -0.2, 0.3], [0.01, np.nan, 0.05], names=("NC_1", "NC²", "‖θ‖ ≥ ½")),)
    panels = (
        Panel(left, Axis("step", "log"), Axis("loss", "log", "nats")),
        Panel(right, Axis("measure"), Axis("value")),
    )
    return Figure(panels, title="Curves")


def alignment() -> Figure:
    """Signed values around zero."""
    rng = np.random.default_rng(0)
    heat = Heat(np.arange(6.0), np.arange(4.0), rng.normal(size=(4, 6)), diverging=True)
    return Figure((Panel((heat,), Axis("unit"), Axis("layer"), Axis("alignment")),))


def landscape() -> Figure:
    """Contours beside a surface with a path on its floor, both with gaps."""
    plane, solid = field().panels[0], field(Surface).panels[0]
    plane = dataclasses.replace(plane, marks=(*plane.marks, Points([0.0], [0.0], label="model")), square=True)
    path = Line([-1.0, 0.0], [-2.0, 0.0], role="second")
    return Figure((plane, dataclasses.replace(solid, marks=(*solid.marks, path))), note="on 10 examples")


PICTURES = {
    "spectrum": spectrum,
    "curves": curves,
    "alignment": alignment,
    "landscape": landscape,
    "contour": field,
    "heat": lambda: field(Heat, "symlog"),
    "surface": lambda: field(Surface, "linear"),
}


@dataclass(frozen=True)
class Drawn(Probe[Any]):
    """A probe whose readings are drawn as one of the pictures."""

    picture: Annotated[str, Doc("which picture")] = "contour"
    variables = (Variable("loss", ("u", "v"), "the loss", "nats"),)

    def stream(self, subject: Any, draw: Any) -> Any:
        """Nothing is measured: readings come from :func:`reading`."""
        yield from ()

    def summary(self, data: Any) -> dict[str, Any]:
        """The smallest value with an error."""
        return {"loss": float(data.loss.min()), "loss_error": 0.1}

    def figure(self, data: Any) -> Figure:
        """The picture that was asked for."""
        return PICTURES[self.picture]()


def reading(picture: str = "contour", size: int = 9, **provenance: Any) -> Reading:
    """A finished reading with random values and with provenance."""
    values = np.random.default_rng(1).normal(size=(size, size))
    made = Drawn(picture).reading(1.0, {"loss": values}, converged=True, notes=("autodiff ignores kinks",))
    facts = {"seed": 3, "fingerprint": "ab" * 16, "subject": {"model": "Net", "on": "on 10 of 20 examples"}}
    return dataclasses.replace(made, provenance={**facts, "versions": {"torch": "2.13.0"}, **provenance})
