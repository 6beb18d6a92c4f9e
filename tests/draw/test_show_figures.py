"""A figure by itself, at the end of a notebook's cell."""

from __future__ import annotations

import base64

import numpy as np

from workbench.draw.show import LIMIT, PLOTLY
from workbench.figure import Axis, Figure, Line, Panel


def test_a_figure_shows_itself_as_a_reading_does() -> None:
    line = Line(np.arange(3.0), np.arange(3.0) ** 2, "square")
    bundle = Figure((Panel((line,), Axis("x"), Axis("y")),), note="three points")._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(bundle[PLOTLY]["data"][0]["y"]) == [0.0, 1.0, 4.0] or "bdata" in bundle[PLOTLY]["data"][0]["y"]
    assert bundle["text/plain"] == "three points"
    assert "text/html" not in bundle
    assert sum(len(str(part)) for part in bundle.values()) < LIMIT
