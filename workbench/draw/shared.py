"""A live Plotly figure for notebooks that sends Plotly's JavaScript once per kernel, not once per figure.

Stock ``FigureWidget`` puts 5 MB of JavaScript into the state of every figure. Here one invisible widget carries it
once, compressed, unpacks it in the page and keeps the module in a promise on ``globalThis``; each figure's own script
is a few lines that wait for it. All names private to Plotly that this project uses stand in this one file.
"""

from __future__ import annotations

import copy
import gzip
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import plotly
import traitlets
from plotly import serializers
from plotly.basedatatypes import Undefined

from workbench.draw.lean import BaseFigureWidget, FigureWidget
from workbench.draw.screen import CONFIG, describe
from workbench.figure import Figure

_PLAIN: dict[str, Any] = serializers.custom_serializers
_KEY = f"workbench-plotly-{version('plotly')}"
_SLOT = f"""
const slot = (globalThis["{_KEY}"] ??= (() => {{
  let give, fail;
  const module = new Promise((resolve, reject) => {{ give = resolve; fail = reject; }});
  return {{ module, give, fail, begun: false }};
}})());
"""
_CARRIER = (
    _SLOT
    + """
export default {
  // Not awaited: anywidget gives up on a model whose start takes two seconds.
  initialize({ model }) {
    if (slot.begun) return;
    slot.begun = true;
    const unpack = async () => {
      const packed = new Blob([model.get("code")]).stream();
      const text = await new Response(packed.pipeThrough(new DecompressionStream("gzip"))).blob();
      return import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
    };
    unpack().then(slot.give, (problem) => { slot.begun = false; slot.fail(problem); });
  },
};
"""
)
# What the waiting script does beside waiting, each for a fault met in practice:
# * A model whose start takes two seconds is given up by anywidget, and Plotly may take longer: only the drawing waits.
# * What the kernel says before Plotly listens is lost, and Plotly's copy of the data in the page goes wrong when an
#   update leaves some traces alone. So each drawing begins by asking for the figure as it is (without a kernel: as it
#   was saved).
# * Plotly answers each update with all defaults that it filled in, which nobody here reads and which its Python side
#   cannot always take. A number is answered instead.
# * A picture of another structure is drawn from nothing: amended piece by piece, it keeps words and sizes of the old.
# * What a person does to the picture is told in its own coordinates: a click on a field gives Plotly's Python side
#   nothing, and a zoom of one axis says nothing of the other.
# * The width is measured before the view is in the page, and never again. So it is watched, and set by the view's own
#   way of changing a layout, which tells Python nothing: the width is the page's.
_WAITER = (
    _SLOT
    + """
const renewed = (model) => new Promise((done) => {
  const asked = Math.floor(Math.random() * 2 ** 31), given_up = setTimeout(done, 3000);
  const heard = () => {
    if (model.get("_wb_answered") !== asked) return;
    clearTimeout(given_up);
    model.off("change:_wb_answered", heard);
    done();
  };
  model.on("change:_wb_answered", heard);
  model.set("_wb_asked", asked);
  model.save_changes();
});
const fit = (el, view) => {
  const width = el.clientWidth;
  if (!el._fullLayout || width < 1 || Math.abs(width - el._fullLayout.width) < 2) return;
  const change = { relayout_data: { width }, source_view_id: null };
  view.prototype.do_relayout.call({ el, viewID: "fit", model: { get: () => change }, _sendLayoutDelta() {} });
};
const tell = (view, touch) => { view.model.set("_wb_touched", { ...touch, at: Date.now() }); view.touch(); };
const mend = (view) => {
  const perform = view.perform_render, relaid = view.handle_plotly_relayout;
  view.handle_plotly_click = function (event) {
    const point = event?.points?.[0];
    if (Number.isFinite(point?.x) && Number.isFinite(point?.y)) tell(this, { kind: "click", x: point.x, y: point.y });
  };
  view.handle_plotly_relayout = function (event) {
    relaid.call(this, event);
    const moved = Object.keys(event ?? {}).map((key) => /^[xy]axis([0-9]*)[.](auto)?range/.exec(key)).find(Boolean);
    if (this._wb_doubled) { this._wb_doubled = false; return tell(this, { kind: "reset" }); }
    if (!moved || event._doNotReportToPy) return;
    const { [`xaxis${moved[1]}`]: x, [`yaxis${moved[1]}`]: y } = this.el._fullLayout;
    if (x && y) tell(this, { kind: "zoom", x: [...x.range], y: [...y.range] });
  };
  view.handle_plotly_doubleclick = function () { this._wb_doubled = true; };
  view._sendTraceDeltas = function (edit) { this.model.set("_wb_drawn", edit); this.touch(); };
  view._sendLayoutDelta = () => {};
  view.perform_render = function () {
    perform.call(this);
    this.model.on("change:_wb_redraw", () => {
      const again = Object.create(this);  // listens to the figure's new events, but not once more to the model
      again.model = Object.assign(Object.create(this.model), { on() {} });
      perform.call(again);
      this.viewID = again.viewID;
    });
  };
};
export default () => {
  let first, begun;
  const begin = async () => {
    const { default: make, FigureView } = await slot.module, inner = make();
    if (!slot.mended) { slot.mended = true; mend(FigureView.prototype); }
    inner.initialize(first);
    return { inner, view: FigureView };
  };
  return {
    initialize(context) { first = context; },
    async render(context) {
      const { inner, view } = await (begun ??= begin());
      await renewed(first.model);
      const undo = inner.render(context);
      const watch = new ResizeObserver(() => requestAnimationFrame(() => fit(context.el, view)));
      watch.observe(context.el);
      return () => { watch.disconnect(); undo(); };
    },
  };
};
"""
)


