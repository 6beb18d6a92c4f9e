"""Previews in bfloat16: the setting, how far their values are from full precision, and the words that say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
import xarray as xr

from workbench.probe import Value, Variable
from workbench.schema import Doc
from workbench.subject import Subject

Preview = Annotated[
    bool,
    Doc(
        "Forward passes in bfloat16: rougher, about twice as fast for wide layers. The reading says how far off it is."
    ),
]
PREVIEWED: tuple[Variable, ...] = (
    Variable(
        "loss_preview_error",
        (),
        "largest difference of a bfloat16 preview's loss from full precision, at the points checked",
        "loss per example",
    ),
    Variable("error_rate_preview_error", (), "the same of the error rate"),
    Variable("preview_checks", (), "points of a bfloat16 preview that were evaluated in full precision too"),
)
"""What says how far off a preview is; unknown (nan) in a reading in full precision."""


@dataclass(eq=False)
class Checks:
    """Points of a preview that were evaluated in full precision too, and the largest differences found there."""

    points: int = 0
    largest: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, rough: Mapping[str, float], exact: Mapping[str, float]) -> None:
        """One more point, as the preview has it and in full precision; values by metric."""
        self.points += 1
        for name in exact:
            known = self.largest.get(name, math.nan)
            self.largest[name] = float(np.fmax(known, apart(rough.get(name, math.nan), exact[name])))

    @property
    def values(self) -> dict[str, float]:
        """The variables of a reading; none before a point was checked."""
        found = {f"{name}_preview_error": self.largest.get(name, math.nan) for name in ("loss", "error_rate")}
        return {**found, "preview_checks": float(self.points)} if self.points else {}

    @property
    def words(self) -> tuple[str, ...]:
        """A note for the reading; none before a point was checked."""
        if not self.points:
            return ()
        off = self.largest.get("loss", math.nan)
        many = f"at the {self.points} points evaluated in full precision too, the model among them"
        at = many if self.points > 1 else "at the model"
        said = f"a preview in bfloat16: its losses are off by up to {off:.2g} {at}"
        return (f"{said}; what depends on small differences of them is not told",)


def apart(rough: float, exact: float) -> float:
    """|rough - exact|; infinite where one of them alone is finite, and unknown where neither is."""
    known = math.isfinite(rough) + math.isfinite(exact)
    return abs(rough - exact) if known == 2 else (math.inf, math.nan)[known == 0]


def check_precision(subject: Subject) -> None:
    """Raise ``ValueError`` where a preview would compute as in full: autocast leaves float64 as it is."""
    if subject.dtype == torch.float64:
        raise ValueError(
            "a bfloat16 preview is one of a model in float32; this one is in float64, which autocast leaves as it is: "
            "use wb.Subject(..., dtype=torch.float32), or preview=False."
        )


def preview_error(data: xr.Dataset) -> float:
    """How far a preview's losses are off where that was checked; nan for a reading in full precision."""
    return float(data.loss_preview_error) if "loss_preview_error" in data else math.nan


def doubt(data: xr.Dataset, metric: str) -> float:
    """What a preview adds to the error of a metric that is drawn; 0 in full precision."""
    name = f"{metric}_preview_error"
    found = float(data[name]) if name in data else math.nan
    return 0.0 if math.isnan(found) else found


def summary_of(data: xr.Dataset) -> dict[str, Value]:
    """The headline numbers that a preview has beside the others; none in full precision."""
    error = preview_error(data)
    return {} if math.isnan(error) else {"precision": "bfloat16 preview", "loss_preview_error": error}


def caption(data: xr.Dataset) -> str:
    """What the small print of a preview's picture says; empty in full precision."""
    error = preview_error(data)
    if math.isnan(error):
        return ""
    points = int(data.preview_checks)
    return f"bfloat16 preview: losses off by up to {error:.2g} ({points} point{'s' * (points > 1)} checked)"
