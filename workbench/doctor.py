"""What is here to work with: versions, devices, memory, programs and fonts; what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

State = Literal["ok", "optional", "missing"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``missing`` is needed, ``optional`` only for what ``help`` says, with how to get it."""

    name: str
    state: State
    words: str
    help: str = ""

    @property
    def line(self) -> str:
        """The finding as it is printed."""
        mark = {"ok": "ok ", "optional": "-  ", "missing": "NO "}[self.state]
        return f"{mark} {self.name:<20} {self.words}" + (f": {self.help}" if self.help else "")


def examine() -> list[Finding]:
    """Look at everything that Workbench uses, within a few seconds and without changing anything."""
    return [*_system(), *_devices(), *_packages(), *_programs(), *_fonts()]


def _system() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("memory", "ok", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    words, advice = f"{free:.1f} GiB free here", "" if free > 1 else "records and readings need room; free some"
    yield Finding("disk", "ok" if free > 1 else "missing", words, advice)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("processor", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for PyTorch")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", "ok", f"{found.name}, {found.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        how = "where there is one, install the PyTorch build that fits its driver"
        yield Finding("gpu", "optional", "none that PyTorch can use; everything runs on the processor", how)


def _packages() -> Iterator[Finding]:
    """Each declared dependency with its version; the optional ones only where they are absent as a group."""
    groups: dict[str, list[str]] = {}
    for text in requires("workbench") or []:
        name = re.split(r"[\s<>=!~;\[(]", text, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", text)
        groups.setdefault(extra[1] if extra else "", []).append(name)
    for name in ("workbench", *groups.pop("", [])):
        yield _package(name)
    for extra, names in groups.items():
        absent = [n for n in names if _version(n) is None]
        if absent and extra not in ("test", "dev"):
            how = f'pip install "workbench[{extra}]"'
            yield Finding(f"extra {extra}", "optional", f"without {', '.join(absent)}", how)


def _package(name: str) -> Finding:
    found = _version(name)
    if found is None:
        return Finding(name, "missing", "not installed", f"pip install {name}")
    return Finding(name, "ok", found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


_PROGRAMS = (
    (("git",), "the commit in a figure's provenance", "apt-get install git"),
    (("chromium", "chromium-browser", "google-chrome"), "the browser tests only", "apt-get install chromium"),
    (("latex",), "figures with usetex=True only", "apt-get install texlive-latex-extra cm-super"),
    (("dvipng",), "figures with usetex=True only", "apt-get install dvipng"),
    (("pdffonts",), "checking exported PDFs in the tests only", "apt-get install poppler-utils"),
)


def _programs() -> Iterator[Finding]:
    for names, purpose, how in _PROGRAMS:
        if any(shutil.which(name) for name in names):
            yield Finding(names[0], "ok", "found")
        else:
            yield Finding(names[0], "optional", "not found", f"needed for {purpose}; {how}")


def _fonts() -> Iterator[Finding]:
    """The font that each kind of venue would get here."""
    from workbench.draw.fonts import choose
    from workbench.draw.venues import venue

    for name in ("icml2024", "neurips2024", "jmlr2001", None):
        try:
            where = venue(name)
        except ValueError:
            continue
        yield Finding(f"font for {where.name}", "ok", choose(where).words)