def bundle_path() -> Path | None:
    """Plotly's JavaScript for widgets, when it is there and exports what :class:`LiveFigure` relies on."""
    path = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"
    return path if path.is_file() and "as default}" in _tail(path) else None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 20_000, 0))
        return file.read().decode("utf-8", errors="replace")


def shared() -> bool:
    """Whether figures can share one copy: the file is as expected, and all outputs live in one page."""
    return bundle_path() is not None and "google.colab" not in sys.modules


@lru_cache(maxsize=1)
def _packed() -> bytes:
    path = bundle_path()
    assert path is not None
    return gzip.compress(path.read_bytes(), 9, mtime=0)


class Carrier(anywidget.AnyWidget):
    """The invisible widget that brings Plotly's JavaScript to the page, as gzip bytes."""

    _esm = _CARRIER
    code = traitlets.Bytes().tag(sync=True)


_made: list[Carrier] = []
_making = threading.Lock()


def carrier() -> Carrier:
    """The one carrier of this kernel, made on first use and again after all widgets were closed."""
    with _making:
        if not _made or _made[-1].comm is None:
            _made[:] = [Carrier(code=_packed())]
        return _made[-1]


def _pack(value: Any, widget: Any) -> Any:
    """Plotly's serializer, but rows of a two-dimensional array travel as binary too, where Plotly writes out digits."""
    if isinstance(value, dict):
        return {k: _pack(v, widget) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, widget) for v in value]
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype == np.float32 and value.size:
        return [_PLAIN["to_json"](np.ascontiguousarray(row), widget) for row in value]
    return _PLAIN["to_json"](value, widget)


_BINARY: dict[str, Any] = {"to_json": _pack, "from_json": _PLAIN["from_json"]}


_WHOLE = ("_widget_data", "_widget_layout", "_last_layout_edit_id", "_last_trace_edit_id")


