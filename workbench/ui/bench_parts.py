"""Small pieces of the bench in JupyterLab; how they work together is in :mod:`workbench.ui.bench`."""

from __future__ import annotations

from typing import Any

import anywidget
import ipywidgets as ipw
import traitlets

from workbench.ui import look

BUDGETS = {"no limit": 0.0, "1 s": 1.0, "5 s": 5.0, "20 s": 20.0, "1 min": 60.0, "5 min": 300.0}


class Page(anywidget.AnyWidget):
    """A button that puts ``text`` on the clipboard; it also tells how many pixels of ``room`` the picture has."""

    _esm = look.SCRIPT
    text = traitlets.Unicode().tag(sync=True)
    room = traitlets.Int(600).tag(sync=True)


def wide() -> dict[str, Any]:
    """Layout of a control that takes the width of its card."""
    return {"layout": ipw.Layout(width="auto"), "style": {"description_width": "8em"}}


def card(content: Any, name: str) -> Any:
    """Widgets as a card."""
    return content.add_class("wb-card").add_class(name)


def heading(words: str) -> Any:
    """The heading of a card."""
    return ipw.HTML(f'<div class="wb-heading">{words}</div>')


def word(control: Any) -> str:
    """The text that a control holds; toolkits do not say in their types that it is never None."""
    return str(control.value)
