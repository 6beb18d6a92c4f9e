"""Settings described once: from the annotated fields of a frozen dataclass to controls, checks, JSON and code.

A probe writes each setting as ``name: Annotated[type, Range(...), Doc("...")] = default``. Everything that shows,
checks, stores or repeats settings reads the same description through :func:`fields`; nothing here knows a toolkit.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
Kind = Literal["int", "float", "bool", "choice", "choices", "text", "probe"]


@dataclass(frozen=True)
class Range:
    """What a number may be, and how a slider should step through it.

    ``low`` and ``high`` are inclusive. ``log`` asks for a logarithmic slider (``low`` must be positive).
    ``soft`` narrows what a slider offers without narrowing what code may pass.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    soft: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"Range needs low < high; got [{self.low:g}, {self.high:g}].")
        if self.log and self.low <= 0:
            raise ValueError(f"A logarithmic Range needs low > 0; got {self.low:g}.")

    @property
    def offered(self) -> tuple[float, float]:
        """The interval that a slider spans."""
        return self.soft or (self.low, self.high)


@dataclass(frozen=True)
class Doc:
    """The words shown beside a setting: what it is, in one sentence."""

    words: str


@dataclass(frozen=True)
class Choice:
    """The words behind each value of a ``Literal`` setting: ``Choice({"filter": "each filter ..."})``.

    ``refused`` says of values that others like it have why it has not: the error ends with that.
    """

    words: Mapping[str, str]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def __hash__(self) -> int:
        return hash((*self.words.items(), *self.refused.items()))


@dataclass(frozen=True)
class Slow:
    """Marks a setting that is expensive to change: controls send it on release, not while dragging."""


@dataclass(frozen=True)
class Display:
    """Marks a setting that only changes the picture: no part of a reading's key, so that changing it reruns nothing."""


@dataclass(frozen=True)
class Field:
    """One setting: its name, kind, default, words, bounds and choices.

    ``live`` is False for :class:`Slow` settings; ``display`` is True for :class:`Display` ones.
    """

    name: str
    kind: Kind
    default: Any
    doc: str
    range: Range | None = None
    choices: tuple[Any, ...] = ()
    choice_words: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    optional: bool = False
    live: bool = True
    display: bool = False

    @property
    def label(self) -> str:
        """The name as a person reads it."""
        return self.name.replace("_", " ")


def fields(settings: Any) -> tuple[Field, ...]:
    """Describe every setting of a dataclass, given as class or instance, in the order of its definition.

    Raises:
        TypeError: a field has a type without a control, or no words.
    """
    return _fields(settings if isinstance(settings, type) else type(settings))


@cache
def _fields(cls: type) -> tuple[Field, ...]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass: write @dataclass(frozen=True) above it.")
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(_field(cls, f, hints[f.name]) for f in dataclasses.fields(cls))


def _field(cls: type, f: dataclasses.Field[Any], hint: Any) -> Field:
    bare, notes = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    bare, optional = _strip_none(bare)
    kind, choices = _kind(cls, f.name, bare)
    found = {type(n): n for n in notes}
    if Doc not in found:
        raise TypeError(
            f"{cls.__name__}.{f.name} has no words: add Doc('...') to its annotation; a person will read it."
        )
    choice = found.get(Choice, Choice({}))
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    if default is dataclasses.MISSING:
        raise TypeError(f"{cls.__name__}.{f.name} has no default: every setting of a probe needs one.")
    return Field(
        name=f.name,
        kind=kind,
        default=default,
        doc=found[Doc].words,
        range=found.get(Range),
        choices=choices,
        choice_words=choice.words,
        refused=choice.refused,
        optional=optional,
        live=Slow not in found,
        display=Display in found,
    )


def _strip_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        kept = [a for a in get_args(hint) if a is not type(None)]
        if len(kept) == 1:
            return kept[0], True
    return hint, False


def _kind(cls: type, name: str, hint: Any) -> tuple[Kind, tuple[Any, ...]]:
    simple: dict[Any, Kind] = {int: "int", float: "float", bool: "bool", str: "text"}
    if hint in simple:
        return simple[hint], ()
    if get_origin(hint) is Literal:
        return "choice", get_args(hint)
    if get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal:
        return "choices", get_args(get_args(hint)[0])
    if getattr(hint, "is_probe", False) or getattr(get_origin(hint), "is_probe", False):
        return "probe", ()
    raise TypeError(
        f"{cls.__name__}.{name} has type {hint}, which has no control; use int, float, bool, str, Literal[...], "
        "tuple[Literal[...], ...] or Probe."
    )


def check(settings: Any) -> None:
    """Raise ``ValueError`` or ``TypeError`` at the first setting that lies outside what its annotation allows."""
    for f in fields(settings):
        _check_one(type(settings).__name__, f, getattr(settings, f.name))


def _check_one(owner: str, f: Field, value: Any) -> None:
    where = f"{owner}.{f.name}"
    if value is None:
        if not f.optional:
            raise TypeError(f"{where} must be {_wanted(f)}; got None.")
    elif f.kind in ("int", "float"):
        _check_number(where, f, value)
    elif f.kind == "bool" and not isinstance(value, bool):
        raise TypeError(f"{where} must be True or False; got {value!r}.")
    elif f.kind == "text" and not isinstance(value, str):
        raise TypeError(f"{where} must be text; got {value!r}.")
    elif f.kind in ("choice", "choices"):
        _check_choice(where, f, value)
    elif f.kind == "probe" and (isinstance(value, type) or not getattr(value, "is_probe", False)):
        raise TypeError(f"{where} must be a probe such as wb.probes.HessianSpectrum(); got {value!r}.")