class LiveFigure(FigureWidget):
    """A figure in a notebook that is updated in place from :class:`workbench.figure.Figure`.

    Updates may come from any thread; only what differs from the last update is sent.
    """

    _wb_asked = traitlets.Int().tag(sync=True)
    _wb_answered = traitlets.Int().tag(sync=True)
    _wb_drawn = traitlets.Int().tag(sync=True)
    _wb_touched: Any = traitlets.Dict().tag(sync=True)
    _wb_redraw: Any = traitlets.Int().tag(sync=True)
    _wb_silent: bool
    _wb_sent: tuple[list[dict[str, Any]], dict[str, Any]]
    _wb_lock: threading.Lock
    _esm = _WAITER if shared() else BaseFigureWidget._esm
    _widget_layout = traitlets.Dict().tag(sync=True, **_BINARY)
    _widget_data = traitlets.List().tag(sync=True, **_BINARY)
    _py2js_addTraces = traitlets.Dict(allow_none=True).tag(sync=True, **_BINARY)
    _py2js_restyle = traitlets.Dict(allow_none=True).tag(sync=True, **_BINARY)
    _py2js_update = traitlets.Dict(allow_none=True).tag(sync=True, **_BINARY)

    def __init__(self, figure: Figure | None = None) -> None:
        if shared():
            carrier()
        traces, layout = describe(figure) if figure else ([], {})
        object.__setattr__(self, "_wb_silent", False)
        super().__init__(data=traces, layout=layout)
        self._config = CONFIG
        object.__setattr__(self, "_wb_sent", (traces, layout))
        object.__setattr__(self, "_wb_lock", threading.Lock())
        self.observe(self._renew, "_wb_asked")
        self.observe(self._reset, "_wb_touched")

    def _renew(self, change: Any) -> None:
        """A page is ready to draw: tell it the figure as it is now."""
        with self._wb_lock:
            self.send_state(_WHOLE)
            self._wb_answered = change["new"]

    def _reset(self, change: Any) -> None:
        """After a double click the axes are as the present figure has them; in the page, as the first one had them."""
        if change["new"].get("kind") != "reset":
            return
        with self._wb_lock:
            axes = {name: part for name, part in self._wb_sent[1].items() if name.startswith(("xaxis", "yaxis"))}
            self.plotly_relayout({f"{name}.range": list(axis["range"]) for name, axis in axes.items()})

    def update_from(self, figure: Figure) -> None:
        """Show another figure: changed arrays and words only when its structure is the same, else new traces."""
        traces, layout = describe(figure)
        with self._wb_lock:
            old_traces, old_layout = self._wb_sent
            if _fits(old_traces, old_layout, traces, layout):
                self._amend(_changes(old_traces, traces), _difference(old_layout, layout))
            else:
                self._replace(traces, layout)
            object.__setattr__(self, "_wb_sent", (traces, layout))

    def _amend(self, changed: dict[int, dict[str, Any]], layout: dict[str, Any]) -> None:
        with self.batch_update():
            for index, values in changed.items():
                for path, value in values.items():
                    self.data[index][path] = value
            for path, value in layout.items():
                self.layout[path] = value
        self._widen(layout)

    def _widen(self, changed: dict[str, Any]) -> None:
        """Ask for the page's width again: Plotly gives it up whenever a height is set."""
        if "height" in changed:
            self._send_relayout_msg({"autosize": True})

    def _replace(self, traces: list[Any], layout: dict[str, Any]) -> None:
        """Another picture: taken whole, and drawn from nothing."""
        object.__setattr__(self, "_wb_silent", shared())
        try:
            self.data = []
            self.layout = layout
            self.add_traces(traces)
        finally:
            object.__setattr__(self, "_wb_silent", False)
        if shared():
            self._last_trace_edit_id = int(self._last_trace_edit_id) + 1
            self.send_state(_WHOLE)
            self._wb_redraw += 1

    def _send_addTraces_msg(self, new_traces_data: Any) -> None:  # noqa: N802 - Plotly's name
        if not self._wb_silent:
            super()._send_addTraces_msg(new_traces_data)

    def _send_deleteTraces_msg(self, delete_inds: Any) -> None:  # noqa: N802 - Plotly's name
        if not self._wb_silent:
            super()._send_deleteTraces_msg(delete_inds)

    def _send_relayout_msg(self, layout_data: Any, source_view_id: Any = None) -> None:
        if not self._wb_silent:
            super()._send_relayout_msg(layout_data, source_view_id)

    def _send_update_msg(
        self, restyle_data: Any, relayout_data: Any, trace_indexes: Any = None, source_view_id: Any = None
    ) -> None:
        """Every trace of the message with its value of every property in it.

        Plotly's message leaves gaps where a trace has not changed, for which the page's copy of the data loses what it
        had: a picture drawn from that copy a moment later lacks its x.
        """
        touched = list(range(len(self._data)) if trace_indexes is None else trace_indexes)
        whole = {path: self._filled(touched, path, values) for path, values in restyle_data.items()}
        super()._send_update_msg(whole, relayout_data, trace_indexes, source_view_id)

    def _filled(self, touched: list[int], path: str, values: Any) -> Any:
        gaps = isinstance(values, list) and any(value is Undefined for value in values)
        if not gaps:
            return values
        return [_held(self._data[i], path) if v is Undefined else v for i, v in zip(touched, values, strict=True)]

    def on_touch(self, hear: Callable[[dict[str, Any]], None]) -> None:
        """Have ``hear`` told, in a thread of the kernel's choosing, what a person does to the picture in the page.

        ``{"kind": "click", "x": ..., "y": ...}``: a point of a trace, in its own coordinates; ``{"kind": "zoom", "x":
        [low, high], "y": [low, high]}``: a panel's axes were moved; ``{"kind": "reset"}``: a double click.
        """
        self.observe(lambda change: hear(dict(change["new"])), "_wb_touched")

    @property
    def acknowledged(self) -> bool:
        """Whether the page has drawn the last change of a trace: when not, the next one should wait a little."""
        if not shared():
            return not getattr(self, "_trace_edit_in_process", False)
        return self._wb_drawn >= self._last_trace_edit_id

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> Any:
        """The state for a page that (re)loads, with the figure as it is now; Plotly keeps the first one there."""
        wanted = {key} if isinstance(key, str) else set(key) if key else {"_widget_data", "_widget_layout"}
        if hasattr(self, "_layout_obj") and wanted & {"_widget_data", "_widget_layout"}:
            self._trait_values["_widget_data"] = copy.deepcopy(self._data)
            self._trait_values["_widget_layout"] = copy.deepcopy(self._layout_obj._props)
        return super().get_state(key, drop_defaults)


