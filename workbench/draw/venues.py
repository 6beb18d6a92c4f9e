"""Venues of the field, as tueplots knows them: column widths in inches, font sizes in points, families.

They are found by looking into ``tueplots.bundles``, so that a newer tueplots brings its new venues along.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal

Column = Literal["half", "full"]
HOUSE = "workbench"
_GOLDEN = 0.618


@dataclass(frozen=True)
class Venue:
    """A column of a venue: ``width`` in inches, ``ratio`` of height to width of one panel, font sizes in points.

    ``fonts`` are the names that the venue's style asks for, best first; ``preamble`` is its LaTeX, used with
    ``usetex=True`` only.
    """

    name: str
    column: Column
    width: float
    ratio: float = _GOLDEN
    size: float = 9.0
    small: float = 7.0
    family: Literal["serif", "sans-serif"] = "serif"
    fonts: tuple[str, ...] = ()
    mathematics: str = "cm"
    preamble: str = field(default="", repr=False)

    @property
    def points(self) -> float:
        """The width in PostScript points (1/72 inch), which is what a PDF states."""
        return 72.0 * self.width


_HOUSE_STYLE: dict[str, Venue] = {
    "half": Venue(HOUSE, "half", 3.5, size=8.5, small=7.0, family="sans-serif", mathematics="dejavusans"),
    "full": Venue(HOUSE, "full", 7.0, size=8.5, small=7.0, family="sans-serif", mathematics="dejavusans"),
}


@lru_cache(maxsize=1)
def venues() -> dict[str, tuple[Column, ...]]:
    """Every venue there is with its columns: ``{"icml2024": ("half", "full"), "neurips2024": ("full",), ...}``."""
    from tueplots import bundles

    found = inspect.getmembers(bundles, inspect.isfunction)
    return {name: _columns(make) for name, make in found if not name.startswith("_") and not _dark(name)}


def _dark(name: str) -> bool:
    return name.endswith("dark_bg")


def _columns(make: Any) -> tuple[Column, ...]:
    return ("half", "full") if "column" in inspect.signature(make).parameters else ("full",)


def venue(name: str | None = None, column: Column | None = None) -> Venue:
    """A venue's column; without a name, a house style (3.5 and 7 inches wide); without a column, the narrower one.

    Raises:
        ValueError: no such venue, or the venue has no such column; the message names those that exist.
    """
    if name is None or name == HOUSE:
        return _HOUSE_STYLE[_checked(HOUSE, ("half", "full"), column)]
    known = venues()
    if name not in known:
        raise ValueError(f"There is no venue {name!r}.{_close(name, known)} Venues are {', '.join(known)}.")
    return _from_bundle(name, _checked(name, known[name], column))


def _close(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(str(name).lower().replace(" ", ""), known, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _checked(name: str, columns: tuple[Column, ...], column: str | None) -> Column:
    if column is None:
        return columns[0]
    for c in columns:
        if c == column:
            return c
    has = " and ".join(map(repr, columns))
    raise ValueError(f"Venue {name!r} has no column {column!r}; it has {has}. Pass column={columns[0]!r}.")


@cache
def _from_bundle(name: str, column: Column) -> Venue:
    from tueplots import bundles

    make = getattr(bundles, name)
    takes = inspect.signature(make).parameters
    choice = {"column": column} if "column" in takes else {}
    tex = make(**choice)
    plain = make(**choice, usetex=False) if "usetex" in takes else tex
    width, height = tex["figure.figsize"]
    family = _family(plain)
    return Venue(
        name=name,
        column=column,
        width=float(width),
        ratio=min(float(height) / float(width), _GOLDEN),
        size=float(tex["font.size"]),
        small=float(tex["legend.fontsize"]),
        family=family,
        fonts=_wanted(plain, family),
        mathematics=plain.get("mathtext.fontset", "cm" if family == "serif" else "stixsans"),
        preamble=tex.get("text.latex.preamble", ""),
    )


def _family(rc: dict[str, Any]) -> Literal["serif", "sans-serif"]:
    named = rc.get("font.family", "serif")
    return "serif" if named == "serif" else "sans-serif"


def _wanted(rc: dict[str, Any], family: str) -> tuple[str, ...]:
    """Font names of the style; a style that leaves them to LaTeX gets Computer Modern, which is LaTeX' own."""
    names = rc.get(f"font.{family}")
    if names:
        return tuple(str(n) for n in names)
    return ("Latin Modern Roman", "CMU Serif") if family == "serif" else ("Latin Modern Sans", "CMU Sans Serif")
