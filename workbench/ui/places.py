"""Points and parts of a landscape, without any toolkit: what a click, a zoom and a reset on a map of losses mean.

A click chooses a point, at which every other probe can look; a zoom has the visible part sampled anew; a reset returns
to the whole. Whatever probe has ``subject_at`` and ``zoomed`` (see :class:`~workbench.landscape.plane.Plane`) and
measures over u and v can be walked in this way.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench import schema
from workbench.figure import Contour, Figure, Points
from workbench.landscape.preview import doubt
from workbench.probe import Probe, Reading
from workbench.ui import scripts

REST = 0.4
"""Seconds without another zoom after which the visible part is sampled: several steps of a zoom are one wish."""
SAME = 0.01
"""Ranges that differ by less than this share of their width are the same: the page rounds."""

Span = tuple[float, float]
_LOOSE = re.compile(r"([xy]axis[0-9]*)[.]autorange$")
_RANGE = re.compile(r"[xy]axis([0-9]*)[.]range")


def walkable(probe: Probe[Any]) -> bool:
    """Whether the points of a probe's readings are models that others can look at, and its range can be moved."""
    return hasattr(probe, "subject_at") and hasattr(probe, "zoomed")


@dataclass(frozen=True)
class Place:
    """A point (u, v) of a plane of losses, as somewhere to measure.

    ``plane`` makes the directions, with ``seed``; ``base`` is where the plane's own middle lies, None for the model.
    """

    plane: Any
    u: float
    v: float
    seed: int = 0
    base: Place | None = None

    def subject(self, subject: Any) -> Any:
        """The model there. Costs what ``Plane.subject_at`` costs, once for each plane on the way."""
        start = subject if self.base is None else self.base.subject(subject)
        return self.plane.subject_at(start, self.u, self.v, seed=self.seed)

    def code(self, subject: str) -> list[str]:
        """Lines of Python after which ``there`` is the model at this place; ``subject`` is an expression."""
        before = self.base.code(subject) if self.base is not None else []
        start = "there" if before else subject
        there = f"{schema.code(self.plane)}.subject_at({start}, {self.u!r}, {self.v!r}, seed={self.seed})"
        return [*before, f"there = {there}"]

    @property
    def words(self) -> str:
        """``u = 0.25, v = -0.5``."""
        return f"u = {self.u:.6g}, v = {self.v:.6g}"


def place_on(reading: Reading, u: float, v: float, base: Place | None = None) -> Place:
    """The place at (u, v) of a reading of a plane."""
    plane: Any = reading.probe
    return Place(getattr(plane, "bearings", plane), u, v, int(reading.provenance.get("seed", 0)), base)


def nearest(reading: Reading, x: float, y: float) -> tuple[float, float]:
    """The grid point nearest to where a person clicked; the model's own place stays what it is."""
    if x == y == 0:
        return 0.0, 0.0
    u, v = reading.data["u"].values, reading.data["v"].values
    return float(u[np.abs(u - x).argmin()]), float(v[np.abs(v - y).argmin()])


def told(reading: Reading, u: float, v: float) -> str:
    """What the reading knows of the loss at (u, v), in words; empty where that is no point of its grid."""
    data = reading.data
    if u == v == 0:
        return _measured(float(data.loss_here), float(data.loss_here_error))
    spots = [np.flatnonzero(np.isclose(data[name].values, at, rtol=1e-9)) for name, at in (("u", u), ("v", v))]
    if not all(spot.size for spot in spots):
        return ""
    at = {"u": int(spots[0][0]), "v": int(spots[1][0])}
    if bool(data.evaluated[at]):
        return _measured(float(data.loss[at]), float(data.loss_error[at]) + doubt(data, "loss"))
    if "surface" not in data or not math.isfinite(float(data.surface[at])):
        return "loss not known yet"
    error = float(data.surface_error[at]) + doubt(data, "loss")
    within = f", to about \N{PLUS-MINUS SIGN}{error:.2g}" if math.isfinite(error) else ""
    return f"loss {float(data.surface[at]):.4g} (interpolated{within})"


