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


class Parts:
    """The controls of a bench, by name."""

    session: Any

    def _make_choosers(self) -> None:
        session = self.session
        steps = session.steps or (0,)
        self.run_choice = ipw.Dropdown(options=session.labels, description="run", **wide()).add_class("wb-run-choice")
        self.step = ipw.SelectionSlider(options=steps, value=steps[-1], description="checkpoint", **wide()).add_class(
            "wb-step"
        )
        chosen = session.order.probe.name
        self.probe = ipw.Dropdown(options=list(session.probes), value=chosen, description="probe", **wide())
        self.probe.add_class("wb-probe")
        self.about = ipw.HTML().add_class("wb-about-box")
        self.form = ipw.VBox().add_class("wb-form-box")
        self.seed = ipw.BoundedIntText(0, min=0, max=2**31 - 1, description="seed", **wide()).add_class("wb-seed")
        self.budget = ipw.Dropdown(options=list(BUDGETS.items()), value=0.0, description="time limit", **wide())
        self.budget.add_class("wb-budget")
        # Value widgets, not buttons: a button's click waits while a cell runs, a value's change does not.
        look_ = {"layout": ipw.Layout(flex="1 1 0", width="auto")}
        self.run = ipw.ToggleButton(description="Run", icon="play", tooltip="Measure again", **look_).add_class(
            "wb-run"
        )
        self.cancel = ipw.ToggleButton(description="Cancel", icon="stop", disabled=True, **look_).add_class("wb-cancel")
        self.explain = ipw.ToggleButton(
            description="?", tooltip="Explain the settings", layout=ipw.Layout(width="36px")
        )
        self.explain.add_class("wb-explain")

    def _make_exits(self) -> None:
        self.venue = ipw.Dropdown(options=["workbench"], description="venue", **wide()).add_class("wb-venue")
        self.column = ipw.Dropdown(options=["half", "full"], description="column", **wide()).add_class("wb-column")
        self.format = ipw.Dropdown(options=self.session.formats, description="format", **wide()).add_class("wb-format")
        kinds = ["full", "anonymous", "none"]
        self.provenance = ipw.Dropdown(options=kinds, description="provenance", **wide()).add_class("wb-provenance")
        self.file = ipw.Text("figure", description="file", continuous_update=False, **wide()).add_class("wb-file")
        self.export = ipw.ToggleButton(description="Export", icon="download", layout=ipw.Layout(width="auto"))
        self.export.add_class("wb-export")
        self.code = ipw.HTML(layout=ipw.Layout(flex="1 1 auto")).add_class("wb-code-box")
        self.copy = Page().add_class("wb-copy")
