"""What a notebook keeps of a reading: a Plotly picture, a PNG for pages without one, and the numbers as text.

There is no ``text/html``: pages that render notebooks prefer it to a picture.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from workbench.draw.export import render
from workbench.draw.screen import screen
from workbench.draw.venues import Venue
from workbench.figure import Figure
from workbench.probe import Reading
from workbench.words import summary_rows

PLOTLY = "application/vnd.plotly.v1+json"
LIMIT = 150_000
"""Bytes that one reading may add to a notebook."""

_PAGE = Venue("notebook", "full", 7.5, size=9.5, small=8.0, family="sans-serif", mathematics="dejavusans")


def mimebundle(reading: Reading) -> dict[str, Any]:
    """The reading in every form that a notebook can show, at most :data:`LIMIT` bytes in all.

    A figure whose Plotly form is too large is kept as PNG alone.
    """
    return bundle_of(reading.figure(), _words(reading))


def bundle_of(figure: Figure, words: str) -> dict[str, Any]:
    """A figure in every such form, with ``words`` for pages of text alone."""
    picture = base64.b64encode(small_png(figure)).decode("ascii")
    bundle: dict[str, Any] = {"text/plain": words, "image/png": picture}
    plotly = screen(figure).to_json()
    if len(plotly) + len(picture) <= LIMIT:
        bundle[PLOTLY] = json.loads(plotly)
    return bundle


def small_png(figure: Figure, limit: int = LIMIT // 3) -> bytes:
    """The figure as PNG in 128 colours at 100 dots per inch, or fewer when it would take over ``limit`` bytes."""
    from PIL import Image

    for dpi in (100, 80, 60):
        drawn = Image.open(io.BytesIO(render(figure, ".png", _PAGE, dpi=dpi))).convert("RGB")
        out = io.BytesIO()
        drawn.quantize(128).save(out, "png", optimize=True)
        if out.tell() <= limit:
            break
    return out.getvalue()


def _words(reading: Reading) -> str:
    rows = summary_rows(reading.summary)
    width = max((len(name) for name, _ in rows), default=0)
    head = f"{reading.probe.name}, {'done' if reading.done == 1 else f'{reading.done:.0%}'}"
    return "\n".join(
        [head, *(f"  {name:<{width}}  {text}" for name, text in rows), *(f"  note: {n}" for n in reading.notes)]
    )
