"""What every trace on screen needs: where it goes, what Plotly is given along an axis, and words under the pointer."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.draw.layout import Place
from workbench.draw.rulers import Ruler
from workbench.draw.sheet import Sheet

INK = "#808890"
GRID = "rgba(128,136,144,0.25)"
VEIL = "#C3C8CD"
HATCH = "#7B838B"
END = "<extra></extra>"
Trace = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Where the traces of a panel go: its sheet, its number from 1, and its rectangle."""

    sheet: Sheet
    number: int
    place: Place

    @property
    def suffix(self) -> str:
        """Empty for the first panel, else its number: how Plotly names axes, scenes and legends."""
        return "" if self.number == 1 else str(self.number)

    @property
    def solid(self) -> bool:
        """Whether the panel is three-dimensional."""
        return self.sheet.panel.solid

    def xy(self, x: Any, y: Any) -> Trace:
        """Points in the plane of the panel: on its two axes, or on the floor of its scene."""
        if not self.solid:
            across, along = screen_values(self.sheet.x, x), screen_values(self.sheet.y, y)
            return {"x": across, "y": along, "xaxis": f"x{self.suffix}", "yaxis": f"y{self.suffix}"}
        across, along = f32(self.sheet.x.forward(x)), f32(self.sheet.y.forward(y))
        floor = np.full(across.shape, self.sheet.height.span[0], dtype=np.float32)
        return {"type": "scatter3d", "x": across, "y": along, "z": floor, "scene": f"scene{self.suffix}"}


def f32(values: Any) -> Any:
    """Values as float32, what cannot be shown as NaN."""
    out = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        small = out.astype(np.float32)
    return np.where(np.isfinite(small), small, np.float32(np.nan))


def screen_values(r: Ruler, values: Any) -> Any:
    """What Plotly is given along an axis: the values (masked where unknown), or u on a symlog, which it lacks."""
    u = r.forward(values)
    return f32(u) if r.scale == "symlog" else f32(np.where(np.isfinite(u), values, np.nan))


def plain(words: str) -> str:
    """Words as they stand, not as markup."""
    return html.escape(words, quote=False)


def plain_words(r: Ruler, between: str = "<br>") -> str:
    """What is printed along an axis, its remark on a second line."""
    return between.join(plain(w) for w in (r.label, r.remark) if w)


def rgba(colour: str, alpha: float) -> str:
    """``#RRGGBB`` with an opacity, as CSS writes it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def hover_values(stage: Stage, x: Any, y: Any, error: Any = None) -> Trace:
    """The words under the pointer, with true values riding along where the axes show transformed ones."""
    panel, columns = stage.sheet.panel, [x, y] if error is None else [x, y, error]
    ends = "" if error is None else " \N{PLUS-MINUS SIGN} %{customdata[2]:.2~g}"
    words = f"{plain(panel.x.label)}: %{{customdata[0]:.4~g}}<br>{plain(panel.y.label)}: %{{customdata[1]:.4~g}}{ends}"
    straight = not stage.solid and error is None and "symlog" not in (stage.sheet.x.scale, stage.sheet.y.scale)
    if straight:
        return {"hovertemplate": words.replace("customdata[0]", "x").replace("customdata[1]", "y") + END}
    return {"customdata": _digits(columns), "hovertemplate": words + END}


def _digits(columns: list[Any]) -> list[list[float | None]]:
    """Rows of a few numbers to five digits; written out they are shorter than as many binary pieces."""
    rows = np.stack([np.ravel(np.asarray(c, dtype=np.float64)) for c in columns], axis=1)
    return [[float(f"{v:.5g}") if np.isfinite(v) else None for v in row] for row in rows]