def _check_number(where: str, f: Field, value: Any) -> None:
    allowed = int if f.kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TypeError(f"{where} must be {_wanted(f)}; got {value!r}.")
    if not math.isfinite(value) or (f.range and not f.range.low <= value <= f.range.high):
        raise ValueError(f"{where} must {_lie(f)}; got {value!r}.")


def _lie(f: Field) -> str:
    return f"lie in [{f.range.low:g}, {f.range.high:g}]" if f.range else "be finite"


def _check_choice(where: str, f: Field, value: Any) -> None:
    given = value if f.kind == "choices" else (value,)
    if not isinstance(given, tuple):
        raise TypeError(f"{where} must be a tuple out of {', '.join(map(repr, f.choices))}; got {value!r}.")
    for one in given:
        if one not in f.choices:
            why = f.refused.get(str(one), "")
            words = f"{where} must be one of {', '.join(map(repr, f.choices))}; got {one!r}."
            raise ValueError(f"{words} {why}".rstrip())


def _wanted(f: Field) -> str:
    return {"int": "an integer", "float": "a number"}.get(f.kind, f"a {f.kind}")


def to_json(settings: Any) -> dict[str, Any]:
    """Settings as JSON-ready values; a nested probe becomes ``{"probe": "module:Class", "settings": {...}}``."""
    return {f.name: _plain(f, getattr(settings, f.name)) for f in fields(settings)}


def measured(settings: Any) -> dict[str, Any]:
    """The settings that decide the numbers, as JSON-ready values: all but those marked :class:`Display`."""
    return {f.name: _plain(f, getattr(settings, f.name)) for f in fields(settings) if not f.display}


def _plain(f: Field, value: Any) -> Any:
    if getattr(value, "is_probe", False):
        return {"probe": f"{type(value).__module__}:{type(value).__qualname__}", "settings": to_json(value)}
    return list(_own(f, value)) if isinstance(value, tuple) else _own(f, value)


def _own(f: Field, value: Any) -> Any:
    """The value in the type of its setting: 1, 1.0 and NumPy's 1.0 are equal, so they give equal JSON and code."""
    if value is None or f.kind in ("bool", "probe"):
        return value
    if f.kind == "choices":
        return tuple(f.choices[f.choices.index(one)] for one in value)
    return f.choices[f.choices.index(value)] if f.kind == "choice" else _TYPES[f.kind](value)


_TYPES: dict[str, Any] = {"int": int, "float": float, "text": str}


def from_json(cls: type[T], stored: Mapping[str, Any]) -> T:
    """The settings again. Unknown names are an error that lists the known ones; absent ones take their default."""
    known = {f.name: f for f in fields(cls)}
    strange = [name for name in stored if name not in known]
    if strange:
        raise ValueError(f"{cls.__name__} has no setting {strange[0]!r}; it has {', '.join(known) or 'none'}.")
    return cls(**{name: _revive(known[name], value) for name, value in stored.items()})


def _revive(f: Field, value: Any) -> Any:
    if f.kind == "choices" and isinstance(value, list):
        return tuple(typing.cast("list[Any]", value))
    if f.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if f.kind == "probe" and isinstance(value, Mapping):
        from workbench.resolve import probe_class

        nested = typing.cast("Mapping[str, Any]", value)
        return from_json(probe_class(nested["probe"]), nested["settings"])
    return value


def parse(cls: type[T], texts: Mapping[str, str]) -> T:
    """Settings from command-line words: ``parse(HessianSpectrum, {"top": "5", "density": "false"})``."""
    known = {f.name: f for f in fields(cls)}
    for name in texts:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no setting {name!r}; it has {', '.join(known) or 'none'}.")
    return from_json(cls, {name: _from_text(cls.__name__, known[name], word) for name, word in texts.items()})


def _from_text(owner: str, f: Field, word: str) -> Any:
    if f.optional and word.lower() in ("none", "null", ""):
        return None
    try:
        return _chosen(f, word) if f.choices else _READ[f.kind](word)
    except (KeyError, ValueError):
        raise ValueError(f"{owner}.{f.name} must be {_wanted(f)}; got {word!r}.") from None


def _bool(word: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[word.lower()]


def _chosen(f: Field, word: str) -> Any:
    """The choice (or choices, between commas) that reads like the word; one that does not is left for ``check``."""
    by_word = {str(c): c for c in f.choices}
    if f.kind == "choice":
        return by_word.get(word, word)
    return [by_word.get(w.strip(), w.strip()) for w in word.split(",") if w.strip()]


_READ: dict[str, Any] = {"int": int, "float": float, "bool": _bool, "text": str}


def code(settings: Any) -> str:
    """The Python that makes these settings, naming only what differs from the defaults: ``HessianSpectrum(top=5)``."""
    given = [
        f"{f.name}={_literal(f, getattr(settings, f.name))}"
        for f in fields(settings)
        if getattr(settings, f.name) != f.default
    ]
    return f"{_place(type(settings))}{type(settings).__name__}({', '.join(given)})"


def _literal(f: Field, value: Any) -> str:
    return code(value) if getattr(value, "is_probe", False) else repr(_own(f, value))


def _place(cls: type) -> str:
    """The public folder that holds a class of ours: ``wb.probes.``; third parties keep their own module."""
    parts = cls.__module__.split(".")
    if parts[0] == "workbench" and len(parts) > 1:
        return f"wb.{parts[1]}."
    return f"{cls.__module__}."
