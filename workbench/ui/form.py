"""A form for any settings, from their schema alone: :func:`widgets` for JupyterLab, :func:`panel` for a served page.

Both give ``(form, read)``: something to show, and a function that makes new frozen settings from what it shows.
Neither knows any probe. What is said twice here is said in two toolkits; what both must agree on is in ``control``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any

from workbench.schema import Field, fields
from workbench.ui.control import (
    Changed,
    Control,
    Read,
    caption,
    chosen,
    explained,
    ladder,
    late,
    nested_probes,
    number,
    span,
    start,
)
from workbench.ui.look import SHEET

# JupyterLab -----------------------------------------------------------------------------------------------------------


def widgets(cls: type, initial: Any = None, on_change: Changed | None = None) -> tuple[Any, Read]:
    """``(box, read)``: an ipywidgets form for the settings class ``cls`` and a function that reads new settings.

    Args:
        cls: any class whose fields the schema describes.
        initial: settings to show first; the defaults when None.
        on_change: called, without arguments, after a person has changed anything.

    ``read`` raises ``ValueError`` with the schema's words where the settings do not fit together.
    """
    import ipywidgets as ipw

    start = cls() if initial is None else initial
    controls = {f.name: _ipy(f, getattr(start, f.name)) for f in fields(cls)}
    rows = [_ipy_row(f, controls[f.name]) for f in fields(cls)]
    for watched in (w for c in controls.values() for w in c.watched):
        watched.observe(lambda _: on_change() if on_change else None, "value")
    box = ipw.VBox(rows).add_class("wb-form")
    return box, lambda: cls(**{name: c.read() for name, c in controls.items()})


def _ipy_row(f: Field, control: Control) -> Any:
    import ipywidgets as ipw

    said = ipw.HTML(caption(f, _maybe(control))).add_class("wb-caption")
    for watched in control.watched if f.kind == "choice" else ():
        watched.observe(lambda _: setattr(said, "value", caption(f, _maybe(control))), "value")
    return ipw.VBox([*control.shown, said]).add_class("wb-setting").add_class(f"wb-set-{f.name}")


def _maybe(control: Control) -> Any:
    found = control.read()
    return found if isinstance(found, str) else None


def _ipy(f: Field, value: Any) -> Control:
    if f.optional and f.kind not in ("text", "probe"):
        return _ipy_optional(f, value)
    return _IPY[f.kind](f, value)


def _ipy_look(f: Field) -> dict[str, Any]:
    import ipywidgets as ipw

    words = {"description": f.label, "tooltip": explained(f)}
    return words | {"style": {"description_width": "8em"}, "layout": ipw.Layout(width="auto")}


def _ipy_number(f: Field, value: Any) -> Control:
    import ipywidgets as ipw

    whole, extra = f.kind == "int", {"continuous_update": f.live, **_ipy_look(f)}
    if f.range is None:
        made = (ipw.IntText if whole else ipw.FloatText)(value=value, **extra)
    elif f.range.log:
        return _ipy_log(f, value)
    elif whole:
        low, high = span(f, value)
        made = ipw.IntSlider(value=value, min=int(low), max=int(high), step=int(f.range.step or 1), **extra)
    else:
        low, high = span(f, value)
        step = f.range.step or (high - low) / 100
        made = ipw.FloatSlider(value=value, min=low, max=high, step=step, readout_format=_digits(step), **extra)
        return Control((made,), lambda: number(f, _slid(made.value, value, step)), (made,))
    return Control((made,), lambda: number(f, made.value), (made,))


def _slid(now: float, first: float, step: float) -> float:
    """A slider's value, without the page's rounding errors; the first one while it is within a step.

    As soon as it is shown, the page moves a slider to its nearest step, which is nobody's choice.
    """
    return first if abs(now - first) < 0.55 * step else round(now, 2 + max(0, math.ceil(-math.log10(step))))


def _ipy_log(f: Field, value: Any) -> Control:
    """A logarithmic slider, which jumps from one round number to the next, beside a box that takes any number."""
    import ipywidgets as ipw

    assert f.range is not None
    low, high = (math.log10(e) for e in span(f, value))
    shape = {"min": low, "max": high, "step": 0.05, "base": 10, "readout": False, "continuous_update": f.live}
    slider = ipw.FloatLogSlider(value=value, **shape, **_ipy_look(f))
    slider.layout.flex = "1 1 auto"
    box = (ipw.BoundedIntText if f.kind == "int" else ipw.BoundedFloatText)(
        value, min=number(f, f.range.low), max=number(f, f.range.high), tooltip=explained(f)
    )
    box.add_class("wb-number")

    def slid(_: Any) -> None:
        # The page moves a slider to its nearest step as soon as it is shown; a person moves it by a step at least.
        if abs(math.log10(slider.value / box.value)) > 0.55 * 0.05:
            box.value = number(f, float(f"{slider.value:.2g}"))

    def typed(_: Any) -> None:
        slider.value = box.value

    slider.observe(slid, "value")
    box.observe(typed, "value")
    return Control((ipw.HBox([slider, box]).add_class("wb-log"),), lambda: number(f, box.value), (box,))


def _digits(step: float) -> str:
    """As many decimals as the slider's step has."""
    return f".{max(0, math.ceil(-math.log10(step)))}f"


