"""What one definition of sharpness says so far, and how it says that it does not apply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FRACTIONS = (0.1, 0.3, 1.0)
"""The shares of its own radius at which a definition shows how it grows."""


class NotDefined(ValueError):
    """A definition that has no meaning for this subject; the message says why, and what would give it one."""


@dataclass(frozen=True)
class Found:
    """One definition's answer so far.

    Attributes:
        value: the sharpness; nan while it is not known.
        error: what ``protocol`` says it is: a residual, a standard error, rounding, or the gap between two starts.
        converged: whether the definition's own rule was met.
        done: share of its work that is done, in (0, 1].
        protocol: radius, norm, parameters, number of draws and starts, in words.
        radius: the size of the perturbation in the definition's own norm; nan where nothing is perturbed.
        lower_bound: the true value may be larger, since a maximum was searched for and not proved.
        rise: values at :data:`FRACTIONS` of the radius, with ``rise_error``; None where that has no meaning.
        notes: what else must be known to read the value.
        extra: further variables of the reading that came with it.
    """

    value: float = math.nan
    error: float = math.nan
    converged: bool = False
    done: float = 1.0
    protocol: str = ""
    radius: float = math.nan
    lower_bound: bool = False
    rise: tuple[float, ...] | None = None
    rise_error: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
