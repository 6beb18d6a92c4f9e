"""What a person does in the picture of a served page: clicks, boxes, double clicks, and the card below a map."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from workbench.draw.screen import screen
from workbench.probe import Reading
from workbench.ui import look
from workbench.ui.moves import Moves
from workbench.ui.places import Rest, Span, loosened, marked, ranges_after


class OnTheMap(Moves):
    """The part of a page that hears of the picture, and shows it; what it means is in :mod:`workbench.ui.places`."""

    figure: Any
    form: Any
    u: Any
    v: Any
    go: Any
    back: Any
    whole: Any
    place: Any
    place_words: Any
    place_code: Any
    _quiet: bool
    _guarded: Callable[[Callable[[], Any]], Callable[..., None]]
    _later: Callable[[str, Callable[[], object]], None]

    def _begin_map(self) -> None:
        self._rest, self._ranges = Rest(), dict[str, Span]()

    def _clicked(self) -> None:
        point = ((self.figure.click_data or {}).get("points") or [{}])[0]
        x, y = point.get("x"), point.get("y")
        if isinstance(x, int | float) and isinstance(y, int | float) and self.session.places.click(x, y):
            self._remark()

    def _typed(self) -> None:
        if self.session.places.choose(self.u.value or 0.0, self.v.value or 0.0):
            self._remark()

    def _remark(self) -> None:
        """Another point is chosen: mark it."""
        self._show_place()
        self._show(self._picture(self.session.latest))

    def _zoomed(self) -> None:
        """The axes of the picture were moved; several steps of a zoom are one wish."""
        change, asked = self.figure.relayout_data or {}, self.session
        part = ranges_after(change, self.figure.viewport or {})
        if part is not None:
            self._rest(lambda: self._later("zoom", self._guarded(lambda: self.session is asked and self._zoom(*part))))
        self._put_back(loosened(change))

    def _zoom(self, u: Span, v: Span) -> None:
        if self.session.places.zoom(u, v):
            self._resample()

    def _doubled(self) -> None:
        """A double click, after which axes choose their ranges: Plotly knows only those of the page's first picture."""
        self._rest.give_up()
        if not self._whole():
            self._put_back(self._ranges)

    def _put_back(self, axes: Iterable[str]) -> None:
        """Have these axes show again what the picture came with."""
        ranges = {axis: self._ranges[axis] for axis in axes if axis in self._ranges}
        if ranges:  # Panel has no public way to move the axes in the page
            self.figure._send_update_msg({}, {f"{axis}.range": list(span) for axis, span in ranges.items()})

    def _whole(self) -> bool:
        """Whether there was a part to be left."""
        left = self.session.places.whole()
        if left:
            self._resample()
        return left

    # What the person sees -------------------------------------------------------------------------------------------

    def _picture(self, reading: Reading) -> Any:
        places = self.session.places
        return screen(reading.figure() if places.map is None else marked(reading.figure(), places.chosen))

    def _show(self, picture: Any) -> None:
        axes = [(axis.plotly_name, axis.range) for axis in (*picture.select_xaxes(), *picture.select_yaxes())]
        self._ranges = {name: tuple(span) for name, span in axes if span}  # Panel writes what is zoomed to into it
        self.figure.object = picture

    def _show_place(self) -> None:
        places = self.session.places
        here, on_map, chosen = places.here is not None, places.map is not None, places.chosen
        self.place.visible, self.back.visible = on_map or here, here
        self.whole.visible = places.zoomed
        self.place_words.object = look.place(places)
        self.place_code.object = look.code(places.code) if on_map and chosen is not None else ""
        for part in (self.u, self.v, self.go):
            part.visible = on_map
        self.go.disabled = chosen is None or chosen == places.here
        if chosen is not None:
            self._quiet = True
            try:
                self.u.value, self.v.value = chosen.u, chosen.v
            finally:
                self._quiet = False