def _ipy_bool(f: Field, value: Any) -> Control:
    import ipywidgets as ipw

    made = ipw.Checkbox(value=value, **_ipy_look(f))
    return Control((made,), lambda: made.value, (made,))


def _ipy_choice(f: Field, value: Any) -> Control:
    import ipywidgets as ipw

    made = ipw.Dropdown(options=[(str(c), c) for c in f.choices], value=value, **_ipy_look(f))
    return Control((made,), lambda: made.value, (made,))


def _ipy_choices(f: Field, value: Any) -> Control:
    import ipywidgets as ipw

    look = {"indent": False, "layout": ipw.Layout(width="auto")}
    ticks = {c: ipw.Checkbox(c in value, description=str(c), tooltip=f.choice_words.get(c), **look) for c in f.choices}
    head = ipw.Label(f.label, tooltip=explained(f))
    box = ipw.VBox([head, *ticks.values()]).add_class("wb-choices")
    return Control((box,), lambda: chosen(f, value, [c for c, t in ticks.items() if t.value]), tuple(ticks.values()))


def _ipy_text(f: Field, value: Any) -> Control:
    import ipywidgets as ipw

    empty = "automatic" if f.optional else ""
    made = ipw.Text(value=value or "", placeholder=empty, continuous_update=False, **_ipy_look(f))
    return Control((made,), lambda: (made.value or None) if f.optional else made.value, (made,))


def _ipy_optional(f: Field, value: Any) -> Control:
    import ipywidgets as ipw

    inner = _IPY[f.kind](f, start(f, value))
    given = ipw.Checkbox(value is not None, description=f"set {f.label}", tooltip=explained(f))
    given.layout.width = "auto"
    box = ipw.VBox(inner.shown)

    def open_or_shut(_: Any = None) -> None:
        box.layout.display = "" if given.value else "none"

    given.observe(open_or_shut, "value")
    open_or_shut()
    return Control((given, box), lambda: inner.read() if given.value else None, (given, *inner.watched))


def _ipy_probe(f: Field, value: Any) -> Control:
    """A dropdown of probes with the chosen one's own form below it."""
    import ipywidgets as ipw

    known = nested_probes() | ({type(value).__name__: type(value)} if value is not None else {})
    names = [("none", "")] if f.optional else []
    names += [(n, n) for n in known]
    chosen = ipw.Dropdown(options=names, value="" if value is None else type(value).__name__, **_ipy_look(f))
    told: Any = ipw.IntText(0)  # never shown: it counts changes in the form inside, whose controls come and go
    box, inner = ipw.VBox().add_class("wb-nested"), dict[str, Any]()

    def rebuild(_: Any = None) -> None:
        cls = known.get(str(chosen.value))
        keep = value if cls is type(value) else None
        form, inner["read"] = widgets(cls, keep, touched) if cls else (ipw.VBox(), lambda: None)
        box.children = (form,)

    def touched() -> None:
        told.value += 1

    rebuild()
    chosen.observe(rebuild, "value")
    return Control((chosen, box), late(inner), (chosen, told))


_IPY: dict[str, Callable[[Field, Any], Control]] = {
    "int": _ipy_number,
    "float": _ipy_number,
    "bool": _ipy_bool,
    "choice": _ipy_choice,
    "choices": _ipy_choices,
    "text": _ipy_text,
    "probe": _ipy_probe,
}


# A served page --------------------------------------------------------------------------------------------------------


def panel(cls: type, initial: Any = None, on_change: Changed | None = None) -> tuple[Any, Read]:
    """``(column, read)``: the same form in Panel. Arguments and errors as for :func:`widgets`."""
    import panel as pn

    start = cls() if initial is None else initial
    controls = {f.name: _pn(f, getattr(start, f.name)) for f in fields(cls)}
    for f in fields(cls):
        for watched in controls[f.name].watched:
            event = "value" if f.live or not hasattr(watched, "value_throttled") else "value_throttled"
            watched.param.watch(lambda _: on_change() if on_change else None, event)
    rows = [_pn_row(f, controls[f.name]) for f in fields(cls)]
    column = pn.Column(*rows, css_classes=["wb-form"], sizing_mode="stretch_width", margin=0)
    return column, lambda: cls(**{name: c.read() for name, c in controls.items()})