def _measured(loss: float, error: float) -> str:
    if math.isnan(loss):
        return "loss NaN"
    return f"loss {loss:.4g}" + (f" \N{PLUS-MINUS SIGN} {error:.2g}" if math.isfinite(error) else "")


def marked(figure: Figure, place: Place | None) -> Figure:
    """The figure with the chosen point on its maps.

    The mark is there, unseen, before anything is chosen, so that choosing does not change the picture's structure.
    """
    u, v = (place.u, place.v) if place is not None else (math.nan, math.nan)
    mark = Points([u], [v], label="chosen", role="fourth")
    panels = tuple(
        dataclasses.replace(p, marks=(*p.marks, mark)) if any(isinstance(m, Contour) for m in p.marks) else p
        for p in figure.panels
    )
    return dataclasses.replace(figure, panels=panels)


class Places:
    """The point that is chosen on the map in view, and the whole map that a zoom came from.

    ``session`` is what is driven: ``latest`` reading, ``order``, ``settle`` and ``stand``. Nothing here is submitted;
    each method says whether there is something to submit.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self.chosen: Place | None = None
        self._whole: tuple[Any, Span, Span] | None = None
        self._part: Any = None

    @property
    def map(self) -> Reading | None:
        """The reading in view, when its points are places."""
        reading = self._session.latest
        return reading if reading is not None and walkable(reading.probe) else None

    @property
    def here(self) -> Place | None:
        """Where probes look now; None is the model itself."""
        return self._session.order.place

    @property
    def zoomed(self) -> bool:
        """Whether a part of a map is in view that :meth:`whole` leaves again."""
        return self._whole is not None and self._session.order.probe == self._part

    # A point ------------------------------------------------------------------------------------------------------

    def click(self, x: float, y: float) -> bool:
        """Choose the grid point nearest to a click; False when what is in view is no map."""
        reading = self.map
        return reading is not None and self.choose(*nearest(reading, x, y))

    def choose(self, u: float, v: float) -> bool:
        """Choose this point of the map in view; False when there is none, or nothing changes."""
        reading = self.map
        if reading is None:
            return False
        before, self.chosen = self.chosen, place_on(reading, float(u), float(v), self._session.shown_at)
        return self.chosen != before

    def forget_unless(self, same: bool) -> None:
        """Choose nothing where the model is another one."""
        self.chosen = self.chosen if same else None

    def seen(self, reading: Reading) -> None:
        """A reading has come: a point chosen on a plane of other directions is no point of this one."""
        if self.chosen is not None and walkable(reading.probe):
            same = place_on(reading, self.chosen.u, self.chosen.v, self._session.shown_at)
            self.forget_unless(same == self.chosen)

    @property
    def words(self) -> str:
        """What is known of the chosen point, as HTML; empty when none is chosen."""
        if self.chosen is None:
            return ""
        reading = self.map
        known = told(reading, self.chosen.u, self.chosen.v) if reading is not None else ""
        return f"<b>{self.chosen.words}</b>" + (f" · {html.escape(known)}" if known else "")

    @property
    def code(self) -> str:
        """Python that loads the model at the chosen point; empty when none is chosen."""
        return scripts.loading(self._session, self.chosen) if self.chosen is not None else ""

    def go(self) -> bool:
        """Have probes look at the chosen point from now on; False when that is where they look already."""
        if self.chosen is None or self.chosen == self.here:
            return False
        self._session.stand(self.chosen)
        return True

    def back(self) -> bool:
        """Have probes look at the model itself again."""
        if self.here is None:
            return False
        self._session.stand(None)
        return True

    # A part -------------------------------------------------------------------------------------------------------

    def zoom(self, u: Span, v: Span) -> bool:
        """Take the settings that sample this range of the map in view; False when it is what is sampled.

        Raises:
            ValueError: the range is smaller, or farther away, than the probe's settings allow.
        """
        reading = self.map
        now: Any = self._session.order.probe
        if reading is None or schema.measured(reading.probe) != schema.measured(now):
            return False  # what was zoomed into is on its way out
        if not all(map(math.isfinite, (*u, *v))) or _alike(_ranges(reading), (u, v)):
            return False
        whole = self._whole if self._whole is not None and now == self._part else (now, *_ranges(reading))
        if self.zoomed and _covers((u, v), whole[1:]):
            return self.whole()
        part = _rounded(now.zoomed(reading.data, (min(u), max(u)), (min(v), max(v))))
        self._session.settle(part)
        self._whole, self._part = whole, part
        return True

    def whole(self) -> bool:
        """Take the range again that the first zoom came from; False when there was none."""
        if self._whole is None or not self.zoomed:
            return False
        before, now = self._whole[0], self._session.order.probe
        kept = {name: getattr(before, name) for name in ("extent", "centre_u", "centre_v")}
        self._session.settle(dataclasses.replace(now, **kept))
        self._whole = self._part = None
        return True

    def restyled(self, probe: Any) -> None:
        """Other settings of the picture leave a part the same part."""
        part = self._part
        if part is not None and type(part) is type(probe) and schema.measured(part) == schema.measured(probe):
            self._part = probe


def _ranges(reading: Reading) -> tuple[Span, Span]:
    u, v = reading.data["u"].values, reading.data["v"].values
    return (float(u[0]), float(u[-1])), (float(v[0]), float(v[-1]))


def _alike(ranges: tuple[Span, Span], others: tuple[Span, Span]) -> bool:
    """Whether both ranges are the same, but for the page's rounding."""
    return all(
        abs(a - b) <= SAME * abs(one[1] - one[0])
        for one, other in zip(ranges, others, strict=True)
        for a, b in zip(one, sorted(other), strict=True)
    )