def _held(trace: dict[str, Any], path: str) -> Any:
    """What a trace has at a path like ``line.color``; Plotly's word for nothing where it has nothing."""
    found: Any = trace
    for name in path.split("."):
        found = found.get(name, Undefined) if isinstance(found, dict) else Undefined
    return found


def _fits(old: list[Any], old_layout: dict[str, Any], new: list[Any], new_layout: dict[str, Any]) -> bool:
    """Whether an update in place will do: traces alike in type, place and properties, equal axes, no words gone."""
    emptied = any(old_layout.get(name) and not new_layout.get(name) for name in ("annotations", "shapes"))
    return not emptied and old_layout.keys() == new_layout.keys() and _structure(old) == _structure(new)


def _structure(traces: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(t["type"], t.get("xaxis"), t.get("yaxis"), t.get("scene"), t.get("showscale"), *sorted(t)) for t in traces]


def _changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found = {i: _difference(a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))}
    return {i: values for i, values in found.items() if values}


def _difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Paths and values by which ``new`` differs, ``None`` where one is gone; lists and arrays count as one value."""
    found: dict[str, Any] = {}
    for name in [*new, *(n for n in old if n not in new)]:
        before, after, here = old.get(name), new.get(name), f"{path}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            found |= _difference(before, after, f"{here}.")
        elif not _same(before, after):
            found[here] = after
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (
            isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and bool(a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
        )
    return bool(a == b)
