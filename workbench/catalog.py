"""Every probe there is: found by walking the package's folders and the entry points of others, with words for each.

``python -m workbench.catalog docs/measures`` writes the page of every measure.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from workbench import schema
from workbench.probe import Probe, Variable
from workbench.resolve import probes_in

FOLDERS = ("probes", "landscape", "dynamics", "experiments")
GROUP = "workbench.probes"
"""Entry points of this group name modules (or classes) of other packages that hold probes."""
_MARK = "<!-- Made by `python -m workbench.catalog`; change the class instead. -->"


def probes(looks_at: str | None = None) -> dict[str, type]:
    """Every probe class by name, in the order of the folders; only those that look at ``looks_at`` when given.

    Args:
        looks_at: "subject", "pair", "trajectory", "runs", or "nothing" (experiments, which train their own nets).

    Raises:
        ValueError: two classes have one name.
    """
    found: dict[str, type] = {}
    for cls in (*own_probes(), *_foreign()):
        other = found.setdefault(cls.__name__, cls)
        if other is not cls:
            raise ValueError(
                f"two probes are called {cls.__name__}: {other.__module__} and {cls.__module__} each have one; rename "
                "one of the classes."
            )
    return {name: cls for name, cls in found.items() if looks_at in (None, *_kinds(cls))}


def _kinds(cls: Any) -> tuple[str, ...]:
    """What a probe looks at, first that which it says first."""
    return (cls.looks_at, *cls.looks_also_at)


def own_probes() -> list[type]:
    """The probe classes of Workbench itself, folder by folder."""
    return [cls for folder in FOLDERS for cls in probes_in(f"workbench.{folder}")]


@cache
def _foreign() -> tuple[type, ...]:
    return tuple(cls for point in entry_points(group=GROUP) for cls in _loaded(point))


def _loaded(point: EntryPoint) -> list[type]:
    """The probes behind one entry point; another package's fault is said and takes nothing else away."""
    try:
        found = point.load()
    except Exception as problem:  # noqa: BLE001 - foreign code may raise anything while it is imported
        warnings.warn(f"the probes of {point.value} cannot be imported: {problem!r}.", RuntimeWarning, stacklevel=2)
        return []
    candidates = vars(found).values() if isinstance(found, ModuleType) else [found]
    return [c for c in candidates if _is_probe(c) and c.__module__.partition(".")[0] == point.module.partition(".")[0]]


def _is_probe(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Probe) and not inspect.isabstract(thing)


def get(name: str) -> type:
    """The probe class of that name, also written with its folder (``probes.HessianSpectrum``).

    Raises:
        ValueError: there is none; the message names the nearest ones and all that there are.
    """
    known, short = probes(), name.rpartition(".")[2]
    if short in known:
        return known[short]
    lower = {n.lower(): n for n in known}
    near = [lower[n] for n in difflib.get_close_matches(short.lower(), lower, n=3, cutoff=0.6)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"there is no probe called {name!r}.{hint} There are: {', '.join(sorted(known)) or 'none'}.")


def make(name: str, settings: Mapping[str, str] | None = None) -> Probe[Any]:
    """A probe from words, as a command line has them: ``make("HessianSpectrum", {"top": "5"})``.

    Raises:
        ValueError: no such probe, no such setting, or a value out of range; the message says what there is.
    """
    return schema.parse(get(name), settings or {})


def written(text: str) -> Probe[Any]:
    """A probe from one word, as a command line has several: ``written("HessianSpectrum:top=5,density=no")``.

    A comma begins a new setting only where a name and an equals sign follow, so that values may hold commas.

    Raises:
        ValueError: as :func:`make`, or something that is no ``name=value``.
    """
    name, _, settings = text.partition(":")
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+=)", settings) if part.strip()]
    wrong = next((key for key, sign, _ in pairs if not sign), None)
    if wrong is not None:
        raise ValueError(f"settings are written as in {name}:top=5,depth=80; got {wrong!r}.")
    return make(name, {key.strip(): value for key, _, value in pairs})