def _covers(ranges: tuple[Span, Span], inner: tuple[Span, Span]) -> bool:
    """Whether all of ``inner`` is in view, but for rounding."""
    return all(
        min(seen) <= low + SAME * (high - low) and max(seen) >= high - SAME * (high - low)
        for seen, (low, high) in zip(ranges, inner, strict=True)
    )


def _rounded(plane: Any) -> Any:
    """The settings to six digits: a person drew them by hand."""
    kept = {name: float(f"{getattr(plane, name):.6g}") for name in ("extent", "centre_u", "centre_v")}
    return dataclasses.replace(plane, **kept)


def ranges_after(change: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[Span, Span] | None:
    """What both axes of a panel show after Plotly's ``relayout`` event; None where it gave no range in numbers.

    ``change`` is the event, ``before`` what all axes showed, by ``"xaxis.range"`` and the like: a zoom along one axis
    says nothing of the other.
    """
    moved = next(filter(None, map(_RANGE.match, change)), None)
    if moved is None:
        return None
    one, two = (_range_after(f"{letter}axis{moved[1]}.range", change, before) for letter in "xy")
    return None if one is None or two is None else (one, two)


def _range_after(name: str, change: Mapping[str, Any], before: Mapping[str, Any]) -> Span | None:
    held = change.get(name) or before.get(name) or (None, None)
    low, high = (change.get(f"{name}[{i}]", end) for i, end in enumerate(held))
    return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None


def loosened(change: Mapping[str, Any]) -> list[str]:
    """The axes (``"xaxis"``, ``"yaxis2"``) that Plotly's ``relayout`` event left to choose a range for themselves."""
    return [found[1] for found in map(_LOOSE.match, change) if found and change[found[0]] is True]


class Rest:
    """Does the last thing asked for once nothing more has been asked for during ``seconds``, in a thread of its own."""

    def __init__(self, seconds: float = REST) -> None:
        self._seconds, self._timer, self._lock = seconds, None, threading.Lock()

    def __call__(self, work: Callable[[], None]) -> None:
        """Do this, unless something else comes first."""
        self.give_up()
        with self._lock:
            self._timer: threading.Timer | None = threading.Timer(self._seconds, work)
            self._timer.daemon = True
            self._timer.start()

    def give_up(self) -> None:
        """Do nothing of what still waits."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
