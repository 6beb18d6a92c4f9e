"""What a bench does, as Python that a person can keep: the reading on screen, or the model at a point of a map.

A ``session`` is a :class:`~workbench.ui.session.Session`, an ``order`` and a ``place`` are its, which import this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench import schema
from workbench.probe import Probe


def measuring(session: Any) -> str:
    """Lines that make the same reading, given names ``subject``, ``pair`` or ``runs`` where no file has them."""
    order = session.order
    limits = f"seed={order.seed}" + ("" if order.seconds is None else f", seconds={order.seconds:g}")
    lines = ["import workbench as wb", *_imports(order.probe), *_opening(session)]
    where = _looked_at(session, order)
    if order.place is not None and session.sees == "subject":
        lines, where = lines + order.place.code(where), "there"
    lines.append(f"reading = {schema.code(order.probe)}.run({f'{where}, ' if where else ''}{limits})")
    return "\n".join(lines)


def loading(session: Any, place: Any) -> str:
    """Lines after which ``there`` is the model at a place, as a Subject."""
    subject = _model(session, session.order)
    return "\n".join(["import workbench as wb", *_imports(place.plane), *_opening(session), *place.code(subject)])


def _imports(probe: Probe[Any]) -> list[str]:
    """Import lines for probes of other packages, which ``wb`` does not hold; also those nested in settings."""
    inner = [v for f in schema.fields(probe) if getattr(v := getattr(probe, f.name), "is_probe", False)]
    modules = {type(p).__module__ for p in (probe, *inner)}
    return [f"import {m}" for m in sorted(modules) if m.partition(".")[0] != "workbench"]


def _opening(session: Any) -> list[str]:
    """The line that opens a recorded folder, or the runs below it; other targets have no file to be opened from."""
    target = session.target
    if session.folder is not None:
        opened = f'wb.Trajectory.open(f"{session.folder.as_posix()}/{{label}}"){_using(session)}'
        return [f"runs = wb.Runs({{label: {opened} for label in {list(session.labels)!r}}})"]
    folder = getattr(getattr(target, "source", None), "folder", None)
    if session.kind != "trajectory" or folder is None:
        return []
    trust = ", trust=True" if target.trust else ""
    return [f'trajectory = wb.Trajectory.open("{Path(folder).as_posix()}"{trust}){_using(session)}']


def _using(session: Any) -> str:
    """What was given for the steps of a trajectory."""
    using = ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={k}" for k, v in session.given.items())
    return f".using({using})" if using else ""


def _looked_at(session: Any, order: Any) -> str:
    """Where the order looks, as an expression; empty for an experiment, which looks at nothing."""
    if session.sees == session.kind:
        return "" if session.kind == "nothing" else session.kind
    return _model(session, order) if session.sees == "subject" else _member(session, order)


def _member(session: Any, order: Any) -> str:
    return f"runs[{order.run!r}]" if session.kind == "runs" else session.kind


def _model(session: Any, order: Any) -> str:
    """The one model that the order points at, as an expression."""
    member = _member(session, order)
    return f"{member}.subject({order.step})" if session.steps else member
