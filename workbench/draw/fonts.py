"""Fonts that exist: the venue's where installed, else one with the same letter widths, and the substitution said."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

from workbench.draw.venues import Venue

_TIMES = ("Times", "Times New Roman", "TeX Gyre Termes", "Nimbus Roman", "Liberation Serif", "STIXGeneral")
_HELVETICA = ("Helvetica", "Arial", "TeX Gyre Heros", "Nimbus Sans", "Liberation Sans", "DejaVu Sans")
_PALATINO = ("Palatino", "TeX Gyre Pagella", "P052", "STIXGeneral")
_MODERN = ("Latin Modern Roman", "CMU Serif", "STIXGeneral")
_KIN = {"Times": _TIMES, "Palatino": _PALATINO, "Latin Modern Roman": _MODERN, "Helvetica": _HELVETICA}
_LAST = {"serif": "DejaVu Serif", "sans-serif": "DejaVu Sans"}


@dataclass(frozen=True)
class Choice:
    """The font in use, the one wanted, and the fallback that has the letters the first one lacks."""

    name: str
    wanted: str
    fallback: str

    @property
    def words(self) -> str:
        """What to record: the font, and what it stands in for."""
        same = self.name == self.wanted
        return self.name if same else f"{self.name} in place of {self.wanted}, which is not installed"


@cache
def choose(venue: Venue) -> Choice:
    """The first installed font among the venue's own, their equals in letter widths, and matplotlib's own."""
    own = venue.fonts or _HELVETICA
    kin = next((k for name, k in _KIN.items() if name in own), _TIMES if venue.family == "serif" else _HELVETICA)
    last = _LAST[venue.family]
    installed = _installed()
    name = next((n for n in (*own, *kin) if n in installed), last)
    return Choice(name, own[0], last)


@lru_cache(maxsize=1)
def _installed() -> frozenset[str]:
    from matplotlib.font_manager import fontManager

    return frozenset(f.name for f in fontManager.ttflist)
