"""What roles look like: Okabe-Ito colours with a dash and a marker each, and colour maps kept as one list of anchors.

Every role differs from the others in dash and marker as well as in colour, so that a picture survives grey print and
colour blindness. The screen palette is lighter where the paper's colour would be weak on a dark theme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.figure import Role

Dash = Literal["solid", "dash", "dot", "dashdot"]


@dataclass(frozen=True)
class Look:
    """One role: colours on paper and on screen, dash, marker (circle, square, ...), opacity, and hollow markers."""

    paper: str
    screen: str
    dash: Dash = "solid"
    marker: str = "circle"
    alpha: float = 1.0
    hollow: bool = False
    width: float = 1.0


LOOKS: dict[Role, Look] = {
    "main": Look("#0072B2", "#3B97D3"),
    "second": Look("#D55E00", "#E0691A", "dash", "square"),
    "third": Look("#009E73", "#12A67C", "dashdot", "triangle"),
    "fourth": Look("#CC79A7", "#CC79A7", "dot", "diamond"),
    "reference": Look("#555B61", "#868E96", "dash", "cross", width=0.8),
    "uncertainty": Look("#0072B2", "#3B97D3", alpha=0.25, width=0.6),
    "unconverged": Look("#8A9096", "#959BA1", "dot", "circle", hollow=True, width=0.8),
}

BAND_ALPHA = 0.25

_MAPS: dict[str, tuple[str, ...]] = {
    "viridis": (
        *("#440154", "#481b6d", "#46327e", "#3f4788", "#365c8d", "#2e6e8e", "#277f8e", "#21918c"),
        *("#1fa187", "#2db27d", "#4ac16d", "#73d056", "#a0da39", "#d0e11c", "#fde725"),
    ),
    "diverging": (
        *("#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7"),
        *("#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"),
    ),
}


def look(role: Role) -> Look:
    """The look of a role.

    Raises:
        ValueError: the role does not exist; the message names those that do.
    """
    if role not in LOOKS:
        raise ValueError(f"There is no role {role!r}; roles are {', '.join(map(repr, LOOKS))}.")
    return LOOKS[role]


def colours(diverging: bool = False) -> tuple[str, ...]:
    """Evenly spaced anchors of the colour map: viridis, or blue-white-red for signed values around zero."""
    return _MAPS["diverging" if diverging else "viridis"]
