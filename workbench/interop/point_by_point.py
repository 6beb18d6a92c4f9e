"""What a second opinion on losses at the same points says, whether they lie on a line or on a plane."""

from __future__ import annotations

import math

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from workbench.interop import loss_landscapes
from workbench.interop.opinion import Answer, Row
from workbench.subject import Subject

Array = NDArray[np.float64]
PREVIEW = "a bfloat16 preview is not compared with others, which compute in full; measure with preview=False."


def rounding(subject: Subject, ours: Array) -> float:
    """What its losses may be off by: its weights sum as many in-place steps as it has points, each rounded."""
    finite = np.abs(ours[np.isfinite(ours)])
    return float(ours.size * torch.finfo(subject.dtype).eps * finite.max(initial=0.0))


def rms(values: Array) -> float:
    """The root of the mean square of the finite values; NaN where there are none."""
    finite = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else math.nan


def placed(found: xr.Dataset, how: str) -> list[Row]:
    """Where both have a value: their mean, and how far they are apart. The same examples: no sampling error.

    ``found`` has ``ours``, ``theirs``, their ``difference``, and the attribute ``rounding``; ``how`` theirs was placed.
    """
    both = np.isfinite(found.difference.values)
    ours, theirs = (float(a.values[both].mean()) if both.any() else math.nan for a in (found.ours, found.theirs))
    apart, bar = rms(found.difference.values), float(found.attrs["rounding"])
    words = f"at the {int(both.sum())} points that both evaluate"
    return [
        Row(f"mean loss, {how}", ours, 0.0, (Answer(loss_landscapes.NAME, theirs, words=words),), bar),
        Row(f"RMS difference, {how}", 0.0, 0.0, (Answer(loss_landscapes.NAME, apart),), bar),
    ]


def ranges(label: str, ours: Array, alone: Array, words: str) -> Row:
    """How far losses rise over ours, and over what it draws by itself: different points, so no bar."""
    spans = [float(np.ptp(a[np.isfinite(a)])) if np.isfinite(a).any() else math.nan for a in (ours, alone)]
    answer = Answer(loss_landscapes.NAME, spans[1], words=words)
    return Row(f"range of losses, {label}", spans[0], math.nan, (answer,))
