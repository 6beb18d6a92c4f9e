"""Names written in files, turned back into classes and functions, without running strangers' code by accident."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from typing import Any


def resolve(path: str) -> Any:
    """The object behind ``"module:name"``; ``ImportError`` says which half is wrong."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as problem:
        raise ImportError(f"{path!r} does not name anything that can be imported here: {problem}.") from problem
    return found


def probe_class(path: str) -> Any:
    """The probe class behind ``"module:Class"`` in a stored file.

    Only Workbench's own modules are imported on a file's word; another package's probe must be imported by the user
    (or be listed as an entry point, which the catalog imports) before its readings are opened.
    """
    module = path.partition(":")[0]
    if module != "workbench" and not module.startswith("workbench.") and module not in sys.modules:
        raise ImportError(
            f"this reading was made by {path}, which is not part of Workbench; import {module} first if you trust it, "
            "then load the reading again."
        )
    found = resolve(path)
    if not getattr(found, "is_probe", False):
        raise ImportError(f"{path!r} is not a probe.")
    return found


def folder(package: str) -> tuple[Any, Any]:
    """``(__getattr__, __dir__)`` for a package whose public names are the probes defined in its modules.

    A new probe is one new file: nobody edits the package. Modules are imported on the first look for a name.
    """

    def found() -> dict[str, Any]:
        return {cls.__name__: cls for cls in probes_in(package)}

    def get(name: str) -> Any:
        if not name[:1].isupper():  # `from workbench.dynamics import described` asks here before it imports that file
            raise AttributeError(name)
        try:
            return found()[name]
        except KeyError:
            known = ", ".join(sorted(found())) or "none yet"
            raise AttributeError(f"{package} has no {name!r}; it has: {known}.") from None

    return get, lambda: sorted(found())


def probes_in(package: str) -> list[Any]:
    """Every public, concrete probe class defined in the modules of ``package``, in their order."""
    home = importlib.import_module(package)
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(home.__path__, f"{package}.")]
    return [
        thing
        for module in modules
        for name, thing in vars(module).items()
        if _is_own_probe(thing, module.__name__) and not name.startswith("_")
    ]


def _is_own_probe(thing: Any, module: str) -> bool:
    return (
        isinstance(thing, type)
        and bool(getattr(thing, "is_probe", False))
        and thing.__module__ == module
        and not inspect.isabstract(thing)
    )