def words(cls: type) -> str:
    """What a probe is, in one sentence: the first of its docstring."""
    first = " ".join((inspect.getdoc(cls) or cls.__name__).partition("\n\n")[0].split())
    return re.split(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)\.(?:\s|$)", first)[0].replace("``", "`") + "."


# Pages ----------------------------------------------------------------------------------------------------------------


def page(cls: type) -> str:
    """The documentation page of a probe, in Markdown: its docstring, its settings and its variables as tables."""
    name = cls.__name__
    parts = [
        f"# {name}",
        _MARK,
        f"`{schema.code(cls())}` {_looks(cls)}.",
        _markdown(inspect.getdoc(cls) or ""),
        "## Settings",
        _settings_table(cls),
        "## Variables",
        "Of `reading.data`. What is not known is nan.",
        _variables_table(cls().variables),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _looks(cls: type) -> str:
    if _kinds(cls) == ("nothing",):
        return "is an experiment: it trains nets of its own"
    return "looks at " + " or ".join(kind if kind == "runs" else f"a {kind}" for kind in _kinds(cls))


def pages() -> dict[str, str]:
    """All pages of Workbench's own probes by file name, with ``index.md`` over them."""
    found = {f"{cls.__name__}.md": page(cls) for cls in own_probes()}
    return found | {"index.md": _index(own_probes())}


def write_pages(folder: str | Path) -> list[Path]:
    """Write every page into ``folder``, remove those of probes that are gone, and return what was written."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for old in target.glob("*.md"):
        if old.name not in wanted and _MARK in old.read_text(encoding="utf-8"):
            old.unlink()
    for name, text in wanted.items():
        (target / name).write_text(text, encoding="utf-8")
    return [target / name for name in wanted]


_TITLES = {
    "probes": "At a point",
    "landscape": "Around a point",
    "dynamics": "Along a path",
    "experiments": "Experiments",
}


def _index(classes: Iterable[type]) -> str:
    parts = ["# Measures", _MARK]
    by_folder = {folder: [c for c in classes if c.__module__.split(".")[1] == folder] for folder in FOLDERS}
    for folder, found in by_folder.items():
        if found:
            lines = "\n".join(f"- [{c.__name__}]({c.__name__}.md): {words(c)}" for c in found)
            parts += [f"## {_TITLES[folder]} (`wb.{folder}`)", lines]
    return "\n\n".join(parts) + "\n"


def _settings_table(cls: type) -> str:
    rows = [(f"`{f.name}`", _type(f), f"`{_default(f)}`", _bounds(f), f.doc) for f in schema.fields(cls)]
    return _table(("name", "type", "default", "allowed", "what it is"), rows) if rows else "None."


def _type(f: schema.Field) -> str:
    kinds = {"choice": "one of", "choices": "some of", "text": "text", "probe": "a probe"}
    return kinds.get(f.kind, f.kind) + (" or None" if f.optional else "")


def _default(f: schema.Field) -> str:
    return schema.code(f.default) if getattr(f.default, "is_probe", False) else repr(f.default)


def _bounds(f: schema.Field) -> str:
    if f.range:
        return f"{f.range.low:g} to {f.range.high:g}"
    explained = [f"`{c!r}`" + (f": {f.choice_words[c]}" if c in f.choice_words else "") for c in f.choices]
    return "; ".join(explained)


def _variables_table(variables: Iterable[Variable]) -> str:
    rows = [(f"`{v.name}`", ", ".join(v.dims) or "scalar", v.long_name, v.units, _error(v)) for v in variables]
    return _table(("name", "dims", "meaning", "units", "error"), rows)


def _error(v: Variable) -> str:
    return "exact for these examples" if v.error == "exact" else f"`{v.error}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _markdown(doc: str) -> str:
    """A docstring's double backticks as Markdown's single ones, and its Sphinx roles as code."""
    return re.sub(r":(?:class|func|mod|meth):`~?([^`]+)`", r"`\1`", doc).replace("``", "`")


if __name__ == "__main__":
    write_pages(sys.argv[1] if len(sys.argv) > 1 else "docs/measures")
