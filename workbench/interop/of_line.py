"""What loss-landscapes says about a :class:`~workbench.landscape.line.Line`, point by point."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from workbench.interop import loss_landscapes
from workbench.interop.opinion import Answer, Opinion, Row
from workbench.interop.point_by_point import PREVIEW, placed, ranges, rms, rounding
from workbench.landscape.directions import mover
from workbench.landscape.line import line_direction
from workbench.numerics.sampling import Draw
from workbench.probe import Probe, Reading
from workbench.subject import Subject

Array = NDArray[np.float64]
MISSING = "it steps before it evaluates: its array begins one step after the start, which it leaves out"
ALONE = (
    "its own direction is uniform instead of Gaussian, all positive before normalisation and so nearly the same in "
    "each run; biases and norm parameters move by their own size; its line goes one way from the model, which it "
    "leaves out, and its default distance of 0.1 makes it ten times as long as all weights: a larger one is shorter"
)


def why_not(probe: Probe[Any]) -> str:
    """Any line in full precision: the package is handed both ends."""
    return PREVIEW if getattr(probe, "preview", False) else ""


def ask(reading: Reading, subject: Subject, seconds: float) -> Opinion:
    """The package between the ends of our line, as returned and put right, and along its own.

    Cost: about twice the line's points in forward passes, or what is done of them within ``seconds``.
    """
    began = time.monotonic()
    found = compared(reading, subject, 2 * seconds / 3)
    alone, said = _alone(reading, subject, began + seconds)
    rows = (*placed(found, "put right"), _returned(found), ranges("its own direction", found.ours.values, alone, said))
    count = found.sizes["row"]
    notes = [f"loss-landscapes was given copies of the weights at both ends of our line, and {count} steps"]
    missing = int(np.isnan(found.returned.values).sum())
    notes += [f"{missing} of its {count} points are not numbers, or time was up"] if missing else []
    return Opinion(reading.probe.name, subject.describe()["on"], rows, tuple(notes))


def compared(reading: Reading, subject: Subject, seconds: float = 60.0) -> xr.Dataset:
    """Both curves at our points.

    ``ours`` and ``theirs`` (alpha,): ours, and theirs where it evaluated it, NaN at the start; ``difference`` theirs -
    ours; ``returned`` (row,): its array as it comes. Points beyond ``seconds`` are NaN.
    """
    deadline = time.monotonic() + seconds
    probe: Any = reading.probe
    ours, alpha = reading.data.loss.values, reading.data["alpha"].values
    draw = Draw(int(reading.provenance["seed"]), probe.name, subject.size, subject.dtype, subject.device)
    along, _ = line_direction(subject, draw, probe.direction, probe.normalization)
    at = mover(subject, along, {name: torch.zeros_like(d) for name, d in along.items()})
    start, end = (at(float(alpha[k]), 0.0) for k in (0, -1))
    returned = loss_landscapes.between(subject.at(start), end, len(alpha) - 1, deadline)
    theirs = np.concatenate([[np.nan], returned])
    curves = {name: ("alpha", a) for name, a in (("ours", ours), ("theirs", theirs), ("difference", theirs - ours))}
    return xr.Dataset({**curves, "returned": ("row", returned)}, {"alpha": alpha}).assign_attrs(
        rounding=rounding(subject, ours)
    )


def _alone(reading: Reading, subject: Subject, deadline: float) -> tuple[Array, str]:
    try:
        steps, seed = len(reading.data["alpha"]) - 1, int(reading.provenance["seed"])
        return loss_landscapes.alone_along(subject, steps, seed, deadline), ALONE
    except (TypeError, ValueError) as problem:
        return np.full(1, np.nan), str(problem)


def _returned(found: xr.Dataset) -> Row:
    """Its array taken for what it seems to be: entry i at our α_i."""
    apart = rms(found.returned.values - found.ours.values[:-1])
    answer = Answer(loss_landscapes.NAME, apart, words=MISSING)
    return Row("RMS difference, as returned", 0.0, 0.0, (answer,), float(found.attrs["rounding"]))
