"""What loss-landscapes says about a :class:`~workbench.landscape.plane.Plane`, point by point."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.interop import loss_landscapes
from workbench.interop.opinion import Answer, Opinion, Row
from workbench.interop.point_by_point import PREVIEW, placed, ranges, rms, rounding
from workbench.landscape.axes import Span, plane_axes
from workbench.landscape.directions import Direction, mover
from workbench.numerics.sampling import Draw
from workbench.probe import Probe, Reading
from workbench.subject import Subject

Array = NDArray[np.float64]
SHIFT = "every second row of its array lies one step off the others, and the last row and column are not evaluated"
MIDDLE = "its array has no middle where the model is; this row of it lies one step off along the second axis"
ALONE = (
    "its own directions are uniform instead of Gaussian, the first all positive and so nearly the same in each run; "
    "normalising them afterwards undoes their being orthogonal; biases and norm parameters move by their own size; "
    "each side of its plane is as long as all weights, over its distance: a larger distance is a smaller plane"
)


def why_not(probe: Probe[Any]) -> str:
    """Any plane in full precision: the package is handed our directions."""
    return PREVIEW if getattr(probe, "preview", False) else ""


def ask(reading: Reading, subject: Subject, seconds: float) -> Opinion:
    """The package along our directions, as returned and with its rows put right, and along its own.

    Cost: about twice the plane's points in forward passes, or what is done of them within ``seconds``.
    """
    began = time.monotonic()
    found = compared(reading, subject, 2 * seconds / 3)
    alone, said = _alone(reading, subject, began + seconds)
    rows = (
        *placed(found, "rows put right"),
        *_returned(found),
        ranges("its own directions", found.ours.values, alone, said),
    )
    missing = int(np.isnan(found.returned.values).sum())
    notes = [f"loss-landscapes was given copies of the weights, our two directions and {len(found.returned)} steps"]
    notes += [f"{missing} of its {found.returned.size} points are not numbers, or time was up"] if missing else []
    return Opinion(reading.probe.name, subject.describe()["on"], rows, tuple(notes))


def compared(reading: Reading, subject: Subject, seconds: float = 60.0) -> xr.Dataset:
    """Both surfaces of a plane on its grid.

    ``ours`` and ``theirs`` (u, v): ours, and theirs with its rows put right, NaN where it does not evaluate;
    ``difference`` theirs - ours; ``returned`` (row, column): its array as it comes. Points beyond ``seconds`` are NaN.
    """
    deadline = time.monotonic() + seconds
    ours, axes = reading.data.loss.values, [reading.data[name].values for name in ("u", "v")]
    moved, first, second = _spanned(reading, subject, axes)
    returned = loss_landscapes.along(moved, first, second, len(ours) - 1, deadline)
    theirs = loss_landscapes.put_right(returned)
    grid = {name: (("u", "v"), a) for name, a in (("ours", ours), ("theirs", theirs), ("difference", theirs - ours))}
    return xr.Dataset({**grid, "returned": (("row", "column"), returned)}, {"u": axes[0], "v": axes[1]}).assign_attrs(
        rounding=rounding(subject, ours)
    )


def _spanned(reading: Reading, subject: Subject, axes: list[Array]) -> tuple[Subject, Direction, Direction]:
    """The middle of the reading's grid and the moves of one step along each axis, drawn again from its seed."""
    probe: Any = reading.probe
    subject = _under(probe, subject)
    draw = Draw(int(reading.provenance["seed"]), probe.name, subject.size, subject.dtype, subject.device)
    span = Span(probe.second, probe.one_dim, (probe.centre_u, probe.centre_v), probe.reach)
    found = plane_axes(subject, draw, probe.directions, probe.normalization, probe.extent, probe.points, span)
    middle = [float(a[0] + a[-1]) / 2 for a in axes]
    moved = subject.at(mover(subject, found.first, found.second)(*middle))
    one, two = (
        {k: d * float(a[1] - a[0]) for k, d in v.items()}
        for v, a in zip((found.first, found.second), axes, strict=True)
    )
    return moved, one, two


def _under(probe: Any, subject: Subject) -> Subject:
    return subject if probe.norm == "subject" else subject.under(probe.norm)


def _alone(reading: Reading, subject: Subject, deadline: float) -> tuple[Array, str]:
    probe: Any = reading.probe
    try:
        seed = int(reading.provenance["seed"])
        return loss_landscapes.alone(_under(probe, subject), probe.points - 1, seed, deadline), ALONE
    except (TypeError, ValueError) as problem:
        return np.full((1, 1), np.nan), str(problem)


def _returned(found: xr.Dataset) -> list[Row]:
    """Its array taken for what it seems to be: row i, column j at our u_i, v_j."""
    raw, bar = found.returned.values, float(found.attrs["rounding"])
    apart, middle = rms(raw - found.ours.values[:-1, :-1]), len(raw) // 2
    here = float(found.ours.values[middle, middle])
    return [
        Row("RMS difference, as returned", 0.0, 0.0, (Answer(loss_landscapes.NAME, apart, words=SHIFT),), bar),
        Row("loss in the middle", here, 0.0, (_middle(float(raw[middle, middle]), middle),), bar),
    ]


def _middle(value: float, place: int) -> Answer:
    return Answer(loss_landscapes.NAME, value, words="" if place % 2 else MIDDLE)
