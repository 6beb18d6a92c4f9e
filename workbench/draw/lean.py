"""Plotly's figure widget without what its import brings along and nobody here uses.

``plotly.basewidget`` imports nbformat, for Plotly's own way of showing figures, and nbformat a schema validator with
grammars that are compiled on import: more seconds than everything else that a bench needs. Plotly takes nbformat as
optional, so it is hidden from that one import, and put there in a form that is imported when Plotly comes to use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

_RENDERERS, _HEAVY = "plotly.io._renderers", "nbformat"


class Later:
    """A module that is imported when one of its names is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def _import_lean() -> None:
    from _plotly_utils import optional_imports

    hidden: Any = getattr(optional_imports, "_not_importable", None)
    loaded = _RENDERERS in sys.modules or _HEAVY in sys.modules
    if loaded or not isinstance(hidden, set) or importlib.util.find_spec(_HEAVY) is None:
        return
    hidden.add(_HEAVY)
    try:
        renderers: Any = importlib.import_module(_RENDERERS)
    finally:
        hidden.discard(_HEAVY)
    if renderers.nbformat is None:
        renderers.nbformat = Later(_HEAVY)


_import_lean()

from plotly.basewidget import BaseFigureWidget  # noqa: E402
from plotly.graph_objects import FigureWidget  # noqa: E402

__all__ = ["BaseFigureWidget", "FigureWidget"]
