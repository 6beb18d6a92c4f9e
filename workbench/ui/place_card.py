"""The card below a map of losses in JupyterLab: the chosen point, the code that loads it, and where probes look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as ipw

from workbench.ui import look
from workbench.ui.places import Places


class PlaceCard:
    """Coordinates, words, code and buttons for a point of the map; shown while there is a map, or probes are away.

    Everything that the mouse does on the map can be done here by keyboard, but for choosing a part, which the map's own
    settings (extent, centre) do.

    Args:
        places: what is chosen.
        pressed: makes a toggle button a push button: ``pressed(button, work)`` is an observer of its value.
        chosen: called after a person has typed other coordinates.
    """

    def __init__(
        self, places: Places, pressed: Callable[[Any, Callable[[], Any]], Any], chosen: Callable[..., None]
    ) -> None:
        self._places, self._quiet = places, False
        self.words = ipw.HTML().add_class("wb-place-words")
        self.u, self.v = _coordinate("u"), _coordinate("v")
        self.go = _button("Probe here", "crosshairs", "Have every probe look at the model at this point")
        self.back = _button("Back to the model", "home", "Have probes look at the model itself again")
        self.whole = _button("Whole map", "expand", "Leave the part that was zoomed into")
        self.code = ipw.HTML().add_class("wb-place-code")
        row = ipw.HBox([self.u, self.v, self.go, self.back, self.whole]).add_class("wb-row")
        self.view = ipw.VBox([self.words, row, self.code]).add_class("wb-place")
        self._pressed = pressed
        for box in (self.u, self.v):
            box.observe(lambda _: None if self._quiet else chosen(), "value")
        self.update()

    def on_press(self, go: Callable[[], Any], back: Callable[[], Any], whole: Callable[[], Any]) -> None:
        """What the three buttons do."""
        for button, work in ((self.go, go), (self.back, back), (self.whole, whole)):
            button.observe(self._pressed(button, work), "value")

    def update(self) -> None:
        """Show what is chosen now."""
        places = self._places
        self._fill(places)
        self.words.value = look.place(places)
        self.code.value = look.code(places.code) if places.code and places.map is not None else ""
        here, on_map = places.here is not None, places.map is not None
        for part, wanted in (
            (self.view, on_map or here),
            (self.u, on_map),
            (self.v, on_map),
            (self.go, on_map),
            (self.back, here),
            (self.whole, places.zoomed),
        ):
            part.layout.display = "" if wanted else "none"
        self.go.disabled = places.chosen is None or places.chosen == places.here

    def _fill(self, places: Places) -> None:
        """The coordinates of the chosen point in the boxes, which is nobody's choice."""
        if places.chosen is None:
            return
        self._quiet = True
        try:
            self.u.value, self.v.value = places.chosen.u, places.chosen.v
        finally:
            self._quiet = False


def _coordinate(name: str) -> Any:
    box = ipw.FloatText(0.0, description=name, continuous_update=False, style={"description_width": "1.5em"})
    box.layout.width = "130px"
    return box.add_class(f"wb-place-{name}")


def _button(words: str, icon: str, more: str) -> Any:
    """A toggle, not a button: its changes are heard while a cell runs."""
    made = ipw.ToggleButton(description=words, icon=icon, tooltip=more, layout=ipw.Layout(width="auto"))
    return made.add_class("wb-place-" + words.split(maxsplit=1)[0].lower())