def _pn_row(f: Field, control: Control) -> Any:
    import panel as pn

    look = {"css_classes": ["wb-explanation"], "stylesheets": [SHEET], "sizing_mode": "stretch_width"}
    said = pn.pane.HTML(caption(f, _maybe(control)), margin=(0, 10, 8, 10), **look)
    for watched in control.watched if f.kind == "choice" else ():
        watched.param.watch(lambda _: setattr(said, "object", caption(f, _maybe(control))), "value")
    classes = ["wb-setting", f"wb-set-{f.name}"]
    return pn.Column(*control.shown, said, css_classes=classes, sizing_mode="stretch_width", margin=0)


def _pn(f: Field, value: Any) -> Control:
    if f.optional and f.kind not in ("text", "probe"):
        return _pn_optional(f, value)
    return _PN[f.kind](f, value)


def _pn_number(f: Field, value: Any) -> Control:
    import panel as pn

    whole, look = f.kind == "int", {"label": f.label, "sizing_mode": "stretch_width"}
    if f.range is None:
        made = (pn.widgets.IntInput if whole else pn.widgets.FloatInput)(value=value, **look)
        return Control((made,), lambda: made.value, (made,))
    low, high = span(f, value)
    if f.range.log:
        rungs = [round(r) for r in ladder(low, high, (value,))] if whole else ladder(low, high, (value,))
        made = pn.widgets.DiscreteSlider(
            options={f"{r:.4g}": r for r in rungs} | {f"{value:.4g}": value}, value=value, **look
        )
        return Control((made,), lambda: number(f, made.value), (made,))
    kind = pn.widgets.EditableIntSlider if whole else pn.widgets.EditableFloatSlider
    step = (int(f.range.step or 1)) if whole else f.range.step or (high - low) / 100
    ends = {"start": number(f, low), "end": number(f, high), "step": step}
    ends |= {"fixed_start": number(f, f.range.low), "fixed_end": number(f, f.range.high)}
    made = kind(value=value, **ends, **look)
    return Control((made,), lambda: number(f, made.value), (made,))


def _pn_bool(f: Field, value: Any) -> Control:
    import panel as pn

    made = pn.widgets.Checkbox(label=f.label, value=value)
    return Control((made,), lambda: made.value, (made,))


def _pn_choice(f: Field, value: Any) -> Control:
    import panel as pn

    options = {str(c): c for c in f.choices}
    made = pn.widgets.Select(label=f.label, options=options, value=value, sizing_mode="stretch_width")
    return Control((made,), lambda: made.value, (made,))


def _pn_choices(f: Field, value: Any) -> Control:
    import panel as pn

    made = pn.widgets.CheckBoxGroup(
        label=f.label, options={str(c): c for c in f.choices}, value=[c for c in f.choices if c in value]
    )
    return Control((pn.pane.HTML(html.escape(f.label)), made), lambda: chosen(f, value, made.value), (made,))


def _pn_text(f: Field, value: Any) -> Control:
    import panel as pn

    empty = "automatic" if f.optional else ""
    made = pn.widgets.TextInput(label=f.label, value=value or "", placeholder=empty, sizing_mode="stretch_width")
    return Control((made,), lambda: (made.value or None) if f.optional else made.value, (made,))


def _pn_optional(f: Field, value: Any) -> Control:
    import panel as pn

    inner = _PN[f.kind](f, start(f, value))
    given = pn.widgets.Checkbox(label=f"set {f.label}", value=value is not None)
    box = pn.Column(*inner.shown, visible=given, sizing_mode="stretch_width", margin=0)
    return Control((given, box), lambda: inner.read() if given.value else None, (given, *inner.watched))


def _pn_probe(f: Field, value: Any) -> Control:
    import panel as pn

    known = nested_probes() | ({type(value).__name__: type(value)} if value is not None else {})
    options = ({"none": ""} if f.optional else {}) | {n: n for n in known}
    start = "" if value is None else type(value).__name__
    chosen = pn.widgets.Select(label=f.label, options=options, value=start, sizing_mode="stretch_width")
    told: Any = pn.widgets.IntInput(value=0)
    box, inner = pn.Column(css_classes=["wb-nested"], sizing_mode="stretch_width"), dict[str, Any]()

    def rebuild(_: Any = None) -> None:
        cls = known.get(chosen.value)
        keep = value if cls is type(value) else None
        form, inner["read"] = panel(cls, keep, touched) if cls else (pn.Column(), lambda: None)
        box[:] = [form]

    def touched() -> None:
        told.value += 1

    rebuild()
    chosen.param.watch(rebuild, "value")
    return Control((chosen, box), late(inner), (chosen, told))


_PN: dict[str, Callable[[Field, Any], Control]] = {
    "int": _pn_number,
    "float": _pn_number,
    "bool": _pn_bool,
    "choice": _pn_choice,
    "choices": _pn_choices,
    "text": _pn_text,
    "probe": _pn_probe,
}
