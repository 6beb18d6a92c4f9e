"""Numbers on axes and colour bars: the same digits in both renderers, each in its own mark-up."""

from __future__ import annotations

import math

from workbench.draw.rulers import Ruler


def tick_texts(r: Ruler, values: list[float], markup: str) -> list[str]:
    """The text of each tick: powers of ten on logarithmic axes, plain numbers elsewhere.

    Args:
        r: the axis, whose scale decides.
        values: where the ticks are.
        markup: ``"html"`` for Plotly or ``"math"`` for matplotlib's mathtext.
    """
    if r.scale == "linear":
        return [_plain(v, markup) for v in values]
    return [_power(v, markup) for v in values]


def _plain(v: float, markup: str) -> str:
    if v != 0 and not 1e-4 <= abs(v) < 1e5:
        return _power(v, markup)
    text = f"{v:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _power(v: float, markup: str) -> str:
    if v == 0:
        return "0"
    exponent = math.floor(math.log10(abs(v)) + 1e-9)
    factor = abs(v) / 10.0**exponent
    sign = "\N{MINUS SIGN}" if v < 0 else ""
    round_power = abs(factor - 1) < 1e-6
    if abs(exponent) <= (1 if round_power else 3):
        return f"{sign}{abs(v):.4g}"
    front = "" if round_power else f"{factor:.3g}"
    return sign + _MARKUP[markup](front, exponent)


def _html(front: str, exponent: int) -> str:
    power = f"10<sup>{_minus(exponent)}</sup>"
    return f"{front}\N{MULTIPLICATION SIGN}{power}" if front else power


def _math(front: str, exponent: int) -> str:
    return rf"${front}\times 10^{{{exponent}}}$" if front else rf"$10^{{{exponent}}}$"


def _minus(number: int) -> str:
    return str(number).replace("-", "\N{MINUS SIGN}")


_MARKUP = {"html": _html, "math": _math}
